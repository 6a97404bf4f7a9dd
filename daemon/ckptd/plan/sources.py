"""The open source files of one job: read at offsets, from any thread, and only while unchanged.

A source that shrinks, is replaced or is rewritten voids the job: its stamp is compared when it is
opened and when the job ends, and a short read is the same failure.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ckptd.checkpoint import checkpoint, uncached
from ckptd.checkpoint.header import Extent, FileStamp
from ckptd.checkpoint.writer import Cache
from ckptd.errors import SourceChanged
from ckptd.quant.parts import Window

MAX_BUFFERS = 1024
"""How many buffers one system call fills: the limit of Linux (IOV_MAX)."""
_GAP_BYTES = 16 << 10
"""Bytes between two ranges of a window that are read and thrown away rather than jumped over: up to
about so many are copied in the time of a system call. They always land in the same memory."""


class Sources:
    """Open file descriptors by path, each checked against the stamp planning saw.

    Use as a context manager; leaving it closes every file. Unless `cache` is `KEEP`, long extents are
    read without leaving them in the page cache.
    """

    def __init__(self, stamps: Mapping[Path, FileStamp], *, cache: Cache = Cache.KEEP) -> None:
        self._stamps = stamps
        self._fds: dict[Path, int] = {}
        self._read = os.preadv if cache is Cache.KEEP else uncached.Reader().preadv
        self._lock = threading.Lock()

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            for fd in self._fds.values():
                os.close(fd)
            self._fds.clear()

    def fd(self, path: Path) -> int:
        """Return a read-only descriptor of the source at `path`.

        Raises:
            SourceChanged: the file is not the one that was planned with.
        """
        with self._lock:
            if path not in self._fds:
                self._fds[path] = self._open(path)
            return self._fds[path]

    def stamp(self, path: Path) -> FileStamp:
        """Return what planning saw of the source at `path`."""
        return self._stamps[path]

    def read_into(self, buffer: memoryview, extent: Extent) -> None:
        """Fill `buffer`, of the extent's length, with the extent's bytes.

        Raises:
            SourceChanged: the file ended before the extent did, or can no longer be read.
        """
        self.scatter([buffer], extent)

    def scatter(self, buffers: Sequence[memoryview], extent: Extent) -> None:
        """Fill `buffers`, one after the other and together of the extent's length.

        At most `MAX_BUFFERS` of them, so that one system call can fill all.

        Raises:
            SourceChanged: the file ended before the extent did, or can no longer be read.
        """
        fd = self.fd(extent.path)
        done = 0
        left = list(buffers)
        while done < extent.nbytes:
            try:
                got = self._read(fd, left, extent.offset + done)
            except OSError as error:
                raise SourceChanged(
                    path=extent.path,
                    expected="a readable file",
                    found=error.strerror or "an error",
                ) from error
            if got == 0:
                raise SourceChanged(
                    path=extent.path,
                    expected=f"{extent.offset + extent.nbytes} bytes",
                    found=f"{extent.offset + done}",
                )
            done += got
            if done < extent.nbytes:
                left = _after(left, got)

    def gather(self, buffer: memoryview, window: Window) -> None:
        """Fill `buffer`, of the window's length, with its ranges, one after the other.

        Raises:
            SourceChanged: the file ended before the window did, or can no longer be read.
        """
        width, stride = window.width_bytes, window.stride_bytes
        ranges = [buffer[start : start + width] for start in range(0, len(buffer), max(1, width))]
        if not 0 < stride - width <= _GAP_BYTES:
            self._gather_each(ranges, window)
            return
        gap = memoryview(bytearray(stride - width))
        at_once = MAX_BUFFERS // 2
        for first in range(0, len(ranges), at_once):
            some = ranges[first : first + at_once]
            reach = (len(some) - 1) * stride + width
            place = Extent(window.path, window.extent.offset + first * stride, reach)
            between = [part for own in some for part in (own, gap)]
            self.scatter(between[:-1], place)

    def _gather_each(self, ranges: Iterable[memoryview], window: Window) -> None:
        """Fill each range with a system call of its own: there may be 100,000 in a gigabyte."""
        fd = self.fd(window.path)
        place = window.extent.offset
        for own in ranges:
            if _read(fd, own, place) != len(own):
                self.read_into(own, Extent(window.path, place, len(own)))
            place += window.stride_bytes

    def check(self) -> None:
        """Verify that every source is still as planned.

        Raises:
            SourceChanged: names the first that is not.
        """
        checkpoint.check_unchanged(self._stamps)

    def _open(self, path: Path) -> int:
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise SourceChanged(
                path=path, expected="a readable file", found=error.strerror or "an error"
            ) from error
        stamp = self._stamps[path]
        found = FileStamp.of(os.fstat(fd))
        if found != stamp:
            os.close(fd)
            raise SourceChanged(path=path, expected=str(stamp), found=str(found))
        return fd


def _read(fd: int, buffer: memoryview, offset: int) -> int:
    """Return how many bytes one system call put into `buffer`; none where it failed."""
    try:
        return os.preadv(fd, (buffer,), offset)
    except OSError:
        return 0


def _after(buffers: list[memoryview], nbytes: int) -> list[memoryview]:
    """Return what is left of `buffers` once their first `nbytes` are filled."""
    for place, buffer in enumerate(buffers):
        if nbytes < len(buffer):
            return [buffer[nbytes:], *buffers[place + 1 :]]
        nbytes -= len(buffer)
    return []
