"""What a runner was lost by, and when it counts as hanging."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from ckptd.errors import Retry
from ckptd.jobs import progress
from ckptd.jobs.failing import RUNNER_DIED
from ckptd.service import vigil
from ckptd.service.vigil import Vigil
from ckptd.telemetry.status import Counters, Phase

PLANNING = progress.PhaseChanged(phase=Phase.PLANNING)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """A clock that tests turn."""
    return Clock()


@pytest.fixture
def watched(clock: Clock) -> Vigil:
    """A runner that has begun to plan."""
    made = Vigil(stall_s=60.0, clock=clock)
    made.heard(PLANNING)
    return made


def test_a_runner_that_moves_bytes_does_not_hang(watched: Vigil, clock: Clock) -> None:
    """Each report gives it its whole time again."""
    for _ in range(10):
        clock.now += 59.0
        watched.heard(progress.BytesMoved(counters=Counters()))
        assert not watched.hangs()
    clock.now += 61.0
    assert watched.hangs()
    assert "made no progress for 61 s while planning" in watched.loss(-signal.SIGKILL).message


def test_a_wait_for_the_hub_is_no_hang(watched: Vigil, clock: Clock) -> None:
    """What the Hub asked for comes on top, once."""
    watched.heard(progress.HubReported(event="waiting", wait_s=300.0))
    clock.now += 350.0
    assert not watched.hangs()
    watched.heard(progress.HubReported(event="uploaded"))
    clock.now += 61.0
    assert watched.hangs()


@pytest.mark.parametrize(
    ("status", "crashes", "text"),
    [
        (-signal.SIGSEGV, 1, "SIGSEGV"),
        (-signal.SIGBUS, 1, "SIGBUS"),
        (-signal.SIGKILL, 0, "SIGKILL"),
        (-signal.SIGTERM, 0, "SIGTERM"),
        (3, 1, "status 3"),
    ],
)
def test_a_fault_is_a_crash_and_a_kill_is_none(
    watched: Vigil, status: int, crashes: int, text: str
) -> None:
    """The reason names the signal; all of them are tried again."""
    found = watched.loss(status)
    assert (found.code, found.crashes, found.retry) == (RUNNER_DIED, crashes, Retry.LATER)
    assert text in found.message


def test_a_kill_for_lack_of_memory_is_a_crash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The kernel counts them: one more than when the job began."""
    vmstat = tmp_path / "vmstat"
    monkeypatch.setattr(vigil, "_VMSTAT", vmstat)
    vmstat.write_text("nr_free_pages 1\noom_kill 4\n")
    watched = Vigil(stall_s=60.0)
    watched.heard(PLANNING)
    assert watched.loss(-signal.SIGKILL).crashes == 0
    vmstat.write_text("nr_free_pages 1\noom_kill 5\n")
    found = watched.loss(-signal.SIGKILL)
    assert found.crashes == 1
    assert "ran out of memory" in found.message


def test_a_runner_that_never_began_says_nothing_about_the_job(clock: Clock) -> None:
    """Its code is another one, so that a broken installation quarantines nobody."""
    assert Vigil(stall_s=60.0, clock=clock).loss(1).code != RUNNER_DIED
