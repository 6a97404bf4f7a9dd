"""What is going on, kept up to date by the daemon's parts and read as a frozen value.

The one owner of the running jobs' status. It is written to `<state>/status.json` (whole or not at
all) a few times a second while it changes, where `ckptd status` finds it.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import structlog
from anyio import to_thread

from ckptd import __version__
from ckptd.jobs import progress
from ckptd.jobs.job import Job
from ckptd.jobs.store import JobStore
from ckptd.telemetry.status import (
    DaemonStatus,
    DefinitionStatus,
    JobStatus,
    Phase,
    PinStatus,
    WatchStatus,
)

STATUS_NAME = "status.json"
PUBLISH_S = 0.5
"""Least time between two writes of the status file."""
REFRESH_S = 10.0
"""Most time between them: a reader may take an older file for a daemon that is gone."""

log = structlog.get_logger()


class Board:
    """The daemon's status; belongs to the event loop."""

    def __init__(self, *, endpoint: str, slots: int) -> None:
        self._endpoint = endpoint
        self._slots = slots
        self._started_at = time.time()
        self._jobs: dict[str, JobStatus] = {}
        self._is_stale = False
        self.state = "starting"
        self.watches: Callable[[], tuple[WatchStatus, ...]] = tuple
        self.definitions: Callable[[], tuple[DefinitionStatus, ...]] = tuple
        self.pins: Callable[[], PinStatus | None] = lambda: None

    def started(self, job: Job, *, worker: str) -> None:
        """A slot has taken `job`."""
        spec = job.spec
        self._jobs[spec.job_id] = JobStatus(
            job_id=spec.job_id,
            pipeline=spec.pipeline,
            run=spec.run,
            name=spec.name,
            step=spec.step,
            target=spec.target,
            attempt=job.attempt,
            worker=worker,
            phase=Phase.STARTING,
            started_at=time.time(),
        )

    def ended(self, job_id: str) -> None:
        """The job is no longer running."""
        self._jobs.pop(job_id, None)

    def reported(self, job_id: str, report: progress.Report) -> None:
        """The job's runner has said something."""
        status = self._jobs[job_id]
        match report:
            case progress.PhaseChanged():
                status = dataclasses.replace(
                    status, phase=report.phase, num_shards=report.num_shards
                )
            case progress.BytesMoved():
                status = dataclasses.replace(status, counters=report.counters)
            case progress.ShardFinished():
                status = dataclasses.replace(
                    status, shards_done=report.shards_done, num_shards=report.num_shards
                )
                log.debug("shard finished", job=job_id, name=report.name, nbytes=report.nbytes)
            case progress.HubReported():
                status = self._hub(status, report)
            case progress.Warned():
                log.warning("job warns", job=job_id, text=report.text)
        self._jobs[job_id] = status

    def _hub(self, status: JobStatus, report: progress.HubReported) -> JobStatus:
        if report.event == "waiting":
            log.warning(
                "waiting for the Hub", job=status.job_id, seconds=report.wait_s, why=report.text
            )
            return dataclasses.replace(
                status, note=f"waiting {report.wait_s or 0:.0f} s for the Hub: {report.text}"
            )
        log.debug("hub", job=status.job_id, what=report.event, file=report.path_in_repo)
        return dataclasses.replace(status, note=None)

    def snapshot(self, counts: dict[str, int]) -> DaemonStatus:
        """Return the status now; `counts` are the jobs by state."""
        return DaemonStatus(
            version=__version__,
            pid=os.getpid(),
            state=self.state,
            started_at=self._started_at,
            at=time.time(),
            endpoint=self._endpoint,
            slots=self._slots,
            jobs=tuple(self._jobs.values()),
            counts=counts,
            watches=self.watches(),
            definitions=self.definitions(),
            pins=self.pins(),
        )

    def _write(self, path: Path, text: str) -> None:
        """Put `text` at `path` whole; not synced, since it is worthless after a crash.

        A full disk must not end the jobs: that the file is stale is said once.
        """
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            temporary.write_text(text)
            temporary.rename(path)
        except OSError as error:
            if not self._is_stale:
                log.error("status file not written", path=str(path), why=str(error))
            self._is_stale = True
        else:
            self._is_stale = False

    async def publish(
        self, state_path: Path, store: JobStore, notify: Callable[[str], None]
    ) -> None:
        """Write the status file while it changes, and tell `notify` its line; until cancelled."""
        path = state_path / STATUS_NAME
        told, told_at = None, 0.0
        while True:
            counts = {state.value: count for state, count in (await store.counts()).items()}
            status = self.snapshot(counts)
            comparable = dataclasses.replace(status, at=0.0)
            if comparable != told or time.monotonic() - told_at > REFRESH_S:
                told, told_at = comparable, time.monotonic()
                await to_thread.run_sync(self._write, path, status.to_json())
                notify(status.line)
            await anyio.sleep(PUBLISH_S)
