"""The pool: memory is used again, and never grows beyond what was needed at once."""

from __future__ import annotations

import random

from ckptd.plan.buffers import MIN_BYTES, BufferPool


class _Memory:
    """Buffers that are counted while anyone holds them."""

    def __init__(self) -> None:
        self.held_bytes = 0
        self.made = 0

    def allocate(self, capacity: int) -> _Buffer:
        self.made += 1
        return _Buffer(self, capacity)


class _Buffer:
    def __init__(self, memory: _Memory, capacity: int) -> None:
        self.memory, self.capacity = memory, capacity
        memory.held_bytes += capacity

    def __del__(self) -> None:
        self.memory.held_bytes -= self.capacity


def test_the_pool_holds_no_more_than_was_once_in_use() -> None:
    """Whatever the order of sizes: idle buffers make way for those of other sizes."""
    memory, rng = _Memory(), random.Random(0)
    pool = BufferPool(memory.allocate)
    used: list[_Buffer] = []
    most = 0
    for _ in range(2000):
        if used and rng.random() < 0.5:
            buffer = used.pop(rng.randrange(len(used)))
            pool.give(buffer, buffer.capacity)
            del buffer
        else:
            used.append(pool.take(rng.randrange(1, 40 * MIN_BYTES)))
        most = max(most, sum(buffer.capacity for buffer in used))
        assert memory.held_bytes <= most


def test_blocks_of_equal_size_are_allocated_once_each() -> None:
    """Four at a time, a hundred times over, take four buffers."""
    memory = _Memory()
    pool = BufferPool(memory.allocate)
    for _ in range(100):
        for buffer in [pool.take(3 * MIN_BYTES + 5) for _ in range(4)]:
            pool.give(buffer, buffer.capacity)
    assert memory.made == 4


def test_a_buffer_is_large_enough_and_wastes_little() -> None:
    """At most a quarter more than asked for, beyond the smallest size."""
    memory = _Memory()
    pool = BufferPool(memory.allocate)
    for nbytes in (0, 1, MIN_BYTES, MIN_BYTES + 1, (16 << 20) + 1, (31 << 20) + 7):
        capacity = pool.take(nbytes).capacity
        assert nbytes <= capacity <= max(MIN_BYTES, nbytes * 5 // 4 + 1)
