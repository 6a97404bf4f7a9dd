"""What can go wrong on the node itself: the disk, the source, the database, the runner."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import snapshot_download
from safetensors.numpy import load_file

from ckptd.jobs.database import Database
from ckptd.jobs.job import Job, State
from tests.flow.conftest import Deployment, write_checkpoint
from tests.flow.steps.arms import Steps

WRITES = (
    "runner mkdir state/work/*",
    "runner open state/work/*/.ckptd-ledger.jsonl",
    "runner posix_fallocate state/work/*/out/.ckptd-model-*-of-*.safetensors",
    "runner pwrite state/work/*/out/.ckptd-model-*-of-*.safetensors",
    "runner fsync state/work/*/out/.ckptd-model-*-of-*.safetensors",
    "runner rename state/work/*/out/model-*-of-*.safetensors",
    "runner open state/work/*/ledger.jsonl",
    "runner pwrite state/work/*/out/.ckptd-ckptd.json",
    "daemon open runs/.ckptd/live/*/..ckptd-origin.json.new",
    "daemon link runs/.ckptd/live/*/.model.safetensors.pinning",
    "daemon open runs/.ckptd/live/*/.config.json.pinning",
    "daemon rename runs/.ckptd/pins/*",
    "daemon open state/.status.json.tmp",
)
SHARD = "runner pwrite state/work/*/out/.ckptd-model-*-of-*.safetensors"


@pytest.fixture
def steps(node: Deployment) -> Steps:
    """The steps of the node's processes; `node.start(**steps.environment)` begins to watch them."""
    return Steps(node.root)


def _publishes(node: Deployment, job: Job, tensors: dict[str, np.ndarray], target: Path) -> None:
    """Check that `job` was published once, whole, and that nothing of it is left."""
    assert job.state is State.PUBLISHED, job.reason
    folder = snapshot_download(
        "ckptd/run",
        revision=f"step-{job.spec.step}",
        local_dir=target,
        endpoint=node.hub.url,
        token=node.hub.token,
    )
    found: dict[str, np.ndarray] = {}
    for shard in Path(folder).glob("*.safetensors"):
        found |= load_file(shard)
    assert all(np.array_equal(found[name], tensors[name]) for name in found)
    assert set(found) == set(tensors) - {"lm_head.weight"}
    node.wait_for(node.clean)


@pytest.mark.parametrize(
    ("refusal", "labels"),
    [(errno.ENOSPC, WRITES), (errno.EROFS, WRITES[1:11:3])],
    ids=["full", "read-only"],
)
def test_a_disk_that_refuses_any_write_costs_time_and_nothing_else(
    node: Deployment, steps: Steps, refusal: int, labels: tuple[str, ...], tmp_path: Path
) -> None:
    """At each write: the daemon stays, says what failed, and goes on when the disk does."""
    node.define()
    node.start(**steps.environment)
    tensors = {}
    for number, label in enumerate(labels, start=1):
        steps.arm(label, "fail", errno=refusal)
        folder = node.runs / "run" / f"checkpoint-{number}"
        tensors[number] = write_checkpoint(folder, number, rows=300)
        node.wait_for(steps.fired.exists)
        steps.disarm()
        node.wait_for_ended(number)
    jobs = node.jobs()
    assert [job.state for job in jobs] == [State.PUBLISHED] * len(labels)
    assert len(node.commits()) == len(labels)
    for job in jobs:
        assert job.spec.step is not None
        _publishes(node, job, tensors[job.spec.step], tmp_path / f"download-{job.spec.step}")
    assert node.process is not None
    assert node.process.poll() is None


def test_a_full_disk_is_named_with_what_is_needed(node: Deployment, steps: Steps) -> None:
    """The job waits for its next try and says which file, how many bytes, how many are free."""
    node.define()
    node.start(**steps.environment)
    steps.arm(re.compile("runner posix_fallocate .*safetensors"), "fail", errno=errno.ENOSPC)
    write_checkpoint(node.runs / "run" / "checkpoint-1", 1)
    (job,) = node.wait_for(lambda: [job for job in node.jobs() if job.state is State.RETRYING])
    assert re.search(r"no space: needs [\d,]+ bytes, [\d,]+ are free", job.reason or "")
    steps.disarm()
    node.wait_for_ended(1)


@pytest.mark.parametrize("harm", ["truncated", "rewritten"])
def test_a_source_that_changes_while_it_is_read_voids_the_job(
    node: Deployment, steps: Steps, harm: str, tmp_path: Path
) -> None:
    """Under a hard link: no signal, no commit of a mixture; what stands there then gets its own job."""
    node.define()
    node.start(**steps.environment)
    steps.arm(SHARD, "wait")
    folder = node.runs / "run" / "checkpoint-1"
    write_checkpoint(folder, 1)
    node.wait_for(steps.fired.exists)
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    with weights.open("r+b") as file:
        if harm == "truncated":
            file.truncate(size // 2)
        else:
            file.seek(size // 2)
            file.write(os.urandom(1000))
    steps.go()
    (job,) = node.wait_for_ended(1)
    assert job.state is State.VANISHED
    assert "changed while it was read" in (job.reason or "")
    assert "signal" not in node.log_path.read_text().partition("job started")[2]
    tensors = write_checkpoint(folder, 1, seed=7)
    jobs = node.wait_for_ended(2)
    _publishes(node, jobs[-1], tensors, tmp_path / "download")
    assert len(node.commits()) == 1


def test_a_pin_that_is_removed_is_made_again_where_the_source_is_there(
    node: Deployment, steps: Steps, tmp_path: Path
) -> None:
    """Somebody cleans up the pin folder: the job ends, the folder is pinned anew, one commit."""
    node.define()
    node.start(**steps.environment)
    steps.arm(re.compile("runner mkdir state/work/.*"), "wait")
    tensors = write_checkpoint(node.runs / "run" / "checkpoint-1", 1)
    node.wait_for(steps.fired.exists)
    shutil.rmtree(node.runs / ".ckptd")
    steps.go()
    job = node.wait_for(lambda: [job for job in node.jobs() if job.state is State.PUBLISHED])[0]
    _publishes(node, job, tensors, tmp_path / "download")
    assert len(node.commits()) == 1


def test_a_file_that_kills_its_runner_is_quarantined_and_holds_nobody_up(
    node: Deployment, steps: Steps, tmp_path: Path
) -> None:
    """Three crashes at the same place end the job for good; the next one of its branch is published."""
    node.define()
    node.start(**steps.environment)
    steps.arm(SHARD, "wait")
    write_checkpoint(node.runs / "run" / "checkpoint-1", 1)
    node.wait_for(steps.fired.exists)
    (poison,) = node.jobs()
    steps.arm(SHARD, "crash", within=poison.job_id)
    steps.go()
    tensors = write_checkpoint(node.runs / "run" / "checkpoint-2", 2)
    first, second = node.wait_for_ended(2)
    assert (first.state, first.attempt) == (State.FAILED, 3)
    assert "quarantined after 3 lost runners" in (first.reason or "")
    assert "SIGSEGV" in (first.reason or "")
    assert second.state is State.PUBLISHED
    assert len(node.commits()) == 1
    with Database(node.state / "jobs.sqlite3") as database:
        assert [m.state for m in database.history(first.job_id)].count(State.RUNNING) == 3
        steps.disarm()
        database.retry(first.job_id, now=first.updated_at + 1)
    job = node.wait_for_ended(2)[0]
    assert job.state is State.PUBLISHED
    assert tensors


def test_a_runner_that_hangs_is_replaced(node: Deployment, steps: Steps, tmp_path: Path) -> None:
    """Nothing is heard of it for the time it has: it is killed, and another one goes on."""
    node.define()
    node.start(CKPTD_STALL_TIMEOUT="10s", **steps.environment)
    steps.arm(SHARD, "stop")
    tensors = write_checkpoint(node.runs / "run" / "checkpoint-1", 1)
    (job,) = node.wait_for_ended(1)
    assert (job.attempt, job.failures) == (2, 0)
    with Database(node.state / "jobs.sqlite3", read_only=True) as database:
        reasons = [moment.reason or "" for moment in database.history(job.job_id)]
    assert any("made no progress for" in reason for reason in reasons)
    _publishes(node, job, tensors, tmp_path / "download")


def test_a_cancelled_job_that_waited_is_tidied_at_once(node: Deployment) -> None:
    """Its pin and its staging are gone while the daemon runs, not at its next start."""
    node.define()
    node.start(HF_TOKEN="hf_nobody")
    write_checkpoint(node.runs / "run" / "checkpoint-1", 1)
    (job,) = node.wait_for(lambda: [job for job in node.jobs() if job.state is State.WAITING])
    assert not node.clean()
    with Database(node.state / "jobs.sqlite3") as database:
        database.cancel(job.job_id, now=job.updated_at + 1)
    node.wait_for(node.clean)


def test_what_a_power_loss_leaves_is_never_published(
    node: Deployment, steps: Steps, tmp_path: Path
) -> None:
    """One shard of zeros, one empty file, a torn ledger and journal: all made again, bytes right."""
    node.define(stages="  - reshard: {max_shard_size: 60KB}\n")
    node.start(**steps.environment)
    steps.arm("runner rename state/work/*/out/config.json", "kill both")
    tensors = write_checkpoint(node.runs / "run" / "checkpoint-1", 1)
    node.wait_for(steps.fired.exists)
    assert node.process is not None
    node.process.wait(20)
    steps.disarm()
    (work_path,) = (node.state / "work").iterdir()
    zeroed, empty, *whole = sorted((work_path / "out").glob("model-*.safetensors"))
    head = zeroed.read_bytes()[:600]
    before = zeroed.stat()
    zeroed.write_bytes(head + bytes(before.st_size - len(head)))
    os.utime(zeroed, ns=(before.st_atime_ns, before.st_mtime_ns))
    empty.write_bytes(b"")
    kept = {path.name: path.stat().st_ino for path in whole}
    ledger = work_path / "ledger.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    lines[0]["boot"] = "the start of the machine before"
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"shard": "mod\0\0')
    wal = node.state / "jobs.sqlite3-wal"
    wal.write_bytes(wal.read_bytes()[:-100])

    steps.arm("runner rename state/work/*/out/config.json", "wait")
    node.start(**steps.environment)
    node.wait_for(steps.fired.exists)
    now = {path.name: path.stat().st_ino for path in (work_path / "out").glob("model-*")}
    assert {name: now[name] for name in kept} == kept
    steps.go()
    (job,) = node.wait_for_ended(1)
    assert job.state is State.PUBLISHED, job.reason
    assert len(node.commits()) == 1
    target = tmp_path / "download"
    api = {"endpoint": node.hub.url, "token": node.hub.token}
    snapshot_download("ckptd/run", revision="step-1", local_dir=target, **api)
    found: dict[str, np.ndarray] = {}
    for shard in target.glob("*.safetensors"):
        found |= load_file(shard)
    assert set(found) == set(tensors)
    assert all(np.array_equal(found[name], tensors[name]) for name in tensors)
    node.wait_for(node.clean)


def _garbage_in_the_middle(path: Path) -> None:
    with path.open("r+b") as file:
        size = path.stat().st_size
        for offset in range(8192, size, 4096):
            file.seek(offset)
            file.write(os.urandom(2048))


def _no_database(path: Path) -> None:
    path.write_bytes(os.urandom(20_000))


def _emptied(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("harm", [_garbage_in_the_middle, _no_database, _emptied])
def test_a_damaged_database_is_kept_aside_and_nothing_is_published_twice(
    node: Deployment, harm, tmp_path: Path
) -> None:
    """The daemon says so, finds its checkpoints and their commits again, and goes on."""
    node.define()
    node.start()
    for step in (1, 2):
        write_checkpoint(node.runs / "run" / f"checkpoint-{step}", step)
    node.wait_for_ended(2)
    node.stop()
    commits = node.commits()
    database_path = node.state / "jobs.sqlite3"
    for companion in ("-wal", "-shm"):
        database_path.with_name(database_path.name + companion).unlink(missing_ok=True)
    harm(database_path)
    node.start()
    if harm is not _emptied:
        assert "job database damaged, kept aside" in node.log_path.read_text()
        assert (node.state / "jobs.sqlite3.damaged-1").exists()
    tensors = write_checkpoint(node.runs / "run" / "checkpoint-3", 3)
    jobs = node.wait_for_ended(3)
    assert [job.state for job in jobs] == [State.PUBLISHED] * 3
    assert node.commits()[1:] == commits
    _publishes(node, jobs[-1], tensors, tmp_path / "download")


def test_a_locked_database_is_waited_for(node: Deployment) -> None:
    """Another process holds it for longer than SQLite waits: the daemon says so and goes on after."""
    node.define()
    node.start()
    lock = sqlite3.connect(node.state / "jobs.sqlite3", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    write_checkpoint(node.runs / "run" / "checkpoint-1", 1)
    node.wait_for(lambda: "job store failed, trying again" in node.log_path.read_text())
    lock.execute("ROLLBACK")
    lock.close()
    (job,) = node.wait_for_ended(1)
    assert (job.state, job.attempt) == (State.PUBLISHED, 1)


@pytest.mark.parametrize(
    "label", ["daemon mkdir state", "daemon open state/lock", "daemon open state/.ckptd-identity"]
)
def test_a_state_folder_that_cannot_be_written_ends_the_start_with_a_reason(
    node: Deployment, steps: Steps, label: str
) -> None:
    """Exit code 7, and the path: systemd's journal says what to mend."""
    node.define()
    steps.arm(label, "fail", errno=errno.EROFS)
    node.launch(**steps.environment)
    assert node.process is not None
    assert node.process.wait(60) == 7
    said = node.log_path.read_text()
    assert str(node.state) in said
    assert "read-only" in said.lower()
