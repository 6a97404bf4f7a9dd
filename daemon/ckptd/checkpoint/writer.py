"""Writing: nothing carries its final name before it is whole and on the disk.

A file grows under a temporary name in its final folder, with all its space reserved at the start,
is synced, renamed, and its folder is synced. Modes come from the umask. A crash leaves only names
that start with `.ckptd-`; `sweep` removes them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path

from ckptd.errors import CkptdError, NoSpace, StorageFailed

TEMPORARY_PREFIX = ".ckptd-"


class ShardWriter:
    """One file of known size, written at planned offsets, from any thread.

    `open` reserves the space, `fd` takes `os.pwrite` calls, `sync` makes the bytes durable under the
    temporary name, `finish` under the final one, `abandon` leaves no trace. Each is safe after the
    other.
    """

    def __init__(self, path: Path, *, nbytes: int) -> None:
        self.path = path
        self.nbytes = nbytes
        self._temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
        self._fd = -1

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
        except OSError as error:
            self.abandon()
            raise translated(error, self.path, self.nbytes) from error

    def sync(self) -> None:
        """Make the bytes durable under the temporary name and close the file; `finish` names it.

        Raises:
            NoSpace, StorageFailed: the file system refused; the temporary file is removed.
        """
        if self._fd < 0:
            return
        try:
            os.fsync(self._fd)
            fd, self._fd = self._fd, -1
            os.close(fd)
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
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Put `content` at `path`, whole or not at all, durable when this returns.

    Raises:
        NoSpace, StorageFailed: the file system refused; the file at `path` is as it was.
    """
    writer = ShardWriter(path, nbytes=len(content))
    writer.open()
    try:
        done = 0
        while done < len(content):
            done += os.pwrite(writer.fd, content[done:], done)
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
