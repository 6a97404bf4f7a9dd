"""The watchdog is fed by progress: where there is none, systemd hears nothing."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from ckptd.jobs import job as jobs
from ckptd.jobs import progress
from ckptd.service import board, watchdog
from ckptd.service.board import Board
from ckptd.service.notify import Notifier
from ckptd.telemetry.status import Counters, Phase
from tests.service.test_admission import spec

SILENCE_S = 60.0


class Clock:
    """The monotonic clock of the board, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """Return the time."""
        return self.now

    def time(self) -> float:
        """Return the time of day."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(board, "time", found)
    return found


@pytest.fixture
def busy(clock: Clock) -> Board:
    """A board with one job that has just started."""
    found = Board(endpoint="http://hub", slots=1)
    found.started(jobs.new(spec("1")), worker="w")
    return found


@pytest.fixture
def heard(tmp_path: Path) -> Iterator[socket.socket]:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listening.bind(str(tmp_path / "notify"))
    listening.setblocking(False)
    yield listening
    listening.close()


def _count(heard: socket.socket) -> int:
    count = 0
    try:
        while heard.recv(1000) == b"WATCHDOG=1":
            count += 1
    except BlockingIOError:
        pass
    return count


async def _feed_once(heard: socket.socket, board: Board) -> int:
    """Let the watchdog be fed until the store was asked twice; return how often systemd heard."""
    asked = 0
    async with anyio.create_task_group() as group:

        async def answers() -> None:
            nonlocal asked
            asked += 1
            if asked == 2:
                group.cancel_scope.cancel()

        notifier = Notifier(heard.getsockname(), watchdog_s=0.0)
        await watchdog.feed(notifier, board=board, silence_s=SILENCE_S, answers=answers)
    return _count(heard)


def _report() -> progress.BytesMoved:
    return progress.BytesMoved(counters=Counters())


async def test_fed_while_a_job_moves(heard: socket.socket, busy: Board, clock: Clock) -> None:
    """Each report of the runner is a sign of life."""
    job_id = busy.running[0]
    clock.now += SILENCE_S + 1
    busy.reported(job_id, _report())
    assert await _feed_once(heard, busy) > 0


async def test_starves_when_the_runner_hangs(
    heard: socket.socket, busy: Board, clock: Clock
) -> None:
    """A running job that says nothing for too long stops it, until it is replaced."""
    clock.now += SILENCE_S + 1
    assert await _feed_once(heard, busy) == 0
    busy.ended(busy.running[0])
    assert await _feed_once(heard, busy) > 0


async def test_waiting_for_the_hub_is_no_silence(
    heard: socket.socket, busy: Board, clock: Clock
) -> None:
    """A pause that the Hub asked for counts as movement until it is over."""
    job_id = busy.running[0]
    busy.reported(job_id, progress.HubReported(event="waiting", text="429", wait_s=300.0))
    clock.now += 300 + SILENCE_S - 1
    assert await _feed_once(heard, busy) > 0
    clock.now += 2
    assert await _feed_once(heard, busy) == 0


async def test_starves_when_the_store_hangs(heard: socket.socket) -> None:
    """While the job store does not answer, nothing is fed."""
    hanging, asked = anyio.Event(), anyio.Event()

    async def answers() -> None:
        asked.set()
        await hanging.wait()

    notifier = Notifier(heard.getsockname(), watchdog_s=0.0)
    idle = Board(endpoint="", slots=1)
    async with anyio.create_task_group() as group:
        group.start_soon(
            lambda: watchdog.feed(notifier, board=idle, silence_s=SILENCE_S, answers=answers)
        )
        with anyio.fail_after(10):
            await asked.wait()
            await anyio.wait_all_tasks_blocked()
        assert _count(heard) == 0
        group.cancel_scope.cancel()


async def test_nobody_watches() -> None:
    """Outside systemd there is nothing to feed, and nothing runs for it."""

    async def answers() -> None:
        raise AssertionError("asked")

    with anyio.fail_after(10):
        await watchdog.feed(
            Notifier(""), board=Board(endpoint="", slots=1), silence_s=1.0, answers=answers
        )


@pytest.mark.parametrize(
    ("usec", "pid", "expected"),
    [("2000000", "", 2.0), ("2000000", "1", None), ("0", "", None), ("x", "", None)],
)
def test_period(
    usec: str, pid: str, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The period is systemd's, where it is meant for this process."""
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.setenv("WATCHDOG_PID", pid)
    assert Notifier("").watchdog_s == expected


def test_a_manager_that_does_not_listen_holds_nobody_up(heard: socket.socket) -> None:
    """When the socket is full, what is said is lost and nothing blocks."""
    notifier = Notifier(heard.getsockname())
    for _ in range(1000):
        notifier.status("busy")
    heard.setblocking(False)
    assert heard.recv(100) == b"STATUS=busy"


def test_phase_is_a_sign_of_life(busy: Board, clock: Clock) -> None:
    """Every kind of report counts, not only bytes."""
    clock.now += SILENCE_S + 1
    assert busy.silent_jobs(SILENCE_S) == busy.running
    busy.reported(busy.running[0], progress.PhaseChanged(phase=Phase.COMMITTING))
    assert busy.silent_jobs(SILENCE_S) == []
