"""A budget of bytes for threads: `aio.budget` for work that no event loop drives."""

from __future__ import annotations

import threading
from collections import deque


class Closed(ValueError):
    """The work is over: nothing is admitted any more, and what waits is sent home."""


class ThreadBudget:
    """At most `total` bytes admitted at once, first come first served; for any threads.

    A request larger than the whole budget is admitted alone. A thread that waits in `take` should
    hold nothing of it, or threads may wait for each other.
    """

    def __init__(self, total: int) -> None:
        if total <= 0:
            raise ValueError(f"a budget must be positive: {total}")
        self.total = total
        self.peak = 0
        self._used = 0
        self._closed = False
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    def take(self, nbytes: int) -> int:
        """Wait until `nbytes` are free; return what must be given back (never over the total).

        Raises:
            Closed: before, or meanwhile.
        """
        share = min(nbytes, self.total)
        turn = object()
        with self._changed:
            self._waiting.append(turn)
            try:
                self._changed.wait_for(
                    lambda: (
                        self._closed
                        or (self._waiting[0] is turn and self._used + share <= self.total)
                    )
                )
            finally:
                self._waiting.remove(turn)
                self._changed.notify_all()
            if self._closed:
                raise Closed("the job is over")
            self._admit(share)
        return share

    def try_take(self, nbytes: int) -> int | None:
        """Return what must be given back if `nbytes` are free and nobody waits, else None."""
        share = min(nbytes, self.total)
        with self._changed:
            if self._closed or self._waiting or self._used + share > self.total:
                return None
            self._admit(share)
        return share

    def give(self, share: int) -> None:
        """Give back what was taken."""
        with self._changed:
            self._used -= share
            assert self._used >= 0
            self._changed.notify_all()

    def close(self) -> None:
        """Admit nothing from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _admit(self, share: int) -> None:
        self._used += share
        self.peak = max(self.peak, self._used)
