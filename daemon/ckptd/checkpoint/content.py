"""Reading tensor bytes to compare or to identify them: bounded buffers, early exits.

The digest of a checkpoint depends on names and bytes alone, not on the path, the inode or the
clock: a copy has the same digest, a resumed run that rewrites the folder has another one. Files
are hashed in blocks whose sha256 values are hashed again, so that any number of threads can share
one large file; the digest is the sha256 of the sorted lines `name size file-digest`.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from ckptd.checkpoint import uncached
from ckptd.checkpoint.header import Extent
from ckptd.errors import CheckpointCorrupt

BLOCK_BYTES = 16 << 20
"""The unit of the file digest; part of the digest's definition, never to be changed."""
_COMPARE_BYTES = 1 << 20


def same_bytes(left: Extent, right: Extent, *, check: Callable[[], None] = lambda: None) -> bool:
    """Return whether two extents hold the same bytes; stops at the first difference.

    `check` is called between blocks and may raise to stop (cancellation).

    Raises:
        CheckpointCorrupt: a file ended before its extent did.
    """
    if left.nbytes != right.nbytes:
        return False
    ours, theirs = bytearray(_COMPARE_BYTES), bytearray(_COMPARE_BYTES)
    with left.path.open("rb", buffering=0) as a, right.path.open("rb", buffering=0) as b:
        for done in range(0, left.nbytes, _COMPARE_BYTES):
            check()
            size = min(_COMPARE_BYTES, left.nbytes - done)
            read_into(a.fileno(), memoryview(ours)[:size], left.offset + done, left.path)
            read_into(b.fileno(), memoryview(theirs)[:size], right.offset + done, right.path)
            if ours[:size] != theirs[:size]:
                return False
    return True


def read_into(
    fd: int,
    buffer: memoryview,
    offset: int,
    path: Path,
    *,
    read: Callable[[int, list[memoryview], int], int] = os.preadv,
) -> None:
    """Fill `buffer` from `offset` of the open file `fd`.

    Raises:
        CheckpointCorrupt: the file ends before the buffer is full.
    """
    done = 0
    while done < len(buffer):
        got = read(fd, [buffer[done:]], offset + done)
        if got == 0:
            raise CheckpointCorrupt(
                "the file ended while it was read",
                path=path,
                expected=f"{offset + len(buffer)} bytes",
                found=f"{offset + done}",
            )
        done += got


def digest(
    files: Iterable[tuple[str, Path]],
    *,
    threads: int = 2,
    check: Callable[[], None] = lambda: None,
) -> str:
    """Return `sha256:...` of the named files' content; the order given does not matter.

    What is not in the page cache is not left there.

    Raises:
        CheckpointCorrupt: a file shrank while it was read.
        OSError: a file cannot be read.
    """
    with concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="digest") as pool:
        lines = sorted(
            f"{name} {path.stat().st_size} {_file_digest(path, pool, threads, check)}\n"
            for name, path in files
        )
    return "sha256:" + hashlib.sha256(b"".join(map(os.fsencode, lines))).hexdigest()


def _file_digest(
    path: Path,
    pool: concurrent.futures.ThreadPoolExecutor,
    threads: int,
    check: Callable[[], None],
) -> str:
    size = path.stat().st_size
    whole = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        fd, reader = file.fileno(), uncached.Reader()

        def block(offset: int) -> bytes:
            return _block_digest(fd, offset, min(BLOCK_BYTES, size - offset), path, reader)

        offsets = list(range(0, size, BLOCK_BYTES))
        for start in range(0, len(offsets), threads):
            check()
            for value in pool.map(block, offsets[start : start + threads]):
                whole.update(value)
    return whole.hexdigest()


def _block_digest(fd: int, offset: int, nbytes: int, path: Path, reader: uncached.Reader) -> bytes:
    buffer = memoryview(bytearray(min(nbytes, _COMPARE_BYTES)))
    value = hashlib.sha256()
    for start in range(offset, offset + nbytes, _COMPARE_BYTES):
        part = buffer[: min(_COMPARE_BYTES, offset + nbytes - start)]
        read_into(fd, part, start, path, read=reader.preadv)
        value.update(part)
    return value.digest()
