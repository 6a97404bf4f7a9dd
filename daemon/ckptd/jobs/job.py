"""A job: one checkpoint through one pipeline to one target. Pure values and transitions.

    queued ──> running ──> published | skipped | refused | failed | vanished | cancelled
      ^          │
      │          ├──> retrying   failed, will be tried again at `next_try_at`
      │          ├──> waiting    needs a person (a token, a permission); tried again rarely
      │          ├──> held       made, but a check said not to push it
      └──────────┴── released at shutdown, or reaped after its worker was lost
    what does not run may be skipped (for a newer step), cancelled, or vanish with its pin

Every function takes a job and the time and returns the job as it is afterwards; nothing here
touches a disk or a clock. A transition that `MOVES` does not name raises. Times are wall-clock
seconds since the epoch, for they outlive the process.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from ckptd import errors
from ckptd.checkpoint.signs.file_set import FileSet
from ckptd.jobs import failing
from ckptd.jobs.failing import Failure, RetryLimits


class State(enum.Enum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    RETRYING = "retrying"
    WAITING = "waiting"
    HELD = "held"
    PUBLISHED = "published"
    SKIPPED = "skipped"
    REFUSED = "refused"
    FAILED = "failed"
    VANISHED = "vanished"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        """Whether nothing more happens without a person."""
        return self in TERMINAL


TERMINAL = frozenset({
    State.PUBLISHED, State.SKIPPED, State.REFUSED, State.FAILED, State.VANISHED, State.CANCELLED,
})  # fmt: skip
_GONE = frozenset({errors.CheckpointVanished.__name__, errors.SourceChanged.__name__})
"""Failures after which the content of the job exists no more; should it come back (a file was only
touched), the job is queued again."""
ACQUIRABLE = frozenset({State.QUEUED, State.RETRYING, State.WAITING})
"""A worker may take these, retrying and waiting ones once `next_try_at` has come."""

_DONE = frozenset({State.PUBLISHED, State.SKIPPED, State.HELD})
_ENDED_BADLY = frozenset({State.REFUSED, State.FAILED, State.VANISHED, State.CANCELLED})
_PAUSED = frozenset({State.RETRYING, State.WAITING})
_WITHOUT_RUNNING = frozenset({State.SKIPPED, State.VANISHED, State.CANCELLED})
_BY_HAND = "cancelled by hand"
RETRIED_BY_HAND = "retried by hand"

MOVES: dict[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.RUNNING}) | _WITHOUT_RUNNING,
    State.RUNNING: frozenset({State.QUEUED}) | _DONE | _ENDED_BADLY | _PAUSED,
    State.RETRYING: frozenset({State.RUNNING, State.QUEUED}) | _WITHOUT_RUNNING,
    State.WAITING: frozenset({State.RUNNING, State.QUEUED}) | _WITHOUT_RUNNING,
    State.HELD: frozenset({State.QUEUED, State.CANCELLED}),
    State.PUBLISHED: frozenset(),
    State.SKIPPED: frozenset({State.QUEUED}),
    State.REFUSED: frozenset({State.QUEUED}),
    State.FAILED: frozenset({State.QUEUED}),
    State.VANISHED: frozenset({State.QUEUED}),
    State.CANCELLED: frozenset({State.QUEUED}),
}
"""From each state, the states a job may move to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """What is to be done; never changes while the job lives."""

    job_id: str
    definition: dict[str, Any]
    """`Definition.dump()`: the whole definition as it was when the job was made."""
    pipeline: str
    source_path: str
    """The trainer's folder or file."""
    pinned_path: str
    """Our pin of it, which is what the runner reads."""
    layout: str
    run: str
    name: str
    step: int | None
    content_digest: str
    fingerprint: str = ""
    """`Listing.fingerprint_id` of the pin when the digest was taken: the digest holds while it is
    the same."""
    boot_id: str = ""
    """The start of the machine in which the digest was taken: in another one the disk may hold
    something else than what was hashed, for the trainer's files were not synced by us."""
    pipeline_digest: str
    target: str
    """Where it goes, placeholders resolved: `acme/run@main`. Empty where nothing is pushed."""
    git_tag: str | None = None
    """The git tag its commit gets, placeholders resolved."""
    base_place: str | None = None
    """What an adapter is merged into: a folder, or `owner/name@commit`."""
    base_digest: str | None = None
    """Digest of that folder's content, or the commit; `content_digest` covers it."""
    base_fingerprint: str | None = None
    """The state of that folder's files when the digest was taken."""
    doubts: tuple[str, ...] = ()
    """What spoke against its being whole, and was waited out: it was taken all the same."""
    file_set: FileSet | None = None
    """What the checkpoint had: the next one of its run is compared with that."""
    created_at: float

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes two jobs the same: content, pipeline and target."""
        return (self.content_digest, self.pipeline_digest, self.target)

    def to_json(self) -> str:
        """Return this spec as one line of JSON."""
        return _SPEC.dump_json(self).decode()

    @staticmethod
    def from_json(text: str | bytes) -> JobSpec:
        """Return the spec that `to_json` wrote.

        Raises:
            ValueError: not the JSON of a spec.
        """
        return _SPEC.validate_json(text)


def job_id_of(content_digest: str, pipeline_digest: str, target: str) -> str:
    """Return the id of the job with this key: twelve hexadecimal digits, the same every time."""
    key = json.dumps([content_digest, pipeline_digest, target]).encode()
    return hashlib.sha256(key).hexdigest()[:12]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a job that did its work ended: published, skipped (why) or held (why)."""

    state: State
    reason: str | None = None
    repo_id: str | None = None
    revision: str | None = None
    commit: str | None = None
    commit_url: str | None = None
    pr_num: int | None = None
    pr_url: str | None = None
    git_tag: str | None = None
    output_path: str | None = None
    num_shards: int = 0
    num_files: int = 0
    read_bytes: int = 0
    computed_bytes: int = 0
    written_bytes: int = 0
    uploaded_bytes: int = 0
    peak_bytes: int = 0
    """Highest resident memory of the runner, 0 where it was not measured."""
    duration_s: float = 0.0
    reports: dict[str, Any] = field(default_factory=dict)
    """What each stage reports, by stage name; JSON values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One row: what is to be done, and where it stands."""

    spec: JobSpec
    state: State
    attempt: int = 1
    """Which try this is, counted from 1; a released job goes on with the same try."""
    failures: int = 0
    """Failures since a person last touched it: decides the backoff and when to give up."""
    reason: str | None = None
    """Why it is in this state, for people."""
    failure: Failure | None = None
    """The last failure, also while it is tried again."""
    outcome: Outcome | None = None
    worker: str | None = None
    """Who holds the lease while running."""
    lease_until: float | None = None
    next_try_at: float | None = None
    cancel_requested: bool = False
    """A person asked to cancel it while it runs; the worker stops it and finishes the move."""
    updated_at: float

    @property
    def job_id(self) -> str:
        """The id of the spec."""
        return self.spec.job_id


def new(spec: JobSpec) -> Job:
    """Return `spec` as a queued job."""
    return Job(spec=spec, state=State.QUEUED, updated_at=spec.created_at)


def start(job: Job, *, worker: str, lease_s: float, now: float) -> Job:
    """Return `job` as running under a lease of `worker`."""
    running = _move(job, State.RUNNING, now, reason=None)
    return dataclasses.replace(running, worker=worker, lease_until=now + lease_s)


def finish(job: Job, outcome: Outcome, *, now: float) -> Job:
    """Return `job` as ended with `outcome`."""
    ended = _move(job, outcome.state, now, reason=outcome.reason)
    return dataclasses.replace(ended, outcome=outcome, failure=None, failures=0)


def fail(job: Job, failure: Failure, *, limits: RetryLimits, jitter: float, now: float) -> Job:
    """Return `job` after `failure`: retrying, waiting, or ended.

    `jitter` is a random number from 0 to 1 that spreads retries. A job that a person asked to
    cancel is cancelled, whatever failed.
    """
    if job.cancel_requested:
        return _move(job, State.CANCELLED, now, reason=_BY_HAND)
    failures = job.failures + 1
    if failure.code == failing.RUNNER_DIED:
        failure = failing.counted(failure, job.failure)
    state = _state_after(failure, failures, limits)
    next_try_at = None
    reason = str(failure)
    if state is State.WAITING:
        next_try_at = now + limits.wait_s
    elif state is State.RETRYING:
        pause = failing.backoff_s(
            failures, limits=limits, jitter=jitter, asked_s=failure.retry_after_s
        )
        next_try_at = now + pause
    elif failure.losses:
        reason = f"quarantined after {failure.losses} lost runners: {failure.message}"
    elif failure.retry is errors.Retry.LATER:
        reason = f"gave up after {failures} failures: {reason}"
    attempt = job.attempt + 1 if next_try_at is not None else job.attempt
    moved = _move(job, state, now, reason=reason)
    return dataclasses.replace(
        moved, failure=failure, failures=failures, attempt=attempt, next_try_at=next_try_at
    )


def extend(job: Job, *, lease_s: float, now: float) -> Job:
    """Return a running job with its lease prolonged to `now + lease_s`."""
    assert job.state is State.RUNNING
    return dataclasses.replace(job, lease_until=now + lease_s)


def release(job: Job, *, reason: str, now: float) -> Job:
    """Return a running job as queued again, same try, or cancelled where a person asked for it."""
    if job.cancel_requested:
        return _move(job, State.CANCELLED, now, reason=_BY_HAND)
    return _move(job, State.QUEUED, now, reason=reason)


def reap(job: Job, *, now: float) -> Job:
    """Return a running job whose worker is gone as queued for another try.

    Its failures do not count up: that a worker was killed says nothing about the job. A job that a
    person asked to cancel is cancelled instead.
    """
    if job.cancel_requested:
        return _move(job, State.CANCELLED, now, reason=_BY_HAND)
    queued = _move(job, State.QUEUED, now, reason=f"worker {job.worker} was lost")
    return dataclasses.replace(queued, attempt=job.attempt + 1)


def requeue(job: Job, spec: JobSpec, *, now: float) -> Job:
    """Return a vanished job as queued with the paths of `spec`: its checkpoint has come back."""
    queued = _move(job, State.QUEUED, now, reason="the checkpoint has come back")
    spec = dataclasses.replace(spec, job_id=job.job_id, created_at=job.spec.created_at)
    return dataclasses.replace(queued, spec=spec, attempt=job.attempt + 1, failures=0)


def retry(job: Job, *, now: float, reason: str = RETRIED_BY_HAND) -> Job:
    """Return `job` as queued because a person asked for it, or mended what it waited for.

    Raises:
        UsageError: it is queued, running or published.
    """
    if job.state is State.QUEUED:
        raise errors.UsageError(f"job {job.job_id} is queued already")
    if job.state is State.RUNNING:
        raise errors.UsageError(f"job {job.job_id} is running", hint="cancel it first")
    queued = _move(job, State.QUEUED, now, reason=reason)
    attempt = job.attempt if job.state in _PAUSED else job.attempt + 1
    return dataclasses.replace(queued, attempt=attempt, failures=0, failure=None)


def cancel(job: Job, *, now: float) -> Job:
    """Return `job` as cancelled, or as asked to stop while it runs.

    Raises:
        UsageError: it has ended already.
    """
    if job.state is State.RUNNING:
        return dataclasses.replace(job, cancel_requested=True, updated_at=now)
    return _move(job, State.CANCELLED, now, reason=_BY_HAND)


def skip(job: Job, *, reason: str, now: float) -> Job:
    """Return a job that does not run as skipped: the definition wants another one in its place."""
    return _move(_idle(job), State.SKIPPED, now, reason=reason)


def unpin(job: Job, *, reason: str, now: float) -> Job:
    """Return `job` after its pin was given up: vanished; failed and held ones only say so."""
    if job.state in (State.FAILED, State.HELD):
        return dataclasses.replace(job, reason=f"{job.reason}; {reason}", updated_at=now)
    return _move(_idle(job), State.VANISHED, now, reason=reason)


def _idle(job: Job) -> Job:
    if job.state is State.RUNNING:
        raise errors.UsageError(f"job {job.job_id} is running")
    return job


def _state_after(failure: Failure, failures: int, limits: RetryLimits) -> State:
    if failing.is_quarantined(failure, limits):
        return State.FAILED
    if failure.retry is errors.Retry.WAIT:
        return State.WAITING
    if failure.retry is errors.Retry.LATER:
        return State.RETRYING if failures < limits.max_failures else State.FAILED
    if failure.code in _GONE:
        return State.VANISHED
    return (
        State.REFUSED if failure.exit_code == errors.CheckpointRefused.exit_code else State.FAILED
    )


def _move(job: Job, state: State, now: float, *, reason: str | None) -> Job:
    """Return `job` in `state`, with lease, next try and request to cancel cleared."""
    if state not in MOVES[job.state]:
        raise errors.UsageError(
            f"job {job.job_id} is {job.state.value} and cannot become {state.value}"
        )
    return dataclasses.replace(
        job,
        state=state,
        reason=reason,
        worker=None,
        lease_until=None,
        next_try_at=None,
        cancel_requested=False,
        updated_at=now,
    )


_SPEC = TypeAdapter(JobSpec)
