"""`ckptd status`: is the daemon there, and what does it do."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.service.board import STATUS_NAME
from ckptd.telemetry.status import (
    Counter,
    Counters,
    DaemonStatus,
    DefinitionStatus,
    JobStatus,
    LimitStatus,
    Phase,
    PinStatus,
    WatchStatus,
)
from tests.cli.conftest import Call, Start

DEAD_PID = 2**22 + 1
"""Larger than any process id of Linux."""


@pytest.fixture
def lock(state_path: Path) -> Iterator[None]:
    """Somebody holds the state folder, as a daemon does."""
    state_path.mkdir(parents=True)
    fd = os.open(state_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    yield
    os.close(fd)


def _write(state_path: Path, *, pid: int, late_s: float = 0) -> None:
    job = JobStatus(
        job_id="abc",
        pipeline="publish",
        run="demo",
        name="checkpoint-3",
        step=3,
        target="acme/demo@main",
        attempt=1,
        worker="w",
        phase=Phase.STREAMING,
        started_at=time.time(),
        counters=Counters(written=Counter(done_bytes=1_000_000, total_bytes=4_000_000)),
        num_shards=4,
        shards_done=1,
        note="waiting 20 s for the Hub",
    )
    watch = WatchStatus(
        pipeline="publish",
        pattern="/runs/*",
        mode="events",
        num_candidates=2,
        num_settling=1,
        last_scan_at=None,
    )
    status = DaemonStatus(
        version="0.1.0",
        pid=pid,
        state="running",
        started_at=time.time() - 100,
        at=time.time() - late_s,
        endpoint="http://127.0.0.1:1",
        slots=2,
        jobs=(job,),
        counts={"published": 7},
        watches=(watch,),
        definitions=(DefinitionStatus(path="/p.yaml", pipeline="publish", problem="is broken"),),
        pins=PinStatus(
            num_pins=3, held_bytes=12_000_000, limit_bytes=500_000_000_000, max_age_s=7 * 86_400
        ),
        limits=(
            LimitStatus(name="min_free", value="2 GB", now="1 GB free", reached=True),
            LimitStatus(name="max_queued", value="1000", now="3 unfinished"),
            LimitStatus(name="nice", value="10"),
        ),
    )
    state_path.mkdir(parents=True, exist_ok=True)
    (state_path / STATUS_NAME).write_text(status.to_json())


def test_never_ran(ckptd: Call) -> None:
    """Without a state folder the daemon does not run, which is no error."""
    result = ckptd("status")
    assert result.code == 0
    assert "not running" in result.out
    assert ckptd("status", "--json").value["running"] is False


def test_running(ckptd: Call, state_path: Path) -> None:
    """A running daemon is shown with its jobs, watches and broken definitions."""
    _write(state_path, pid=os.getpid())
    out = ckptd("status").out
    for text in (
        "is running",
        "1 of 2 slots busy",
        "acme/demo@main: streaming, shard 1 of 4",
        "1 MB of 4 MB written",
        "waiting 20 s for the Hub",
        "is broken",
        "2 checkpoints, 1 settling",
        "pins: 3, holding 12 MB of 500 GB; those of failed and held jobs go after 168h00m",
        "held back by min_free: 2 GB, 1 GB free",
        "limits: max_queued 1000 (3 unfinished), nice 10",
    ):
        assert text in out


def test_killed(ckptd: Call, state_path: Path) -> None:
    """A status file whose daemon was killed a moment ago does not mislead."""
    _write(state_path, pid=DEAD_PID)
    result = ckptd("status")
    assert "not running" in result.out
    assert "last seen" in result.out


@pytest.mark.usefixtures("lock")
def test_in_another_container(ckptd: Call, state_path: Path) -> None:
    """A daemon whose process id is not to be seen here runs, for it holds the lock."""
    _write(state_path, pid=DEAD_PID)
    assert ckptd("status", "--json").value["running"] is True


@pytest.mark.usefixtures("lock")
def test_silent(ckptd: Call, state_path: Path) -> None:
    """A daemon that has the lock and stopped talking is said to be silent."""
    _write(state_path, pid=os.getpid(), late_s=300)
    assert "said nothing for 5m" in ckptd("status").out


def test_named_state_folder(ckptd: Call, tmp_path: Path) -> None:
    """--state-dir looks elsewhere."""
    _write(tmp_path / "other", pid=os.getpid())
    assert ckptd("status", "--state-dir", tmp_path / "other", "--json").value["running"] is True


def test_foreign_file(ckptd: Call, state_path: Path) -> None:
    """A status file that cannot be read is a sentence, not a crash."""
    state_path.mkdir(parents=True)
    (state_path / STATUS_NAME).write_text("{")
    assert ckptd("status", "--json").value["problem"].startswith("its status cannot be read")


def test_watch(start: Start, state_path: Path) -> None:
    """--watch says it again when something changed, and only then, until Ctrl-C."""
    watch = start("status", "--watch", "--json")
    assert watch.stdout is not None
    assert json.loads(watch.stdout.readline())["running"] is False
    _write(state_path, pid=os.getpid())
    assert json.loads(watch.stdout.readline())["running"] is True
    watch.send_signal(signal.SIGINT)
    assert watch.wait(timeout=30) == 130
