"""How a push tries again: patience, clock and reporting in one value that its parts share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from ckptd import errors, units
from ckptd.aio import backoff
from ckptd.hub import push

T = TypeVar("T")

Report = Callable[[push.HubEvent], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempts:
    """Runs calls that may be repeated, and tells about every wait before it begins."""

    report: Report
    patience: backoff.Backoff = field(default_factory=backoff.Backoff)
    clock: backoff.Time = backoff.REAL_TIME

    async def run(self, call: Callable[[], Awaitable[T]], *, absent_ok: bool = False) -> T:
        """Return what `call` returns; repeat it while the Hub is unavailable.

        `absent_ok` also repeats after a 404: for what was made a moment ago and may not be visible
        on every server of the Hub yet.
        """
        kinds = (
            (errors.HubUnavailable, errors.HubNotFound) if absent_ok else (errors.HubUnavailable,)
        )
        return await backoff.retry(
            call,
            backoff=self.patience,
            wanted=lambda error: isinstance(error, kinds),
            on_wait=self._tell,
            clock=self.clock,
        )

    def tries(self) -> backoff.Tries:
        """Return a counter of failures for a loop that does more than repeat."""
        return backoff.Tries(self.patience, clock=self.clock, on_wait=self._tell)

    def _tell(self, wait: backoff.Wait) -> None:
        self.report(
            push.HubEvent(
                happening=push.Happening.WAITING,
                text=f"{wait.error.message}; next try in {units.format_duration(wait.wait_s)}",
                wait_s=wait.wait_s,
            )
        )
