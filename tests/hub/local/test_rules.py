"""Patterns of .gitattributes and .gitignore."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.hub.local import front_matter, names, refusal, rules


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("*.bin", "a/b.bin", True),
        ("*.bin", "a/b.bin/c", False),
        ("/a.bin", "a.bin", True),
        ("/a.bin", "b/a.bin", False),
        ("a/*.bin", "a/b/c.bin", False),
        ("a/**", "a/b/c.bin", True),
        ("a/**/c.bin", "a/c.bin", True),
        ("[ab].bin", "b.bin", True),
        ("[!ab].bin", "b.bin", False),
        ("*tfevents*", "runs/events.out.tfevents.1", True),
    ],
)
def test_lfs_patterns(pattern: str, path: str, expected: bool):
    """A pattern decides as gitattributes(5) says."""
    line = f"{pattern} filter=lfs -text\n"
    assert rules.is_lfs(path, size=1, sample=b"x", gitattributes=line) is expected


def test_later_lines_win():
    """-filter takes back what an earlier line gave."""
    lines = "*.bin filter=lfs\nsmall.bin -filter\n"
    assert rules.is_lfs("x.bin", size=1, sample=b"x", gitattributes=lines)
    assert not rules.is_lfs("small.bin", size=1, sample=b"x", gitattributes=lines)


@pytest.mark.parametrize(
    ("ignore", "path", "expected"),
    [
        ("*.log", "a/x.log", True),
        ("build/", "build/x", True),
        ("build/", "build", False),
        ("*.log\n!keep.log", "keep.log", False),
        ("# *.log", "x.log", False),
        ("a/b", "c/a/b", False),
    ],
)
def test_ignore_patterns(ignore: str, path: str, expected: bool):
    """A pattern decides as gitignore(5) says."""
    assert rules.is_ignored(path, ignore) is expected


@given(st.text(max_size=30), st.text(min_size=1, max_size=30))
def test_no_pattern_breaks_it(pattern: str, path: str):
    """Whatever stands in a pattern file, the answer is yes or no."""
    assert rules.is_ignored(path, pattern) in (True, False)
    rules.is_lfs(path, size=1, sample=b"x", gitattributes=f"{pattern} filter=lfs")


@given(st.text())
def test_any_card_is_judged(card: str):
    """Checking a card gives messages, never an exception."""
    errors, warnings = front_matter.check(f"---\n{card}\n---\n")
    assert all(isinstance(message, str) for message in (*errors, *warnings))


@given(st.text(max_size=40))
def test_paths_that_pass_stay_inside(path: str):
    """A path that is accepted has no empty, dot or git segment, and no control characters."""
    try:
        passed = names.path(path)
    except refusal.Refused:
        return
    assert not {"", ".", "..", ".git"} & set(passed.split("/"))
    assert passed.isprintable() or all(ord(char) >= 32 for char in passed)


@pytest.mark.parametrize(
    "name", ["a..b", "refs/heads/x", "a b", "-x", "x.lock", "a//b", "HEAD", ""]
)
def test_ref_names_follow_git(name: str):
    """What git check-ref-format refuses is refused."""
    with pytest.raises(refusal.Refused):
        names.ref(name)
