"""From a complete checkpoint to a job, or to why it gets none.

Identity comes first: a job of the same content, pipeline and target is never made twice; a step with
the bytes of an earlier one gets its own git tag on that one's commit. Then the definition's policies
(`service.policies`): what they pass over is recorded, and under `take: newest` older jobs that do not
run give way.
"""

from __future__ import annotations

import dataclasses
import importlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from anyio import from_thread, to_thread

from ckptd import errors
from ckptd.checkpoint import layouts, pin
from ckptd.checkpoint.listing import Listing
from ckptd.checkpoint.signs.file_set import FileSet
from ckptd.jobs.job import ACQUIRABLE, Job, JobSpec, State
from ckptd.jobs.store import JobStore
from ckptd.pipeline.definition import Definition, Watch
from ckptd.service import identify, policies
from ckptd.service.identify import KnownBases
from ckptd.service.pins import Pins

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What became of a complete checkpoint: a job (`is_new` where it was queued now), or a reason.

    `waits` says what has to happen first: it is to be taken once more. `note` goes with the job.
    """

    job_id: str | None = None
    is_new: bool = False
    skipped: str | None = None
    waits: str | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """A checkpoint that was found to be whole: what its live pin holds, and what that rests on."""

    pinned: Listing
    file_set: FileSet | None = None
    doubts: tuple[str, ...] = ()


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
        self._identified: dict[Path, tuple[str, JobSpec]] = {}
        self._log = log.bind(pipeline=definition.pipeline)

    async def take(self, path: Path, pin_path: Path, accepted: Accepted) -> Taken:
        """Identify the checkpoint of `path` by the content of its live pin, and queue a job.

        Where there is a job of it already, or the definition passes it over, nothing is queued, and
        the live pin is left to the caller.

        Raises:
            CheckpointRefused, HubError, SourceChanged: see `identify.spec_of`.
            NoSpace, StorageFailed: the pin or the job store cannot be written.
        """
        step = await to_thread.run_sync(layouts.step_of, pin_path, path.name)
        if why := await self._why_not(path, accepted.pinned, step):
            return Taken(skipped=why)
        spec = await self._identify(path, pin_path, accepted)
        if spec.step != step and (why := await self._why_not(path, accepted.pinned, spec.step)):
            return Taken(skipped=why)
        known = await identify.known_job(self._store, spec.job_id)
        if known is not None and identify.stands(known, self._definition):
            taken = await self._recognised(path, known, spec)
            if taken.waits is not None:
                self._identified[pin_path] = (accepted.pinned.fingerprint_id, spec)
            return taken
        await to_thread.run_sync(self._pins.freeze, pin_path, Path(spec.pinned_path))
        queued = await self._store.enqueue(spec, now=time.time())
        self._log.info(
            "job queued", checkpoint=str(path), job=spec.job_id, step=spec.step,
            digest=spec.content_digest[:19], target=spec.target,
        )  # fmt: skip
        await self._supersede(queued.job)
        return Taken(job_id=spec.job_id, is_new=True, note=_although(spec))

    async def _identify(self, path: Path, pin_path: Path, accepted: Accepted) -> JobSpec:
        """Return the job of the checkpoint; what waits is not hashed again."""
        fingerprint, known = self._identified.pop(pin_path, ("", None))
        if known is not None and fingerprint == accepted.pinned.fingerprint_id:
            return known
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
        return dataclasses.replace(spec, file_set=accepted.file_set, doubts=accepted.doubts)

    async def _why_not(self, path: Path, pinned: Listing, step: int | None) -> str | None:
        """Return why `take` passes over this complete checkpoint, or None."""
        take = self._definition.take
        if take != "newest":
            return policies.passed_over(take, step=step)
        theirs = [file for file in pinned.files if file.relpath not in pin.NOTES]
        return policies.outdated(
            take,
            await self._store.list(run_path=path.parent, after_step=step),
            pipeline=self._definition.pipeline,
            source_path=path,
            step=step,
            written_at=max((file.mtime_ns for file in theirs), default=0) / 1e9,
        )

    async def _recognised(self, path: Path, known: Job, spec: JobSpec) -> Taken:
        """Return that there is a job of this content already, whose commit gets the tag of this step."""
        tag = policies.second_tag(known, spec)
        if tag is None:
            self._log.info(
                "checkpoint known", checkpoint=str(path), job=spec.job_id, state=known.state.value
            )
            return Taken(job_id=spec.job_id)
        told = policies.same_bytes(known)
        if policies.is_to_come(known):
            return Taken(waits=f"{told}; its commit gets git tag {tag} when it stands")
        outcome = known.outcome
        if known.state is not State.PUBLISHED or outcome is None or outcome.commit is None:
            return Taken(skipped=f"{told}, and git tag {tag} is not set: it is {known.state.value}")
        assert outcome.repo_id is not None
        tagging: Any = await to_thread.run_sync(importlib.import_module, "ckptd.service.tagging")
        try:
            is_new = await tagging.put(
                endpoint=self._bases.endpoint,
                repo_id=outcome.repo_id,
                tag=tag,
                commit=outcome.commit,
            )
        except errors.HubError as error:
            why = f"{told}, and git tag {tag} is not set on its commit {outcome.commit}: {error}"
            if error.retry is errors.Retry.NEVER:
                return Taken(skipped=why)
            return Taken(waits=why)
        self._log.info(
            "git tag set" if is_new else "git tag known",
            checkpoint=str(path), job=known.job_id, tag=tag, commit=outcome.commit,
        )  # fmt: skip
        return Taken(job_id=spec.job_id, note=f"{told}; its commit {outcome.commit} has tag {tag}")

    async def _supersede(self, newest: Job) -> None:
        """Skip the jobs that give way to `newest`, and drop their pins."""
        take = self._definition.take
        if take != "newest":
            return
        waiting = await self._store.list(states=ACQUIRABLE)
        for older, why in policies.superseded(take, waiting, by=newest):
            try:
                skipped = await self._store.skip(older.job_id, reason=why, now=time.time())
            except errors.UsageError:
                continue  # it has just been started
            self._log.info("job skipped", job=skipped.job_id, reason=why)
            await to_thread.run_sync(self._pins.release, Path(skipped.spec.pinned_path))


def _although(spec: JobSpec) -> str | None:
    """Return in words what was waited out before a checkpoint was taken."""
    return f"taken, although {'; '.join(spec.doubts)}" if spec.doubts else None
