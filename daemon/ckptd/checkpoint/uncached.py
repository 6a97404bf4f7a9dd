"""Long reads that leave the page cache as it was: what others read stays, what was there stays.

Linux 6.14 and later read so (RWF_DONTCACHE of preadv2) on file systems that support it; elsewhere a
read is an ordinary one of a file from which the system is told that nothing is wanted twice.
Measured on ext4, a read of what is in the cache takes as long either way.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence

MIN_BYTES = 1 << 20
"""Shorter reads go through the page cache: the next one may want the rest of its pages."""
_RWF_DONTCACHE = 0x80
"""Flag of preadv2(2) in linux/fs.h."""


class Reader:
    """Reads open files at offsets, from any thread; a descriptor is that of one file while it lives."""

    def __init__(self) -> None:
        self._plain: set[int] = set()

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill `buffers` as `os.preadv` does; return the bytes read.

        Raises:
            OSError: the file cannot be read.
        """
        if fd in self._plain or sum(map(len, buffers)) < MIN_BYTES:
            return os.preadv(fd, buffers, offset)
        try:
            return os.preadv(fd, buffers, offset, _RWF_DONTCACHE)
        except OSError as error:
            if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL}:
                raise
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_NOREUSE)
        self._plain.add(fd)
        return os.preadv(fd, buffers, offset)
