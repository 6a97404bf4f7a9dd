"""What the checkpoint had that was accepted last, run by run: what the next one is compared with.

It is kept in memory, and in the jobs that were made: after a restart the newest job of the run says
it. A checkpoint that became no job (it was passed over, or its content had one) is known only until
the daemon stops.
"""

from __future__ import annotations

from pathlib import Path

from ckptd.checkpoint.signs.file_set import FileSet
from ckptd.jobs.store import JobStore

_MOST_JOBS = 1000
"""So many of the newest jobs are looked through, once for each run and start of the daemon."""


class Earlier:
    """The file sets of one definition's runs."""

    def __init__(self, store: JobStore, pipeline: str) -> None:
        self._store = store
        self._pipeline = pipeline
        self._by_run: dict[Path, FileSet | None] = {}

    async def of(self, run: Path) -> FileSet | None:
        """Return what the last accepted checkpoint in the folder `run` had; None where none is known."""
        if run not in self._by_run:
            self._by_run[run] = await self._of_jobs(run)
        return self._by_run[run]

    def note(self, run: Path, accepted: FileSet) -> None:
        """Remember what a checkpoint of `run` had that is accepted now."""
        self._by_run[run] = accepted

    async def _of_jobs(self, run: Path) -> FileSet | None:
        jobs = await self._store.list(limit=_MOST_JOBS)
        return next(
            (
                job.spec.file_set
                for job in reversed(jobs)
                if job.spec.file_set is not None
                and job.spec.pipeline == self._pipeline
                and Path(job.spec.source_path).parent == run
            ),
            None,
        )
