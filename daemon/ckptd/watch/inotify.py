"""The kernel's inotify(7), as far as watching needs it: which folders changed, and at which names.

This module owns the system calls and the bytes they speak in, and knows nothing of checkpoints. It
is called directly because what decides here is what libraries for many systems leave out: an idle
instance costs nothing (its descriptor can be waited for), a folder more is one call, lost events
are said to be lost, and a limit that is reached is an error at the call that reached it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from dataclasses import dataclass
from pathlib import Path

ATTRIB = 0x004
CLOSE_WRITE = 0x008
MOVED_FROM = 0x040
MOVED_TO = 0x080
CREATE = 0x100
DELETE = 0x200
DELETE_SELF = 0x400
MOVE_SELF = 0x800
Q_OVERFLOW = 0x4000
IGNORED = 0x8000
IS_FOLDER = 0x40000000

_UNMOUNT = 0x2000
_ONLYDIR = 0x01000000
_DONT_FOLLOW = 0x02000000
_EXCL_UNLINK = 0x04000000

ENTRIES = CREATE | DELETE | MOVED_FROM | MOVED_TO
"""Names came or went."""
GONE = DELETE_SELF | MOVE_SELF | IGNORED | _UNMOUNT
"""What was watched is no longer where it was."""

_HEADER = struct.Struct("iIII")  # inotify(7): wd, mask, cookie, length of the name that follows
_READ_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    """One event as the kernel tells it."""

    watch: int
    """The watch descriptor; -1 where events were lost (`Q_OVERFLOW`)."""
    mask: int
    name: str
    """The entry of the watched folder; empty where it is the folder itself."""


class Inotify:
    """One instance; belongs to one thread at a time, but for `fileno`. No call blocks for events.

    Raises:
        OSError: from the constructor, EMFILE where the user has no instance left, ENOSYS where
            this system has no inotify.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        if not hasattr(self._libc, "inotify_init1"):
            raise OSError(errno.ENOSYS, "this system has no inotify")
        self._fd: int = self._checked(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when something happened."""
        return self._fd

    def add(self, path: Path, mask: int) -> int:
        """Watch the folder at `path`, which is no link, and return its watch descriptor.

        A folder that is watched already has one descriptor under all its names.

        Raises:
            OSError: ENOSPC where the user has no watch left, ENOENT and ENOTDIR where there is no
                folder (any more), EACCES where it may not be read.
        """
        flags = mask | _ONLYDIR | _DONT_FOLLOW | _EXCL_UNLINK
        return self._checked(self._libc.inotify_add_watch(self._fd, os.fsencode(path), flags))

    def remove(self, watch: int) -> None:
        """Watch a folder no longer; one that is gone is not an error."""
        self._libc.inotify_rm_watch(self._fd, watch)

    def read(self) -> list[Happening]:
        """Return what happened since the last call, in order; empty where nothing did."""
        happened: list[Happening] = []
        while True:
            try:
                block = os.read(self._fd, _READ_BYTES)
            except BlockingIOError:
                return happened
            at = 0
            while at < len(block):
                watch, mask, _, length = _HEADER.unpack_from(block, at)
                at += _HEADER.size
                name = os.fsdecode(block[at : at + length].rstrip(b"\0"))
                at += length
                happened.append(Happening(watch=watch, mask=mask, name=name))

    def close(self) -> None:
        """Give the instance and its watches back. Calling it again is safe."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _checked(self, result: int) -> int:
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result
