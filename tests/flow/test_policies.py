"""Policies for busy runs: what is taken, what gives way, what a branch holds; each skip says why."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from starlette.requests import Request
from starlette.responses import Response

from ckptd.jobs import job as jobs
from ckptd.jobs.database import Database
from ckptd.jobs.job import Job, JobSpec, State
from ckptd.jobs.store import Verdict
from ckptd.pipeline.take import Every
from ckptd.service import policies
from tests.flow.conftest import Deployment, write_checkpoint

FORWARD = {"push": {"forward_only": True}}


def made(step: int | None, *, state: State = State.QUEUED, at: float = 100.0, **more: Any) -> Job:
    given: dict[str, Any] = {
        "job_id": f"job{step}",
        "definition": {},
        "pipeline": "p",
        "source_path": f"/runs/a/checkpoint-{step}",
        "pinned_path": "/runs/.ckptd/pins/x",
        "layout": "hf",
        "run": "a",
        "name": f"checkpoint-{step}",
        "step": step,
        "content_digest": f"c{step}",
        "pipeline_digest": "d",
        "target": "acme/a@latest",
        "created_at": at,
    }
    return dataclasses.replace(jobs.new(JobSpec(**(given | more))), state=state)


@pytest.mark.parametrize(
    ("step", "is_taken"), [(0, True), (500, True), (501, False), (1000, True), (None, True)]
)
def test_every_takes_multiples_and_what_has_no_step(step: int | None, is_taken: bool) -> None:
    """A final save, whose step nobody knows, is never lost to a rhythm."""
    why = policies.passed_over(Every(every=500), step=step)
    assert (why is None) is is_taken
    assert policies.passed_over("all", step=step) is None


@pytest.mark.parametrize(
    ("name", "step"),
    [("checkpoint-30", 30), ("global_step7", 7), ("final", None), ("m-000010.safetensors", 10)],
)
def test_the_step_stands_in_the_name(name: str, step: int | None) -> None:
    """Folder or file: what is passed over by its name needs no pin."""
    assert policies.step_in_name(Path("/runs/a") / name) == step


def test_newest_lets_older_ones_that_do_not_run_give_way() -> None:
    """Queued, retrying and waiting ones of the same run and pipeline; nothing else."""
    newest = made(40)
    give_way = [made(10), made(20, state=State.RETRYING), made(30, state=State.WAITING)]
    stay = [
        made(11, state=State.RUNNING),
        made(12, state=State.FAILED),
        made(13, source_path="/runs/b/checkpoint-13"),
        made(14, pipeline="q"),
        made(50),
        made(None),
        newest,
    ]
    found = policies.superseded("newest", [*give_way, *stay], by=newest)
    assert [job for job, _ in found] == give_way
    assert all("step 40" in why and "job40" in why for _, why in found)
    assert policies.superseded("all", give_way, by=newest) == ()


@pytest.mark.parametrize(
    ("state", "written_at", "is_outdated"),
    [
        (State.QUEUED, 50.0, True),
        (State.PUBLISHED, 50.0, True),
        (State.VANISHED, 50.0, False),
        (State.REFUSED, 50.0, False),
        (State.PUBLISHED, 150.0, False),
    ],
)
def test_an_older_step_that_is_complete_late_is_outdated(
    state: State, written_at: float, is_outdated: bool
) -> None:
    """Unless the newer one came to nothing, or the run was set back and wrote it afterwards."""
    why = policies.outdated(
        "newest",
        [made(40, state=state, at=100.0)],
        pipeline="p",
        source_path=Path("/runs/a/checkpoint-30"),
        step=30,
        written_at=written_at,
    )
    assert (why is not None) is is_outdated


def test_a_branch_that_moves_forward_only_never_goes_back() -> None:
    """A newer published step of the same branch and run stands in the way, and is named."""
    older = made(10, definition=FORWARD)
    assert "step 30" in (
        policies.goes_back(older, [made(n, state=State.PUBLISHED) for n in (20, 30)]) or ""
    )
    free = [
        made(20, state=State.FAILED),
        made(20, state=State.PUBLISHED, target="acme/a@main"),
        made(20, state=State.PUBLISHED, source_path="/runs/b/checkpoint-20"),
        made(5, state=State.PUBLISHED),
    ]
    assert policies.goes_back(older, free) is None
    assert policies.goes_back(made(10), [made(20, state=State.PUBLISHED)]) is None


def test_the_same_bytes_at_another_step_give_only_a_tag_of_their_own() -> None:
    """Where both would get the same tag, or none, or the step is the same, there is none to set."""
    known = made(10, git_tag="step-10", state=State.PUBLISHED)
    assert policies.second_tag(known, made(20, git_tag="step-20").spec) == "step-20"
    assert policies.second_tag(known, made(20, git_tag="step-10").spec) is None
    assert policies.second_tag(known, made(10, git_tag="step-20").spec) is None
    told = policies.same_bytes(known)
    assert "step 10" in told
    assert "job10" in told


def _reasons(node: Deployment) -> dict[str, str]:
    return {
        Path(s.source_path).name: s.reason or ""
        for s in node.sightings()
        if s.verdict is Verdict.SKIPPED
    }


def _take(node: Deployment, what: str) -> None:
    path = node.define()
    path.write_text(f"take: {what}\n" + path.read_text())


def test_every_publishes_multiples_and_says_of_the_others_why(node: Deployment) -> None:
    """Step 15 is passed over without a pin, 20 is published; a wider rhythm takes up nothing."""
    _take(node, "{every: 10}")
    node.start()
    for step in (15, 20):
        write_checkpoint(node.runs / "run" / f"checkpoint-{step}", step)
    (job,) = node.wait_for_ended(1)
    assert (job.spec.step, job.state) == (20, State.PUBLISHED)
    assert _reasons(node) == {"checkpoint-15": "step 15 is not taken: take is {every: 10}"}
    _take(node, "all")
    assert [job.spec.step for job in node.wait_for_ended(2)] == [20, 15]


def test_newest_skips_what_waits_behind_a_running_one(node: Deployment) -> None:
    """While step 1 is uploaded, 2 and 3 come: 2 is skipped for 3, and its pin goes."""
    _take(node, "newest")
    tried, goes_on = threading.Event(), threading.Event()

    def busy(request: Request) -> Response | None:
        if "preupload" not in request.url.path or goes_on.is_set():
            return None
        tried.set()
        return Response(status_code=503)

    node.hub.faults = busy
    node.start()
    run = node.runs / "run"
    write_checkpoint(run / "checkpoint-1", 1)
    node.wait_for(tried.is_set)
    for step in (2, 3):
        write_checkpoint(run / f"checkpoint-{step}", step)
        node.wait_for(lambda step=step: step in {job.spec.step for job in node.jobs()})
    second = node.wait_for(lambda: [job for job in node.jobs() if job.state is State.SKIPPED])
    assert [job.spec.step for job in second] == [2]
    assert "step 3 is newer and complete" in (second[0].reason or "")
    assert not Path(second[0].spec.pinned_path).exists()
    goes_on.set()
    states = {job.spec.step: job.state for job in node.wait_for_ended(3)}
    assert states == {1: State.PUBLISHED, 2: State.SKIPPED, 3: State.PUBLISHED}


def test_newest_at_the_start_takes_the_newest_of_many(node: Deployment) -> None:
    """Five are there already: the last is published, each older one says which is newer."""
    _take(node, "newest")
    run = node.runs / "run"
    for step in range(1, 6):
        write_checkpoint(run / f"checkpoint-{step}", step)
    node.start()
    node.wait_for(lambda: len(_reasons(node)) == 4)
    (job,) = node.wait_for_ended(1)
    assert (job.spec.step, job.state) == (5, State.PUBLISHED)
    assert all("step 5 is newer" in why for why in _reasons(node).values())
    node.wait_for(node.clean)


def test_an_older_step_that_is_retried_leaves_a_moving_branch_alone(node: Deployment) -> None:
    """It failed, a newer one was published, somebody retries it: skipped, the branch stays."""
    node.define(push="  revision: latest\n  forward_only: true")
    api = HfApi(endpoint=node.hub.url, token=node.hub.token)
    api.create_repo("ckptd/run")
    api.create_tag("ckptd/run", tag="step-10")
    node.start()
    run = node.runs / "run"
    write_checkpoint(run / "checkpoint-10", 10)
    (older,) = node.wait_for_ended(1)
    assert older.state is State.FAILED
    write_checkpoint(run / "checkpoint-20", 20)
    _, newer = node.wait_for_ended(2)
    assert newer.state is State.PUBLISHED
    api.delete_tag("ckptd/run", tag="step-10")
    with Database(node.state / "jobs.sqlite3") as database:
        database.retry(older.job_id, now=newer.updated_at + 1)
    older, _ = node.wait_for(lambda: node.jobs() if node.jobs()[0].state is State.SKIPPED else ())
    assert "holds step 20 already" in (older.reason or "")
    assert newer.outcome is not None
    refs = api.list_repo_refs("ckptd/run")
    (latest,) = [branch for branch in refs.branches if branch.name == "latest"]
    assert latest.target_commit == newer.outcome.commit


def _tags(node: Deployment) -> dict[str, str]:
    refs = HfApi(endpoint=node.hub.url, token=node.hub.token).list_repo_refs("ckptd/run")
    return {tag.name: tag.target_commit for tag in refs.tags}


def _said_of(node: Deployment, name: str) -> tuple[Verdict, str] | None:
    found = (s for s in node.sightings() if Path(s.source_path).name == name)
    return next(((s.verdict, s.reason or "") for s in found), None)


def test_the_same_bytes_at_another_step_put_a_second_tag_on_the_one_commit(
    node: Deployment,
) -> None:
    """One commit with both tags, also after a restart; what became of the second step says so."""
    node.define()
    node.start()
    run = node.runs / "run"
    write_checkpoint(run / "checkpoint-10", 10, seed=1)
    (job,) = node.wait_for_ended(1)
    assert job.outcome is not None
    write_checkpoint(run / "checkpoint-20", 20, seed=1)
    node.wait_for(lambda: _said_of(node, "checkpoint-20"))
    commit = job.outcome.commit
    node.wait_for(lambda: _tags(node) == {"step-10": commit, "step-20": commit})
    verdict, why = node.wait_for(lambda: _said_of(node, "checkpoint-20"))
    assert verdict is Verdict.TAKEN
    assert job.job_id in why
    assert "step-20" in why
    assert node.stop() == 0
    node.start()
    write_checkpoint(run / "checkpoint-30", 30)
    node.wait_for_ended(2)
    assert len(node.commits()) == 2
    assert node.log_path.read_text().count("git tag set") == 1
    node.wait_for(node.clean)


def test_a_second_tag_waits_for_the_commit_and_survives_rotation(node: Deployment) -> None:
    """The first is still being pushed when the second settles and is deleted: the tag comes later."""
    goes_on = threading.Event()

    def busy(request: Request) -> Response | None:
        stops = "preupload" in request.url.path and not goes_on.is_set()
        return Response(status_code=503) if stops else None

    node.hub.faults = busy
    node.define()
    node.start()
    run = node.runs / "run"
    write_checkpoint(run / "checkpoint-10", 10, seed=1)
    node.wait_for(node.jobs)
    write_checkpoint(run / "checkpoint-20", 20, seed=1)
    node.wait_for(lambda: "when it stands" in (_said_of(node, "checkpoint-20") or ("", ""))[1])
    shutil.rmtree(run / "checkpoint-20")
    goes_on.set()
    (job,) = node.wait_for_ended(1)
    assert job.outcome is not None
    node.wait_for(lambda: _tags(node).get("step-20") == job.outcome.commit)
    assert len(node.commits()) == 1
    node.wait_for(node.clean)


def test_a_second_tag_that_stands_elsewhere_is_not_moved(node: Deployment) -> None:
    """Skipped, with the commit that has it."""
    node.define()
    node.start()
    run = node.runs / "run"
    write_checkpoint(run / "checkpoint-10", 10, seed=1)
    (job,) = node.wait_for_ended(1)
    api = HfApi(endpoint=node.hub.url, token=node.hub.token)
    api.create_branch("ckptd/run", branch="other")
    api.upload_file(
        path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="ckptd/run", revision="other"
    )
    api.create_tag("ckptd/run", tag="step-20", revision="other")
    theirs = _tags(node)["step-20"]
    write_checkpoint(run / "checkpoint-20", 20, seed=1)
    node.wait_for(lambda: "checkpoint-20" in _reasons(node))
    why = _reasons(node)["checkpoint-20"]
    assert job.outcome is not None
    for named in (job.job_id, "step-20", theirs, str(job.outcome.commit)):
        assert named in why
    assert _tags(node)["step-20"] == theirs
