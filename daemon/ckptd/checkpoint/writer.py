"""Writing: nothing carries its final name before it is whole and on the disk.

A file grows under a temporary name in its final folder, with all its space reserved at the start,
is synced, renamed, and its folder is synced. Modes come from the umask. A crash leaves only names
that start with `.ckptd-`; `sweep` removes them.

Long writes may go past the page cache: see `Cache`.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import os
import shutil
from pathlib import Path

from ckptd.errors import CkptdError, NoSpace, StorageFailed

TEMPORARY_PREFIX = ".ckptd-"
DIRECT_UNIT = 4096
"""Places in the file, in memory and lengths of what is written past the page cache are multiples of
this: what every usual disk and file system takes."""
MIN_DIRECT_BYTES = 256 << 10
"""Less is written through the page cache, where neighbours are put together."""
_WRITEBACK_BYTES = 32 << 20
"""Through the page cache, the disk is set to work each time so much was written, so that the sync at
a file's end waits for little: measured, a synced copy of 3 GB takes 1.8 to 2.2 s instead of 2.3 to
3.2 s."""
_SYNC_FILE_RANGE = getattr(ctypes.CDLL(None), "sync_file_range", None)
"""sync_file_range(2) of the C library; None where it has none."""
_SYNC_FILE_RANGE_WRITE = 2
"""Its flag: begin to write dirty pages back, and do not wait for them."""


class Cache(enum.StrEnum):
    """What a job does to the page cache of the node, which holds what others read, too."""

    KEEP = "keep"
    """Files are written through the page cache and stay there as long as the system likes."""
    DROP = "drop"
    """Written through it, and dropped from it once they are durable."""
    DIRECT = "direct"
    """Written past it where the file system can, else as `drop`. The bytes are on the disk at once,
    and the processor does not copy them: measured, 3.9 GB are durable after 1.7 to 3.0 s and 0.2 s of
    processor time, through the page cache after 2.7 to 15.8 s and 1.7 to 14.6 s."""


class ShardWriter:
    """One file of known size, written at planned offsets, from any thread.

    `open` reserves the space, `write` puts bytes in their place (`fd` takes other calls), `sync`
    makes them durable under the temporary name, `finish` under the final one, `abandon` leaves no
    trace. Each is safe after the other.
    """

    def __init__(self, path: Path, *, nbytes: int, cache: Cache = Cache.KEEP) -> None:
        self.path = path
        self.nbytes = nbytes
        self._temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
        self._cache = cache
        self._fd = -1
        self._direct_fd = -1

    @property
    def fd(self) -> int:
        """The open file; offsets are those of the final file."""
        return self._fd

    def open(self) -> None:
        """Create the temporary file and reserve its space.

        Raises:
            NoSpace: the disk cannot hold `nbytes` more.
            StorageFailed: the folder cannot be written.
        """
        try:
            self._temporary.unlink(missing_ok=True)
            self._fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            if self.nbytes:
                _reserve(self._fd, self.nbytes)
            if self._cache is Cache.DIRECT and self.nbytes >= MIN_DIRECT_BYTES:
                self._direct_fd = _open_direct(self._temporary)
        except OSError as error:
            self.abandon()
            raise translated(error, self.path, self.nbytes) from error

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Put all of `data` at `offset`; concurrent calls write different bytes.

        It goes past the page cache from one multiple of `DIRECT_UNIT` in the file to another, if
        `data` is writable memory and lies as far from such a multiple as `offset` does, and through
        it before and after. No two ways ever meet in one unit.

        Raises:
            OSError: the file system refused.
        """
        low = -offset % DIRECT_UNIT
        high = len(data) - (offset + len(data)) % DIRECT_UNIT
        if self._direct_fd < 0 or high - low < MIN_DIRECT_BYTES or not _is_aligned(data, low):
            self._write_cached(data, offset)
            return
        whole = memoryview(data)[low:high]
        self._write_cached(data[:low], offset)
        self._write_direct(whole, offset + low)
        self._write_cached(data[high:], offset + high)

    def _write_direct(self, data: memoryview, offset: int) -> None:
        try:
            _write_all(self._direct_fd, data, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._write_cached(data, offset)  # its units are larger than ours

    def _write_cached(self, data: memoryview | bytes, offset: int) -> None:
        _write_all(self._fd, data, offset)
        end = offset + len(data)
        reached = end // _WRITEBACK_BYTES * _WRITEBACK_BYTES
        if reached > offset:
            _start_writeback(self._fd, reached - _WRITEBACK_BYTES, _WRITEBACK_BYTES)

    def sync(self) -> None:
        """Make the bytes durable under the temporary name and close the file; `finish` names it.

        Raises:
            NoSpace, StorageFailed: the file system refused; the temporary file is removed.
        """
        if self._fd < 0:
            return
        try:
            os.fsync(self._fd)
            if self._cache is not Cache.KEEP:
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            self._close()
        except OSError as error:
            self.abandon()
            raise translated(error, self.path, self.nbytes) from error

    def finish(self) -> None:
        """Sync, rename and sync the folder; the file stands under its name when this returns.

        Raises:
            NoSpace, StorageFailed: the file system refused; the temporary file is removed.
        """
        self.sync()
        try:
            self._temporary.rename(self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            self.abandon()
            raise translated(error, self.path, self.nbytes) from error

    def abandon(self) -> None:
        """Close and remove the temporary file, if there is one."""
        self._close()
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)

    def _close(self) -> None:
        held = [fd for fd in (self._fd, self._direct_fd) if fd >= 0]
        self._fd = self._direct_fd = -1
        for fd in held:
            os.close(fd)


def write_file(path: Path, content: bytes) -> None:
    """Put `content` at `path`, whole or not at all, durable when this returns.

    Raises:
        NoSpace, StorageFailed: the file system refused; the file at `path` is as it was.
    """
    writer = ShardWriter(path, nbytes=len(content))
    writer.open()
    try:
        writer.write(content, 0)
    except OSError as error:
        writer.abandon()
        raise translated(error, path, len(content)) from error
    writer.finish()


def make_folder(path: Path) -> None:
    """Create the folder at `path` and its parents.

    Raises:
        NoSpace, StorageFailed: the file system refused, or a file has that name.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise translated(error, path, 0) from error


def sync_folder(path: Path) -> None:
    """Make the names in the folder at `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sweep(path: Path) -> None:
    """Remove what a killed writer left in the folder at `path`."""
    for leftover in path.glob(f"{TEMPORARY_PREFIX}*"):
        leftover.unlink(missing_ok=True)


def require_space(path: Path, needed_bytes: int) -> None:
    """Refuse at once if the file system of the folder at `path` lacks `needed_bytes`.

    Raises:
        NoSpace: with the bytes needed and free.
        StorageFailed: there is no such folder.
    """
    try:
        free = shutil.disk_usage(path).free
    except OSError as error:
        raise translated(error, path, needed_bytes) from error
    if free < needed_bytes:
        raise NoSpace(path=path, needed_bytes=needed_bytes, free_bytes=free)


def _reserve(fd: int, nbytes: int) -> None:
    """Take all the space of a file now; only set its size where the file system cannot reserve."""
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}:
            raise
        os.ftruncate(fd, nbytes)


def _open_direct(path: Path) -> int:
    """Return a second descriptor that writes past the page cache, or -1 where there is no such."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:
            raise
        return -1


def _is_aligned(data: memoryview | bytes, offset: int) -> bool:
    """Whether the byte at `offset` of `data` lies at a multiple of `DIRECT_UNIT` in memory."""
    if isinstance(data, bytes) or data.readonly:
        return False
    return (ctypes.addressof(ctypes.c_char.from_buffer(data)) + offset) % DIRECT_UNIT == 0


def _write_all(fd: int, data: memoryview | bytes, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def _start_writeback(fd: int, offset: int, nbytes: int) -> None:
    """Let the kernel begin to write a part of the file back; a hint, so that no failure counts."""
    if _SYNC_FILE_RANGE is not None:
        place, size = ctypes.c_int64(offset), ctypes.c_int64(nbytes)
        _SYNC_FILE_RANGE(fd, place, size, ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))


def translated(error: OSError, path: Path, needed_bytes: int) -> CkptdError:
    """Return the failure of the file system as one of ours."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        folder = next(parent for parent in path.parents if parent.exists())
        free = shutil.disk_usage(folder).free
        return NoSpace(path=path, needed_bytes=needed_bytes, free_bytes=free)
    hints = {
        errno.EROFS: "the file system is read-only: choose another output folder",
        errno.EACCES: "the user running ckptd may not write there",
        errno.EPERM: "the user running ckptd may not write there",
        errno.ENOTDIR: "a part of the path is a file",
        errno.EEXIST: "a file of that name stands in the way",
    }
    reason = error.strerror or type(error).__name__
    hint = hints.get(error.errno) if error.errno is not None else None
    return StorageFailed(f"cannot be written: {reason}", path=path, hint=hint)
