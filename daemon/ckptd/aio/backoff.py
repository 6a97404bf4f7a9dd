"""Trying again after a temporary failure: how often, how long in between, and when to stop.

Owns the arithmetic (`Backoff`, pure) and the loop (`retry`). It retries `CkptdError`s only, because
only those say whether a second try can help; anything else passes through at once.

Promises: waits grow exponentially with jitter, so that many jobs do not come back together; a wait
the other side asked for (`retry_after_s`) is honoured, up to a cap; the number of attempts and the
time spent are bounded; a wait that would not fit into what is left of that time is not begun: the
error is raised at once, with `retry_after_s` in it for whoever schedules the next try.
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import anyio

from ckptd import errors

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """How patient to be. All durations are seconds; the defaults suit a web service."""

    first_s: float = 1.0
    """The wait after the first failure, before jitter."""
    factor: float = 2.0
    """Each further wait is this many times longer."""
    longest_s: float = 60.0
    """No own wait is longer than this."""
    asked_longest_s: float = 300.0
    """A wait the other side asks for is cut to this."""
    jitter: float = 0.5
    """The share of a wait that is random: 0.5 draws between 50 % and 100 % of it."""
    attempts: int = 8
    """Calls in all, the first one included."""
    total_s: float = 900.0
    """No wait is begun that would end later than this after the first call."""

    def wait_s(self, failures: int, *, asked_s: float | None, draw: float) -> float:
        """Return the seconds to wait after failure number `failures` (1 is the first).

        `asked_s` is what the other side asked for: never waited less than that (up to the cap), and
        a little more by jitter, since everybody was told the same number. `draw` is in [0, 1).
        """
        own_s = min(self.longest_s, self.first_s * self.factor ** (failures - 1))
        if asked_s is None:
            return own_s * (1 - self.jitter * draw)
        return min(asked_s, self.asked_longest_s) + min(own_s, 1.0) * self.jitter * draw


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """A wait about to begin: after which error, for how long, and which call comes next."""

    error: errors.CkptdError
    wait_s: float
    next_attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Time:
    """The clock, the pause and the dice of a retry loop; tests bring their own."""

    now_s: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = anyio.sleep
    draw: Callable[[], float] = random.random


REAL_TIME = Time()


def is_temporary(error: errors.CkptdError) -> bool:
    """Say whether the error's class promises that the same call may pass later."""
    return error.retry is errors.Retry.LATER


class Tries:
    """The failures of one undertaking so far: counts them, and waits between them.

    For loops that do something else between the calls (re-read, rebase); `retry` is the plain one.
    """

    def __init__(
        self,
        backoff: Backoff,
        *,
        clock: Time = REAL_TIME,
        on_wait: Callable[[Wait], None] = lambda _: None,
    ) -> None:
        self._backoff = backoff
        self._clock = clock
        self._on_wait = on_wait
        self._started_s = clock.now_s()
        self.failures = 0

    async def pause(self, error: errors.CkptdError) -> None:
        """Wait as long as `error` and the policy ask, or raise `error` when patience is used up.

        Raises:
            errors.CkptdError: `error` itself: attempts or time are used up, or the wait that the
                other side asks for would end after the time allowed.
        """
        self.failures += 1
        policy, asked_s = self._backoff, error.retry_after_s
        wait_s = policy.wait_s(self.failures, asked_s=asked_s, draw=self._clock.draw())
        spent_s = self._clock.now_s() - self._started_s
        if self.failures >= policy.attempts or spent_s + wait_s > policy.total_s:
            raise error
        self._on_wait(Wait(error=error, wait_s=wait_s, next_attempt=self.failures + 1))
        await self._clock.sleep(wait_s)


async def retry(
    call: Callable[[], Awaitable[T]],
    *,
    backoff: Backoff,
    wanted: Callable[[errors.CkptdError], bool] = is_temporary,
    on_wait: Callable[[Wait], None] = lambda _: None,
    clock: Time = REAL_TIME,
) -> T:
    """Return what `call` returns, calling it again after every failure that is `wanted`.

    `call` must be safe to repeat. `on_wait` is told before each wait begins. Cancellation ends a
    wait at once.

    Raises:
        errors.CkptdError: the last failure, when patience is used up or it is not `wanted`.
    """
    tries = Tries(backoff, clock=clock, on_wait=on_wait)
    while True:
        try:
            return await call()
        except errors.CkptdError as error:
            if not wanted(error):
                raise
            failure = error
        await tries.pause(failure)
