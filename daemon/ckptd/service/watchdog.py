"""The watchdog is fed while work progresses, and only then.

Each feeding is earned: the event loop came round to it, the job store answered from its thread (so
that threads and database work too), and no running job has been silent for longer than it may.
Where one of them hangs, systemd gets no sign of life, ends the daemon and starts it again; jobs go
on where they were. A runner that hangs is the worker's to replace; the watchdog is for when it does
not.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import structlog

from ckptd.service.board import Board
from ckptd.service.notify import Notifier

SHARE = 1 / 4
"""Of systemd's period that passes between two feedings: one that comes late is no death."""

log = structlog.get_logger()


async def feed(
    notifier: Notifier,
    *,
    board: Board,
    silence_s: float,
    answers: Callable[[], Awaitable[object]],
) -> None:
    """Feed the watchdog until cancelled; returns at once where systemd does not watch.

    Args:
        notifier: where systemd listens.
        board: knows when each running job last moved.
        silence_s: how long a running job may not move.
        answers: comes back when the job store works.
    """
    if notifier.watchdog_s is None:
        return
    told = False
    while True:
        await answers()
        silent = board.silent_jobs(silence_s)
        if not silent:
            notifier.watchdog()
        elif not told:
            log.error("watchdog not fed", jobs=silent, why="they do not move", seconds=silence_s)
        told = bool(silent)
        await anyio.sleep(notifier.watchdog_s * SHARE)
