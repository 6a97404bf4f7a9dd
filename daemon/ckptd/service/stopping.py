"""How the daemon ends in order: what is nearly done may end, the service manager is kept waiting.

Nothing depends on it: a job that is cut off goes on at the next start.
"""

from __future__ import annotations

import anyio
import structlog

from ckptd.service.board import Board
from ckptd.service.notify import Notifier

STEP_S = 5.0
"""Seconds between two signs to the service manager."""
CLOSING_S = 30.0
"""How long it may take to end the runners and to give jobs back, asked for in advance."""

log = structlog.get_logger()


async def drain(ended: anyio.Event, notifier: Notifier, *, board: Board, grace_s: float) -> None:
    """Return when the worker has `ended`, or when `grace_s` seconds have passed."""
    if board.running and grace_s > 0:
        log.info("waiting for running jobs", jobs=board.running, seconds=grace_s)
    with anyio.move_on_after(grace_s):
        while not ended.is_set():
            notifier.extend(STEP_S + CLOSING_S)
            notifier.status(f"stopping, {len(board.running)} jobs may still end")
            with anyio.move_on_after(STEP_S):
                await ended.wait()
    notifier.extend(CLOSING_S)
