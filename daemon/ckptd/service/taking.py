"""From a complete checkpoint to a job, or to why it gets none.

Identity comes first: a job of the same content, pipeline and target is never made twice. Then the
definition's policies (`service.policies`): what they pass over is recorded, and under `take: newest`
older jobs that do not run give way.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import structlog
from anyio import from_thread, to_thread

from ckptd import errors
from ckptd.checkpoint import layouts, pin
from ckptd.checkpoint.listing import Listing
from ckptd.jobs.job import Job, JobSpec
from ckptd.jobs.store import JobStore
from ckptd.pipeline.definition import Definition, Watch
from ckptd.service import identify, policies
from ckptd.service.identify import KnownBases
from ckptd.service.pins import Pins

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What became of a complete checkpoint: a job (`is_new` where it was queued now), or a reason."""

    job_id: str | None = None
    is_new: bool = False
    skipped: str | None = None


class Taker:
    """Makes the jobs of one watched place."""

    def __init__(
        self,
        *,
        definition: Definition,
        watch: Watch,
        pins: Pins,
        store: JobStore,
        bases: KnownBases,
    ) -> None:
        self._definition = definition
        self._watch = watch
        self._pins = pins
        self._store = store
        self._bases = bases
        self._log = log.bind(pipeline=definition.pipeline)

    async def take(self, path: Path, pin_path: Path, pinned: Listing) -> Taken:
        """Identify the checkpoint of `path` by the content of its live pin, and queue a job.

        Where there is a job of it already, or the definition passes it over, nothing is queued, and
        the live pin is left to the caller.

        Raises:
            CheckpointRefused, HubError, SourceChanged: see `identify.spec_of`.
            NoSpace, StorageFailed: the pin or the job store cannot be written.
        """
        step = await to_thread.run_sync(layouts.step_of, pin_path, path.name)
        if why := await self._why_not(path, pinned, step):
            return Taken(skipped=why)
        spec = await to_thread.run_sync(
            lambda: identify.spec_of(
                path,
                pin_path,
                definition=self._definition,
                watch=self._watch,
                frozen_path=lambda job_id: self._pins.frozen_path(pin_path, job_id),
                bases=self._bases,
                now=time.time(),
                check=from_thread.check_cancelled,
            )
        )
        if spec.step != step and (why := await self._why_not(path, pinned, spec.step)):
            return Taken(skipped=why)
        known = await identify.known_job(self._store, spec.job_id)
        if known is not None and identify.stands(known, self._definition):
            return self._recognised(path, known, spec)
        await to_thread.run_sync(self._pins.freeze, pin_path, Path(spec.pinned_path))
        queued = await self._store.enqueue(spec, now=time.time())
        self._log.info(
            "job queued", checkpoint=str(path), job=spec.job_id, step=spec.step,
            digest=spec.content_digest[:19], target=spec.target,
        )  # fmt: skip
        await self._supersede(queued.job)
        return Taken(job_id=spec.job_id, is_new=True)

    async def _why_not(self, path: Path, pinned: Listing, step: int | None) -> str | None:
        """Return why `take` passes over this complete checkpoint, or None."""
        take = self._definition.take
        if take != "newest":
            return policies.passed_over(take, step=step)
        theirs = [file for file in pinned.files if file.relpath not in pin.NOTES]
        return policies.outdated(
            take,
            await self._store.list(),
            pipeline=self._definition.pipeline,
            source_path=path,
            step=step,
            written_at=max((file.mtime_ns for file in theirs), default=0) / 1e9,
        )

    def _recognised(self, path: Path, known: Job, spec: JobSpec) -> Taken:
        """Return that there is a job of this content already, or what is lost by that."""
        lost = policies.untagged(known, spec)
        if lost is not None:
            return Taken(skipped=lost)
        self._log.info(
            "checkpoint known", checkpoint=str(path), job=spec.job_id, state=known.state.value
        )
        return Taken(job_id=spec.job_id)

    async def _supersede(self, newest: Job) -> None:
        """Skip the jobs that give way to `newest`, and drop their pins."""
        take = self._definition.take
        if take != "newest":
            return
        for older, why in policies.superseded(take, await self._store.list(), by=newest):
            try:
                skipped = await self._store.skip(older.job_id, reason=why, now=time.time())
            except errors.UsageError:
                continue  # it has just been started
            self._log.info("job skipped", job=skipped.job_id, reason=why)
            await to_thread.run_sync(self._pins.release, Path(skipped.spec.pinned_path))
