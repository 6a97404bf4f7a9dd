"""The byte budget: never more admitted than there is, in order, and nothing lost on the way."""

from __future__ import annotations

import asyncio

import anyio
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.aio.budget import ByteBudget


def test_a_budget_is_positive() -> None:
    """None of nothing can be admitted."""
    with pytest.raises(ValueError, match="positive"):
        ByteBudget(0)


async def test_requests_wait_their_turn() -> None:
    """First come first served: a small request does not overtake a large one that waits."""
    budget = ByteBudget(10)
    order = []

    async def take(name: str, nbytes: int) -> None:
        await budget.acquire(nbytes)
        order.append(name)

    first = await budget.acquire(6)
    async with anyio.create_task_group() as group:
        group.start_soon(take, "large", 8)
        await anyio.wait_all_tasks_blocked()
        group.start_soon(take, "small", 1)
        await anyio.wait_all_tasks_blocked()
        assert order == []
        budget.release(first)
    assert order == ["large", "small"]
    assert (budget.used, budget.peak) == (9, 9)


async def test_a_request_over_the_total_is_admitted_alone() -> None:
    """The smallest thing that can be computed is admitted, however large it is."""
    budget = ByteBudget(10)
    small = await budget.acquire(1)
    async with anyio.create_task_group() as group:

        async def take() -> None:
            share = await budget.acquire(1000)
            assert budget.used == share == 10
            budget.release(share)

        group.start_soon(take)
        await anyio.wait_all_tasks_blocked()
        assert budget.used == 1
        budget.release(small)
    assert budget.used == 0


async def test_who_gives_up_waiting_takes_nothing() -> None:
    """A cancelled request leaves the queue, and those behind it move up."""
    budget = ByteBudget(10)
    share = await budget.acquire(5)
    admitted = anyio.Event()
    async with anyio.create_task_group() as group:
        scope = anyio.CancelScope()

        async def give_up() -> None:
            with scope:
                await budget.acquire(10)

        async def behind() -> None:
            await budget.acquire(5)
            admitted.set()

        group.start_soon(give_up)
        await anyio.wait_all_tasks_blocked()
        group.start_soon(behind)
        await anyio.wait_all_tasks_blocked()
        scope.cancel()
        with anyio.fail_after(5):
            await admitted.wait()
    assert budget.used == 10
    budget.release(share)
    assert budget.used == 5


async def test_who_is_cancelled_when_admitted_gives_back() -> None:
    """Admission and cancellation in the same moment lose no bytes."""
    budget = ByteBudget(10)
    share = await budget.acquire(10)
    task = asyncio.create_task(budget.acquire(7))
    await anyio.wait_all_tasks_blocked()
    budget.release(share)
    assert budget.used == 7
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert budget.used == 0


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 30), max_size=20), total=st.integers(1, 20))
def test_the_total_is_never_exceeded(sizes: list[int], total: int) -> None:
    """Whatever is asked for in whatever order: at most the total at once, all served, none left."""

    async def main() -> None:
        budget = ByteBudget(total)
        served = 0

        async def use(nbytes: int) -> None:
            nonlocal served
            share = await budget.acquire(nbytes)
            assert budget.used <= total
            await checkpoint()
            budget.release(share)
            served += 1

        async with anyio.create_task_group() as group:
            for nbytes in sizes:
                group.start_soon(use, nbytes)
        assert served == len(sizes)
        assert budget.used == 0
        assert budget.peak <= total

    anyio.run(main)
