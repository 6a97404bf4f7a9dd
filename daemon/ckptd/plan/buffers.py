"""Host memory that is used again: touched once, then given back to a pool instead of freed.

Fresh memory for every block costs page faults, and blocks freed by many threads stay in the
allocator of each. A pool holds what the blocks in flight need: their number is bounded by the byte
budget, not here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

B = TypeVar("B")

MIN_BYTES = 1 << 20
"""The smallest buffer; sizes are quarters of powers of two, so that a few sizes serve all blocks."""


class BufferPool(Generic[B]):
    """Buffers made by `allocate(capacity)`; any thread takes and gives.

    Used and idle ones together are never more than what was once in use at a time: of what lies idle
    only as much is kept, and dropped first where a buffer of another size is wanted.
    """

    def __init__(self, allocate: Callable[[int], B]) -> None:
        self._allocate = allocate
        self._idle: dict[int, list[B]] = {}
        self._idle_bytes = 0
        self._used_bytes = 0
        self._most_bytes = 0
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> B:
        """Return a buffer of at least `nbytes`; its content is whatever was in it."""
        capacity = _capacity(nbytes)
        with self._lock:
            self._used_bytes += capacity
            self._most_bytes = max(self._most_bytes, self._used_bytes)
            idle = self._idle.get(capacity)
            if idle:
                self._idle_bytes -= capacity
                return idle.pop()
            self._drop()
        return self._allocate(capacity)

    def give(self, buffer: B, capacity: int) -> None:
        """Take back a buffer of `capacity` that nobody uses any more."""
        with self._lock:
            self._used_bytes -= capacity
            self._idle.setdefault(capacity, []).append(buffer)
            self._idle_bytes += capacity
            self._drop()

    def _drop(self) -> None:
        """Drop idle buffers, the largest first, until all are within what was in use at once."""
        for capacity in sorted(self._idle, reverse=True):
            while self._used_bytes + self._idle_bytes > self._most_bytes and self._idle[capacity]:
                self._idle[capacity].pop()
                self._idle_bytes -= capacity


def _capacity(nbytes: int) -> int:
    unit = max(MIN_BYTES // 4, 1 << max(0, (nbytes - 1).bit_length() - 3))
    return max(MIN_BYTES, -(-nbytes // unit) * unit)
