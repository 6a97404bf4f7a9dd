"""The contract of a job store, and the values it deals in.

A store keeps every job and its history durably: when a method has returned, what it did survives
kill -9 and power loss. All methods may be called from many tasks; one transaction happens at a time.
Time comes in as `now`, wall-clock seconds. `tests/jobs/test_store.py` is the suite that every
store passes.

Order: jobs are acquired in the order of their arrival, and a job waits while an earlier one with
the same target is unfinished, so that a branch never ends at an older step. Held and terminal jobs
hold nobody up, nor do jobs without a target.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ckptd.jobs.failing import Failure, RetryLimits
from ckptd.jobs.job import RETRIED_BY_HAND, Job, JobSpec, Outcome, State


@dataclass(frozen=True, slots=True, kw_only=True)
class Enqueued:
    """What `enqueue` found: the job of this key, and whether it was queued by this call."""

    job: Job
    created: bool
    """False: it was there already, in whatever state it is."""


Admit = Callable[[JobSpec, Sequence[JobSpec]], str | None]
"""Why a job may not begin beside those that run, or None where it may; quick, and never blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """One line of a job's history."""

    at: float
    state: State
    attempt: int
    reason: str | None


class Verdict(enum.Enum):
    """What became of a checkpoint that was seen."""

    SETTLING = "settling"
    """Somebody still writes it."""
    INCOMPLETE = "incomplete"
    """Quiet, but something is missing; judged again when it changes."""
    TAKEN = "taken"
    """A job was made of it, or it already had one."""
    REFUSED = "refused"
    SKIPPED = "skipped"
    VANISHED = "vanished"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """What was last seen of one watched checkpoint, for one pipeline."""

    source_path: str
    pipeline: str
    fingerprint_id: str
    """`Listing.fingerprint_id`: while it is the same, nothing needs to be judged again."""
    verdict: Verdict
    reason: str | None = None
    job_id: str | None = None
    at: float


class JobStore(Protocol):
    """Where jobs are kept."""

    async def enqueue(self, spec: JobSpec, *, now: float) -> Enqueued:
        """Queue `spec`, or return the job that has its key already, untouched.

        A vanished job is queued again with the new spec: its checkpoint has come back. So is one
        that was skipped under another definition.
        """

    async def acquire(
        self, *, worker: str, lease_s: float, now: float, admit: Admit | None = None
    ) -> Job | None:
        """Return the next job that may run, now running under a lease of `worker`; or None.

        A job that `admit` keeps back stays as it is, with the reason in its row; the next is asked.
        """

    async def extend(self, job_id: str, *, worker: str, lease_s: float, now: float) -> Job:
        """Prolong the lease to `now + lease_s` and return the job: see `cancel_requested`.

        Raises:
            LeaseLost: `worker` does not hold the lease (any more): it must stop the work.
        """

    async def finish(self, job_id: str, outcome: Outcome, *, worker: str, now: float) -> Job:
        """End the job with `outcome` and return it.

        Raises:
            LeaseLost: as `extend`; nothing is changed.
        """

    async def fail(
        self,
        job_id: str,
        failure: Failure,
        *,
        worker: str,
        limits: RetryLimits,
        jitter: float,
        now: float,
    ) -> Job:
        """Record `failure` and return the job: retrying, waiting or ended.

        Raises:
            LeaseLost: as `extend`; nothing is changed.
        """

    async def release(self, job_id: str, *, worker: str, reason: str, now: float) -> Job:
        """Queue the job again, same try: the worker stops in an orderly way.

        A job that a person asked to cancel is cancelled instead.

        Raises:
            LeaseLost: as `extend`; nothing is changed.
        """

    async def reap(self, *, now: float, every: bool = False) -> Sequence[Job]:
        """Queue the running jobs whose lease has run out for another try, and return them.

        `every` takes all running jobs: right when a daemon starts that owns the store alone. A job
        that a person asked to cancel is cancelled instead.
        """

    async def retry(self, job_id: str, *, now: float, reason: str = RETRIED_BY_HAND) -> Job:
        """Queue a job that failed, waits or was cancelled, because a person acted.

        Raises:
            UsageError: no such job, or it is queued, running or published.
        """

    async def cancel(self, job_id: str, *, now: float) -> Job:
        """Cancel the job; while it runs, ask its worker to.

        Raises:
            UsageError: no such job, or it has ended.
        """

    async def skip(self, job_id: str, *, reason: str, now: float) -> Job:
        """End a job that does not run as skipped: the definition wants another in its place.

        Raises:
            UsageError: no such job, or it runs or has ended.
        """

    async def unpin(self, job_id: str, *, reason: str, now: float) -> Job:
        """Record that the pin of a job that does not run is given up.

        One that was still to be done is vanished; a failed or held one stays so, and its reason
        says it.

        Raises:
            UsageError: no such job, or it runs or has ended in a way that keeps no pin.
        """

    async def get(self, job_id: str) -> Job:
        """Return the job with this id, or whose id begins so where only one does.

        Raises:
            UsageError: there is none, or several begin so.
        """

    async def list(
        self,
        *,
        states: Collection[State] | None = None,
        limit: int | None = None,
        target: str | None = None,
        run_path: Path | None = None,
        after_step: int | None = None,
    ) -> Sequence[Job]:
        """Return jobs in order of arrival, newest last; the newest `limit` of them.

        `target` and `run_path` (the folder that checkpoints lie in) leave those of others out,
        `after_step` those of this step or an earlier one and those without a step.
        """

    async def counts(self) -> dict[State, int]:
        """Return how many jobs are in each state that has any."""

    async def next_due(self, *, now: float) -> float | None:
        """Return when the next retrying or waiting job, or lease, falls due; None: never."""

    async def history(self, job_id: str) -> Sequence[Moment]:
        """Return every transition of the job with this full id, oldest first."""

    async def note(self, sighting: Sighting) -> None:
        """Remember what was seen of a checkpoint, in place of what was seen before."""

    async def sighting(self, source_path: str, pipeline: str) -> Sighting | None:
        """Return what was last seen of one checkpoint."""

    async def sightings(self) -> Sequence[Sighting]:
        """Return what was last seen of every checkpoint, newest last."""

    async def forget(self, *, before: float) -> int:
        """Drop what is older than `before` and return how much; jobs are never dropped.

        Dropped are sightings, and the transitions of jobs that ended before then.
        """
