"""YAML with places: what is refused before any field is looked at."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd import errors
from ckptd.pipeline import locate

MOST_S = 2.0
"""Processor time of a refusal, on a machine that is ten times as slow as it need be."""


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "p.yaml:1:1: must be a mapping (lines of key: value)"),
        ("- a", "p.yaml:1:1: must be a mapping (lines of key: value)"),
        ("a: 1\nb: 2\na: 3", "p.yaml:3:1: a: given twice, first in line 1"),
        ("a: &x 1\nb: *x", "p.yaml:2:1: b: aliases are not taken: write the value out"),
        ("a: !!python/object:os.system x", "p.yaml:1:4: a: the tag"),
        ("a: !mine {b: 1}", "p.yaml:1:4: a: the tag !mine is not taken"),
        ("5: a", "p.yaml:1:1: a key must be text"),
        ("a:\n\t- b", "p.yaml:2:1: not YAML"),
        ("a: [1", "p.yaml:1:"),
        ("a: 1\n---\nb: 2", "p.yaml:2:1: not YAML"),
        ("a: \x00", "p.yaml:1:1: not YAML"),
        ("[" * 5000, "p.yaml:1:33: nested more than 32 levels deep"),
        (": \n%YAML 9.9", "p.yaml:1:1: not YAML"),
        ("b: 1\na: !!int x", "p.yaml:2:4: a: is no int: 'x'"),
        ("a: !!float x", "p.yaml:1:4: a: is no float: 'x'"),
        ("a: !!bool x", "p.yaml:1:4: a: is no bool: 'x'"),
        ("a: [1, !!bool x]", "p.yaml:1:8: a[1]: is no bool: 'x'"),
        ("a: " + "9" * 5000, "p.yaml:1:4: a: is no int: '999"),
        ("a: 0x" + "f" * 500, "p.yaml:1:4: a: a number beyond 18446744073709551615"),
    ],
)
def test_unreadable_text(text: str, problem: str) -> None:
    """What is not one plain mapping is refused with its place."""
    with pytest.raises(errors.DefinitionError) as caught:
        locate.parse(text, "p.yaml")
    assert str(caught.value).startswith(problem)


DEEP = [
    pytest.param("a: " + "[" * 500, "p.yaml:1:35", id="brackets on a line"),
    pytest.param("a:\n" + " [\n" * 50_000, "p.yaml:33:2", id="brackets on lines"),
    pytest.param("a: " + "{a: " * 50_000, "p.yaml:1:125", id="braces"),
    pytest.param("a:\n " + "- " * 50_000, "p.yaml:2:64", id="dashes"),
    pytest.param("? " * 50_000, "p.yaml:1:65", id="keys"),
    pytest.param(
        "".join(f"{' ' * n}a:\n" for n in range(500)), "p.yaml:32:32", id="indented mappings"
    ),
]
LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 700)
)


@pytest.mark.parametrize(("text", "place"), DEEP)
def test_nesting_is_refused_where_it_becomes_too_deep(text: str, place: str) -> None:
    """What is nested deeper than any definition is told with its place, and is not read further."""
    begin = time.process_time()
    with pytest.raises(errors.DefinitionError) as caught:
        locate.parse(text, "p.yaml")
    assert str(caught.value).startswith(f"{place}: nested more than 32 levels deep")
    assert time.process_time() - begin < MOST_S


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a:\n" + "- 1\n" * 100_000, "p.yaml:4999:3: more than 5000 keys and values"),
        ("".join(f"k{n}:\n" for n in range(9000)), "p.yaml:2501:1: more than 5000"),
        ("a: [" + "x, " * 90_000, "p.yaml:1:14996: more than 5000"),
        (LAUGHS, "p.yaml:456:7: more than 5000"),
    ],
    ids=["list", "mapping", "line", "aliases"],
)
def test_a_text_of_many_values_is_refused_where_they_become_too_many(
    text: str, problem: str
) -> None:
    """Long lists, and aliases of aliases, are told with the place of the first one too many."""
    begin = time.process_time()
    with pytest.raises(errors.DefinitionError) as caught:
        locate.parse(text, "p.yaml")
    assert str(caught.value).startswith(problem)
    assert time.process_time() - begin < MOST_S


def test_all_repeats_are_named() -> None:
    """Duplicate keys do not hide each other."""
    with pytest.raises(errors.DefinitionError) as caught:
        locate.parse("a: 1\na: 2\nb:\n  c: 1\n  c: 2\n", "p.yaml")
    assert [(p.line, p.column, p.field) for p in caught.value.problems] == [
        (2, 1, "a"),
        (5, 3, "b.c"),
    ]


def test_yaml_is_version_1_2() -> None:
    """Words stay words, leading zeros stay decimal, exponents are numbers, dates are text."""
    document = locate.parse("a: yes\nb: 010\nc: 1e-5\nd: 2026-01-31\ne: null\n", "p.yaml")
    assert document.data == {"a": "yes", "b": 10, "c": 1e-5, "d": "2026-01-31", "e": None}


def test_nearest_place() -> None:
    """What has no place of its own is reported at what encloses it."""
    document = locate.parse("a:\n  - b: 1\n", "p.yaml")
    assert document.place(("a", 0, "b")) == locate.Place(line=2, column=8)
    assert document.place(("a", 0, "b"), of_key=True) == locate.Place(line=2, column=5)
    assert document.place(("a", 0, "zzz")) == locate.Place(line=2, column=5)
    assert document.place(("zzz",)) == locate.Place(line=1, column=1)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    """A binary or huge file is refused by name and line."""
    path = tmp_path / "p.yaml"
    path.write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(errors.DefinitionError, match=r"p\.yaml:2:1: not UTF-8 text"):
        locate.read(path)
    path.write_bytes(b"a" * (locate.MAX_BYTES + 1))
    with pytest.raises(errors.DefinitionError, match="larger than 1 MiB"):
        locate.read(path)


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    """No text makes the reader fail in another way."""
    with contextlib.suppress(errors.DefinitionError):
        assert isinstance(locate.parse(text, "p.yaml").data, dict)
