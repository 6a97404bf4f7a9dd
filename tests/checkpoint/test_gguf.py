"""The reader of GGUF headers: what is read, and how each kind of damage is named."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest

from ckptd.checkpoint import gguf
from ckptd.checkpoint.dtypes import Dtype
from ckptd.errors import CheckpointCorrupt, CheckpointRefused, CheckpointUnsupported
from tests.checkpoint import gguf_file
from tests.checkpoint.gguf_file import LLAMA, Entry, encode, floats


def read(path: Path, raw: bytes) -> gguf.GgufHeader:
    path.write_bytes(raw)
    return gguf.read(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def test_values_of_every_type_are_read(path: Path) -> None:
    """Each scalar type gives its value; short arrays of numbers are tuples, texts are places."""
    scalars = {
        "u8": struct.pack("<IB", 0, 200),
        "i8": struct.pack("<Ib", 1, -3),
        "u16": struct.pack("<IH", 2, 60000),
        "i16": struct.pack("<Ih", 3, -30000),
        "u32": 7,
        "i32": struct.pack("<Ii", 5, -7),
        "f32": 0.5,
        "bool": True,
        "text": "äö",
        "u64": struct.pack("<IQ", 10, 1 << 40),
        "i64": struct.pack("<Iq", 11, -(1 << 40)),
        "f64": struct.pack("<Id", 12, 0.1),
        "numbers": [1, -2, 3],
        "texts": ["a", "", "ccc"],
        "nested": struct.pack("<IIQIQ2BIQ", 9, 9, 2, 0, 2, 1, 2, 0, 0),
        "after": 9,
    }
    metadata = read(path, encode({**LLAMA, **scalars})).metadata
    numbers = [200, -3, 60000, -30000, 7, -7, 0.5, True]
    others = ["äö", 1 << 40, -(1 << 40), 0.1, (1, -2, 3)]
    assert [metadata[key] for key in list(scalars)[:13]] == [*numbers, *others]
    texts = metadata["texts"]
    assert isinstance(texts, gguf.Array)
    assert (texts.count, gguf.strings(path, texts)) == (3, ["a", "", "ccc"])
    assert metadata["after"] == 9


def test_tensors_are_read_with_their_blocks(path: Path) -> None:
    """Plain tensors have their dtype and shape, blocks are rows of bytes; all in order of bytes."""
    entries = [
        Entry("q", (3, 64), 2, bytes(3 * 2 * 18)),
        Entry("h", (2, 3, 5), 1, bytes(60)),
        floats("scalar"),
        Entry("empty", (0, 32), 8, b""),
    ]
    header = read(path, encode(LLAMA, entries, version=2))
    found = {tensor.spec.name: tensor for tensor in header.tensors}
    assert (found["q"].spec.dtype, found["q"].spec.shape) == (Dtype.U8, (3, 36))
    assert (found["h"].spec.dtype, found["h"].spec.shape) == (Dtype.F16, (2, 3, 5))
    assert found["scalar"].spec.shape == ()
    assert found["empty"].extent.nbytes == 0
    assert header.encodings == {"q": "Q4_0", "empty": "Q8_0"}
    assert found["h"].extent.offset == found["q"].extent.offset + 128


def test_a_file_that_ends_anywhere_is_refused(path: Path) -> None:
    """Whatever byte a file is cut at, it is refused as corrupt."""
    raw = encode(LLAMA, gguf_file.llama())
    for length in (*range(0, 700, 5), *range(701, len(raw) - 1, 131)):
        with pytest.raises(CheckpointCorrupt):
            read(path, raw[:length])


def test_damaged_bytes_never_raise_anything_else(path: Path) -> None:
    """Random bytes in the header give a header or a refusal, never another exception."""
    metadata = {**LLAMA, "texts": ["a", "b"], "numbers": [1, 2]}
    whole = encode(metadata, gguf_file.llama(Entry("q", (3, 64), 2, bytes(108))))
    chance = random.Random(1)
    for _ in range(400):
        raw = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            raw[chance.randrange(900)] = chance.choice((0, 1, 9, 127, 255, chance.randrange(256)))
        try:
            read(path, bytes(raw))
        except CheckpointRefused:
            continue


CORRUPT: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a GGUF file"),
    "another kind": (b"GGJT" + bytes(60), "not a GGUF file"),
    "many tensors": (encode(counts=(1 << 60, 7)), "more tensors than it can hold"),
    "many keys": (encode(counts=(0, 1 << 60)), "more key-value pairs than it can hold"),
    "a key twice": (encode([("a", 1), ("a", 2)]), "a key stands twice"),
    "a long text": (
        encode({"a": struct.pack("<IQ", 8, 1 << 62)}),
        "ends within its header, at 'a'",
    ),
    "a long array": (encode({"a": struct.pack("<IIQ", 9, 10, 1 << 61)}), "ends within its header"),
    "many texts": (encode({"a": struct.pack("<IIQ", 9, 8, 1 << 58)}), "ends within its header"),
    "an unknown value": (encode({"a": struct.pack("<II", 13, 0)}), "'a' is of an unknown type"),
    "deep arrays": (encode({"a": struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9}), "too deep"),
    "a key that is no text": (encode({"a!": 1}).replace(b"a!", b"a\xff"), "is not text"),
    "alignment 0": (encode({"general.alignment": 0}), "not a power of two"),
    "alignment 24": (encode({"general.alignment": 24}), "not a power of two"),
    "alignment as text": (encode({"general.alignment": "32"}), "not a power of two"),
    "a name twice": (encode(LLAMA, [floats("a", 8), floats("a", 8)]), "'a': stands twice"),
    "dimensions": (encode(LLAMA, [floats("a", 1, 1, 1, 1, 1)]), "too many dimensions"),
    "a huge tensor": (
        encode(LLAMA, [Entry("a", (1 << 40, 1 << 40), 0, b"")]),
        "larger than any file",
    ),
    "half a block": (encode(LLAMA, [Entry("a", (2, 40), 2, bytes(36))]), "not whole blocks"),
    "an odd offset": (
        encode(LLAMA, [Entry("a", (8,), 0, bytes(32), 4)]),
        "multiple of the alignment",
    ),
    "past the end": (encode(LLAMA, [Entry("a", (8,), 0, bytes(32), 1 << 40)]), "truncated"),
    "overlap": (
        encode(LLAMA, [Entry("a", (16,), 0, bytes(64)), Entry("b", (16,), 0, bytes(64), 32)]),
        "'b': overlaps",
    ),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_a_header_that_contradicts_itself_is_refused(case: str, path: Path) -> None:
    """Absurd counts, names that stand twice, overlaps and wrong places are each named."""
    raw, said = CORRUPT[case]
    with pytest.raises(CheckpointCorrupt, match=said):
        read(path, raw)


UNSUPPORTED: dict[str, tuple[bytes, str]] = {
    "version 1": (encode(version=1), "version that is not read.*found 1"),
    "version 4": (encode(version=4), "version that is not read.*found 4"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "unknown types": (
        encode(LLAMA, [Entry("a", (8,), 99, b""), Entry("b", (8,), 31, b""), floats("c", 8)]),
        r"2 tensors .*Q4_0_4_4 \(31\), unknown \(99\)",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_another_kind_of_file_is_named(case: str, path: Path) -> None:
    """Other versions, the other byte order and unknown element types are unsupported by name."""
    raw, said = UNSUPPORTED[case]
    with pytest.raises(CheckpointUnsupported, match=said):
        read(path, raw)


def test_long_arrays_are_places(path: Path) -> None:
    """An array of many numbers is not kept; its numbers can be read where it lies."""
    count = gguf.MAX_KEPT_ELEMENTS + 1
    scores: Any = struct.pack("<IIQ", 9, 6, count) + struct.pack(f"<{count}f", *range(count))
    array = read(path, encode({"scores": scores})).metadata["scores"]
    assert isinstance(array, gguf.Array)
    assert gguf.numbers(path, array)[-1] == count - 1
