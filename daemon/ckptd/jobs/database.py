"""Jobs in a SQLite file, synchronously: what `JobStore` says, one transaction a call.

WAL with synchronous=FULL: a call that returned has reached the disk. Writers begin IMMEDIATE, so
that another process (`ckptd jobs cancel`) and the daemon can share the file. The daemon uses this
through `SqliteStore`; the command line uses it directly, read-only where it only looks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import Self

from ckptd import errors
from ckptd.jobs import damage, rows
from ckptd.jobs import job as jobs
from ckptd.jobs.failing import Failure, RetryLimits
from ckptd.jobs.job import Job, JobSpec, Outcome, State
from ckptd.jobs.store import Admit, Enqueued, Moment, Sighting

BUSY_TIMEOUT_S = 10.0
"""How long to wait for another process that writes."""
MIGRATIONS: tuple[str, ...] = ("schema.sql",)
"""Scripts beside this module; the database's `user_version` says how many were applied."""

_NEXT = """
WITH live AS (
  SELECT seq, target, state FROM jobs WHERE state IN ('queued', 'running', 'retrying', 'waiting')),
first AS (
  SELECT seq FROM live WHERE target = '' AND state != 'running'
  UNION ALL
  SELECT min(seq) FROM live WHERE target != '' GROUP BY target HAVING sum(state = 'running') = 0)
SELECT jobs.* FROM jobs JOIN first USING (seq)
WHERE state = 'queued'
   OR (state IN ('retrying', 'waiting')
       AND (next_try_at <= :now OR updated_at > :now))  -- the clock was set back since
ORDER BY seq LIMIT :looks
"""
_OF_CHECKPOINT = (
    "AND (:target IS NULL OR target = :target) "
    "AND (:run_path IS NULL OR substr(source_path, 1, length(:run_path) + 1) = :run_path || '/') "
    "AND (:run IS NULL OR json_extract(spec, '$.run') = :run) "
    "AND (:step IS NULL OR json_extract(spec, '$.step') = :step) "
    "AND (:after_step IS NULL OR json_extract(spec, '$.step') > :after_step)"
)
LAST_CHARACTER = "\U0010ffff"
"""Behind every text that begins with another one, as SQLite sorts."""
MOST_LOOKS = 64
"""Jobs that are asked whether they may begin before a slot rather waits."""


class Database:
    """One connection to the job database; not for two threads at once."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self._path = path
        with _translated(path):
            if not read_only:
                path.parent.mkdir(parents=True, exist_ok=True)
            uri = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
            self._connection = sqlite3.connect(
                uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            try:
                self._connection.row_factory = sqlite3.Row
                self._prepare(read_only=read_only)
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        """Close the connection; calling it twice is safe."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def enqueue(self, spec: JobSpec, *, now: float) -> Enqueued:
        """See `JobStore.enqueue`."""
        with self._writing():
            row = self._connection.execute(
                "SELECT * FROM jobs WHERE content_digest=? AND pipeline_digest=? AND target=?",
                spec.key,
            ).fetchone()
            if row is None:
                return Enqueued(job=self._insert(jobs.new(spec)), created=True)
            known = rows.job(row)
            passed_over = known.state is State.SKIPPED and known.spec.definition != spec.definition
            if known.state is not State.VANISHED and not passed_over:
                return Enqueued(job=known, created=False)
            again = jobs.requeue(known, spec, now=now)
            return Enqueued(job=self._update(again), created=True)

    def acquire(
        self, *, worker: str, lease_s: float, now: float, admit: Admit | None = None
    ) -> Job | None:
        """See `JobStore.acquire`."""
        looks = 1 if admit is None else MOST_LOOKS
        with self._writing():
            found = self._connection.execute(_NEXT, {"now": now, "looks": looks}).fetchall()
            running = self._running() if found and admit is not None else []
            for job in map(rows.job, found):
                why = None if admit is None else admit(job.spec, running)
                if why is None:
                    return self._update(jobs.start(job, worker=worker, lease_s=lease_s, now=now))
                if job.reason != why:
                    self._update(dataclasses.replace(job, reason=why), moment=False)
            return None

    def extend(self, job_id: str, *, worker: str, lease_s: float, now: float) -> Job:
        """See `JobStore.extend`."""
        with self._writing():
            held = self._held(job_id, worker)
            return self._update(jobs.extend(held, lease_s=lease_s, now=now), moment=False)

    def finish(self, job_id: str, outcome: Outcome, *, worker: str, now: float) -> Job:
        """See `JobStore.finish`."""
        with self._writing():
            return self._update(jobs.finish(self._held(job_id, worker), outcome, now=now))

    def fail(
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
        with self._writing():
            held = self._held(job_id, worker)
            return self._update(jobs.fail(held, failure, limits=limits, jitter=jitter, now=now))

    def release(self, job_id: str, *, worker: str, reason: str, now: float) -> Job:
        """See `JobStore.release`."""
        with self._writing():
            return self._update(jobs.release(self._held(job_id, worker), reason=reason, now=now))

    def reap(self, *, now: float, every: bool = False) -> list[Job]:
        """See `JobStore.reap`."""
        with self._writing():
            found = self._connection.execute(
                "SELECT * FROM jobs WHERE state='running' AND (? OR lease_until <= ?) ORDER BY seq",
                (every, now),
            ).fetchall()
            return [self._update(jobs.reap(rows.job(row), now=now)) for row in found]

    def retry(self, job_id: str, *, now: float, reason: str = jobs.RETRIED_BY_HAND) -> Job:
        """See `JobStore.retry`."""
        with self._writing():
            return self._update(jobs.retry(self._find(job_id), now=now, reason=reason))

    def cancel(self, job_id: str, *, now: float) -> Job:
        """See `JobStore.cancel`."""
        with self._writing():
            return self._update(jobs.cancel(self._find(job_id), now=now))

    def skip(self, job_id: str, *, reason: str, now: float) -> Job:
        """See `JobStore.skip`."""
        with self._writing():
            return self._update(jobs.skip(self._find(job_id), reason=reason, now=now))

    def unpin(self, job_id: str, *, reason: str, now: float) -> Job:
        """See `JobStore.unpin`."""
        with self._writing():
            return self._update(jobs.unpin(self._find(job_id), reason=reason, now=now))

    def get(self, job_id: str) -> Job:
        """See `JobStore.get`."""
        with _translated(self._path):
            return self._find(job_id)

    def list(
        self,
        *,
        states: Collection[State] | None = None,
        limit: int | None = None,
        target: str | None = None,
        run_path: Path | None = None,
        run: str | None = None,
        step: int | None = None,
        after_step: int | None = None,
    ) -> Sequence[Job]:
        """See `JobStore.list`; `run` (its name) and `step` leave the jobs of others out."""
        wanted = {f"s{n}": s.value for n, s in enumerate(State if states is None else states)}
        marks = ",".join(f":{name}" for name in wanted)
        query = f"SELECT * FROM jobs WHERE state IN ({marks}) {_OF_CHECKPOINT} ORDER BY seq DESC LIMIT :limit"  # noqa: S608 - only marks and our own text are put in; values are bound
        bound: dict[str, str | int | None] = {
            **wanted, "target": target, "run": run, "step": step, "after_step": after_step,
            "run_path": None if run_path is None else str(run_path),
            "limit": -1 if limit is None else limit,
        }  # fmt: skip
        with _translated(self._path):
            found = self._connection.execute(query, bound)
            return [rows.job(row) for row in reversed(found.fetchall())]

    def counts(self) -> dict[State, int]:
        """See `JobStore.counts`."""
        with _translated(self._path):
            found = self._connection.execute("SELECT state, count(*) FROM jobs GROUP BY state")
            return {State(state): number for state, number in found}

    def next_due(self, *, now: float) -> float | None:
        """See `JobStore.next_due`."""
        with _translated(self._path):
            [earliest] = self._connection.execute(
                "SELECT min(coalesce(next_try_at, lease_until)) FROM jobs "
                "WHERE state IN ('running', 'retrying', 'waiting') "
                "AND coalesce(next_try_at, lease_until) > ?",
                (now,),
            ).fetchone()
            return None if earliest is None else float(earliest)

    def history(self, job_id: str) -> Sequence[Moment]:
        """See `JobStore.history`."""
        with _translated(self._path):
            found = self._connection.execute(
                "SELECT at, state, attempt, reason FROM history WHERE job_id=? ORDER BY seq",
                (job_id,),
            ).fetchall()
        return [
            Moment(at=at, state=State(state), attempt=attempt, reason=reason)
            for at, state, attempt, reason in found
        ]

    def note(self, sighting: Sighting) -> None:
        """See `JobStore.note`."""
        with self._writing():
            self._connection.execute(
                "INSERT OR REPLACE INTO sightings VALUES (?, ?, ?, ?, ?, ?, ?)",
                rows.of_sighting(sighting),
            )

    def sighting(self, source_path: str, pipeline: str) -> Sighting | None:
        """See `JobStore.sighting`."""
        with _translated(self._path):
            row = self._connection.execute(
                "SELECT * FROM sightings WHERE source_path=? AND pipeline=?",
                (source_path, pipeline),
            ).fetchone()
            return None if row is None else rows.sighting(row)

    def sightings(self) -> Sequence[Sighting]:
        """See `JobStore.sightings`."""
        with _translated(self._path):
            found = self._connection.execute("SELECT * FROM sightings ORDER BY at, source_path")
            return [rows.sighting(row) for row in found]

    def forget(self, *, before: float) -> int:
        """See `JobStore.forget`."""
        ended = [state.value for state in jobs.TERMINAL]
        marks = ",".join("?" * len(ended))
        old = f"SELECT job_id FROM jobs WHERE updated_at < ? AND state IN ({marks})"  # noqa: S608 - only marks are put in; values are bound
        with self._writing():
            execute = self._connection.execute
            dropped = execute("DELETE FROM sightings WHERE at < ?", (before,)).rowcount
            query = f"DELETE FROM history WHERE job_id IN ({old})"  # noqa: S608 - as above
            return dropped + execute(query, (before, *ended)).rowcount

    def _prepare(self, *, read_only: bool) -> None:
        self._connection.execute("PRAGMA foreign_keys=ON")
        if not read_only:
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            damage.check(self._connection, self._path)
        [version] = self._connection.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS) or (read_only and version < len(MIGRATIONS)):
            raise errors.StorageFailed(
                f"is of version {version}, this ckptd works with {len(MIGRATIONS)}",
                path=self._path,
                hint="use the ckptd that the daemon runs",
            )
        if version < len(MIGRATIONS):
            self._migrate()

    def _migrate(self) -> None:
        with self._writing():  # another process may have been faster: the version is read inside
            [version] = self._connection.execute("PRAGMA user_version").fetchone()
            for name in MIGRATIONS[version:]:
                script = resources.files("ckptd.jobs").joinpath(name).read_text("utf-8")
                for statement in _statements(script):
                    self._connection.execute(statement)
            self._connection.execute(f"PRAGMA user_version={len(MIGRATIONS)}")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction: all of the block, or nothing."""
        with _translated(self._path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _running(self) -> Sequence[JobSpec]:
        found = self._connection.execute("SELECT spec FROM jobs WHERE state='running'")
        return [JobSpec.from_json(spec) for [spec] in found.fetchall()]

    def _find(self, job_id: str) -> Job:
        # A range, not a prefix: that is found by the index, among all jobs that ever were.
        found = self._connection.execute(
            "SELECT * FROM jobs WHERE job_id >= ? AND job_id < ? ORDER BY job_id LIMIT 2",
            (job_id, f"{job_id}{LAST_CHARACTER}"),
        ).fetchall()
        if not found or not job_id:
            raise errors.UsageError(f"no job {job_id!r}", hint="ckptd jobs ls shows all")
        if len(found) > 1 and found[0]["job_id"] != job_id:
            raise errors.UsageError(f"several jobs begin with {job_id!r}", hint="give more of it")
        return rows.job(found[0])

    def _held(self, job_id: str, worker: str) -> Job:
        row = self._connection.execute(
            "SELECT * FROM jobs WHERE job_id=? AND state='running' AND worker=?", (job_id, worker)
        ).fetchone()
        if row is None:
            raise errors.LeaseLost(job_id=job_id, worker=worker)
        return rows.job(row)

    def _insert(self, job: Job) -> Job:
        row = rows.row(job)
        columns = ", ".join(row)
        marks = ", ".join(f":{column}" for column in row)
        self._connection.execute(f"INSERT INTO jobs ({columns}) VALUES ({marks})", row)  # noqa: S608 - only marks and our own column names are put in; values are bound
        self._add_moment(job)
        return job

    def _update(self, job: Job, *, moment: bool = True) -> Job:
        row = rows.row(job)
        changes = ", ".join(f"{column}=:{column}" for column in row)
        self._connection.execute(f"UPDATE jobs SET {changes} WHERE job_id=:job_id", row)  # noqa: S608 - only marks and our own column names are put in; values are bound
        if moment:
            self._add_moment(job)
        return job

    def _add_moment(self, job: Job) -> None:
        reason = "asked to stop" if job.cancel_requested else job.reason
        self._connection.execute(
            "INSERT INTO history (job_id, at, state, attempt, reason) VALUES (?, ?, ?, ?, ?)",
            (job.job_id, job.updated_at, job.state.value, job.attempt, reason),
        )


def _statements(script: str) -> Iterator[str]:
    """Yield the statements of `script`: running it as one would end our transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as exc:
        raise damage.translated(exc, path) from exc
