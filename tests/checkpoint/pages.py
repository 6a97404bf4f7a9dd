"""Memory that lies in a page as a test wants it, and which pages of a file are in memory."""

from __future__ import annotations

import ctypes
import mmap


def memory(content: bytes, *, phase: int) -> memoryview:
    """Return writable memory with `content`, `phase` bytes after the begin of a page."""
    pages = mmap.mmap(-1, phase + len(content))
    pages[phase:] = content
    return memoryview(pages)[phase:]


def resident_pages(fd: int, nbytes: int) -> int:
    """Return how many pages of the first `nbytes` of a file, open for writing, are in memory."""
    mapped = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED)
    states = (ctypes.c_ubyte * (nbytes // mmap.PAGESIZE))()
    first = ctypes.c_char.from_buffer(mapped)
    failed = ctypes.CDLL(None).mincore(
        ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(nbytes), states
    )
    assert not failed
    del first
    mapped.close()
    return sum(state & 1 for state in states)
