"""The job store of the daemon: a `Database`, one call at a time, off the event loop."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import anyio
import structlog
from anyio import to_thread

from ckptd.jobs import damage
from ckptd.jobs.database import Database
from ckptd.jobs.failing import Failure, RetryLimits
from ckptd.jobs.job import RETRIED_BY_HAND, Job, JobSpec, Outcome, State
from ckptd.jobs.store import Admit, Enqueued, Moment, Sighting

PAUSES_S = (0.2, 1.0, 5.0, 15.0, 30.0)
"""Pauses before a call is made again that a lock or the disk refused; the last one for good."""

log = structlog.get_logger()

P = ParamSpec("P")
T = TypeVar("T")


class SqliteStore:
    """The `JobStore` over a `Database`: every call is one transaction in a worker thread.

    Calls come one after the other. A cancelled call still ends its transaction before the
    cancellation goes on.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._limiter = anyio.CapacityLimiter(1)

    @classmethod
    async def open(cls, path: Path) -> SqliteStore:
        """Open (and make or migrate) the database at `path`; its folder must exist.

        One that is damaged is kept aside and replaced by a new one with what can be read of it.

        Raises:
            StorageFailed: it cannot be opened, or was made by a newer ckptd.
        """
        return cls(await to_thread.run_sync(_opened, path))

    async def aclose(self) -> None:
        """Close the database after the call that runs, if any."""
        await self._run(Database.close)

    async def enqueue(self, spec: JobSpec, *, now: float) -> Enqueued:
        """See `JobStore.enqueue`."""
        return await self._run(Database.enqueue, spec, now=now)

    async def acquire(
        self, *, worker: str, lease_s: float, now: float, admit: Admit | None = None
    ) -> Job | None:
        """See `JobStore.acquire`."""
        return await self._run(
            Database.acquire, worker=worker, lease_s=lease_s, now=now, admit=admit
        )

    async def extend(self, job_id: str, *, worker: str, lease_s: float, now: float) -> Job:
        """See `JobStore.extend`."""
        return await self._run(Database.extend, job_id, worker=worker, lease_s=lease_s, now=now)

    async def finish(self, job_id: str, outcome: Outcome, *, worker: str, now: float) -> Job:
        """See `JobStore.finish`."""
        return await self._run(Database.finish, job_id, outcome, worker=worker, now=now)

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
        """See `JobStore.fail`."""
        return await self._run(
            Database.fail, job_id, failure, worker=worker, limits=limits, jitter=jitter, now=now
        )

    async def release(self, job_id: str, *, worker: str, reason: str, now: float) -> Job:
        """See `JobStore.release`."""
        return await self._run(Database.release, job_id, worker=worker, reason=reason, now=now)

    async def reap(self, *, now: float, every: bool = False) -> Sequence[Job]:
        """See `JobStore.reap`."""
        return await self._run(Database.reap, now=now, every=every)

    async def retry(self, job_id: str, *, now: float, reason: str = RETRIED_BY_HAND) -> Job:
        """See `JobStore.retry`."""
        return await self._run(Database.retry, job_id, now=now, reason=reason)

    async def cancel(self, job_id: str, *, now: float) -> Job:
        """See `JobStore.cancel`."""
        return await self._run(Database.cancel, job_id, now=now)

    async def skip(self, job_id: str, *, reason: str, now: float) -> Job:
        """See `JobStore.skip`."""
        return await self._run(Database.skip, job_id, reason=reason, now=now)

    async def unpin(self, job_id: str, *, reason: str, now: float) -> Job:
        """See `JobStore.unpin`."""
        return await self._run(Database.unpin, job_id, reason=reason, now=now)

    async def get(self, job_id: str) -> Job:
        """See `JobStore.get`."""
        return await self._run(Database.get, job_id)

    async def list(
        self,
        *,
        states: Collection[State] | None = None,
        limit: int | None = None,
        target: str | None = None,
        run_path: Path | None = None,
        after_step: int | None = None,
    ) -> Sequence[Job]:
        """See `JobStore.list`."""
        return await self._run(
            Database.list,
            states=states, limit=limit, target=target, run_path=run_path, after_step=after_step,
        )  # fmt: skip

    async def counts(self) -> dict[State, int]:
        """See `JobStore.counts`."""
        return await self._run(Database.counts)

    async def next_due(self, *, now: float) -> float | None:
        """See `JobStore.next_due`."""
        return await self._run(Database.next_due, now=now)

    async def history(self, job_id: str) -> Sequence[Moment]:
        """See `JobStore.history`."""
        return await self._run(Database.history, job_id)

    async def note(self, sighting: Sighting) -> None:
        """See `JobStore.note`."""
        await self._run(Database.note, sighting)

    async def sighting(self, source_path: str, pipeline: str) -> Sighting | None:
        """See `JobStore.sighting`."""
        return await self._run(Database.sighting, source_path, pipeline)

    async def sightings(self) -> Sequence[Sighting]:
        """See `JobStore.sightings`."""
        return await self._run(Database.sightings)

    async def forget(self, *, before: float) -> int:
        """See `JobStore.forget`."""
        return await self._run(Database.forget, before=before)

    async def _run(
        self, method: Callable[Concatenate[Database, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        call = functools.partial(method, self._database, *args, **kwargs)
        for pause_s in itertools.chain(PAUSES_S, itertools.repeat(PAUSES_S[-1])):
            try:
                return await to_thread.run_sync(call, limiter=self._limiter)
            except damage.DatabaseBusy as error:
                log.warning("job store failed, trying again", why=str(error), seconds=pause_s)
            await anyio.sleep(pause_s)
        raise AssertionError("unreachable: the pauses do not end")


def _opened(path: Path) -> Database:
    try:
        return Database(path)
    except damage.DatabaseDamaged as error:
        why = str(error)
    aside = damage.set_aside(path)
    log.error("job database damaged, kept aside and made anew", kept=str(aside), why=why)
    database = Database(path)
    try:
        num_jobs = damage.rescue(aside, path)
    except BaseException:
        database.close()
        raise
    log.warning("job database rebuilt", jobs=num_jobs, hint="the folders and the Hub have the rest")
    return database
