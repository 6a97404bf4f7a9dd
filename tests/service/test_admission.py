"""Which job may begin: the rule, and that a store keeps to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckptd.jobs.job import JobSpec, State, job_id_of
from ckptd.jobs.sqlite import SqliteStore
from ckptd.service import admission
from ckptd.service.admission import Admission, Caps, Node

CAPS = Caps(per_repo=1, per_device=1, min_free_bytes=1000)
ROOMY = Node(free_bytes=1000, accelerators=("cuda:0", "cuda:1"))


def spec(
    content: str, target: str = "acme/a@main", *, device: str = "auto", stage: str = "resize"
) -> JobSpec:
    definition: dict[str, Any] = {"pipeline": "p", "device": device, "stages": [{stage: {}}]}
    return JobSpec(
        job_id=job_id_of(content, "d", target),
        definition=definition,
        pipeline="p",
        source_path=f"/runs/a/{content}",
        pinned_path=f"/runs/.ckptd/{content}",
        layout="hf",
        run="a",
        name=content,
        step=1,
        content_digest=content,
        pipeline_digest="d",
        target=target,
        created_at=100.0,
    )


def test_repo() -> None:
    """Two revisions of one repo are one repo; two repos are two."""
    one, other = spec("1", "acme/a@main", device="cpu"), spec("2", "acme/a@dev", device="cpu")
    why = admission.why_not(other, [one], CAPS, ROOMY)
    assert why == "waits for another job on acme/a (jobs_per_repo: 1)"
    assert admission.why_not(spec("3", "acme/b@main", device="cpu"), [one], CAPS, ROOMY) is None
    two = Caps(per_repo=2, per_device=1, min_free_bytes=0)
    assert admission.why_not(other, [one], two, ROOMY) is None


def test_jobs_without_a_target_share_no_repo() -> None:
    """What is pushed nowhere waits for no repo."""
    assert admission.why_not(spec("2", "", device="cpu"), [spec("1", "")], CAPS, ROOMY) is None


@pytest.mark.parametrize(
    ("device", "stage", "expected"),
    [
        ("auto", "resize", "cuda:0"),
        ("cuda", "resize", "cuda:0"),
        ("cuda:1", "resize", "cuda:1"),
        ("cpu", "resize", None),
        ("auto", "reshard", None),
    ],
)
def test_device(device: str, stage: str, expected: str | None) -> None:
    """A job has the accelerator it computes on; one that copies has none."""
    found = admission.device_of(spec("1", device=device, stage=stage), ROOMY.accelerators)
    assert found == expected


def test_jobs_on_one_accelerator() -> None:
    """Two jobs on one accelerator come one after the other, on two at once."""
    running = [spec("1", "acme/a@main", device="cuda:1")]
    why = admission.why_not(spec("2", "acme/b@main", device="cuda:1"), running, CAPS, ROOMY)
    assert why == "waits for another job on cuda:1 (jobs_per_device: 1)"
    assert admission.why_not(spec("2", "acme/b@main", device="cuda"), running, CAPS, ROOMY) is None
    no_gpu = Node(free_bytes=None, accelerators=())
    assert admission.why_not(spec("2", "acme/b@main"), running, CAPS, no_gpu) is None


async def test_low_disk_keeps_jobs_back_until_there_is_room(tmp_path: Path) -> None:
    """Below the mark a job stays queued and says why; above it, it begins."""
    free = [999]
    gate = Admission(CAPS, state_path=tmp_path, free_bytes=lambda _: free[0])
    store = await SqliteStore.open(tmp_path / "jobs.sqlite3")
    try:
        queued = (await store.enqueue(spec("1"), now=100.0)).job
        admit = await gate.look()
        assert await store.acquire(worker="w", lease_s=30, now=101.0, admit=admit) is None
        kept = await store.get(queued.job_id)
        assert (kept.state, kept.reason) == (
            State.QUEUED, "waits for disk space (min_free: 1 KB)",
        )  # fmt: skip
        assert len(await store.history(queued.job_id)) == 1
        free[0] = 1000
        admit = await gate.look()
        begun = await store.acquire(worker="w", lease_s=30, now=102.0, admit=admit)
        assert begun is not None
        assert (begun.state, begun.reason) == (State.RUNNING, None)
    finally:
        await store.aclose()


async def test_a_job_kept_back_holds_nobody_up(tmp_path: Path) -> None:
    """Behind a job whose repo is busy, one for another repo begins."""
    gate = Admission(CAPS, state_path=tmp_path, free_bytes=lambda _: 5000)
    store = await SqliteStore.open(tmp_path / "jobs.sqlite3")
    try:
        for content, target in (("1", "acme/a@main"), ("2", "acme/a@dev"), ("3", "acme/b@main")):
            await store.enqueue(spec(content, target, device="cpu"), now=100.0)
        admit = await gate.look()
        names = []
        for _ in range(3):
            job = await store.acquire(worker="w", lease_s=30, now=101.0, admit=admit)
            names.append(None if job is None else job.spec.name)
        assert names == ["1", "3", None]
    finally:
        await store.aclose()


async def test_a_disk_that_says_nothing_keeps_nothing_back(tmp_path: Path) -> None:
    """Where the disk cannot be asked, jobs begin and meet what is wrong themselves."""

    def refuse(_: Path) -> int:
        raise OSError(5, "Input/output error")

    admit = await Admission(CAPS, state_path=tmp_path, free_bytes=refuse).look()
    assert admit(spec("1"), []) is None
