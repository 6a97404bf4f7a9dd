"""The budget of threads: what is admitted, in which order, and how it ends."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ckptd.plan.budget import Closed, ThreadBudget


def test_a_request_larger_than_all_is_admitted_alone() -> None:
    """It gets the whole budget, and nothing else is admitted meanwhile."""
    budget = ThreadBudget(10)
    assert budget.take(25) == 10
    assert budget.try_take(1) is None
    budget.give(10)
    assert budget.try_take(4) == 4


def test_who_waits_comes_before_who_only_tries() -> None:
    """A thread that waits for much is not starved by others that try for little."""
    budget = ThreadBudget(10)
    share = budget.take(6)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(budget.take, 8)
        while budget.try_take(1) is not None:  # until it has come to wait
            budget.give(1)
        assert not waiting.done()
        budget.give(share)
        assert waiting.result(10) == 8
    assert budget.peak <= 10


def test_any_number_of_threads_stay_within_it() -> None:
    """Used bytes never exceed the total, and come back to nothing."""
    budget = ThreadBudget(100)
    used = 0
    most = 0
    lock = threading.Lock()

    def work(nbytes: int) -> None:
        nonlocal used, most
        for _ in range(50):
            share = budget.take(nbytes)
            with lock:
                used += share
                most = max(most, used)
            with lock:
                used -= share
            budget.give(share)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(10, 90, 10)))
    assert (used, most <= 100, budget.peak <= 100) == (0, True, True)


def test_closing_sends_home_what_waits() -> None:
    """A waiting thread ends with Closed, and so does everybody who comes later."""
    budget = ThreadBudget(10)
    budget.take(10)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(budget.take, 1)
        budget.close()
        with pytest.raises(Closed):
            waiting.result(10)
    with pytest.raises(Closed):
        budget.take(1)
    assert budget.try_take(1) is None
