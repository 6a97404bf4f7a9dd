"""Moving verbatim bytes: by reflink where the filesystem can, else through one reused buffer.

Measured on a filesystem without reflink: `pread` into a buffer that stays in the cache and `pwrite`
at the planned offset, in two threads, takes half the time of `cp` and beats `copy_file_range`.
sha256 is computed on the same buffer while it is hot.
"""

from __future__ import annotations

import fcntl
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from ckptd.checkpoint.header import Extent
from ckptd.checkpoint.writer import DIRECT_UNIT, ShardWriter
from ckptd.plan.sources import Sources

BUFFER_BYTES = 2 << 20
"""Bytes at a time; as long as the largest page of the page cache, to fill one at a time."""
_CLONE_UNIT = 4096
_MIN_CLONE_BYTES = 1 << 20
_FICLONERANGE = 0x4020940D
"""ioctl of linux/fs.h: share a range of blocks between two files."""


class Hash(Protocol):
    """A running digest, as of hashlib."""

    def update(self, data: memoryview | bytes, /) -> None:
        """Take in more bytes."""

    def hexdigest(self) -> str:
        """Return the digest of all bytes so far as hexadecimal text."""


def _whole_pages() -> memoryview:
    return memoryview(mmap.mmap(-1, BUFFER_BYTES + DIRECT_UNIT))


@dataclass(slots=True)
class Lane:
    """What one thread keeps while it copies: its buffer, and whether cloning works here."""

    sources: Sources
    tick: Callable[[int, int], None]
    """Told (bytes read, bytes written) after each step; raises to stop the copy."""
    buffer: memoryview = field(default_factory=_whole_pages)
    can_clone: bool = True


def copy(lane: Lane, source: Extent, target: ShardWriter, offset: int, sha256: Hash | None) -> None:
    """Put the bytes of `source` at `offset` of `target`, and into `sha256` where given.

    Raises:
        SourceChanged: the source ended early.
        OSError: the target cannot be written.
    """
    begin, end = source.offset, source.offset + source.nbytes
    low, high = _cloned(lane, source, target.fd, offset)
    position = begin
    while position < end:
        if position == low and sha256 is None and low < high:
            lane.tick(high - low, high - low)
            position = high
            continue
        stop = low if position < low < high else end
        if low <= position < high:
            stop = high
        # Aligned in the target: the page cache takes whole buffers as its largest pages, and the
        # disk takes them directly.
        place = offset + position - begin
        size = min(BUFFER_BYTES - place % BUFFER_BYTES, stop - position)
        first = place % DIRECT_UNIT
        part = lane.buffer[first : first + size]
        lane.sources.read_into(part, Extent(source.path, position, len(part)))
        if sha256 is not None:
            sha256.update(part)
        if not low <= position < high:
            target.write(part, place)
        lane.tick(len(part), len(part))
        position += len(part)


def _cloned(lane: Lane, source: Extent, target_fd: int, offset: int) -> tuple[int, int]:
    """Clone whole blocks of the range; return the cloned part of the source, empty if none."""
    nothing = (source.offset, source.offset)
    aligned = (source.offset - offset) % _CLONE_UNIT == 0
    if not lane.can_clone or not aligned or source.nbytes < _MIN_CLONE_BYTES:
        return nothing
    low = -(-source.offset // _CLONE_UNIT) * _CLONE_UNIT
    high = (source.offset + source.nbytes) // _CLONE_UNIT * _CLONE_UNIT
    fd = lane.sources.fd(source.path)
    request = struct.pack("qQQQ", fd, low, high - low, low - source.offset + offset)
    try:
        fcntl.ioctl(target_fd, _FICLONERANGE, request)
    except OSError:
        lane.can_clone = False
        return nothing
    return low, high
