"""Jobs and sightings as rows of the database, both ways."""

from __future__ import annotations

import sqlite3
from typing import Any

from pydantic import TypeAdapter

from ckptd.jobs.failing import Failure
from ckptd.jobs.job import Job, JobSpec, Outcome, State
from ckptd.jobs.store import Sighting, Verdict

_OUTCOME = TypeAdapter(Outcome)
_FAILURE = TypeAdapter(Failure)


def row(job: Job) -> dict[str, Any]:
    """Return the columns of `job`, by name."""
    spec = job.spec
    return {
        "job_id": spec.job_id,
        "content_digest": spec.content_digest,
        "pipeline_digest": spec.pipeline_digest,
        "target": spec.target,
        "pipeline": spec.pipeline,
        "source_path": spec.source_path,
        "spec": spec.to_json(),
        "state": job.state.value,
        "attempt": job.attempt,
        "failures": job.failures,
        "reason": job.reason,
        "failure": None if job.failure is None else _FAILURE.dump_json(job.failure).decode(),
        "outcome": None if job.outcome is None else _OUTCOME.dump_json(job.outcome).decode(),
        "worker": job.worker,
        "lease_until": job.lease_until,
        "next_try_at": job.next_try_at,
        "cancel_requested": int(job.cancel_requested),
        "created_at": spec.created_at,
        "updated_at": job.updated_at,
    }


def job(found: sqlite3.Row) -> Job:
    """Return the job that `row` wrote."""
    failure, outcome = found["failure"], found["outcome"]
    return Job(
        spec=JobSpec.from_json(found["spec"]),
        state=State(found["state"]),
        attempt=found["attempt"],
        failures=found["failures"],
        reason=found["reason"],
        failure=None if failure is None else _FAILURE.validate_json(failure),
        outcome=None if outcome is None else _OUTCOME.validate_json(outcome),
        worker=found["worker"],
        lease_until=found["lease_until"],
        next_try_at=found["next_try_at"],
        cancel_requested=bool(found["cancel_requested"]),
        updated_at=found["updated_at"],
    )


def of_sighting(sighting: Sighting) -> tuple[Any, ...]:
    """Return the columns of `sighting`, in the order of the table."""
    return (
        sighting.source_path,
        sighting.pipeline,
        sighting.fingerprint_id,
        sighting.verdict.value,
        sighting.reason,
        sighting.job_id,
        sighting.at,
    )


def sighting(found: sqlite3.Row) -> Sighting:
    """Return the sighting that `of_sighting` wrote."""
    return Sighting(
        source_path=found["source_path"],
        pipeline=found["pipeline"],
        fingerprint_id=found["fingerprint_id"],
        verdict=Verdict(found["verdict"]),
        reason=found["reason"],
        job_id=found["job_id"],
        at=found["at"],
    )
