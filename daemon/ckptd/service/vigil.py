"""Looking after a runner at work: does it get on, how far has it come, and what was it lost by?

A runner that says nothing new for too long is taken to hang and is replaced. One that ends without
a word leaves a failure that says how: a crash (a fault of its own, a lack of memory, a hang), of which
a few at the same place quarantine the job, or a kill by who knows whom.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

from ckptd import errors
from ckptd.jobs import progress
from ckptd.jobs.failing import RUNNER_DIED, Failure
from ckptd.telemetry.status import Phase

_FAULTS = frozenset({
    signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT, signal.SIGSYS,
})  # fmt: skip
_VMSTAT = Path("/proc/vmstat")


class Vigil:
    """One job in one runner; `stall_s` is how long it may say nothing new."""

    def __init__(self, *, stall_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._stall_s = stall_s
        self._clock = clock
        self._heard_at = clock()
        self._excused_s = 0.0
        self._phase = Phase.STARTING
        self._oom_kills = oom_kills()
        self._given_up: str | None = None
        self.reached = 0
        """Steps that the job has made: phases, files finished, files sent. A job that is resumed
        makes them again, so that the same number is the same place."""

    def heard(self, report: progress.Report) -> None:
        """The runner has said something; only what is new is sent."""
        self._heard_at = self._clock()
        self._excused_s = 0.0
        match report:
            case progress.PhaseChanged():
                self._phase = report.phase
                self.reached += 1
            case progress.HubReported(event="waiting"):
                self._excused_s = report.wait_s or 0.0
            case progress.ShardFinished() | progress.HubReported():
                self.reached += 1
            case _:
                pass

    def hangs(self) -> bool:
        """Say whether nothing was heard for too long; from then on that is what it was lost by."""
        silent_s = self._clock() - self._heard_at
        if silent_s > self._stall_s + self._excused_s:
            self.give_up(f"made no progress for {silent_s:.0f} s while {self._phase.value}")
        return self._given_up is not None

    def give_up(self, why: str) -> None:
        """The runner is to be killed by us, for this reason."""
        self._given_up = why

    def loss(self, status: int) -> Failure:
        """Return what the end of the runner with exit `status` (negative: a signal) is to the job."""
        if self._given_up is not None:
            hint = "it was replaced; is the storage or the device stuck?"
            return self._lost(f"the runner {self._given_up}", hint, crash=True)
        if -status == signal.SIGKILL and self._oom_kills < oom_kills():
            hint = "lower byte_budget, or give the machine more memory"
            return self._lost("the runner ran out of memory and was killed", hint, crash=True)
        if status < 0:
            how = f"signal {-status} ({_name(-status)})"
            crash = -status in _FAULTS
        else:
            how, crash = f"status {status}", True
        hint = "out of memory or killed? the kernel's log says; the job goes on where it was"
        return self._lost(f"the runner process ended with {how}", hint, crash=crash)

    def _lost(self, message: str, hint: str, *, crash: bool) -> Failure:
        return Failure(
            code=RUNNER_DIED if self.reached else "RunnerNotReady",
            message=message,
            hint=hint,
            retry=errors.Retry.LATER,
            reached=self.reached,
            crashes=int(crash),
        )


def oom_kills() -> int:
    """Return how many processes the kernel has killed for lack of memory since it started."""
    try:
        lines = _VMSTAT.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
