"""Folders of the daemon's own: where they are, and when they go.

Staging (a folder a job, in `work` of the state folder) and pin of a job stay while the job may still
need them: queued, running, retrying, waiting, and failed or held (a person may retry it when the
source is long gone; a held job's output is in its staging). Everything else is removed as soon as
the job has ended, and what a crash left behind is removed at the next start.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from ckptd.checkpoint import pin
from ckptd.jobs.job import Job, State

_NEEDED = frozenset({
    State.QUEUED, State.RUNNING, State.RETRYING, State.WAITING, State.FAILED, State.HELD,
})  # fmt: skip


def work_path(state_path: Path, job_id: str) -> Path:
    """Return the staging folder of a job."""
    return state_path / "work" / job_id


def tidy(job: Job, state_path: Path) -> None:
    """Remove what `job` no longer needs in its state; safe to call twice. Blocks."""
    if job.state not in _NEEDED:
        pin.release(Path(job.spec.pinned_path))
        shutil.rmtree(work_path(state_path, job.job_id), ignore_errors=True)


def sweep(jobs: Iterable[Job], state_path: Path) -> None:
    """Remove staging folders of no job that needs one, and what ended jobs left. Blocks."""
    needed = set()
    for job in jobs:
        tidy(job, state_path)
        if job.state in _NEEDED:
            needed.add(job.job_id)
    for folder in (state_path / "work").glob("*"):
        if folder.name not in needed:
            shutil.rmtree(folder, ignore_errors=True)


def needs_pin(job: Job) -> bool:
    """Return whether the job's pin must stay."""
    return job.state in _NEEDED
