"""Every reader, on real inputs changed at random: read well, or refused by name, and soon."""

from __future__ import annotations

import json
import random
import resource
import sys
import threading
import tracemalloc
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import targets
from tests.fuzz.mutate import TOKENS, json_bytes, mutate, mutate_json
from tests.fuzz.run import reheaded
from tests.fuzz.targets import TARGETS, check

QUICK = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
"""The same inputs in each run: a new find belongs to the long run, not to somebody's change."""
MEMORY_BYTES = 64 << 20
"""What reading an input of 64 KiB may take at its peak."""
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@cache
def seeds(name: str) -> list[bytes]:
    """Return the inputs to begin with, made once."""
    return TARGETS[name].seeds()


@pytest.fixture(autouse=True, scope="module")
def bounded_memory() -> Iterator[None]:
    """No input may ask for more address space than the process has and four gigabytes."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + (4 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", TARGETS)
def test_the_inputs_to_begin_with_keep_the_promise(name: str, tmp_path: Path) -> None:
    """What the libraries write is read or refused, and nothing in it is executed."""
    for data in seeds(name):
        check(TARGETS[name], data, tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "safetensors", "config", "torch", "dcp", "gguf", "definition", "legacy", "model_index",
        "component", "flat", "inner_index", "inner_shard", "tokenizer_config", "sentencepiece",
        "chat_template", "optimizer", "whole_note", "tracker",
    ],
)  # fmt: skip
def test_the_first_input_is_read(name: str, tmp_path: Path) -> None:
    """The inputs are good ones: changes to them reach deep into the readers."""
    TARGETS[name].run(seeds(name)[0], tmp_path)


@pytest.mark.parametrize("name", TARGETS)
@QUICK
@given(seed=st.integers(0, 1 << 32))
def test_changed_inputs_keep_the_promise(name: str, tmp_path: Path, seed: int) -> None:
    """A changed input is read, or refused with a text that names the path and can be written."""
    source = random.Random(seed)
    check(TARGETS[name], mutate(source.choice(seeds(name)), source, seeds(name)), tmp_path)


@pytest.mark.parametrize("name", [name for name, one in TARGETS.items() if one.is_json])
@QUICK
@given(seed=st.integers(0, 1 << 32))
def test_changed_json_keeps_the_promise(name: str, tmp_path: Path, seed: int) -> None:
    """JSON that is right as JSON and wrong in what it says is refused by name."""
    source = random.Random(seed)
    value = mutate_json(json.loads(seeds(name)[0]), source)
    check(TARGETS[name], json_bytes(value, source), tmp_path)


@settings(QUICK, max_examples=150)
@given(seed=st.integers(0, 1 << 32))
def test_changed_headers_keep_the_promise(tmp_path: Path, seed: int) -> None:
    """A safetensors header with wrong sizes, names, numbers or keys, of the right length."""
    data = reheaded(seeds("safetensors")[0], random.Random(seed))
    check(TARGETS["safetensors"], data, tmp_path)


OPCODES = bytes(range(128, 152)) + b"()0125BCGJKMNQRTUX]abcehjlqrstu}."


@settings(QUICK, max_examples=200)
@given(
    parts=st.lists(
        st.one_of(
            st.sampled_from([bytes([code]) for code in OPCODES]),
            st.sampled_from(TOKENS),
            st.sampled_from([b"X\x01\x00\x00\x00a", b"K\x01", b"}", b"]", b")", b"h\x00", b"\x94"]),
            st.binary(max_size=4),
        ),
        max_size=40,
    )
)
def test_programs_of_random_operations_keep_the_promise(tmp_path: Path, parts: list[bytes]) -> None:
    """A pickle of any operations whatever makes a value or is refused."""
    check(TARGETS["pickle"], b"\x80\x02" + b"".join(parts) + b".", tmp_path)


YAML_PARTS = ("a", "b: ", "- ", "&x ", "*x", "<<: ", "!!int ", "!!map ", "? ", "[", "]", "{", "}", ",",
              "\n", "\n  ", "|", ">", "'", '"', "#", "%", "---\n", "1", ".nan", "2024-02-31", ": ")  # fmt: skip


@pytest.mark.parametrize("name", ["definition", "settings", "card"])
@QUICK
@given(parts=st.lists(st.sampled_from(YAML_PARTS), max_size=25))
def test_yaml_of_random_parts_keeps_the_promise(
    name: str, tmp_path: Path, parts: list[str]
) -> None:
    """Whatever is made of the signs that YAML has, it is read or refused."""
    text = "".join(parts)
    check(TARGETS[name], (f"---\n{text}\n---\n" if name == "card" else text).encode(), tmp_path)


@pytest.mark.parametrize(
    "member",
    [
        "../escape",
        "/etc/passwd",
        "a/../../x",
        "x/data/../../../y",
        "x/data/0",
        "x/data.pkl",
        "\\..\\x",
    ],
)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_of_any_name_make_no_file(tmp_path: Path, member: str, compression: int) -> None:
    """A member that leaves the archive by its name, stands twice or is packed makes no file."""
    folder = tmp_path / "model"
    folder.mkdir()
    path = tmp_path / "made.zip"
    path.write_bytes(seeds("torch")[0])
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(member, bytes(100), compression)
    check(TARGETS["torch"], path.read_bytes(), folder)
    assert {file.name for file in folder.iterdir()} == {"pytorch_model.bin"}
    assert {file.name for file in tmp_path.iterdir()} == {"model", "made.zip"}


def test_opened_files_stay_in_the_folder(tmp_path: Path) -> None:
    """Readers open nothing but what was written for them, whatever an input says."""
    names = ("index", "torch_folder", "dcp", "gguf", "adapter_config")
    for name in names:  # what seeds and targets make for themselves is made before it counts
        warm = tmp_path / f"warm-{name}"
        warm.mkdir()
        check(TARGETS[name], seeds(name)[0], warm)
    opened: set[str] = set()
    watching = [threading.get_ident()]  # other threads are those of the test runner

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and threading.get_ident() in watching and isinstance(arguments[0], str):
            opened.add(arguments[0])

    sys.addaudithook(look)
    source = random.Random(6)
    for name in names:
        folder = tmp_path / name
        folder.mkdir()
        for _ in range(15):
            check(TARGETS[name], mutate(source.choice(seeds(name)), source, seeds(name)), folder)
    watching.clear()
    opened = {path for path in opened if not path.endswith((".py", ".pyc"))}
    assert not {path for path in opened if not path.startswith(str(tmp_path))}
    assert len(opened) > 5


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("pickle", b"\x80\x02]q\x00" + b"(" * 60_000 + b"."),
        ("pickle", b"\x80\x02)" + b"\x85" * 60_000 + b"."),
        ("pickle", b"\x80\x02]q\x00(" + b"h\x00" * 30_000 + b"e."),
        ("pickle", b"\x80\x04\x8d" + (1 << 62).to_bytes(8, "little") + b"a."),
        ("safetensors", (99_000_000).to_bytes(8, "little") + b"{}"),
        ("safetensors", (60_000).to_bytes(8, "little") + b"[" * 60_000),
        ("index", b'{"weight_map": ' + b"[" * 60_000),
        ("gguf", b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 16 + bytes(60_000)),
        ("sentencepiece", b"\x0a" + b"\x80" * 60_000),
        ("sentencepiece", b"\x0a" + b"\x00" * 60_000),
        ("chat_template", b"{{ '" + b"\\'" * 30_000),
        ("chat_template", b"{{" + b"[" * 60_000),
        ("whole_note", b"[" * 60_000),
        ("tokenizer_config", b'{"a": ' + b"[" * 60_000),
        ("definition", b"pipeline: " + b"[" * 600),
        ("definition", b"a: &a [x, x]\n" + b"b: [*a, *a]\n" * 100),
        ("card", b"---\na: " + b"[" * 600 + b"\n---\n"),
        ("card", targets.alias_bomb()),
    ],
)
def test_small_inputs_take_little_memory(tmp_path: Path, name: str, data: bytes) -> None:
    """Inputs that ask for much, by length or by nesting, are refused within a bound of memory."""
    check(TARGETS[name], data, tmp_path)  # imports and caches are made before
    tracemalloc.start()
    try:
        check(TARGETS[name], data, tmp_path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < MEMORY_BYTES
