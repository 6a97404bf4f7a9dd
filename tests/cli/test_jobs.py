"""`ckptd jobs`: the store as a person sees it."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest

from ckptd import errors
from ckptd.jobs.database import Database
from ckptd.jobs.failing import Failure, RetryLimits
from ckptd.jobs.job import JobSpec, Outcome, State
from ckptd.jobs.store import Sighting, Verdict
from tests.cli.conftest import Call, Start

FAILED_ID = "aa0000000000"
QUEUED_ID = "bb0000000000"


def _spec(job_id: str) -> JobSpec:
    return JobSpec(
        job_id=job_id,
        definition={},
        pipeline="publish",
        source_path=f"/runs/demo/{job_id}",
        pinned_path="/runs/.ckptd/x",
        layout="hf",
        run="demo",
        name=f"ck-{job_id}",
        step=3,
        content_digest=f"sha256:{job_id}",
        pipeline_digest="0" * 64,
        target=f"acme/{job_id}@main",
        created_at=time.time(),
    )


@pytest.fixture
def store(state_path: Path) -> Path:
    """A state folder with a failed job, a queued job, and a checkpoint that got no job."""
    path = state_path / "jobs.sqlite3"
    now = time.time()
    with Database(path) as database:
        database.enqueue(_spec(FAILED_ID), now=now)
        database.acquire(worker="w", lease_s=60, now=now)
        failure = Failure.of(errors.HubRejected("the card is wrong", hint="mend it"))
        limits = RetryLimits()
        database.fail(FAILED_ID, failure, worker="w", limits=limits, jitter=0, now=now)
        database.enqueue(_spec(QUEUED_ID), now=now)
        database.note(
            Sighting(
                source_path="/runs/demo/half",
                pipeline="publish",
                fingerprint_id="f",
                verdict=Verdict.INCOMPLETE,
                reason="shard 2 is missing",
                at=now,
            )
        )
    return path


def test_no_database(ckptd: Call) -> None:
    """Without a database there are no jobs yet, said kindly; asking for one is a usage error."""
    result = ckptd("jobs", "ls")
    assert (result.code, result.out) == (0, "")
    assert "no daemon has run" in result.err
    assert ckptd("jobs", "ls", "--json").value == {"jobs": []}
    assert ckptd("jobs", "info", "aa").code == 2


@pytest.mark.usefixtures("store")
def test_ls(ckptd: Call) -> None:
    """Jobs are listed oldest first, with state, target and why."""
    lines = ckptd("jobs", "ls").out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        [FAILED_ID, "failed"],
        [QUEUED_ID, "queued"],
    ]
    assert "the card is wrong" in lines[1]


@pytest.mark.usefixtures("store")
def test_ls_by_state(ckptd: Call) -> None:
    """--state filters; a state that does not exist is a usage error that names all."""
    value = ckptd("jobs", "ls", "--state", "queued", "--json").value
    assert [job["job_id"] for job in value["jobs"]] == [QUEUED_ID]
    wrong = ckptd("jobs", "ls", "--state", "dead")
    assert wrong.code == 2
    assert "vanished" in wrong.err


@pytest.mark.usefixtures("store")
def test_ls_all(ckptd: Call) -> None:
    """--all adds checkpoints that got no job, and why."""
    assert "shard 2 is missing" in ckptd("jobs", "ls", "--all").out
    value = ckptd("jobs", "ls", "--all", "--json").value
    assert value["sightings"][0]["verdict"] == "incomplete"


@pytest.mark.usefixtures("store")
def test_info(ckptd: Call) -> None:
    """A beginning of the id is enough; reason, hint and history are shown."""
    out = ckptd("jobs", "info", "aa").out
    assert "the card is wrong" in out
    assert "mend it" in out
    assert [line.split()[2] for line in out.splitlines()[-3:]] == ["queued", "running", "failed"]
    value = ckptd("jobs", "info", "aa", "--json").value
    assert value["job"]["failure"]["code"] == "HubRejected"
    assert len(value["history"]) == 3


@pytest.mark.usefixtures("store")
def test_info_on_a_checkpoint(ckptd: Call) -> None:
    """A checkpoint without a job is explained too, by its folder; unknown ones are a usage error."""
    out = ckptd("jobs", "info", "/runs/demo/half").out
    assert "incomplete" in out
    assert "shard 2 is missing" in out
    (seen,) = ckptd("jobs", "info", "/runs/demo/half/", "--json").value["sightings"]
    assert (seen["pipeline"], seen["verdict"]) == ("publish", "incomplete")
    unknown = ckptd("jobs", "info", "/runs/demo/none")
    assert unknown.code == 2
    assert "not been seen" in unknown.err


def test_a_table_leaves_the_checkpoint_out_of_its_reason(ckptd: Call, store: Path) -> None:
    """The reason is cut short in a table: it does not begin with the path that stands beside it."""
    path = "/runs/demo/a-rather-long-name-of-a-run/checkpoint-123456"
    with Database(store) as database:
        for pipeline, reason in (("p", f"{path}/model.safetensors: torn"), ("q", f"{path}: empty")):
            seen = Sighting(
                source_path=path,
                pipeline=pipeline,
                fingerprint_id="f",
                verdict=Verdict.REFUSED,
                reason=reason,
                at=time.time(),
            )
            database.note(seen)
    lines = ckptd("jobs", "ls", "--all").out.splitlines()
    assert any(line.endswith("  model.safetensors: torn") for line in lines)
    assert any(line.endswith("  empty") for line in lines)


@pytest.mark.usefixtures("store")
def test_retry_and_cancel(ckptd: Call) -> None:
    """A failed job can be queued again, a queued one cancelled; what makes no sense is refused."""
    assert ckptd("jobs", "retry", "aa").out == f"job {FAILED_ID} is queued\n"
    assert ckptd("jobs", "retry", "aa").code == 2
    assert ckptd("jobs", "cancel", "bb", "--json").value["state"] == "cancelled"
    assert ckptd("jobs", "cancel", "bb").code == 2
    assert ckptd("jobs", "retry", "cc").code == 2


def test_looking_writes_nothing(ckptd: Call, store: Path) -> None:
    """Listing works on a database that this user may only read."""
    before = store.read_bytes()
    assert ckptd("jobs", "ls").code == 0
    assert store.read_bytes() == before


@pytest.mark.usefixtures("store")
def test_reader_goes_away(start: Start) -> None:
    """`ckptd jobs ls | head -0` ends without a word of complaint."""
    process = start("jobs", "ls", "--all")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait() == 0


@pytest.fixture
def old_store(state_path: Path) -> Path:
    """Two runs, each with steps 4000 and 5000, and a checkpoint of step 4000 that got no job."""
    path = state_path / "jobs.sqlite3"
    with Database(path) as database:
        for run in ("llama-sft", "other"):
            for step in (4000, 5000):
                spec = dataclasses.replace(
                    _spec(f"{run}-{step}"), run=run, step=step, name=f"checkpoint-{step}"
                )
                database.enqueue(spec, now=100.0)
        job = database.acquire(worker="w", lease_s=60, now=200.0)
        assert job is not None
        outage = Failure(code="HubUnavailable", message="no answer", retry=errors.Retry.LATER)
        database.fail(job.job_id, outage, worker="w", limits=RetryLimits(), jitter=1.0, now=300.0)
        job = database.acquire(worker="w", lease_s=60, now=400.0)
        assert job is not None
        outcome = Outcome(state=State.PUBLISHED, commit="c" * 40, commit_url="https://hub/c")
        database.finish(job.job_id, outcome, worker="w", now=500.0)
        database.note(
            Sighting(
                source_path="/runs/llama-sft/adapter-4000",
                pipeline="publish",
                fingerprint_id="f",
                verdict=Verdict.REFUSED,
                reason="shard 2 is truncated",
                at=100.0,
            )
        )
    return path


@pytest.mark.usefixtures("old_store")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--step", 4000), {("llama-sft", 4000), ("other", 4000)}),
        (("--run", "llama-sft"), {("llama-sft", 4000), ("llama-sft", 5000)}),
        (("--run", "llama-sft", "--step", 4000), {("llama-sft", 4000)}),
        (("--step", 6000), set()),
    ],
)
def test_ls_of_a_step(
    options: tuple[object, ...], expected: set[tuple[str, int]], ckptd: Call
) -> None:
    """--run and --step leave the jobs of other checkpoints out."""
    found = ckptd("jobs", "ls", *options, "--json").value["jobs"]
    assert {(job["run"], job["step"]) for job in found} == expected


@pytest.mark.usefixtures("old_store")
def test_what_happened_to_step_4000(ckptd: Call) -> None:
    """Each try, each reason and the commit are told months later, and what got no job, too."""
    result = ckptd("jobs", "history", "--run", "llama-sft", "--step", 4000)
    lines = [" ".join(line.split()[2:]) for line in result.out.splitlines()]
    assert result.code == 0
    assert [line for line in lines if line.startswith(("queued", "running", "retr", "publ"))] == [
        "queued try 1",
        "running try 1",
        "retrying try 2 no answer",
        "running try 2",
        "published try 2",
    ]  # fmt: skip
    assert "commit: https://hub/c" in result.out
    assert "shard 2 is truncated" in result.out
    assert "other" not in result.out
    value = ckptd("jobs", "history", "--step", 4000, "--json").value
    assert [len(told["history"]) for told in value["jobs"]] == [5, 1]
    assert [seen["verdict"] for seen in value["sightings"]] == ["refused"]


@pytest.mark.usefixtures("old_store")
def test_history_of_nothing(ckptd: Call) -> None:
    """Without run and step there is no question; an unknown step is no error."""
    assert ckptd("jobs", "history").code == 2
    assert ckptd("jobs", "history", "--step", 1).code == 0
