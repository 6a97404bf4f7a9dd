"""A budget of bytes: work is admitted before it takes memory, and waits while there is none."""

from __future__ import annotations

from collections import deque

import anyio


class ByteBudget:
    """At most `total` bytes admitted at once, first come first served.

    A request larger than the whole budget is admitted alone: a single row of a tensor is the
    smallest thing that can be computed. Belongs to one event loop.
    """

    def __init__(self, total: int) -> None:
        if total <= 0:
            raise ValueError(f"a budget must be positive: {total}")
        self.total = total
        self._used = 0
        self._waiting: deque[tuple[int, anyio.Event]] = deque()
        self.peak = 0

    @property
    def used(self) -> int:
        """Bytes admitted now."""
        return self._used

    async def acquire(self, nbytes: int) -> int:
        """Wait until `nbytes` are free; return what must be released (never over the total)."""
        share = min(nbytes, self.total)
        if self._waiting or self._used + share > self.total:
            event = anyio.Event()
            entry = (share, event)
            self._waiting.append(entry)
            try:
                await event.wait()
            except BaseException:
                if event.is_set():
                    self.release(share)
                else:
                    self._waiting.remove(entry)
                    self._admit()
                raise
            return share
        self._take(share)
        return share

    def release(self, share: int) -> None:
        """Give back what `acquire` returned."""
        self._used -= share
        assert self._used >= 0
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._used + self._waiting[0][0] <= self.total:
            share, event = self._waiting.popleft()
            self._take(share)
            event.set()

    def _take(self, share: int) -> None:
        self._used += share
        self.peak = max(self.peak, self._used)
