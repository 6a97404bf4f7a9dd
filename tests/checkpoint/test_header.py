"""Headers: what safetensors writes is read, what is hostile or broken is refused by name."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from ckptd.checkpoint import header
from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import FileStamp, TensorSpec
from ckptd.errors import CheckpointCorrupt

STAMP = FileStamp(ino=1, nbytes=0, mtime_ns=0)


def _file(path: Path, entries: Any, data: bytes = b"", *, raw: bytes | None = None) -> Path:
    text = json.dumps(entries).encode() if raw is None else raw
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def _tensor(begin: int, end: int, shape: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    """Names, dtypes, shapes and extents agree with the library that wrote the file."""
    path = tmp_path / "model.safetensors"
    arrays = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.array(7, dtype=np.int64),
        "empty": np.zeros((0, 4), dtype=np.float16),
    }
    save_file(arrays, path, metadata={"format": "pt"})

    read = header.read(path)

    raw = path.read_bytes()
    found = {t.spec.name: t for t in read.tensors}
    assert read.metadata == {"format": "pt"}
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        extent = found[name].extent
        assert found[name].spec.shape == array.shape
        assert raw[extent.offset : extent.offset + extent.nbytes] == array.tobytes()


def test_what_is_encoded_is_read_by_safetensors(tmp_path: Path) -> None:
    """A header of ours, with data behind it, is a valid file to the library."""
    specs = [TensorSpec("x", Dtype.F32, (2, 2)), TensorSpec("y", Dtype.BF16, (3,))]
    path = tmp_path / "model.safetensors"
    path.write_bytes(header.encode(specs, metadata={"format": "pt"}) + bytes(16 + 6))

    with safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_slice("x").get_shape() == [2, 2]
        assert file.get_slice("y").get_dtype() == "BF16"
    assert [t.spec for t in header.read(path).tensors] == specs


@pytest.mark.parametrize("like", [0, 8, 1000, 4096 * 3 + 328, 5])
def test_the_data_begins_where_the_source_block_does(like: int) -> None:
    """The data offset is a multiple of 8, and congruent to the source's where that is one."""
    size = len(header.encode([TensorSpec("x", Dtype.U8, (1,))], metadata={}, data_offset_like=like))
    if like % 8 == 0:
        assert (size - like) % 4096 == 0
    assert size % 8 == 0


HOSTILE: dict[str, tuple[Any, bytes, str]] = {
    "overlap": ({"a": _tensor(0, 8, [2]), "b": _tensor(4, 12, [2])}, bytes(12), "overlaps"),
    "hole": ({"a": _tensor(0, 4, [1]), "b": _tensor(8, 12, [1])}, bytes(12), "hole"),
    "truncated": ({"a": _tensor(0, 8, [2])}, bytes(7), "truncated"),
    "oversized": ({"a": _tensor(0, 8, [2])}, bytes(9), "longer"),
    "wrong size": ({"a": _tensor(0, 8, [3])}, bytes(8), "disagree"),
    "unknown dtype": ({"a": _tensor(0, 8, [2], "F33")}, bytes(8), "dtype"),
    "negative shape": ({"a": _tensor(0, 8, [-2])}, bytes(8), "shape"),
    "float shape": ({"a": _tensor(0, 8, [2.0])}, bytes(8), "shape"),
    "boolean shape": ({"a": _tensor(0, 4, [True])}, bytes(4), "shape"),
    "reversed offsets": ({"a": _tensor(8, 0, [2])}, bytes(8), "data_offsets"),
    "negative offset": ({"a": _tensor(-8, 0, [2])}, bytes(8), "data_offsets"),
    "huge offset": ({"a": _tensor(0, 10**30, [2])}, bytes(8), "data_offsets"),
    "huge length": ({"a": _tensor(0, 8, [2**63])}, bytes(8), "shape"),
    "overflowing shape": ({"a": _tensor(0, 0, [2**62, 2**62, 0])}, b"", "more elements"),
    "unprintable product": ({"a": _tensor(0, 8, [10**18] * 300)}, bytes(8), "more elements"),
    "half bytes": ({"a": _tensor(0, 1, [3], "F4")}, bytes(1), "whole bytes"),
    "extra key": ({"a": {**_tensor(0, 8, [2]), "x": 1}}, bytes(8), "exactly"),
    "not an object": ([1, 2], b"", "object"),
    "entry is a list": ({"a": [1]}, b"", "exactly"),
    "metadata not strings": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused_by_name(case: str, tmp_path: Path) -> None:
    """Each contradiction is refused, with the file, and the tensor where it is a tensor's."""
    entries, data, words = HOSTILE[case]
    path = _file(tmp_path / "bad.safetensors", entries, data)

    with pytest.raises(CheckpointCorrupt) as caught:
        header.read(path)

    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    if isinstance(entries, dict) and "a" in entries:
        assert caught.value.tensor in entries


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": NaN}', "finite"),
        (b'{"a": 1e999999}', "exactly"),
        (b"{" * 100_000, "JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "JSON"),
        (b'{"\\ud800": {}}', "Unicode"),
        (b"\xff\xfe", "JSON"),
        (b"", "JSON"),
    ],
)
def test_json_that_attacks_the_parser_is_refused(raw: bytes, words: str, tmp_path: Path) -> None:
    """Duplicate names, non-finite numbers, deep nesting and bad text do not get through."""
    path = _file(tmp_path / "bad.safetensors", None, raw=raw)
    with pytest.raises(CheckpointCorrupt, match=words):
        header.read(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "too short"),
        (b"1234567", "too short"),
        ((10**6).to_bytes(8, "little") + b"{}", "longer than the file"),
        ((2**63).to_bytes(8, "little") + b"{}", "limit"),
    ],
)
def test_a_header_length_that_lies_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    """The length is checked against the format's limit and the file before anything is read."""
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointCorrupt, match=words):
        header.read(path)


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused(raw: bytes) -> None:
    """No input raises anything but a refusal."""
    with contextlib.suppress(CheckpointCorrupt):
        header.parse(raw, path=Path("x"), stamp=STAMP)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([d for d in Dtype if d.bits >= 8]),
            st.lists(st.integers(0, 5), max_size=3),
        ),
        max_size=6,
    )
)
def test_encoding_and_parsing_are_inverse(entries: list[tuple[Dtype, list[int]]]) -> None:
    """Whatever is encoded comes back equal, in order of its bytes."""
    specs = [TensorSpec(f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(entries)]
    raw = header.encode(specs, metadata={"format": "pt"})
    size = len(raw) + sum(spec.nbytes for spec in specs)
    stamp = FileStamp(ino=1, nbytes=size, mtime_ns=0)
    parsed = header.parse(raw[8:], path=Path("x"), stamp=stamp)
    assert {t.spec for t in parsed.tensors} == set(specs)


@pytest.mark.parametrize("metadata", [b'{"format": "\\ud800"}', b'{"\\udfff": "pt"}'])
def test_metadata_of_half_a_character_is_refused(tmp_path: Path, metadata: bytes) -> None:
    """What cannot be written again into the published file is refused while it is read."""
    path = _file(tmp_path / "x.safetensors", None, raw=b'{"__metadata__": ' + metadata + b"}")
    with pytest.raises(CheckpointCorrupt, match="__metadata__ is not valid Unicode"):
        header.read(path)


def test_a_name_of_a_million_characters_is_told_in_short(tmp_path: Path) -> None:
    """The text of an error goes to a log line and a row: it does not grow with what is in a file."""
    path = _file(tmp_path / "x.safetensors", {"n" * 1_000_000: _tensor(0, 4, [1] * 100_000)})
    with pytest.raises(CheckpointCorrupt, match=r"nnn\.\.\. \(1,000,002 characters\)") as caught:
        header.read(path)
    assert len(str(caught.value)) < 10_000
