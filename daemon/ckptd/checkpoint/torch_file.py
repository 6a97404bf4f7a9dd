"""Files of `torch.save`, read without torch and without executing them: values and extents.

A file is a zip archive whose members are stored as they are: `NAME/data.pkl` is the pickle,
`NAME/data/KEY` the bytes of a storage, little-endian. So a tensor's bytes are an extent of the
file, like those of a safetensors file. Several such archives may lie one after the other in a file
(distributed checkpoints); each is opened by its offset and length. Older files, which are not zip
archives, hold pickles and storages in sequence. Sources: `torch.save`; the zip file format.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptd.checkpoint import inert, legacy_file
from ckptd.checkpoint.header import Extent, FileStamp
from ckptd.checkpoint.inert import TensorRef
from ckptd.errors import CheckpointCorrupt, CheckpointUnsupported

MAX_DIRECTORY_BYTES = 32 << 20
"""The list of members of half a million storages, more than any file of a checkpoint has."""
_ENCRYPTED = 1
_ZIP_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_PICKLE_MAGIC = b"\x80"
_DAMAGED = "the file is truncated or damaged: save or copy it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchFile:
    """What a file of `torch.save` holds: its value, with `TensorRef` for tensors, and storages."""

    path: Path
    stamp: FileStamp
    value: Any
    storages: Mapping[str, Extent]

    def extent(self, tensor: TensorRef) -> Extent:
        """Return the bytes of a contiguous tensor.

        Raises:
            CheckpointCorrupt: the storage is missing or shorter than the tensor says.
        """
        storage = self.storages.get(tensor.storage.key)
        width = tensor.dtype.bits // 8
        numel = 1
        for length in tensor.shape:
            numel *= length
        begin, nbytes = tensor.offset * width, numel * width
        if storage is None or begin + nbytes > storage.nbytes:
            raise CheckpointCorrupt(
                f"storage {tensor.storage.key} is missing or too short",
                path=self.path,
                expected=f"{begin + nbytes} bytes for {tensor.dtype} {list(tensor.shape)}",
                found="none" if storage is None else f"{storage.nbytes}",
                hint=_DAMAGED,
            )
        return Extent(storage.path, storage.offset + begin, nbytes)


def read(path: Path, *, offset: int = 0, nbytes: int | None = None) -> TorchFile:
    """Return what the archive at `offset` of the file at `path` holds; `nbytes` None: to its end.

    No storage is read.

    Raises:
        CheckpointCorrupt: truncated, damaged, or not what `torch.save` writes.
        CheckpointUnsupported: compressed or big-endian members, or a file of another kind.
        OSError: the file cannot be opened or read.
    """
    with path.open("rb", buffering=0) as file:
        stamp = FileStamp.of(os.fstat(file.fileno()))
        size = stamp.nbytes
        end = size if nbytes is None else offset + nbytes
        if end > size:
            raise CheckpointCorrupt(
                "the file is truncated", path=path, expected=f"{end} bytes", found=f"{size}",
                hint=_DAMAGED,
            )  # fmt: skip
        part = _Part(file.fileno(), offset, end - offset)
        magic = os.pread(file.fileno(), 4, offset)
        if magic[:1] == _PICKLE_MAGIC:
            value, storages = legacy_file.read(path, file.fileno(), offset, end - offset)
            return TorchFile(path=path, stamp=stamp, value=value, storages=storages)
        if magic != _ZIP_MAGIC:
            raise CheckpointCorrupt(
                "not a file of torch.save", path=path, expected="a zip archive",
                found=repr(magic), hint=_DAMAGED,
            )  # fmt: skip
        return _read_zip(path, part, offset, stamp)


def _read_zip(path: Path, part: _Part, offset: int, stamp: FileStamp) -> TorchFile:
    try:
        with zipfile.ZipFile(part) as archive:
            return _read_archive(path, part, archive, offset, stamp)
    except (zipfile.BadZipFile, struct.error, EOFError, NotImplementedError, ValueError) as error:
        raise CheckpointCorrupt(
            f"not a whole archive: {error}", path=path, hint=_DAMAGED
        ) from error


def _read_archive(
    path: Path, part: _Part, archive: zipfile.ZipFile, base: int, stamp: FileStamp
) -> TorchFile:
    members = archive.infolist()
    pickled = next((m for m in members if m.filename.endswith("/data.pkl")), None)
    if pickled is None:
        raise CheckpointUnsupported(
            "a zip archive without data.pkl: not a file of torch.save",
            path=path,
            hint="TorchScript and other archives are not checkpoints: save a state dict",
        )
    prefix = pickled.filename.removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in archive.namelist():
        raise CheckpointUnsupported(
            "a TorchScript archive", path=path, hint="save a state dict instead"
        )
    if pickled.file_size > inert.MAX_PICKLE_BYTES:
        raise CheckpointCorrupt("its pickle is too large", path=path, found=f"{pickled.file_size}")
    if len({member.filename for member in members}) != len(members):
        raise CheckpointCorrupt("a name stands twice in the archive", path=path, hint=_DAMAGED)
    storages: dict[str, Extent] = {}
    raw = b""
    for member in members:
        extent = _extent(path, part, member, base)
        if member is pickled:
            raw = part.at(extent.offset - base, extent.nbytes)
        elif member.filename == f"{prefix}byteorder":
            order = part.at(extent.offset - base, min(extent.nbytes, 16))
            if order != b"little":
                raise CheckpointUnsupported("its bytes are big-endian", path=path)
        elif member.filename.startswith(f"{prefix}data/"):
            storages[member.filename.removeprefix(f"{prefix}data/")] = extent
    value = inert.loads(raw, path=path)
    return TorchFile(path=path, stamp=stamp, value=value, storages=storages)


def _extent(path: Path, part: _Part, member: zipfile.ZipInfo, base: int) -> Extent:
    """Return where a member's bytes lie: behind its local header, stored and whole."""
    stored = member.compress_type == zipfile.ZIP_STORED and not member.flag_bits & _ENCRYPTED
    if not stored or member.compress_size != member.file_size:
        raise CheckpointUnsupported(
            f"member {member.filename!r} is compressed or encrypted",
            path=path,
            hint="torch.save stores its members: save the file again",
        )
    head = part.at(max(0, member.header_offset), _LOCAL_HEADER.size)
    magic, name_length, extra_length = _LOCAL_HEADER.unpack(head)
    begin = member.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    is_inside = member.header_offset >= 0 and begin + member.file_size <= part.nbytes
    if magic != _ZIP_MAGIC or not is_inside:
        raise CheckpointCorrupt(
            f"member {member.filename!r} lies outside of the archive", path=path, hint=_DAMAGED
        )
    return Extent(path, base + begin, member.file_size)


class _Part(io.RawIOBase):
    """A range of an open file as a file of its own, for the zip reader."""

    def __init__(self, fd: int, offset: int, nbytes: int) -> None:
        self._fd = fd
        self._offset = offset
        self._place = 0
        self.nbytes = nbytes

    def at(self, place: int, nbytes: int) -> bytes:
        """Return `nbytes` from `place` on, fewer at the end."""
        wanted = min(nbytes, self.nbytes - place)
        return os.pread(self._fd, wanted, self._offset + place) if wanted > 0 else b""

    def readable(self) -> bool:
        """Say yes."""
        return True

    def seekable(self) -> bool:
        """Say yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the place of the next read."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.nbytes}[whence]
        if start + offset < 0:
            raise ValueError("before the begin")
        self._place = start + offset
        return self._place

    def tell(self) -> int:
        """Return the place of the next read."""
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        """Return the next bytes."""
        wanted = self.nbytes - self._place if size is None or size < 0 else size
        if wanted > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile("its list of members is too long")
        data = self.at(self._place, wanted)
        self._place += len(data)
        return data
