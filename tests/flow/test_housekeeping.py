"""The janitor: what pins hold on disk, what goes when, and that whoever loses something says so."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ckptd.checkpoint import origin, pin
from ckptd.checkpoint.listing import list_files
from ckptd.checkpoint.open_files import OpenFiles
from ckptd.checkpoint.pin import PinMethod
from ckptd.jobs.job import Failure, JobSpec, Outcome, RetryLimits, State, job_id_of
from ckptd.jobs.sqlite import SqliteStore
from ckptd.jobs.store import Verdict
from ckptd.pipeline.definition import Definition, parse_definition
from ckptd.service import housekeeping, pinned
from ckptd.service.housekeeping import Janitor, PinLimits
from ckptd.service.pinned import Pin, Pinned

SIZE = 1 << 20
DAY_S = 86_400.0
REFUSAL = Failure(code="HubRejected", message="no such owner", exit_code=6)


class Node:
    """A root with checkpoints and pins, a state folder and a store; no daemon."""

    def __init__(self, root: Path, store: SqliteStore) -> None:
        self.root = root / "runs"
        self.state = root / "state"
        self.store = store
        self.definitions: dict[str, Definition] | None = {}
        pinned.remember(self.state, self.root)

    def checkpoint(self, number: int) -> Path:
        """A checkpoint of one file of a mebibyte."""
        folder = self.root / "run" / f"checkpoint-{number}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(os.urandom(SIZE))
        return folder

    def pin(self, source: Path, kind: str, name: str, *, owner: str = "me", **more: Any) -> Path:
        """A pin of it by hard links."""
        path = self.root / ".ckptd" / kind / name
        ours = {"owner": owner, "pipeline": "p", "source": str(source), "method": "hard link"}
        origin.write(path, ours | more)
        pin.refresh(source, list_files(source), path, PinMethod.HARD_LINK)
        return path

    async def job(self, number: int, *, created_at: float = 100.0) -> JobSpec:
        """A queued job of a checkpoint, with its frozen pin and a staging folder."""
        source = self.checkpoint(number)
        job_id = job_id_of(f"c{number}", "d", f"t{number}")
        spec = JobSpec(
            job_id=job_id,
            definition={},
            pipeline="p",
            source_path=str(source),
            pinned_path=str(self.pin(source, "pins", job_id)),
            layout="hf",
            run="run",
            name=source.name,
            step=number,
            content_digest=f"c{number}",
            pipeline_digest="d",
            target=f"t{number}",
            created_at=created_at,
        )
        await self.store.enqueue(spec, now=created_at)
        (self.state / "work" / job_id).mkdir(parents=True)
        return spec

    async def run(self, spec: JobSpec) -> None:
        """Start the oldest job, which is this one."""
        job = await self.store.acquire(worker="w", lease_s=60.0, now=spec.created_at)
        assert job is not None
        assert job.job_id == spec.job_id

    async def fail(self, spec: JobSpec, *, now: float) -> None:
        """End it with a failure that is not tried again."""
        await self.run(spec)
        limits = RetryLimits()
        await self.store.fail(spec.job_id, REFUSAL, worker="w", limits=limits, jitter=0.0, now=now)

    def janitor(self, *, max_bytes: int = 10 * SIZE, max_age_s: float = 7 * DAY_S) -> Janitor:
        return Janitor(
            owner="me",
            state_path=self.state,
            store=self.store,
            held=OpenFiles(),
            limits=PinLimits(max_bytes=max_bytes, max_age_s=max_age_s),
            definitions=lambda: self.definitions,
        )

    def held(self) -> dict[str, int]:
        """What every pin holds, by the name of its folder."""
        found = pinned.held_bytes(Pinned(owner="me", state_path=self.state).all())
        return {path.name: size for path, size in found.items()}


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    """A node with nothing on it."""
    store = await SqliteStore.open(tmp_path / "state" / "jobs.sqlite3")
    yield Node(tmp_path, store)
    await store.aclose()


async def test_a_hard_link_costs_nothing_until_the_trainer_deletes_the_file(node: Node) -> None:
    """Then its blocks count, once however many pins have it, and never another daemon's."""
    source = node.checkpoint(1)
    node.pin(source, "pins", "a")
    node.pin(source, "live", "b", pipeline="q")
    small = 64 * 1024  # the notes in a pin
    assert sum(node.held().values()) < small
    shutil.rmtree(source)
    held = node.held()
    assert SIZE <= held["a"] < SIZE + small
    assert held["b"] < small
    other = node.checkpoint(2)
    node.pin(other, "pins", "c", owner="somebody")
    shutil.rmtree(other)
    assert "c" not in node.held()


async def test_a_reflink_counts_when_its_source_is_gone_or_another(node: Node) -> None:
    """While the file it was made of is as it was, they share their blocks."""
    source = node.checkpoint(1)
    path = node.root / ".ckptd" / "pins" / "a"
    shutil.copytree(source, path)  # as stat sees a reflink
    for method, is_shared in ((PinMethod.REFLINK, True), (PinMethod.COPY, False)):
        found = Pin(path=path, source=source, pipeline="p", method=method, live=False)
        assert (pinned.held_bytes([found])[path] == 0) is is_shared
    (source / "model.safetensors").write_bytes(b"other")
    found = Pin(path=path, source=source, pipeline="p", method=PinMethod.REFLINK, live=False)
    assert pinned.held_bytes([found])[path] >= SIZE


async def test_over_the_limit_the_oldest_that_does_not_run_goes(node: Node) -> None:
    """What runs keeps its pin, whatever the limit; the others say which setting took theirs."""
    running, older, newer = [await node.job(n, created_at=100.0 + n) for n in (1, 2, 3)]
    await node.run(running)
    janitor = node.janitor(max_bytes=int(2.5 * SIZE))
    await janitor.look(now=200.0)
    assert all(Path(spec.pinned_path).exists() for spec in (running, older, newer))
    shutil.rmtree(node.root / "run")
    await janitor.look(now=200.0)
    assert not Path(older.pinned_path).exists()
    assert not housekeeping.work_path(node.state, older.job_id).exists()
    dropped = await node.store.get(older.job_id)
    assert dropped.state is State.VANISHED
    assert "pin_limit is 2.62 MB" in (dropped.reason or "")
    assert (await node.store.history(older.job_id))[-1].reason == dropped.reason
    assert (await node.store.get(newer.job_id)).state is State.QUEUED
    assert 2 * SIZE <= janitor.status.held_bytes <= 2.5 * SIZE

    await node.janitor(max_bytes=0).look(now=201.0)
    assert (await node.store.get(newer.job_id)).state is State.VANISHED
    assert Path(running.pinned_path).exists()


async def test_pins_of_failed_jobs_age_out(node: Node) -> None:
    """It stays failed, for the reason it had, and says that it cannot be retried without its source."""
    spec = await node.job(1)
    await node.fail(spec, now=1000.0)
    janitor = node.janitor(max_age_s=DAY_S)
    await janitor.look(now=1000.0 + DAY_S)
    assert Path(spec.pinned_path).exists()
    await janitor.look(now=1001.0 + DAY_S)
    assert not Path(spec.pinned_path).exists()
    assert not housekeeping.work_path(node.state, spec.job_id).exists()
    job = await node.store.get(spec.job_id)
    assert job.state is State.FAILED
    assert job.reason == "no such owner; its pin was dropped after 24h00m (pin_age)"


async def test_a_held_job_keeps_its_output_when_its_pin_ages_out(node: Node) -> None:
    """Its staging is the only place where its output is."""
    spec = await node.job(1)
    await node.run(spec)
    held = Outcome(state=State.HELD, reason="the definition has no push")
    await node.store.finish(spec.job_id, held, worker="w", now=1000.0)
    await node.janitor(max_age_s=DAY_S).look(now=1001.0 + DAY_S)
    assert not Path(spec.pinned_path).exists()
    assert housekeeping.work_path(node.state, spec.job_id).exists()
    job = await node.store.get(spec.job_id)
    assert job.state is State.HELD
    assert "pin_age" in (job.reason or "")


async def test_what_a_cancelled_job_left_goes_without_a_restart(node: Node) -> None:
    """It was cancelled while it did not run: no slot tidied up after it."""
    spec = await node.job(1)
    await node.store.cancel(spec.job_id, now=200.0)
    await node.janitor().look(now=201.0)
    assert not Path(spec.pinned_path).exists()
    assert not housekeeping.work_path(node.state, spec.job_id).exists()


async def test_live_pins_of_no_definition_go_unless_one_is_broken(node: Node) -> None:
    """Nobody knows what a broken file defines; what another place of ours is watched for stays."""
    stray, followed = (
        node.pin(node.checkpoint(n), "live", f"x{n}", pipeline=f"p{n}") for n in (1, 2)
    )
    node.definitions = None
    await node.janitor().look(now=1.0)
    assert stray.exists()
    text = f"pipeline: p2\nwatch:\n  - path: {node.root}/*/checkpoint-*\nstages: [tie]\n"
    node.definitions = {"p2": parse_definition(text, "p2.yaml")}
    await node.janitor().look(now=1.0)
    assert not stray.exists()
    assert followed.exists()
    told = await node.store.sighting(str(node.root / "run" / "checkpoint-1"), "p1")
    assert told is not None
    assert told.verdict is Verdict.SKIPPED
    assert "p1" in (told.reason or "")


async def test_a_pin_that_was_made_anew_meanwhile_is_left_alone(node: Node) -> None:
    """Between deciding and removing, the checkpoint came back and was pinned in the same place."""
    source = node.checkpoint(1)
    path = node.pin(source, "pins", "a")
    ino = path.stat().st_ino
    path.rename(path.with_name("old"))
    node.pin(source, "pins", "a")
    pinned.dispose(path, ino=ino)
    assert path.exists()
    pinned.dispose(path, ino=path.stat().st_ino)
    assert not path.exists()


async def test_a_start_after_a_crash_takes_up_what_was_frozen_for_no_job(node: Node) -> None:
    """Killed between freezing and queueing: judged again if its source is gone, else dropped."""
    kept = await node.job(1)
    gone, there = node.checkpoint(2), node.checkpoint(3)
    node.pin(gone, "pins", "of-gone")
    node.pin(there, "pins", "of-there")
    shutil.rmtree(gone)
    await node.janitor().sweep()
    assert Path(kept.pinned_path).exists()
    live = node.root / ".ckptd" / "live"
    assert [path.name for path in live.iterdir()] == ["of-gone"]
    assert not (node.root / ".ckptd" / "pins" / "of-there").exists()


async def test_a_start_removes_what_a_kill_left_of_jobs_that_have_ended(node: Node) -> None:
    """Killed between recording the end and tidying up: pin and staging go, also without a source."""
    spec = await node.job(1)
    shutil.rmtree(spec.source_path)
    work = housekeeping.work_path(node.state, spec.job_id)
    assert work.exists()
    await node.store.cancel(spec.job_id, now=101.0)
    await node.janitor().sweep()
    assert not Path(spec.pinned_path).exists()
    assert not work.exists()
    assert not [*(node.root / ".ckptd" / "live").glob("*")]


async def test_a_start_removes_a_pin_of_which_a_kill_left_the_folder_alone(node: Node) -> None:
    """Nothing in it says any more whose it is: its name does, and that of others is left alone."""
    pins = node.root / ".ckptd" / "pins"
    ours, kept = pins / pinned.frozen_name("job1", "me"), node.pin(node.checkpoint(1), "pins", "x")
    others = pins / pinned.frozen_name("job1", "another")
    ours.mkdir(parents=True)
    others.mkdir()
    await node.janitor().sweep()
    assert not ours.exists()
    assert others.exists()
    assert not kept.exists()
