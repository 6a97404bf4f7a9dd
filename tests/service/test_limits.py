"""The limits of a running daemon: each one bites, and each one is seen."""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path

import pytest
from anyio import to_thread

from ckptd import errors, settings
from ckptd.hub.local.traffic import Slow
from ckptd.jobs.job import State
from ckptd.jobs.store import Verdict
from ckptd.service import daemon, limits
from ckptd.service.admission import Caps, Node
from ckptd.service.board import STATUS_NAME
from ckptd.telemetry import node as node_facts
from ckptd.telemetry.status import DaemonStatus, LimitStatus, PinStatus
from tests.flow.conftest import Deployment, write_checkpoint


def _status(node: Deployment) -> DaemonStatus:
    return DaemonStatus.from_json((node.state / STATUS_NAME).read_bytes())


def test_full_queue_keeps_checkpoints_pinned_and_waiting(node: Deployment) -> None:
    """Beyond max_queued a checkpoint has no job yet, and says so; it gets one when there is room."""
    released, reached = threading.Event(), threading.Event()

    async def pause() -> None:
        reached.set()
        await to_thread.run_sync(released.wait)

    node.hub.faults = lambda request: Slow(pause=pause) if "/commit/" in request.url.path else None
    node.define()
    node.start(CKPTD_MAX_QUEUED="1")
    write_checkpoint(node.runs / "run" / "checkpoint-10", 10)
    try:
        assert reached.wait(60)
        write_checkpoint(node.runs / "run" / "checkpoint-20", 20)

        def held_back() -> bool:
            return any("max_queued" in (s.reason or "") for s in node.sightings())

        node.wait_for(held_back)
        assert [job.spec.step for job in node.jobs()] == [10]
        node.wait_for(lambda: "held back by max_queued 1 (1 unfinished)" in _status(node).line)
    finally:
        released.set()
    jobs = node.wait_for_ended(2)
    assert [job.state for job in jobs] == [State.PUBLISHED] * 2
    assert {s.verdict for s in node.sightings()} == {Verdict.TAKEN}
    assert node.stop() == 0


def test_full_disk_keeps_jobs_back(node: Deployment) -> None:
    """Below min_free no job begins, the row says why, and it goes on with the next start's setting."""
    node.define()
    node.start(CKPTD_MIN_FREE="1000TB")
    write_checkpoint(node.runs / "run" / "checkpoint-10", 10)

    def told() -> bool:
        return any(job.reason == "waits for disk space (min_free: 1e+03 TB)" for job in node.jobs())

    node.wait_for(told)
    assert [job.state for job in node.jobs()] == [State.QUEUED]
    node.wait_for(lambda: "held back by min_free" in _status(node).line)
    assert node.stop() == 0
    node.start()
    (job,) = node.wait_for_ended(1)
    assert (job.state, job.attempt) == (State.PUBLISHED, 1)
    assert node.stop() == 0


def test_runners_stay_behind_the_trainer(node: Deployment) -> None:
    """Niceness and memory bound of the settings are those of the runner processes."""
    node.define()
    node.start(CKPTD_NICE="7", CKPTD_RUNNER_MEMORY="3GB")

    def bounded() -> bool:
        pids = node.runner_pids()
        return bool(pids) and all(
            os.getpriority(os.PRIO_PROCESS, pid) == 7
            and resource.prlimit(pid, resource.RLIMIT_DATA)[0] == 3_000_000_000
            for pid in pids
        )

    node.wait_for(bounded)
    assert node.stop() == 0


def test_every_limit_is_shown() -> None:
    """What bounds the daemon's work stands in its status under the name of its setting."""
    found = limits.statuses(
        settings.Settings(max_queued=5),
        counts={"queued": 2, "running": 1, "retrying": 1, "waiting": 1, "published": 90},
        caps=Caps(per_repo=1, per_device=1, min_free_bytes=1000),
        found=Node(free_bytes=500, accelerators=()),
    )
    assert {limit.name for limit in found} <= set(settings.Settings.model_fields)
    assert [limit for limit in found if limit.reached] == [
        LimitStatus(name="max_queued", value="5", now="5 unfinished", reached=True),
        LimitStatus(name="min_free", value="1 KB", now="500 B free", reached=True),
    ]


@pytest.mark.parametrize(
    ("name", "value", "now"),
    [
        ("max_queued", "5", "0 unfinished"),
        ("slots", "2", "0 running"),
        ("jobs_per_repo", "3", None),
        ("jobs_per_device", "4", None),
        ("upload_limit", "50 MB/s", None),
        ("nice", "6", None),
        ("io_priority", "idle", None),
        ("byte_budget", "100 MB", None),
        ("runner_memory", "8 GB", None),
        ("threads", "7", None),
        ("pin_limit", "9 GB", "3 GB held"),
        ("pin_age", "48h00m", None),
        ("min_free", "1 KB", "2 KB free"),
    ],
)
def test_a_limit_is_shown_as_it_is_set(name: str, value: str, now: str | None) -> None:
    """Queue, concurrency, bandwidth, priorities, memory, pins, disk: each with what is used of it."""
    wanted = settings.Settings(
        max_queued=5, slots=2, jobs_per_repo=3, jobs_per_device=4, upload_limit="50MB/s", nice=6,
        io_priority="idle", byte_budget="100MB", runner_memory="8GB", threads=7, pin_limit="9GB",
        pin_age="2d",
    )  # fmt: skip
    found = limits.statuses(
        wanted,
        counts={},
        caps=Caps(per_repo=3, per_device=4, min_free_bytes=1000),
        found=Node(free_bytes=2000, accelerators=()),
        pins=PinStatus(held_bytes=3_000_000_000, limit_bytes=9_000_000_000, max_age_s=172_800.0),
    )
    assert LimitStatus(name=name, value=value, now=now) in found


def test_low_water_mark(tmp_path: Path) -> None:
    """The mark is 2 GB, but never more than a twentieth of the disk; what is set holds."""
    disk = os.statvfs(tmp_path)
    expected = min(2_000_000_000, disk.f_blocks * disk.f_frsize // 20)
    assert settings.Settings(state_dir=tmp_path / "not" / "yet").min_free_bytes == expected
    assert settings.load(overrides={"min_free": "3TB"}).min_free_bytes == 3_000_000_000_000


def test_memory_bound_has_room_for_the_byte_budget() -> None:
    """A runner's bound below its own byte budget is refused when settings are read."""
    with pytest.raises(errors.SettingsError, match="runner_memory: must be at least byte_budget"):
        settings.load(overrides={"byte_budget": "3GB", "runner_memory": "3GB"})


def test_a_runner_beside_an_accelerator_has_no_memory_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a driver maps for itself would count; on a node without one the bound is passed on."""
    wanted = settings.load(overrides={"runner_memory": "3GB"})
    monkeypatch.setattr(node_facts, "accelerators", tuple)
    assert "--memory-bytes=3000000000" in daemon._bounds(wanted)
    monkeypatch.setattr(node_facts, "accelerators", lambda: ("cuda:0",))
    assert not any(bound.startswith("--memory-bytes") for bound in daemon._bounds(wanted))
