"""States and transitions of a job, without a store."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd import errors
from ckptd.errors import Retry
from ckptd.jobs import failing
from ckptd.jobs import job as jobs
from ckptd.jobs.failing import Failure, RetryLimits
from ckptd.jobs.job import Job, JobSpec, Outcome, State

LIMITS = RetryLimits(max_failures=3, base_s=10.0, cap_s=60.0, wait_s=600.0)
OUTAGE = Failure(code="HubUnavailable", message="no answer", retry=Retry.LATER, exit_code=6)
NO_TOKEN = Failure(code="HubUnauthorized", message="no token", retry=Retry.WAIT, exit_code=6)
TRUNCATED = Failure(code="CheckpointCorrupt", message="truncated", exit_code=4)


def spec(**changes: Any) -> JobSpec:
    given: dict[str, Any] = {
        "job_id": "abc",
        "definition": {"pipeline": "p", "stages": ["tie"]},
        "pipeline": "p",
        "source_path": "/runs/a/checkpoint-10",
        "pinned_path": "/runs/.ckptd/pins/x",
        "layout": "hf-trainer",
        "run": "a",
        "name": "checkpoint-10",
        "step": 10,
        "content_digest": "c",
        "pipeline_digest": "d",
        "target": "acme/a@main",
        "created_at": 100.0,
    }
    return JobSpec(**(given | changes))


def running() -> Job:
    return jobs.start(jobs.new(spec()), worker="w1", lease_s=30.0, now=101.0)


def fail(job: Job, failure: Failure, *, jitter: float = 1.0, now: float = 200.0) -> Job:
    return jobs.fail(job, failure, limits=LIMITS, jitter=jitter, now=now)


def test_spec_survives_json() -> None:
    """A spec that went through JSON is equal to what it was."""
    given = spec(step=None, run="läuft ✓")
    assert JobSpec.from_json(given.to_json()) == given


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"job_id": 5}'])
def test_what_is_no_spec_is_refused(text: str) -> None:
    """Damaged JSON raises ValueError, nothing else."""
    with pytest.raises(ValueError):
        JobSpec.from_json(text)


def test_id_depends_on_the_whole_key() -> None:
    """The same key has the same id, and no part of the key can stand in for another."""
    ids = {jobs.job_id_of(*key) for key in (("a", "b", "c"), ("ab", "", "c"), ("a", "bc", ""))}
    assert len(ids) == 3
    assert jobs.job_id_of("a", "b", "c") == jobs.job_id_of("a", "b", "c")


def test_failure_keeps_what_an_error_says() -> None:
    """Code, text, hint, retry and exit code of an error cross the process border."""
    error = errors.HubUnavailable("busy", repo_id="a/b", retry_after_s=7.0, hint="wait")
    found = Failure.of(error)
    assert (found.code, found.retry, found.retry_after_s) == ("HubUnavailable", Retry.LATER, 7.0)
    assert (found.exit_code, str(found)) == (6, str(error))


@pytest.mark.parametrize("state", [State.PUBLISHED, State.SKIPPED, State.HELD])
def test_outcome_ends_a_running_job(state: State) -> None:
    """A job that did its work is in the state its outcome names, without lease or failure."""
    ended = jobs.finish(running(), Outcome(state=state, reason="because"), now=300.0)
    assert (ended.state, ended.worker, ended.lease_until) == (state, None, None)
    assert ended.reason == "because"


def test_temporary_failure_is_retried_later() -> None:
    """A temporary failure counts up, sets the next try and keeps its reason."""
    failed = fail(running(), OUTAGE)
    assert (failed.state, failed.failures, failed.attempt) == (State.RETRYING, 1, 2)
    assert failed.next_try_at == 210.0
    assert failed.reason == "no answer"


def test_given_up_after_the_limit() -> None:
    """After the last allowed failure the job has failed and says how often it was tried."""
    failed = fail(dataclasses.replace(running(), failures=2), OUTAGE)
    assert failed.state is State.FAILED
    assert failed.reason == "gave up after 3 failures: no answer"


def test_waiting_is_never_given_up() -> None:
    """A job that needs a person waits however often it was tried."""
    failed = fail(dataclasses.replace(running(), failures=99), NO_TOKEN)
    assert (failed.state, failed.next_try_at) == (State.WAITING, 800.0)


@pytest.mark.parametrize(
    ("failure", "state"),
    [
        (TRUNCATED, State.REFUSED),
        (Failure(code="CheckpointVanished", message="gone", exit_code=4), State.VANISHED),
        (Failure(code="CheckFailed", message="too large", exit_code=5), State.FAILED),
    ],
)
def test_final_failures_name_their_state(failure: Failure, state: State) -> None:
    """A checkpoint that cannot be used is refused, one that is gone vanished, the rest failed."""
    assert fail(running(), failure).state is state


def test_asked_to_cancel_while_running() -> None:
    """Whatever a job does after a person asked to cancel it, it ends cancelled."""
    asked = jobs.cancel(running(), now=150.0)
    assert (asked.state, asked.cancel_requested, asked.worker) == (State.RUNNING, True, "w1")
    assert fail(asked, OUTAGE).state is State.CANCELLED
    assert jobs.release(asked, reason="stop", now=151.0).state is State.CANCELLED
    assert jobs.reap(asked, now=151.0).state is State.CANCELLED


def test_published_wins_over_a_late_cancel() -> None:
    """A commit that was made is not hidden by a cancel that came too late."""
    asked = jobs.cancel(running(), now=150.0)
    ended = jobs.finish(asked, Outcome(state=State.PUBLISHED), now=151.0)
    assert (ended.state, ended.cancel_requested) == (State.PUBLISHED, False)


def test_reaped_job_is_another_try_without_a_failure() -> None:
    """A lost worker makes the job queued again, with the next attempt and no failure."""
    reaped = jobs.reap(running(), now=200.0)
    assert (reaped.state, reaped.attempt, reaped.failures) == (State.QUEUED, 2, 0)
    assert reaped.reason == "worker w1 was lost"


def test_released_job_goes_on_with_the_same_try() -> None:
    """An orderly stop is no new attempt."""
    released = jobs.release(running(), reason="ckptd stops", now=200.0)
    assert (released.state, released.attempt) == (State.QUEUED, 1)


def test_retry_by_hand_starts_counting_anew() -> None:
    """A person's retry forgets the failures, so that the backoff starts from its base."""
    retried = jobs.retry(fail(running(), TRUNCATED), now=300.0)
    assert (retried.state, retried.failures, retried.attempt) == (State.QUEUED, 0, 2)


@pytest.mark.parametrize("state", [State.QUEUED, State.RUNNING, State.PUBLISHED])
def test_retry_is_refused_where_it_means_nothing(state: State) -> None:
    """Queued, running and published jobs cannot be retried; the text says what they are."""
    given = dataclasses.replace(jobs.new(spec()), state=state)
    with pytest.raises(errors.UsageError, match=state.value):
        jobs.retry(given, now=300.0)


@given(st.sampled_from(list(State)), st.sampled_from(list(State)))
def test_only_listed_moves_are_made(before: State, after: State) -> None:
    """Every pair of states is either a listed move, or refused with both names."""
    given = dataclasses.replace(jobs.new(spec()), state=before)
    if after in jobs.MOVES[before]:
        assert jobs._move(given, after, 1.0, reason=None).state is after
    else:
        with pytest.raises(errors.UsageError, match=before.value):
            jobs._move(given, after, 1.0, reason=None)


def test_every_state_is_reached_and_left_as_documented() -> None:
    """Every state is reachable, and no terminal state moves on but to queued."""
    reachable = {State.QUEUED}.union(*jobs.MOVES.values())
    assert reachable == set(State) == set(jobs.MOVES)
    for state in jobs.TERMINAL:
        assert jobs.MOVES[state] <= {State.QUEUED}


@given(
    failures=st.integers(1, 10_000),
    jitter=st.floats(0, 1),
    asked_s=st.none() | st.floats(0, 1e9),
)
def test_backoff_is_bounded(failures: int, jitter: float, asked_s: float | None) -> None:
    """A pause is at least half of base, as long as was asked for, and never over the cap."""
    pause = failing.backoff_s(failures, limits=LIMITS, jitter=jitter, asked_s=asked_s)
    assert LIMITS.base_s / 2 <= pause <= LIMITS.cap_s
    assert pause >= min(LIMITS.cap_s, asked_s or 0.0)


def test_backoff_doubles() -> None:
    """Without jitter, pauses double until the cap."""
    pauses = [failing.backoff_s(n, limits=LIMITS, jitter=1.0) for n in (1, 2, 3, 4, 5)]
    assert pauses == [10.0, 20.0, 40.0, 60.0, 60.0]


CRASHED = Failure(
    code=failing.RUNNER_DIED, message="SIGSEGV", retry=Retry.LATER, reached=4, crashes=1
)
KILLED = dataclasses.replace(CRASHED, message="SIGKILL", crashes=0)
PATIENT = RetryLimits(max_failures=50, base_s=1.0, max_crashes=3, max_losses=5)


def _lose(job: Job, *failures: Failure) -> list[Job]:
    """Return the job after each of `failures`, started again in between."""
    found = []
    for failure in failures:
        job = jobs.fail(job, failure, limits=PATIENT, jitter=0.0, now=200.0)
        found.append(job)
        if job.state is State.RETRYING:
            job = jobs.start(job, worker="w1", lease_s=30.0, now=300.0)
    return found


def test_a_job_that_crashes_its_runner_at_one_place_is_quarantined() -> None:
    """The third crash ends it, with the number and the last reason; a person may try it again."""
    found = _lose(running(), CRASHED, CRASHED, CRASHED)
    assert [job.state for job in found] == [State.RETRYING, State.RETRYING, State.FAILED]
    assert found[-1].reason == "quarantined after 3 lost runners: SIGSEGV"
    again = jobs.start(jobs.retry(found[-1], now=400.0), worker="w1", lease_s=30.0, now=401.0)
    assert _lose(again, CRASHED)[0].state is State.RETRYING


def test_a_job_that_gets_further_is_not_blamed_for_lost_runners() -> None:
    """However many runners are lost: while each comes further than those before, it goes on."""
    further = [dataclasses.replace(CRASHED, reached=n) for n in range(1, 20)]
    assert {job.state for job in _lose(running(), *further)} == {State.RETRYING}


def test_kills_by_others_blame_the_job_later_than_crashes() -> None:
    """A runner that was killed from outside says less about the job, but not nothing."""
    assert [job.state for job in _lose(running(), *[KILLED] * 5)] == [State.RETRYING] * 4 + [
        State.FAILED
    ]
    mixed = _lose(running(), CRASHED, KILLED, CRASHED, KILLED)
    assert [job.state for job in mixed] == [State.RETRYING] * 4


def test_another_failure_in_between_ends_the_row_of_lost_runners() -> None:
    """A try that came to words was no crash."""
    found = _lose(running(), CRASHED, CRASHED, OUTAGE, CRASHED, CRASHED)
    assert {job.state for job in found} == {State.RETRYING}
