"""Files of `torch.save` from before torch 1.6, read without torch and without executing them.

Five pickles in a row: a magic number, the version, sizes of C types, the value, and the keys of the
storages; behind them each storage in the order of the keys, 8 bytes for its number of elements and
then these. torch writes them still, on request. Source: `torch.serialization._legacy_save`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckptd.checkpoint import inert
from ckptd.checkpoint.header import Extent
from ckptd.checkpoint.inert import StorageRef
from ckptd.errors import CheckpointCorrupt, CheckpointUnsupported

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_NUM_PICKLES = 5
_FIRST_BYTES = 1 << 20
"""What is read at first of a file whose pickles have no stated length; then twice as much."""
_LENGTH_BYTES = 8
MAX_STORAGES = 500_000


def read(path: Path, fd: int, offset: int, nbytes: int) -> tuple[Any, Mapping[str, Extent]]:
    """Return the value of the file of `nbytes` at `offset` of the open `fd`, and its storages.

    Raises:
        CheckpointUnsupported: a bare pickle, another version, or storages that are views.
        CheckpointCorrupt: truncated or damaged.
    """
    values, found, end = _pickles(path, fd, offset, nbytes)
    if values[1] != _VERSION or not _is_little(values[2]):
        raise CheckpointUnsupported(
            "a file of torch.save of another version, or big-endian",
            path=path,
            found=_shown(values[1]),
            hint="load it with torch and save it again",
        )
    keys = values[4]
    if not isinstance(keys, list) or len(keys) > MAX_STORAGES or not _are_each(keys, found):
        raise CheckpointCorrupt("its storages are not those of its tensors", path=path)
    storages: dict[str, Extent] = {}
    for key in keys:
        storage = found[key]
        said = int.from_bytes(os.pread(fd, _LENGTH_BYTES, offset + end), "little")
        end += _LENGTH_BYTES
        size = storage.numel * storage.dtype.bits // 8
        if said != storage.numel or end + size > nbytes:
            raise CheckpointCorrupt(
                f"storage {key[:40]} is cut short, or of another length",
                path=path,
                expected=f"{storage.numel} elements",
                found=f"{said} elements, {max(0, nbytes - end)} bytes left in the file",
                hint="the file is truncated or damaged: save or copy it again",
            )
        storages[key] = Extent(path, offset + end, size)
        end += size
    return values[3], storages


def _pickles(
    path: Path, fd: int, offset: int, nbytes: int
) -> tuple[list[Any], Mapping[str, StorageRef], int]:
    """Return the five values, the storages they refer to, and where they end."""
    length = min(_FIRST_BYTES, nbytes)
    while True:
        data = os.pread(fd, length, offset)
        first, _, _ = inert.loads_row(data, 1, path=path)
        if first != [_MAGIC]:
            raise CheckpointUnsupported(
                "a bare pickle, not a file of torch.save",
                path=path,
                hint="load it with what wrote it, and save safetensors or with torch.save",
            )
        try:
            return inert.loads_row(data, _NUM_PICKLES, path=path)
        except CheckpointCorrupt:
            if length >= min(nbytes, inert.MAX_PICKLE_BYTES):
                raise
        length = min(2 * length, nbytes, inert.MAX_PICKLE_BYTES)


def _are_each(keys: list[Any], found: Mapping[str, StorageRef]) -> bool:
    """Whether `keys` are those of `found`, each once."""
    are_text = all(type(key) is str for key in keys)
    return are_text and len(keys) == len(found) and found.keys() == set(keys)


def _shown(version: Any) -> str:
    """Return a version for people; anything may stand there, of any length and depth."""
    is_number = type(version) is int and abs(version) < 1 << 62
    return f"version {version}" if is_number else f"a {type(version).__name__} for a version"


def _is_little(info: Any) -> bool:
    return isinstance(info, dict) and info.get("little_endian") is True
