"""This machine's limits, each measured alone: bytes a second that nothing here can exceed.

Every measurement moves a few hundred megabytes in `threads` threads and takes the best of some
turns. What is written is removed again; nothing outside the given folder is touched.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ckptd.checkpoint import uncached
from ckptd.checkpoint.writer import Cache, ShardWriter
from ckptd.plan.transfer import BUFFER_BYTES

TURNS = 3
_BLOCK_BYTES = 8 << 20
_FICLONE = 0x40049409
"""ioctl of linux/fs.h: share all blocks of a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One limit, in bytes a second."""

    name: str
    bytes_per_s: float
    what: str
    """How it was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """What the file system of one folder can do."""

    write: Limit
    cached_write: Limit
    read: Limit
    has_reflink: bool


def disk(folder: Path, *, nbytes: int, threads: int) -> Disk:
    """Return the limits of the file system of `folder`; writes and removes a file of `nbytes`.

    Raises:
        NoSpace, StorageFailed: there is no room for it.
    """
    path = folder / "ckptd-bench.limit"
    try:
        direct = max(written(path, nbytes, threads, Cache.DIRECT) for _ in range(TURNS))
        cached = max(written(path, nbytes, threads, Cache.KEEP) for _ in range(TURNS))
        read = max(_read(path, nbytes, threads) for _ in range(TURNS))
        return Disk(
            write=Limit(
                name="disk write", bytes_per_s=direct,
                what=f"past the page cache and synced, {threads} threads",
            ),
            cached_write=Limit(
                name="cached write", bytes_per_s=cached,
                what=f"through the page cache and synced, {threads} threads",
            ),
            read=Limit(
                name="disk read", bytes_per_s=read, what=f"not in the page cache, {threads} threads"
            ),
            has_reflink=_reflinks(path),
        )  # fmt: skip
    finally:
        path.unlink(missing_ok=True)


def memory_copy(*, nbytes: int, threads: int) -> Limit:
    """Return how fast memory is copied to memory; each byte is read once and written once."""
    parts = [(_pages(nbytes // threads), _pages(nbytes // threads)) for _ in range(threads)]

    def copy(number: int) -> None:
        source, target = (np.frombuffer(memory, np.uint8) for memory in parts[number])
        for start in range(0, len(source), _BLOCK_BYTES):  # numpy lets other threads run meanwhile
            block = slice(start, start + _BLOCK_BYTES)
            np.copyto(target[block], source[block])

    rate = _best(lambda: _in_threads(copy, threads), nbytes)
    return Limit(name="memory copy", bytes_per_s=rate, what=f"{threads} threads")


def sha256(*, nbytes: int, threads: int) -> Limit:
    """Return how fast bytes in memory are hashed, each thread its own."""
    block = _pages(BUFFER_BYTES)

    def hash_all(_: int) -> None:
        value = hashlib.sha256()
        for _ in range(max(1, nbytes // threads // len(block))):
            value.update(block)

    rate = _best(lambda: _in_threads(hash_all, threads), nbytes)
    return Limit(name="sha256", bytes_per_s=rate, what=f"{threads} threads")


def written(path: Path, nbytes: int, threads: int, cache: Cache) -> float:
    """Return the bytes a second at which a new file is written and synced.

    Raises:
        NoSpace, StorageFailed: there is no room for it.
    """
    path.unlink(missing_ok=True)
    file = ShardWriter(path, nbytes=nbytes, cache=cache)
    block = _pages(_BLOCK_BYTES)
    with _timed() as seconds:
        file.open()
        try:

            def write(start: int) -> None:
                file.write(block[: min(_BLOCK_BYTES, nbytes - start)], start)

            _map(write, range(0, nbytes, _BLOCK_BYTES), threads)
            file.finish()
        except BaseException:
            file.abandon()
            raise
    return nbytes / seconds[0]


def _read(path: Path, nbytes: int, threads: int) -> float:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        reader = uncached.Reader()
        buffers = [_pages(_BLOCK_BYTES) for _ in range(threads)]

        def read(number: int) -> None:
            for start in range(number * _BLOCK_BYTES, nbytes, threads * _BLOCK_BYTES):
                reader.preadv(fd, [buffers[number]], start)

        with _timed() as seconds:
            _in_threads(read, threads)
        return nbytes / seconds[0]
    finally:
        os.close(fd)


def _reflinks(path: Path) -> bool:
    """Whether the file system shares the blocks of `path` with another file."""
    other = path.with_suffix(".clone")
    try:
        with path.open("rb") as source, other.open("wb") as target:
            fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
    except OSError:
        return False
    finally:
        other.unlink(missing_ok=True)
    return True


def _pages(nbytes: int) -> memoryview:
    """Return memory that begins with a page and is there already."""
    memory = mmap.mmap(-1, max(1, nbytes))
    for start in range(0, nbytes, mmap.PAGESIZE):
        memory[start] = start // mmap.PAGESIZE % 251
    return memoryview(memory)


def _best(call: Callable[[], None], nbytes: int) -> float:
    best = 0.0
    for _ in range(TURNS):
        with _timed() as seconds:
            call()
        best = max(best, nbytes / seconds[0])
    return best


def _in_threads(call: Callable[[int], None], threads: int) -> None:
    _map(call, range(threads), threads)


def _map(call: Callable[[int], None], values: Sequence[int], threads: int) -> None:
    with ThreadPoolExecutor(threads, thread_name_prefix="bench") as pool:
        for _ in pool.map(call, values):
            pass


@contextmanager
def _timed() -> Iterator[list[float]]:
    """Yield a list that has the block's seconds in it afterwards."""
    seconds: list[float] = []
    began = time.perf_counter()
    yield seconds
    seconds.append(max(1e-9, time.perf_counter() - began))
