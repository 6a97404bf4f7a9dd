"""The header of a safetensors file: read with suspicion, written deterministically.

A file is 8 bytes of little-endian header length N, N bytes of JSON, then the tensor bytes; offsets
in the JSON count from the end of the header. Reading accepts exactly the files in which every
tensor has a known dtype, the size its shape says, and in which the tensors cover the rest of the
file without hole or overlap. Anything else is refused with the file and the tensor by name.
No tensor byte is read here. Source: the safetensors format description.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ckptd.checkpoint.dtypes import Dtype
from ckptd.errors import CheckpointCorrupt, CheckpointUnsupported

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself; a longer header is an attack or an accident."""
_LENGTH_BYTES = 8
_ENTRY_KEYS = frozenset({"dtype", "shape", "data_offsets"})
_DTYPES = {str(dtype): dtype for dtype in Dtype}
"""By their spelling: asked for with every tensor, and three times as fast as the enumeration."""
_LIMIT = 1 << 63
"""Sizes and offsets are below this: no file is larger, and what is larger is an attack."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of bytes in a file."""

    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a header says of a tensor: name, dtype, shape."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes the tensor takes; sub-byte dtypes must fill whole bytes."""
        return self.numel * self.dtype.bits // 8


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a file: its specification and where its bytes lie."""

    spec: TensorSpec
    extent: Extent


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStamp:
    """What identifies one state of a file; ctime is left out because our own links change it."""

    ino: int
    nbytes: int
    mtime_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> FileStamp:
        """Return the stamp in a stat result."""
        return cls(ino=stat.st_ino, nbytes=stat.st_size, mtime_ns=stat.st_mtime_ns)

    def __str__(self) -> str:
        return f"inode {self.ino}, {self.nbytes} bytes, mtime {self.mtime_ns}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A whole safetensors header, its tensors in the order of their bytes."""

    path: Path
    stamp: FileStamp
    data_offset: int
    metadata: Mapping[str, str]
    tensors: tuple[StoredTensor, ...]


def read(path: Path) -> Header:
    """Return the checked header of the safetensors file at `path`.

    Raises:
        CheckpointCorrupt: the file is too short or too long, or its header is not one; names the
            tensor where the fault is a tensor's.
        CheckpointUnsupported: this user may not read the file.
        OSError: the file cannot be opened or read.
    """
    try:
        opened = path.open("rb", buffering=0)
    except PermissionError:
        raise CheckpointUnsupported(
            "may not be read by this user",
            path=path,
            hint="safetensors 0.8 writes files of mode 0600: run ckptd as the training user",
        ) from None
    with opened as file:
        stamp = FileStamp.of(os.fstat(file.fileno()))
        prefix = file.read(_LENGTH_BYTES)
        length = _header_length(path, prefix, stamp.nbytes)
        raw = _read_exactly(file.fileno(), length, path)
    return parse(raw, path=path, stamp=stamp)


def parse(raw: bytes, *, path: Path, stamp: FileStamp) -> Header:
    """Return the header in `raw` (the JSON bytes) of a file in the state `stamp`.

    Raises:
        CheckpointCorrupt: see `read`.
    """
    entries = _load_object(raw, path)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointCorrupt("__metadata__ must map strings to strings", path=path)
    if b"\\u" in raw and not all(_is_text(key) and _is_text(v) for key, v in metadata.items()):
        raise CheckpointCorrupt("__metadata__ is not valid Unicode", path=path)
    data_offset = _LENGTH_BYTES + len(raw)
    tensors = [_stored(name, entry, path, data_offset) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.extent.offset, tensor.extent.nbytes))
    _check_coverage(tensors, path=path, data_offset=data_offset, file_bytes=stamp.nbytes)
    return Header(
        path=path,
        stamp=stamp,
        data_offset=data_offset,
        metadata=metadata,
        tensors=tuple(tensors),
    )


def encode(
    specs: Iterable[TensorSpec], *, metadata: Mapping[str, str], data_offset_like: int = 0
) -> bytes:
    """Return the first bytes of a file, up to the first tensor, for `specs` laid out in order.

    The header is padded with spaces so that the data begins at a multiple of 8 and, where that
    allows it, at the same place within a 4096-byte block as `data_offset_like`: filesystems clone
    ranges only between equal places.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for spec in specs:
        end = offset + spec.nbytes
        entries[spec.name] = {
            "dtype": str(spec.dtype),
            "shape": spec.shape,
            "data_offsets": (offset, end),
        }
        offset = end
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    unit, like = (4096, data_offset_like) if data_offset_like % 8 == 0 else (8, 0)
    padding = (like - _LENGTH_BYTES - len(raw)) % unit
    raw += b" " * padding
    return len(raw).to_bytes(_LENGTH_BYTES, "little") + raw


def _header_length(path: Path, prefix: bytes, file_bytes: int) -> int:
    if len(prefix) < _LENGTH_BYTES:
        raise CheckpointCorrupt(
            "too short for a safetensors file",
            path=path,
            expected="at least 8 bytes",
            found=f"{file_bytes}",
            hint="the file is empty or truncated: save or copy it again",
        )
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointCorrupt(
            "header length over the limit of the format",
            path=path,
            expected=f"at most {MAX_HEADER_BYTES} bytes",
            found=f"{length}",
            hint="this is not a safetensors file",
        )
    if _LENGTH_BYTES + length > file_bytes:
        raise CheckpointCorrupt(
            "header longer than the file",
            path=path,
            expected=f"{_LENGTH_BYTES + length} bytes",
            found=f"{file_bytes}",
            hint="the file is truncated: save or copy it again",
        )
    return length


def _read_exactly(fd: int, nbytes: int, path: Path) -> bytes:
    parts = []
    missing = nbytes
    while missing:
        part = os.read(fd, missing)
        if not part:
            raise CheckpointCorrupt("shrank while its header was read", path=path)
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _load_object(raw: bytes, path: Path) -> dict[str, Any]:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(items)
        if len(entries) != len(items):
            twice = Counter(key for key, _ in items).most_common(1)[0][0]
            raise CheckpointCorrupt("stands twice in the header", path=path, tensor=twice)
        return entries

    def constant(text: str) -> NoReturn:
        raise CheckpointCorrupt("a number in the header is not finite", path=path, found=text)

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointCorrupt(
            f"header is not JSON: {error}", path=path, hint="this is not a safetensors file"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointCorrupt("header is not a JSON object", path=path)
    if b"\\u" in raw:
        for name in value:
            if not _is_text(name):
                raise CheckpointCorrupt("its name is not valid Unicode", path=path, tensor=name)
    return value


def _is_text(name: str) -> bool:
    """Whether `name` can be written again: JSON escapes can spell halves of characters."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _stored(name: str, entry: Any, path: Path, data_offset: int) -> StoredTensor:
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        raise _wrong(path, name, "its entry must have exactly dtype, shape and data_offsets")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise _wrong(path, name, "unknown dtype", found=repr(entry["dtype"])[:80])
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape):
        what = "shape must be a list of whole numbers"
        raise _wrong(path, name, what, found=repr(shape)[:80])
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        what = "data_offsets must be a begin and an end"
        raise _wrong(path, name, what, found=repr(offsets)[:80])
    numel = _product(shape)
    if numel is None:
        what = "shape has more elements than any file"
        raise _wrong(path, name, what, found=repr(shape)[:80])
    if numel * dtype.bits % 8:
        what = f"{dtype} elements do not fill whole bytes"
        raise _wrong(path, name, what, found=f"shape {shape}")
    nbytes = numel * dtype.bits // 8
    begin, end = offsets
    if end - begin != nbytes:
        what = "size and shape disagree"
        expected = f"{nbytes} bytes for {dtype} {shape}"
        raise _wrong(path, name, what, expected=expected, found=f"{end - begin}")
    spec = TensorSpec(name, dtype, tuple(shape))
    return StoredTensor(spec, Extent(path, data_offset + begin, nbytes))


def _wrong(path: Path, tensor: str, what: str, **sides: str) -> CheckpointCorrupt:
    return CheckpointCorrupt(what, path=path, tensor=tensor, **sides)


def _are_sizes(values: Any) -> bool:
    if not isinstance(values, list):
        return False
    for value in values:  # noqa: SIM110 - a plain loop, because this runs for every tensor
        if type(value) is not int or not 0 <= value < _LIMIT:
            return False
    return True


def _product(shape: list[int]) -> int | None:
    """The elements, or None where a step overflows, as the safetensors library demands."""
    product = 1
    for length in shape:
        product *= length
        if product >= _LIMIT:
            return None
    return product


def _check_coverage(
    tensors: list[StoredTensor], *, path: Path, data_offset: int, file_bytes: int
) -> None:
    cursor = data_offset
    for tensor in tensors:
        begin = tensor.extent.offset
        if begin != cursor:
            raise CheckpointCorrupt(
                "overlaps the tensor before it" if begin < cursor else "leaves a hole before it",
                path=path,
                tensor=tensor.spec.name,
                expected=f"begin at byte {cursor - data_offset}",
                found=f"{begin - data_offset}",
            )
        cursor = begin + tensor.extent.nbytes
    if cursor != file_bytes:
        kind = "truncated" if file_bytes < cursor else "longer than its tensors"
        raise CheckpointCorrupt(
            f"the file is {kind}",
            path=path,
            tensor=tensors[-1].spec.name if tensors else None,
            expected=f"{cursor} bytes",
            found=f"{file_bytes}",
            hint="save or copy it again",
        )
