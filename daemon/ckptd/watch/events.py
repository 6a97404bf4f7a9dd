"""File system events as hints: something may have changed here, look again.

No decision rests on an event. They are lost on overflow, on network file systems, when a limit is
reached and in many other cases, and a scan at an interval finds all of that; an event only makes
the look come at once, and tells it where, which is what saves a checkpoint that lives for a moment.

Folders are watched one by one, none recursively, and each before it is listed, so that nothing
falls between. Watches are a resource that the user's other programs want, too: ckptd takes a
quarter at most, and lets go of the quiet folders first. Where a limit is reached all the same it
says so once, by the limit's name, and looks at the interval instead.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from ckptd.watch import inotify
from ckptd.watch.inotify import Inotify

MAX_FOLDERS = 16_384
"""Folders watched for one place, about 1 kB of kernel memory each."""
WATCHES_SHARE = 4
"""Of the watches that the user may have, ckptd takes one of so many at most."""
RETRY_S = 60.0
"""Pause after a limit was reached, before another watch is tried."""
SYSCTL_PATH = Path("/proc/sys")

_FOLDER_MASK = inotify.ENTRIES | inotify.DELETE_SELF | inotify.MOVE_SELF
_FILES_MASK = _FOLDER_MASK | inotify.CLOSE_WRITE | inotify.ATTRIB

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """A folder, and which one it was: a new one may bear the same name."""

    path: Path
    dev: int
    ino: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Hints:
    """Where something happened since the last time."""

    names: dict[Path, frozenset[str]]
    """By folder, the entries that came, went or were written; `""` is the folder itself."""
    written: frozenset[Path] = frozenset()
    """Files that somebody has closed who might have written them. Of a file that is written through
    a mapping this may be the only trace: its time stamps move with the first store alone."""
    deleted: frozenset[Path] = frozenset()
    """Folders (in a place of single files: files) that were deleted, perhaps before a look."""
    lost: bool = False
    """The kernel could not keep up: anything may have happened."""


@dataclass(slots=True, kw_only=True)
class _Watch:
    folder: Folder
    number: int
    with_files: bool


class Events:
    """The events of one watched place; used by one thread at a time."""

    def __init__(self, *, place: str, clock: Callable[[], float]) -> None:
        self._place = place
        self._clock = clock
        self._inotify: Inotify | None = None
        self._by_path: dict[Path, _Watch] = {}
        self._by_number: dict[int, _Watch] = {}
        self._resting: dict[Path, None] = {}
        self._max_folders = MAX_FOLDERS
        self._why_polling: str | None = None
        self._said: set[str] = set()
        self._retry_at = float("-inf")

    @property
    def mode(self) -> str:
        """`events`, or `polling (why)`."""
        return "events" if self._why_polling is None else f"polling ({self._why_polling})"

    def fileno(self) -> int | None:
        """Return the descriptor that becomes readable with the next event; None without events."""
        return None if self._inotify is None else self._inotify.fileno()

    def is_watched(self, folder: Folder, *, with_files: bool = False) -> bool:
        """Whether this very folder is watched, and for what is written in it where that is asked."""
        watch = self._by_path.get(folder.path)
        return watch is not None and watch.folder == folder and watch.with_files >= with_files

    def watch(self, folder: Folder, *, with_files: bool = False, make_room: bool = True) -> bool:
        """Watch `folder`, also for files being closed after writing; whether that is new.

        What cannot be watched is polled; a limit that is reached is said in `mode` and the log.
        Without `make_room` no quiet folder is let go for this one, which stays quiet if it is.
        """
        if make_room:
            self._resting.pop(folder.path, None)
        if self.is_watched(folder, with_files=with_files) or not self._may_try():
            return False
        known = self._by_path.get(folder.path)
        if known is not None and known.folder != folder:
            self.forget(folder.path)
        elif known is None and len(self._by_path) >= self._max_folders:
            if not self._resting or not make_room:
                return False
            self.forget(next(iter(self._resting)))
        try:
            inotify_ = self._opened()
            number = inotify_.add(folder.path, _FILES_MASK if with_files else _FOLDER_MASK)
        except OSError as exc:
            self._failed(exc)
            return False
        watch = _Watch(folder=folder, number=number, with_files=with_files)
        self._by_path[folder.path] = self._by_number[number] = watch
        self._why_polling = None
        return True

    def rest(self, path: Path) -> None:
        """Say that the folder at `path` is quiet: its watch is the first to go where room is short."""
        if path in self._by_path:
            self._resting[path] = None

    def forget(self, path: Path) -> None:
        """Watch the folder at `path` no longer; one that is not watched is no error."""
        watch = self._by_path.pop(path, None)
        self._resting.pop(path, None)
        # One folder has one number, also where two paths lead to it: the later has it.
        if watch is not None and self._by_number.get(watch.number) is watch:
            del self._by_number[watch.number]
            if self._inotify is not None:
                self._inotify.remove(watch.number)

    def drain(self) -> Hints:
        """Return what happened since the last call; never blocks."""
        names: dict[Path, set[str]] = {}
        written: set[Path] = set()
        deleted: set[Path] = set()
        lost = False
        for happened in self._inotify.read() if self._inotify is not None else ():
            lost = lost or bool(happened.mask & inotify.Q_OVERFLOW)
            watch = self._by_number.get(happened.watch)
            if watch is None:
                continue
            names.setdefault(watch.folder.path, set()).add(happened.name)
            if happened.mask & inotify.CLOSE_WRITE:
                written.add(watch.folder.path / happened.name)
            of_interest = watch.with_files or happened.mask & inotify.IS_FOLDER
            if happened.mask & inotify.DELETE and of_interest:
                deleted.add(watch.folder.path / happened.name)
            if happened.mask & inotify.GONE:
                self.forget(watch.folder.path)
        if lost:
            self._say("events were lost", why="the kernel's queue (max_queued_events) was full")
        return Hints(
            names={path: frozenset(of) for path, of in names.items()},
            written=frozenset(written),
            deleted=frozenset(deleted),
            lost=lost,
        )

    def poll_only(self, why: str | None) -> None:
        """Do without events because of `why`, said once in the log, until this is None again."""
        if why is not None:
            self.close()
            self._retry_at = float("inf")
            self._polling(why)
        elif self._retry_at == float("inf"):
            self._retry_at = float("-inf")
            self._why_polling = None

    def close(self) -> None:
        """Give all watches back. Calling it again is safe."""
        if self._inotify is not None:
            self._inotify.close()
        self._inotify = None
        self._by_path, self._by_number, self._resting = {}, {}, {}

    def _opened(self) -> Inotify:
        if self._inotify is None:
            self._inotify = Inotify()
            _, limit = _limit("watches")
            self._max_folders = (
                MAX_FOLDERS if limit is None else min(MAX_FOLDERS, limit // WATCHES_SHARE + 1)
            )
        return self._inotify

    def _may_try(self) -> bool:
        return self._why_polling is None or self._clock() >= self._retry_at

    def _failed(self, exc: OSError) -> None:
        """Take in why a folder cannot be watched; only what concerns all of them is said."""
        if exc.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP):
            return  # it went or may not be read: the scan says so
        self._retry_at = self._clock() + RETRY_S
        self._polling(_advice(exc))

    def _polling(self, why: str) -> None:
        self._why_polling = why
        self._say("watching by polling", why=why)

    def _say(self, what: str, *, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            log.warning(what, place=self._place, why=why)


def _limit(of: str) -> tuple[str, int | None]:
    """Return the name and the value of the limit of `watches` or `instances` that is reached first.

    A user namespace (a container) has its own beside that of the machine; the smaller one counts.
    """
    found: list[tuple[str, int]] = []
    for name in (f"fs.inotify.max_user_{of}", f"user.max_inotify_{of}"):
        try:
            value = int((SYSCTL_PATH / name.replace(".", "/")).read_text("ascii"))
        except (OSError, ValueError):
            continue
        found.append((name, value))
    return min(found, key=lambda limit: limit[1], default=(f"fs.inotify.max_user_{of}", None))


def _advice(exc: OSError) -> str:
    """Return why there are no (more) events, and what gives them back."""
    if exc.errno == errno.ENOSPC:
        return _used_up("watches", 524_288)
    if exc.errno == errno.EMFILE and _has_descriptors():
        return _used_up("instances", 1024)
    if exc.errno == errno.EMFILE:
        return "this process has no file descriptor left: raise LimitNOFILE in its unit"
    return f"inotify: {exc.strerror}"


def _used_up(of: str, better: int) -> str:
    name, value = _limit(of)
    what = name if value is None else f"{name} ({value:,})"
    return f"{what} is used up: raise it with `sysctl {name}={better}`"


def _has_descriptors() -> bool:
    try:
        os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
