"""Retrying: how long, how often, what for."""

from __future__ import annotations

import pytest

from ckptd import errors
from ckptd.aio import backoff


class ManualClock:
    """A clock that only sleeping moves; the dice always show `draw`."""

    def __init__(self, draw: float = 0.0) -> None:
        self.now_s = 0.0
        self.waits: list[float] = []
        self.time = backoff.Time(now_s=lambda: self.now_s, sleep=self._sleep, draw=lambda: draw)

    async def _sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now_s += seconds


class Failing:
    """A call that raises the given errors, one a call, and then returns how often it was called."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.calls = 0

    async def __call__(self) -> int:
        self.calls += 1
        if self.failures:
            raise self.failures.pop(0)
        return self.calls


def unavailable(asked_s: float | None = None) -> errors.HubUnavailable:
    return errors.HubUnavailable("no", retry_after_s=asked_s)


async def test_waits_grow_to_a_bound() -> None:
    """Each wait is twice the one before, up to the longest."""
    clock, policy = ManualClock(), backoff.Backoff(first_s=1, longest_s=5, attempts=6)
    result = await backoff.retry(Failing(*[unavailable()] * 5), backoff=policy, clock=clock.time)
    assert result == 6
    assert clock.waits == [1, 2, 4, 5, 5]


@pytest.mark.parametrize("draw", [0.0, 0.3, 0.999])
def test_jitter_never_shortens_what_was_asked(draw: float) -> None:
    """A wait the other side asks for is waited in full, and never more than a second longer."""
    policy = backoff.Backoff()
    assert 7 <= policy.wait_s(1, asked_s=7, draw=draw) < 8


def test_own_waits_are_spread() -> None:
    """Two jobs that fail together do not come back together."""
    policy = backoff.Backoff(first_s=10)
    assert policy.wait_s(1, asked_s=None, draw=0.9) < policy.wait_s(1, asked_s=None, draw=0.1)


async def test_an_endless_wait_is_cut() -> None:
    """A server that asks for an hour gets the cap."""
    clock, policy = ManualClock(), backoff.Backoff(asked_longest_s=30)
    await backoff.retry(Failing(unavailable(3600)), backoff=policy, clock=clock.time)
    assert clock.waits == [30]


async def test_a_wait_that_does_not_fit_is_not_begun() -> None:
    """An error whose wait would end after the time allowed is raised at once, with its wait."""
    clock, policy = ManualClock(), backoff.Backoff(total_s=20)
    with pytest.raises(errors.HubUnavailable) as caught:
        await backoff.retry(Failing(unavailable(60)), backoff=policy, clock=clock.time)
    assert caught.value.retry_after_s == 60
    assert clock.waits == []


async def test_attempts_are_bounded() -> None:
    """After the last attempt the last failure is raised."""
    call, clock = Failing(*[unavailable()] * 9), ManualClock()
    with pytest.raises(errors.HubUnavailable):
        await backoff.retry(call, backoff=backoff.Backoff(attempts=3), clock=clock.time)
    assert call.calls == 3


@pytest.mark.parametrize("failure", [errors.HubRejected("no"), ValueError("a bug")])
async def test_only_temporary_failures_are_retried(failure: Exception) -> None:
    """A final refusal and an unclassified error pass through after one call."""
    call = Failing(failure)
    with pytest.raises(type(failure)):
        await backoff.retry(call, backoff=backoff.Backoff(), clock=ManualClock().time)
    assert call.calls == 1


async def test_every_wait_is_announced() -> None:
    """Whoever watches hears of a wait before it begins, with its length and reason."""
    clock, heard = ManualClock(), []
    await backoff.retry(
        Failing(unavailable(4)), backoff=backoff.Backoff(), clock=clock.time, on_wait=heard.append
    )
    assert [(wait.wait_s, wait.next_attempt) for wait in heard] == [(4, 2)]
    assert isinstance(heard[0].error, errors.HubUnavailable)
