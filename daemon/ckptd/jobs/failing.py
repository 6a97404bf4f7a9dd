"""Failures of jobs as values: what failed, how often in a row, and when it is tried again. Pure."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ckptd import errors

RUNNER_DIED = "RunnerDied"
"""The code of the failure that a runner leaves which ends without a word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An error as it crosses a process border and stands in a job row."""

    code: str
    """Class name in `ckptd.errors`."""
    message: str
    hint: str | None = None
    retry: errors.Retry = errors.Retry.NEVER
    retry_after_s: float | None = None
    exit_code: int = 1
    reached: int = 0
    """How far the job had come when its runner was lost, see `progress.Reached`."""
    losses: int = 0
    """How many runners in a row were lost without coming further."""
    crashes: int = 0
    """Those of them that were lost by what they did (a fault, too much memory, a hang), not by
    somebody's kill."""

    @staticmethod
    def of(error: errors.CkptdError) -> Failure:
        """Return `error` as a value."""
        return Failure(
            code=error.code,
            message=error.message,
            hint=error.hint,
            retry=error.retry,
            retry_after_s=error.retry_after_s,
            exit_code=error.exit_code,
        )

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}; {self.hint}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryLimits:
    """How often and how fast failed jobs are tried again."""

    max_failures: int = 50
    """Failures after which a job is given up; with the other defaults about twelve hours."""
    base_s: float = 10.0
    """Longest pause after the first failure, in seconds; it doubles with each further one."""
    cap_s: float = 900.0
    """Longest pause ever, in seconds, also where the Hub asks for more."""
    wait_s: float = 600.0
    """Seconds between tries of a job that waits for a person."""
    max_crashes: int = 3
    """Runners that a job may crash at the same place before it is quarantined."""
    max_losses: int = 10
    """The same for runners that were killed by who knows whom."""


def backoff_s(
    failures: int, *, limits: RetryLimits, jitter: float, asked_s: float | None = None
) -> float:
    """Return the pause after the `failures`-th failure in a row, in seconds.

    Doubles from `base_s` to `cap_s`, and is spread over its upper half by `jitter` (0 to 1). Where
    the other side asked for `asked_s`, it is at least that, but never more than `cap_s`.
    """
    longest = min(limits.cap_s, limits.base_s * 2.0 ** min(failures - 1, 60))
    pause = longest * (0.5 + 0.5 * jitter)
    return min(limits.cap_s, max(pause, asked_s or 0.0))


def counted(failure: Failure, before: Failure | None) -> Failure:
    """Return the loss of a runner with the losses before it at the same place counted in."""
    if before is None or before.code != RUNNER_DIED or failure.reached > before.reached:
        return dataclasses.replace(failure, losses=1)
    return dataclasses.replace(
        failure,
        losses=before.losses + 1,
        crashes=before.crashes + failure.crashes,
        reached=before.reached,
    )


def is_quarantined(failure: Failure, limits: RetryLimits) -> bool:
    """Return whether a job has lost so many runners that only a person should try it again."""
    return failure.crashes >= limits.max_crashes or failure.losses >= limits.max_losses
