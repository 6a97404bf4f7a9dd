"""File system events as hints: something may have changed, look again.

No decision rests on an event. They are lost on overflow, on network file systems, when a root is
made anew and in many other cases, and a scan at an interval finds all of that; an event only makes
the next scan come sooner, which is what saves a checkpoint that lives for a moment.

Watched, not recursively, are the folders of the last scan and the candidates that still change.
Whenever that set changes the watch is set up anew: watch first, then scan, so that nothing falls
between. A folder that was removed and made again is another one (its inode says so).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection

import anyio
import structlog
import watchfiles
from anyio.abc import TaskStatus
from watchfiles._rust_notify import WatchfilesRustInternalError

from ckptd.aio import groups
from ckptd.watch.scan import Folder

MAX_FOLDERS = 512
"""Folders watched for one place; beyond these the interval has to do."""
DEBOUNCE_MS = 50
STEP_MS = 20
"""How long events are collected, and how long nothing must come after the last of them."""

log = structlog.get_logger()


class Events:
    """The events of one watched place."""

    def __init__(self, poke: Callable[[], None], *, place: str) -> None:
        self._poke = poke
        self._place = place
        self._folders: frozenset[Folder] = frozenset()
        self._changed = anyio.Event()
        self._why_polling: str | None = None

    @property
    def mode(self) -> str:
        """`events`, or `polling (why)`."""
        return "events" if self._why_polling is None else f"polling ({self._why_polling})"

    def poll_only(self, why: str) -> None:
        """Do without events from now on; said once in the log."""
        if self._why_polling is None:
            log.warning("watching by polling", place=self._place, why=why)
            self._why_polling = why
            self._changed.set()

    def follow(self, folders: Collection[Folder]) -> None:
        """Watch these folders in place of those before; the same ones change nothing."""
        wanted = frozenset(sorted(folders, key=lambda folder: folder.path)[:MAX_FOLDERS])
        if wanted != self._folders:
            self._folders = wanted
            self._changed.set()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Call `poke` for every bundle of events, until cancelled."""
        task_status.started()
        while True:
            self._changed = anyio.Event()
            if self._why_polling is None and self._folders:
                await self._watch(self._folders, self._changed)
            await self._changed.wait()

    async def _watch(self, folders: frozenset[Folder], changed: anyio.Event) -> None:
        """Watch `folders` until `changed`."""
        stop = anyio.Event()
        paths = [folder.path for folder in folders]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_set_after, changed, stop)
            # Runs when awatch first waits: the watch is set up by then.
            tasks.start_soon(self._poke_from_task)
            try:
                changes = watchfiles.awatch(
                    *paths,
                    watch_filter=None,
                    debounce=DEBOUNCE_MS,
                    step=STEP_MS,
                    stop_event=stop,
                    force_polling=False,
                    recursive=False,
                    ignore_permission_denied=True,
                )
                async with contextlib.aclosing(changes):
                    async for _ in changes:
                        self._poke()
            except FileNotFoundError:
                self._folders = frozenset()  # one went meanwhile: the next scan says which are left
                self._poke()
            except (OSError, WatchfilesRustInternalError) as exc:
                self.poll_only(str(exc))
            except ExceptionGroup as group:  # what fails later comes out of its own task group
                expected, rest = group.split((OSError, WatchfilesRustInternalError))
                if rest is not None or expected is None:
                    raise
                self.poll_only(str(groups.first(expected, Exception)))
            tasks.cancel_scope.cancel()

    async def _poke_from_task(self) -> None:
        self._poke()


async def _set_after(changed: anyio.Event, stop: anyio.Event) -> None:
    """Set `stop` when `changed` is, or on cancellation: the watching thread hears nothing else."""
    try:
        await changed.wait()
    finally:
        stop.set()
