"""Reading past the page cache: the same bytes, and the cache is as it was."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptd.checkpoint import content, uncached
from tests.checkpoint.pages import resident_pages

NUM_BYTES = 8 << 20


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """A file whose bytes are on the disk and not in the page cache."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(NUM_BYTES))
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    yield descriptor
    os.close(descriptor)


def _read(fd: int, nbytes: int = NUM_BYTES) -> bytes:
    buffer = memoryview(bytearray(nbytes))
    assert uncached.Reader().preadv(fd, [buffer], 0) == nbytes
    return bytes(buffer)


def test_long_reads_leave_nothing_in_the_page_cache(fd: int) -> None:
    """Where the kernel can, what was not in memory is not there afterwards."""
    if resident_pages(fd, NUM_BYTES):
        pytest.skip("the file system of the tests has no place but memory")
    try:
        os.preadv(fd, [bytearray(1)], NUM_BYTES - 1, uncached._RWF_DONTCACHE)
    except OSError:
        pytest.skip("the kernel or file system of the tests cannot read so")
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    read = _read(fd)
    assert resident_pages(fd, NUM_BYTES) < 16
    assert read == os.pread(fd, NUM_BYTES, 0)


def test_what_others_had_in_the_page_cache_stays(fd: int) -> None:
    """A trainer's data that is in memory is there afterwards."""
    read = os.pread(fd, NUM_BYTES, 0)
    before = resident_pages(fd, NUM_BYTES)
    assert _read(fd) == read
    assert resident_pages(fd, NUM_BYTES) >= before > 0


def test_where_it_cannot_be_read_is_ordinary(fd: int, monkeypatch: Any) -> None:
    """A kernel or file system that refuses the flag is asked once, and read as ever."""
    real, flags = os.preadv, []

    def preadv(fd: int, buffers: Any, offset: int, flag: int = 0) -> int:
        flags.append(flag)
        if flag:
            raise OSError(errno.EOPNOTSUPP, "no such flag")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    reader = uncached.Reader()
    buffer = memoryview(bytearray(uncached.MIN_BYTES))
    for _ in range(2):
        assert reader.preadv(fd, [buffer], 0) == len(buffer)
    assert bytes(buffer) == os.pread(fd, len(buffer), 0)
    assert flags == [uncached._RWF_DONTCACHE, 0, 0]


def test_a_file_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    """Any other failure is the caller's."""
    path = tmp_path / "file"
    path.write_bytes(bytes(uncached.MIN_BYTES))
    fd = os.open(path, os.O_WRONLY)
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            uncached.Reader().preadv(fd, [memoryview(bytearray(uncached.MIN_BYTES))], 0)
    finally:
        os.close(fd)


def test_the_digest_leaves_nothing_in_the_page_cache(fd: int, tmp_path: Path) -> None:
    """Hashing a checkpoint that has long left the memory does not bring it back there."""
    if resident_pages(fd, NUM_BYTES):
        pytest.skip("the file system of the tests has no place but memory")
    try:
        os.preadv(fd, [bytearray(1)], NUM_BYTES - 1, uncached._RWF_DONTCACHE)
    except OSError:
        pytest.skip("the kernel or file system of the tests cannot read so")
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    content.digest([("file", tmp_path / "file")])
    assert resident_pages(fd, NUM_BYTES) < 16
