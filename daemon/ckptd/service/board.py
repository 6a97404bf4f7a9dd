"""What is going on, kept up to date by the daemon's parts and read as a frozen value.

The one owner of the running jobs' status. It is written to `<state>/status.json` (whole or not at
all) a few times a second while it changes, where `ckptd status` finds it.
"""

from __future__ import annotations

import dataclasses
import math
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
    LimitStatus,
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
        self._moved_at: dict[str, float] = {}
        self.state = "starting"
        self.limits: Callable[[dict[str, int]], tuple[LimitStatus, ...]] = lambda _: ()
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
        self._moved_at[spec.job_id] = time.monotonic()

    def ended(self, job_id: str) -> None:
        """The job is no longer running."""
        self._jobs.pop(job_id, None)
        self._moved_at.pop(job_id, None)

    @property
    def running(self) -> list[str]:
        """The ids of the jobs that run."""
        return list(self._jobs)

    def silent_jobs(self, silence_s: float) -> list[str]:
        """Return the running jobs that have not moved for `silence_s` seconds.

        A job moves when its runner says something; while it waits for the Hub it counts as moving
        until that wait is over.
        """
        now = time.monotonic()
        return [job_id for job_id, at in self._moved_at.items() if now - at > silence_s]

    def reported(self, job_id: str, report: progress.Report) -> None:
        """The job's runner has said something."""
        status = self._jobs[job_id]
        waits_s = report.wait_s or 0.0 if isinstance(report, progress.HubReported) else 0.0
        self._moved_at[job_id] = time.monotonic() + waits_s
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
            resumes_at = time.time() + (report.wait_s or 0.0)
            why = (report.text or "").partition("; next try")[0]
            return dataclasses.replace(status, note=why, resumes_at=resumes_at)
        tell = log.info if report.text else log.debug
        tell(
            "hub",
            job=status.job_id,
            what=report.event,
            file=report.path_in_repo,
            text=report.text,
        )
        return dataclasses.replace(status, note=None, resumes_at=None)

    def snapshot(self, counts: dict[str, int]) -> DaemonStatus:
        """Return the status now; `counts` are the jobs by state."""
        now = time.time()
        return DaemonStatus(
            version=__version__,
            pid=os.getpid(),
            state=self.state,
            started_at=self._started_at,
            at=now,
            endpoint=self._endpoint,
            slots=self._slots,
            jobs=tuple(_counted_down(status, now) for status in self._jobs.values()),
            counts=counts,
            watches=self.watches(),
            definitions=self.definitions(),
            pins=self.pins(),
            limits=self.limits(counts),
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


def _counted_down(status: JobStatus, now: float) -> JobStatus:
    """Return the status with the seconds that its wait for the Hub still takes."""
    if status.resumes_at is None:
        return status
    left_s = math.ceil(status.resumes_at - now)
    note = f"waiting {left_s} s for the Hub: {status.note}" if left_s > 0 else None
    return dataclasses.replace(status, note=note)
