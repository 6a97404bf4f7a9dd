"""The header of a GGUF file: metadata and where each tensor lies, read with suspicion.

A file is `GGUF`, a version, two counts, that many key-value pairs, that many tensor entries, then
the tensor bytes from the next multiple of the alignment on. Reading accepts versions 2 and 3 in
little-endian order and refuses, with the file and the key or tensor by name, whatever contradicts
itself: counts and lengths beyond the file, keys or tensors that stand twice, tensors that overlap
or reach past the end, types nobody knows. No tensor byte is read here, and of long arrays (a
vocabulary) only where they lie. Source: the GGUF specification of ggml (docs/gguf.md).
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ckptd.checkpoint import ggml
from ckptd.checkpoint.cursor import Cursor
from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.ggml import GgmlType
from ckptd.checkpoint.header import Extent, FileStamp, StoredTensor, TensorSpec
from ckptd.errors import CheckpointCorrupt, CheckpointUnsupported

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_KEPT_ELEMENTS = 4096
"""Arrays of numbers up to this length are values (one number a layer); longer ones are places."""
MAX_NESTING = 4
"""Arrays of arrays deeper than this are an attack: no writer makes any."""
MAX_DIMENSIONS = 4
_LIMIT = 1 << 63
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
"""Number of a value type -> its letter in `struct`."""
_SMALLEST_PAIR_BYTES = 8 + 1 + 4 + 1
_SMALLEST_ENTRY_BYTES = 8 + 1 + 4 + 8 + 4 + 8


@dataclass(frozen=True, slots=True)
class Array:
    """A long array of the metadata: not its values, but where they lie in the file.

    `element` is the number of the value type: 8 for strings, each a length of 8 bytes and text.
    """

    element: int
    count: int
    offset: int


Value = int | float | bool | str | tuple[int | float | bool, ...] | Array


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """A whole header: metadata by key, tensors in the order of their bytes.

    `encodings` is the name of the block type of each tensor that is not of a plain type; such a
    tensor is `U8` with rows of whole blocks.
    """

    path: Path
    stamp: FileStamp
    metadata: Mapping[str, Value]
    tensors: tuple[StoredTensor, ...]
    encodings: Mapping[str, str]

    @property
    def architecture(self) -> str:
        """What `general.architecture` says, empty where it says nothing."""
        value = self.metadata.get("general.architecture")
        return value if isinstance(value, str) else ""


def read(path: Path) -> GgufHeader:
    """Return the checked header of the GGUF file at `path`.

    Raises:
        CheckpointCorrupt: the file contradicts itself; names the key or tensor.
        CheckpointUnsupported: another version, byte order or element type; or this user may not
            read the file.
        OSError: the file cannot be opened or read.
    """
    try:
        opened = path.open("rb", buffering=0)
    except PermissionError:
        raise CheckpointUnsupported(
            "may not be read by this user", path=path, hint="run ckptd as its owner"
        ) from None
    with opened as file:
        stamp = FileStamp.of(os.fstat(file.fileno()))
        return _parsed(file, path, stamp)


def strings(path: Path, array: Array) -> list[str]:
    """Return the texts of a long array of strings; bytes that are no UTF-8 become `U+FFFD`.

    Raises:
        CheckpointCorrupt: the file ends within them.
        OSError: the file cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        cursor = Cursor(file, path, os.fstat(file.fileno()).st_size, start=array.offset)
        return [cursor.text("an array", strict=False) for _ in range(array.count)]


def numbers(path: Path, array: Array) -> tuple[int | float | bool, ...]:
    """Return the numbers of a long array.

    Raises:
        CheckpointCorrupt: the file ends within them.
        OSError: the file cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        cursor = Cursor(file, path, os.fstat(file.fileno()).st_size, start=array.offset)
        return cursor.unpack(f"{array.count}{_SCALARS[array.element]}", "an array")


def _parsed(file: BinaryIO, path: Path, stamp: FileStamp) -> GgufHeader:
    cursor = Cursor(file, path, stamp.nbytes)
    num_tensors, num_pairs = _counts(cursor)
    metadata: dict[str, Value] = {}
    for _ in range(num_pairs):
        key = cursor.text("a key")
        if key in metadata:
            raise CheckpointCorrupt("a key stands twice in the metadata", path=path, found=key)
        (kind,) = cursor.unpack("I", key)
        metadata[key] = _value(cursor, kind, key)
    alignment = _alignment(metadata, path)
    entries = [_entry(cursor) for _ in range(num_tensors)]
    data_offset = -(-cursor.position // alignment) * alignment
    _require_known(entries, path)
    placed = [_placed(entry, path, data_offset, alignment) for entry in entries]
    placed.sort(key=lambda tensor: (tensor.extent.offset, tensor.extent.nbytes))
    _check_places(placed, path, stamp.nbytes)
    encodings = {
        entry.name: ggml.TYPES[entry.kind].name
        for entry in entries
        if ggml.TYPES[entry.kind].dtype is None
    }
    return GgufHeader(
        path=path, stamp=stamp, metadata=metadata, tensors=tuple(placed), encodings=encodings
    )


def _version(cursor: Cursor) -> int:
    """Return the version of a file that begins as one should."""
    if cursor.file_bytes < 24 or cursor.take(4, "the magic bytes") != MAGIC:
        raise CheckpointCorrupt(
            "is not a GGUF file",
            path=cursor.path,
            expected="GGUF at its beginning, and 24 bytes",
            found=f"{cursor.file_bytes} bytes that begin otherwise",
            hint="it is empty, truncated or of an older kind (GGML, GGJT): get it again",
        )
    version: int = cursor.unpack("I", "the version")[0]
    return version


def _counts(cursor: Cursor) -> tuple[int, int]:
    """Return the numbers of tensors and of key-value pairs.

    Raises:
        CheckpointCorrupt, CheckpointUnsupported: not such a file, or more than it can hold.
    """
    path = cursor.path
    version = _version(cursor)
    if version and version & 0xFFFF == 0:
        raise CheckpointUnsupported(
            "is a big-endian GGUF file", path=path, hint="get the little-endian one"
        )
    if version not in VERSIONS:
        raise CheckpointUnsupported(
            "is of a GGUF version that is not read",
            path=path,
            expected="version 2 or 3",
            found=f"{version}",
            hint="convert it again with a current llama.cpp",
        )
    num_tensors, num_pairs = cursor.unpack("QQ", "the counts")
    for count, smallest, what in (
        (num_pairs, _SMALLEST_PAIR_BYTES, "key-value pairs"),
        (num_tensors, _SMALLEST_ENTRY_BYTES, "tensors"),
    ):
        if count * smallest > cursor.file_bytes:
            raise CheckpointCorrupt(
                f"says that it has more {what} than it can hold",
                path=path,
                expected=f"at most {cursor.file_bytes // smallest}",
                found=f"{count}",
            )
    return num_tensors, num_pairs


def _value(cursor: Cursor, kind: int, key: str) -> Value:
    if kind == _STRING:
        return cursor.text(key, strict=False)
    if kind != _ARRAY:
        (value,) = cursor.unpack(_letter(kind, key, cursor.path), key)
        number: int | float | bool = value
        return number
    element, count = cursor.unpack("IQ", key)
    place = Array(element, count, cursor.position)
    if element in _SCALARS and count <= MAX_KEPT_ELEMENTS:
        return cursor.unpack(f"{count}{_SCALARS[element]}", key)
    _skip(cursor, place, key, depth=1)
    return place


def _skip(cursor: Cursor, array: Array, key: str, *, depth: int) -> None:
    """Move past the elements of an array."""
    if array.element == _STRING:
        cursor.skip_texts(array.count, key)
    elif array.element == _ARRAY:
        if depth >= MAX_NESTING:
            raise CheckpointCorrupt(
                "arrays lie too deep in one another", path=cursor.path, found=key
            )
        for _ in range(array.count):
            element, count = cursor.unpack("IQ", key)
            _skip(cursor, Array(element, count, cursor.position), key, depth=depth + 1)
    else:
        width = struct.calcsize("<" + _letter(array.element, key, cursor.path))
        cursor.skip(array.count * width, key)


def _letter(kind: int, key: str, path: Path) -> str:
    letter = _SCALARS.get(kind)
    if letter is None:
        raise CheckpointCorrupt(
            f"the value of {key!r} is of an unknown type",
            path=path,
            expected="a type from 0 to 12",
            found=f"{kind}",
        )
    return letter


def _alignment(metadata: Mapping[str, Value], path: Path) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if (
        type(alignment) is not int
        or not 0 < alignment <= MAX_ALIGNMENT
        or alignment & (alignment - 1)
    ):
        raise CheckpointCorrupt(
            "general.alignment is not a power of two",
            path=path,
            expected=f"1 to {MAX_ALIGNMENT}",
            found=repr(alignment)[:80],
        )
    return alignment


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor as its entry says: the shape's last axis first in the file, last here."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def _entry(cursor: Cursor) -> _Entry:
    name = cursor.text("a tensor's name")
    (count,) = cursor.unpack("I", name)
    if count > MAX_DIMENSIONS:
        raise CheckpointCorrupt(
            "has too many dimensions",
            path=cursor.path,
            tensor=name,
            expected=f"at most {MAX_DIMENSIONS}",
            found=f"{count}",
        )
    dimensions = cursor.unpack(f"{count}Q", name)
    kind, offset = cursor.unpack("IQ", name)
    return _Entry(name, tuple(reversed(dimensions)), kind, offset)


def _require_known(entries: list[_Entry], path: Path) -> None:
    """Refuse names that stand twice, and types that are not read: all of them at once."""
    seen: set[str] = set()
    for entry in entries:
        if entry.name in seen:
            raise CheckpointCorrupt("stands twice in the file", path=path, tensor=entry.name)
        seen.add(entry.name)
    unknown = [entry for entry in entries if entry.kind not in ggml.TYPES]
    if not unknown:
        return
    kinds = sorted({entry.kind for entry in unknown})
    told = ", ".join(f"{ggml.REMOVED.get(kind, 'unknown')} ({kind})" for kind in kinds)
    removed = any(kind in ggml.REMOVED for kind in kinds)
    raise CheckpointUnsupported(
        f"{len(unknown)} tensors are of element types that are not read: {told}",
        path=path,
        tensor=unknown[0].name,
        expected=", ".join(kind.name for kind in ggml.TYPES.values()),
        hint="llama.cpp reads them no more: take the file in a plain type such as Q4_0"
        if removed
        else "take the model in another type",
    )


def _placed(entry: _Entry, path: Path, data_offset: int, alignment: int) -> StoredTensor:
    kind = ggml.TYPES[entry.kind]
    numel = math.prod(entry.shape)
    if numel >= _LIMIT or entry.offset >= _LIMIT:
        raise CheckpointCorrupt(
            "is larger than any file",
            path=path,
            tensor=entry.name,
            found=f"{kind.name} {entry.shape} at byte {entry.offset}",
        )
    columns = entry.shape[-1] if entry.shape else 1
    if columns % kind.elements:
        raise CheckpointCorrupt(
            "its rows are not whole blocks",
            path=path,
            tensor=entry.name,
            expected=f"a multiple of {kind.elements} columns for {kind.name}",
            found=f"{columns}",
        )
    if entry.offset % alignment:
        raise CheckpointCorrupt(
            "does not begin at a multiple of the alignment",
            path=path,
            tensor=entry.name,
            expected=f"a multiple of {alignment}",
            found=f"{entry.offset}",
        )
    spec = _spec(entry, kind, columns)
    return StoredTensor(spec, Extent(path, data_offset + entry.offset, spec.nbytes))


def _spec(entry: _Entry, kind: GgmlType, columns: int) -> TensorSpec:
    if kind.dtype is not None:
        return TensorSpec(entry.name, kind.dtype, entry.shape)
    row_bytes = columns // kind.elements * kind.block_bytes
    return TensorSpec(entry.name, Dtype.U8, (*entry.shape[:-1], row_bytes))


def _check_places(tensors: list[StoredTensor], path: Path, file_bytes: int) -> None:
    cursor = 0
    for tensor in tensors:
        begin, end = tensor.extent.offset, tensor.extent.offset + tensor.extent.nbytes
        if end > file_bytes:
            raise CheckpointCorrupt(
                "the file is truncated",
                path=path,
                tensor=tensor.spec.name,
                expected=f"{end} bytes",
                found=f"{file_bytes}",
                hint="copy or download it again",
            )
        if begin < cursor and tensor.extent.nbytes:
            raise CheckpointCorrupt(
                "overlaps the tensor before it",
                path=path,
                tensor=tensor.spec.name,
                expected=f"begin at byte {cursor} or later",
                found=f"{begin}",
            )
        cursor = max(cursor, end)
