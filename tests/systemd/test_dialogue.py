"""What a real daemon says to the service manager, on a real socket."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from anyio import to_thread

from ckptd.hub.local.server import Running
from ckptd.hub.local.traffic import Slow
from ckptd.jobs.job import State
from tests.flow.conftest import Deployment, write_checkpoint
from tests.systemd.conftest import Manager

WATCHDOG_S = 2.0


@pytest.fixture
def node(tmp_path: Path, hub: Running) -> Iterator[Deployment]:
    """A node with nothing running yet; what a test started is killed after it."""
    deployment = Deployment(tmp_path, hub)
    yield deployment
    if deployment.process is not None and deployment.process.poll() is None:
        deployment.kill()


def _start(node: Deployment, manager: Manager, **variables: str) -> None:
    node.start(
        NOTIFY_SOCKET=str(manager.path), WATCHDOG_USEC=str(round(WATCHDOG_S * 1e6)), **variables
    )


def test_from_start_to_stop(node: Deployment, manager: Manager) -> None:
    """READY comes once, then STATUS in one line and WATCHDOG; STOPPING before the end."""
    node.define()
    _start(node, manager)
    manager.hear_until("READY")
    assert all("STATUS" not in message for message in manager.heard[:-1])
    assert manager.hear_until("STATUS") == {"STATUS": "1 watched, 0 running, 0 waiting"}
    manager.hear_until("WATCHDOG")
    manager.hear_until("WATCHDOG")
    assert node.stop() == 0
    rest = manager.hear_rest()
    assert {"STOPPING": "1"} in rest
    assert all(message.keys() <= {"STOPPING", "WATCHDOG", "STATUS", "EXTEND_TIMEOUT_USEC"}
               for message in rest)  # fmt: skip


def test_reload(node: Deployment, manager: Manager) -> None:
    """SIGHUP is answered RELOADING with the time, then READY; a broken definition changes nothing."""
    path = node.define()
    _start(node, manager)
    manager.hear_until("READY")
    path.write_text("pipeline: publish\nstages: [no_such_stage]\n")
    assert node.process is not None
    before = time.monotonic_ns() // 1000
    node.process.send_signal(signal.SIGHUP)
    told = manager.hear_until("RELOADING")
    assert before < int(told["MONOTONIC_USEC"]) < time.monotonic_ns() // 1000
    manager.hear_until("READY")
    assert b"the last good one stays" in node.log_path.read_bytes()

    write_checkpoint(node.runs / "run" / "checkpoint-10", 10)  # the last good one still works
    (job,) = node.wait_for_ended(1)
    assert job.state is State.PUBLISHED

    node.define(name="second", tag='"second-{step}"')
    node.process.send_signal(signal.SIGHUP)
    manager.hear_until("RELOADING")
    manager.hear_until("READY")
    assert manager.hear_until("STATUS", "2 watched")
    assert node.stop() == 0


def test_draining(node: Deployment, manager: Manager) -> None:
    """A job that is nearly done ends after SIGTERM, and meanwhile more time is asked for."""
    reached, released = _hold_commits(node)
    node.define()
    _start(node, manager, CKPTD_STOP_GRACE="60s")
    write_checkpoint(node.runs / "run" / "checkpoint-10", 10)
    try:
        assert reached.wait(60)
        assert node.process is not None
        node.process.send_signal(signal.SIGTERM)
        manager.hear_until("STOPPING")
        assert int(manager.hear_until("EXTEND_TIMEOUT_USEC")["EXTEND_TIMEOUT_USEC"]) > 10_000_000
        assert manager.hear_until("STATUS", "stopping, 1 jobs may still end")
        assert node.process.poll() is None
    finally:
        released.set()
    assert node.process.wait(60) == 0
    (job,) = node.jobs()
    assert job.state is State.PUBLISHED
    assert len(node.commits()) == 1


def test_no_grace(node: Deployment, manager: Manager) -> None:
    """Without a grace the job is given back at once, for the next start to go on with."""
    reached, released = _hold_commits(node)
    node.define()
    _start(node, manager, CKPTD_STOP_GRACE="0s")
    write_checkpoint(node.runs / "run" / "checkpoint-10", 10)
    try:
        assert reached.wait(60)
        assert node.stop() == 0
        (job,) = node.jobs()
        assert (job.state, job.attempt) == (State.QUEUED, 1)
    finally:
        released.set()


def _hold_commits(node: Deployment) -> tuple[threading.Event, threading.Event]:
    """Let the Hub answer commits once the second event is set; the first says that one came."""
    reached, released = threading.Event(), threading.Event()

    async def pause() -> None:
        reached.set()
        await to_thread.run_sync(released.wait)

    node.hub.faults = lambda request: Slow(pause=pause) if "/commit/" in request.url.path else None
    return reached, released
