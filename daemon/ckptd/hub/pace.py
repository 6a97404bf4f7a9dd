"""A cap on the bytes a second that this process sends to a Hub, shared by all of its uploads.

Belongs to threads, not to the event loop: the bytes are sent by the client's threads. Whoever is
about to send takes its bytes first and waits until they are due. There is no saving up: after a
pause the first bytes are due at once and the next ones at the pace, so that in no second more than
the cap is sent (and one piece).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator

PIECE_BYTES = 64 * 1024
"""Most that is sent between two waits."""
PIECES_A_SECOND = 16
"""At least so many pieces a second, so that slow paces are even too."""


class Pace:
    """At most `bytes_per_s`, first come first served; None for no cap."""

    def __init__(
        self,
        bytes_per_s: float | None = None,
        *,
        now_s: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if bytes_per_s is not None and bytes_per_s <= 0:
            raise ValueError(f"a pace must be positive: {bytes_per_s}")
        self.bytes_per_s = bytes_per_s
        """May be changed at any time."""
        self._now_s = now_s
        self._sleep = sleep
        self._lock = threading.Lock()
        self._free_s = 0.0

    def take(self, num_bytes: int) -> None:
        """Return when `num_bytes` may be sent."""
        rate = self.bytes_per_s
        if rate is None:
            return
        with self._lock:
            now_s = self._now_s()
            due_s = max(now_s, self._free_s)
            self._free_s = due_s + num_bytes / rate
        if due_s > now_s:
            self._sleep(due_s - now_s)

    @property
    def piece_bytes(self) -> int:
        """Most that should be taken at once."""
        if self.bytes_per_s is None:
            return PIECE_BYTES
        return max(1, min(PIECE_BYTES, int(self.bytes_per_s / PIECES_A_SECOND)))

    def pieces(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Yield the bytes of `chunks`, each piece when it is due."""
        for chunk in chunks:
            if self.bytes_per_s is None:
                yield chunk
                continue
            view, at = memoryview(chunk), 0
            while at < len(view):
                piece = bytes(view[at : at + self.piece_bytes])
                self.take(len(piece))
                yield piece
                at += len(piece)
