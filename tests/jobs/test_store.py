"""The conformance suite of job stores."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest

from ckptd import errors
from ckptd.errors import Retry
from ckptd.jobs.failing import Failure, RetryLimits
from ckptd.jobs.job import Job, JobSpec, Outcome, State, job_id_of
from ckptd.jobs.sqlite import SqliteStore
from ckptd.jobs.store import JobStore, Sighting, Verdict

LIMITS = RetryLimits(max_failures=3, base_s=10.0, cap_s=60.0, wait_s=600.0)
OUTAGE = Failure(code="HubUnavailable", message="no answer", retry=Retry.LATER, exit_code=6)
PUBLISHED = Outcome(state=State.PUBLISHED, commit="f" * 40, reports={"tie": {"tied": True}})


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[JobStore]:
    found = await SqliteStore.open(tmp_path / "state" / "jobs.sqlite3")
    yield found
    await found.aclose()


def spec(content: str = "c1", *, target: str = "acme/a@main", **changes: Any) -> JobSpec:
    given: dict[str, Any] = {
        "job_id": job_id_of(content, "d", target),
        "definition": {"pipeline": "p"},
        "pipeline": "p",
        "source_path": f"/runs/a/{content}",
        "pinned_path": f"/runs/.ckptd/{content}",
        "layout": "hf",
        "run": "a",
        "name": content,
        "step": 1,
        "content_digest": content,
        "pipeline_digest": "d",
        "target": target,
        "created_at": 100.0,
    }
    return JobSpec(**(given | changes))


async def acquire(store: JobStore, *, worker: str = "w1", now: float = 110.0) -> Job:
    job = await store.acquire(worker=worker, lease_s=30.0, now=now)
    assert job is not None
    return job


async def fail(store: JobStore, job_id: str, failure: Failure = OUTAGE, now: float = 120.0) -> Job:
    return await store.fail(job_id, failure, worker="w1", limits=LIMITS, jitter=1.0, now=now)


async def test_enqueue_is_idempotent_by_key(store: JobStore) -> None:
    """The same checkpoint, pipeline and target is one job, however often it is seen."""
    first = await store.enqueue(spec(), now=100.0)
    again = await store.enqueue(spec(source_path="/elsewhere"), now=101.0)
    assert (first.created, again.created) == (True, False)
    assert again.job == first.job


async def test_published_key_returns_the_published_job(store: JobStore) -> None:
    """What is published already is found, not made again."""
    await store.enqueue(spec(), now=100.0)
    job = await acquire(store)
    await store.finish(job.job_id, PUBLISHED, worker="w1", now=130.0)
    again = await store.enqueue(spec(), now=140.0)
    assert not again.created
    assert again.job.state is State.PUBLISHED
    assert again.job.outcome == PUBLISHED
    assert await store.acquire(worker="w1", lease_s=30.0, now=141.0) is None


async def test_vanished_job_is_queued_again_when_it_comes_back(store: JobStore) -> None:
    """A checkpoint that was gone and is there again is work, at its new place."""
    found = await store.enqueue(spec(), now=100.0)
    await store.unpin(found.job.job_id, reason="gone", now=101.0)
    again = await store.enqueue(spec(pinned_path="/new"), now=102.0)
    assert (again.created, again.job.state) == (True, State.QUEUED)
    assert (await acquire(store)).spec.pinned_path == "/new"


async def test_acquired_in_order_of_arrival(store: JobStore) -> None:
    """The oldest job goes first."""
    for number in range(3):
        await store.enqueue(spec(f"c{number}", target=f"acme/{number}@main"), now=100.0)
    names = [(await acquire(store, worker=f"w{n}")).spec.name for n in range(3)]
    assert names == ["c0", "c1", "c2"]


async def test_one_job_goes_to_one_worker(store: JobStore) -> None:
    """Workers that ask at the same time never get the same job."""
    for number in range(5):
        await store.enqueue(spec(f"c{number}", target=f"acme/{number}@main"), now=100.0)
    got: list[str] = []

    async def ask(worker: str) -> None:
        job = await store.acquire(worker=worker, lease_s=30.0, now=110.0)
        if job is not None:
            got.append(job.job_id)

    async with anyio.create_task_group() as tasks:
        for number in range(8):
            tasks.start_soon(ask, f"w{number}")
    assert len(got) == len(set(got)) == 5


async def test_one_target_is_served_in_order(store: JobStore) -> None:
    """A later step never overtakes an earlier one on the same branch, also while it is retried."""
    await store.enqueue(spec("c1"), now=100.0)
    await store.enqueue(spec("c2"), now=101.0)
    first = await acquire(store)
    assert first.spec.name == "c1"
    assert await store.acquire(worker="w2", lease_s=30.0, now=111.0) is None
    await fail(store, first.job_id, now=120.0)
    assert await store.acquire(worker="w2", lease_s=30.0, now=121.0) is None
    assert (await acquire(store, now=131.0)).spec.name == "c1"
    await store.finish(first.job_id, PUBLISHED, worker="w1", now=140.0)
    assert (await acquire(store, now=141.0)).spec.name == "c2"


async def test_jobs_without_a_target_do_not_wait_for_each_other(store: JobStore) -> None:
    """What goes nowhere has no order to keep."""
    for content in ("c1", "c2"):
        await store.enqueue(spec(content, target=""), now=100.0)
    assert {(await acquire(store)).spec.name for _ in range(2)} == {"c1", "c2"}


async def test_held_job_holds_nobody_up(store: JobStore) -> None:
    """A job held back by its footprint lets the next step pass."""
    await store.enqueue(spec("c1"), now=100.0)
    await store.enqueue(spec("c2"), now=101.0)
    job = await acquire(store)
    await store.finish(job.job_id, Outcome(state=State.HELD, reason="over"), worker="w1", now=112.0)
    assert (await acquire(store, now=113.0)).spec.name == "c2"


async def test_retrying_job_is_not_acquired_before_its_time(store: JobStore) -> None:
    """A failed job is acquired when its pause is over, and `next_due` says when."""
    await store.enqueue(spec(), now=100.0)
    job = await acquire(store)
    failed = await fail(store, job.job_id, now=120.0)
    assert failed.next_try_at == 130.0
    assert await store.next_due(now=120.0) == 130.0
    assert await store.acquire(worker="w1", lease_s=30.0, now=129.9) is None
    assert (await acquire(store, now=130.0)).attempt == 2


async def test_extended_lease_is_not_reaped(store: JobStore) -> None:
    """A worker that reports in time keeps its job; one that does not loses it."""
    await store.enqueue(spec(), now=100.0)
    job = await acquire(store, now=100.0)
    await store.extend(job.job_id, worker="w1", lease_s=30.0, now=125.0)
    assert await store.reap(now=140.0) == []
    [reaped] = await store.reap(now=155.0)
    assert (reaped.state, reaped.attempt, reaped.worker) == (State.QUEUED, 2, None)


async def test_all_running_jobs_are_reaped_at_start(store: JobStore) -> None:
    """A daemon that owns the store alone takes back what its predecessor left, at once."""
    await store.enqueue(spec(), now=100.0)
    await acquire(store, now=100.0)
    assert len(await store.reap(now=101.0, every=True)) == 1
    assert (await acquire(store, worker="w2")).attempt == 2


async def test_lost_lease_changes_nothing(store: JobStore) -> None:
    """A worker that lost its lease can neither extend, finish, fail nor release the job."""
    await store.enqueue(spec(), now=100.0)
    job = await acquire(store, now=100.0)
    await store.reap(now=200.0)
    await acquire(store, worker="w2", now=201.0)
    with pytest.raises(errors.LeaseLost):
        await store.extend(job.job_id, worker="w1", lease_s=30.0, now=202.0)
    with pytest.raises(errors.LeaseLost):
        await store.finish(job.job_id, PUBLISHED, worker="w1", now=202.0)
    with pytest.raises(errors.LeaseLost):
        await fail(store, job.job_id)
    with pytest.raises(errors.LeaseLost):
        await store.release(job.job_id, worker="w1", reason="stop", now=202.0)
    assert (await store.get(job.job_id)).worker == "w2"


async def test_cancel_reaches_the_worker(store: JobStore) -> None:
    """A running job is asked to stop, and is cancelled once its worker has stopped it."""
    await store.enqueue(spec(), now=100.0)
    job = await acquire(store)
    await store.cancel(job.job_id, now=111.0)
    assert (await store.extend(job.job_id, worker="w1", lease_s=30.0, now=112.0)).cancel_requested
    stopped = await store.release(job.job_id, worker="w1", reason="asked", now=113.0)
    assert stopped.state is State.CANCELLED


async def test_history_tells_every_transition(store: JobStore) -> None:
    """`jobs info` can say what happened, when and why."""
    await store.enqueue(spec(), now=100.0)
    job = await acquire(store, now=110.0)
    await fail(store, job.job_id, now=120.0)
    await acquire(store, now=130.0)
    await store.extend(job.job_id, worker="w1", lease_s=30.0, now=135.0)
    await store.finish(job.job_id, PUBLISHED, worker="w1", now=140.0)
    told = [(m.at, m.state, m.attempt, m.reason) for m in await store.history(job.job_id)]
    assert told == [
        (100.0, State.QUEUED, 1, None),
        (110.0, State.RUNNING, 1, None),
        (120.0, State.RETRYING, 2, "no answer"),
        (130.0, State.RUNNING, 2, None),
        (140.0, State.PUBLISHED, 2, None),
    ]


async def test_illegal_moves_change_nothing(store: JobStore) -> None:
    """Retrying what is queued or cancelling what has ended is refused and leaves no trace."""
    found = await store.enqueue(spec(), now=100.0)
    with pytest.raises(errors.UsageError, match="queued already"):
        await store.retry(found.job.job_id, now=101.0)
    await store.cancel(found.job.job_id, now=102.0)
    with pytest.raises(errors.UsageError, match="cancelled"):
        await store.cancel(found.job.job_id, now=103.0)
    assert len(await store.history(found.job.job_id)) == 2


async def test_jobs_are_found_by_the_beginning_of_their_id(store: JobStore) -> None:
    """An id may be shortened while it is clear which job is meant."""
    await store.enqueue(spec("c1", job_id="abc1"), now=100.0)
    await store.enqueue(spec("c2", job_id="abd2"), now=100.0)
    await store.enqueue(spec("c3", job_id="abd"), now=100.0)
    assert (await store.get("abc")).spec.name == "c1"
    assert (await store.get("abd")).spec.name == "c3"
    for unclear in ("ab", "x", "", "%"):
        with pytest.raises(errors.UsageError):
            await store.get(unclear)


async def test_list_and_counts(store: JobStore) -> None:
    """Jobs are listed oldest first, by state, the newest of them where a limit is set."""
    for number in range(4):
        await store.enqueue(spec(f"c{number}"), now=100.0)
    await acquire(store)
    assert [job.spec.name for job in await store.list(limit=2)] == ["c2", "c3"]
    assert [job.spec.name for job in await store.list(states=[State.RUNNING])] == ["c0"]
    assert await store.list(states=[]) == []
    assert await store.counts() == {State.QUEUED: 3, State.RUNNING: 1}


async def test_sightings_are_replaced_and_forgotten(store: JobStore) -> None:
    """Of each checkpoint and pipeline the last sighting counts; old ones can be dropped."""
    ticks = itertools.count(1.0)
    for fingerprint, verdict in (("f1", Verdict.SETTLING), ("f2", Verdict.REFUSED)):
        await store.note(
            Sighting(
                source_path="/runs/a/c1",
                pipeline="p",
                fingerprint_id=fingerprint,
                verdict=verdict,
                reason="truncated" if verdict is Verdict.REFUSED else None,
                at=next(ticks),
            )
        )
    found = await store.sighting("/runs/a/c1", "p")
    assert found is not None
    assert (found.fingerprint_id, found.verdict, found.reason) == (
        "f2",
        Verdict.REFUSED,
        "truncated",
    )
    assert await store.sighting("/runs/a/c1", "q") is None
    assert await store.sightings() == [found]
    assert await store.forget(before=10.0) == 1
    assert await store.sightings() == []


async def test_a_job_that_does_not_run_can_be_skipped_or_lose_its_pin(store: JobStore) -> None:
    """Skipped or vanished with the reason in row and history; a running one is left alone."""
    for number in range(3):
        await store.enqueue(spec(f"c{number}", target=f"acme/{number}@main"), now=100.0)
    running = await acquire(store)
    skipped, unpinned = [job.job_id for job in await store.list(states=[State.QUEUED])]
    found = [
        await store.skip(skipped, reason="step 2 is newer", now=120.0),
        await store.unpin(unpinned, reason="over the limit", now=120.0),
    ]
    assert [job.state for job in found] == [State.SKIPPED, State.VANISHED]
    assert (await store.history(skipped))[-1].reason == "step 2 is newer"
    assert (await store.history(unpinned))[-1].reason == "over the limit"
    for move in (store.skip, store.unpin):
        with pytest.raises(errors.UsageError, match="running"):
            await move(running.job_id, reason="no", now=120.0)


async def test_a_failed_job_without_its_pin_says_both(store: JobStore) -> None:
    """It stays failed, with why it failed and why its pin is gone."""
    await store.enqueue(spec(), now=100.0)
    job = await acquire(store)
    refusal = Failure(code="HubRejected", message="no such owner", exit_code=6)
    await fail(store, job.job_id, refusal)
    found = await store.unpin(job.job_id, reason="its pin was 7 days old", now=200.0)
    assert found.state is State.FAILED
    assert found.reason == "no such owner; its pin was 7 days old"


async def test_old_history_is_forgotten_and_no_job(store: JobStore) -> None:
    """What happened to jobs that ended long ago goes; jobs stay, and so does all of live ones."""
    old = await store.enqueue(spec("c1", target="acme/a@main"), now=100.0)
    live = await store.enqueue(spec("c2", target="acme/b@main"), now=100.0)
    await acquire(store, now=110.0)
    await store.finish(old.job.job_id, PUBLISHED, worker="w1", now=120.0)
    assert await store.forget(before=120.0) == 0
    assert await store.forget(before=121.0) == 3
    assert await store.history(old.job.job_id) == []
    assert (await store.get(old.job.job_id)).state is State.PUBLISHED
    assert (await store.enqueue(old.job.spec, now=900.0)).created is False
    assert len(await store.history(live.job.job_id)) == 1


async def test_a_job_that_is_not_admitted_stays_with_the_reason(store: JobStore) -> None:
    """`admit` sees what runs, is asked in order, and what it keeps back says why."""
    for name in ("c1", "c2", "c3"):
        await store.enqueue(spec(name, target=f"acme/{name}@main"), now=100.0)
    running = await acquire(store)
    asked = []

    def admit(one: JobSpec, others: Sequence[JobSpec]) -> str | None:
        asked.append((one.name, [other.name for other in others]))
        return "not yet" if one.name == "c2" else None

    begun = await store.acquire(worker="w2", lease_s=30.0, now=111.0, admit=admit)
    assert begun is not None
    assert (running.spec.name, begun.spec.name) == ("c1", "c3")
    assert asked == [("c2", ["c1"]), ("c3", ["c1"])]
    kept = await store.get(job_id_of("c2", "d", "acme/c2@main"))
    assert (kept.state, kept.reason, kept.updated_at) == (State.QUEUED, "not yet", 100.0)
    assert len(await store.history(kept.job_id)) == 1


async def test_a_clock_that_was_set_back_does_not_stop_a_retry(store: JobStore) -> None:
    """A job that fails at a time that has not come yet any more is tried at once, not in a day."""
    await store.enqueue(spec(), now=DAY)
    await store.acquire(worker="w", lease_s=30.0, now=DAY)
    failure = Failure(code="HubUnavailable", message="busy", retry=errors.Retry.LATER)
    limits = RetryLimits()
    job = spec().job_id
    await store.fail(job, failure, worker="w", limits=limits, jitter=1.0, now=DAY)
    assert await store.acquire(worker="w", lease_s=30.0, now=DAY + 0.1) is None
    found = await store.acquire(worker="w", lease_s=30.0, now=1.0)
    assert found is not None
    assert found.job_id == job


DAY = 86_400.0


async def test_a_list_may_leave_out_other_runs_targets_and_earlier_steps(store: JobStore) -> None:
    """A run is the very folder that the checkpoints lie in, whatever other names begin like it."""
    places = {"a": "/runs/a/s", "b": "/runs/a/t", "c": "/runs/ab/s", "d": "/other/a/s"}
    for step, (name, path) in enumerate(places.items()):
        target = "acme/one@main" if name in "ac" else "acme/two@main"
        await store.enqueue(spec(name, source_path=path, step=step, target=target), now=100.0)

    async def names(**wanted: Any) -> str:
        return "".join(job.spec.name for job in await store.list(**wanted))

    assert await names() == "abcd"
    assert await names(run_path=Path("/runs/a")) == "ab"
    assert await names(target="acme/one@main") == "ac"
    assert await names(after_step=1) == "cd"
    assert await names(run_path=Path("/runs/a"), target="acme/two@main", after_step=0) == "b"
    assert await names(states=[State.PUBLISHED], after_step=0) == ""


async def test_a_job_is_found_by_its_id_or_by_a_beginning_that_only_it_has(store: JobStore) -> None:
    """A whole id wins over longer ones; what several have, nobody or nothing has is refused."""
    for job_id in ("ab", "abc1", "abd2", "f00"):
        await store.enqueue(spec(job_id, job_id=job_id, target=f"acme/{job_id}"), now=100.0)
    found = {given: (await store.get(given)).job_id for given in ("ab", "abc", "abd2", "f")}
    assert found == {"ab": "ab", "abc": "abc1", "abd2": "abd2", "f": "f00"}
    for refused in ("a", "x", "", "%", "b"):
        with pytest.raises(errors.UsageError):
            await store.get(refused)
