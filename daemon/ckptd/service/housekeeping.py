"""Folders of the daemon's own: where they are, and when they go.

Staging (a folder a job, in `work` of the state folder) and pin of a job stay while the job may still
need them: queued, running, retrying, waiting, and failed or held (a person may retry it when the
source is long gone; a held job's output is in its staging). Everything else is removed as soon as
the job has ended, or by the `Janitor`, which looks every few seconds:

- what ended jobs left (one that was cancelled while it did not run);
- pins of failed and held jobs older than `pin_age`, and a failed one's staging;
- live pins of definitions that were renamed or removed;
- where pins hold more bytes on disk than `pin_limit`, the oldest ones of jobs that do not run.

Whatever loses its pin says so in its job's reason, or in the sighting of its checkpoint.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import anyio
import structlog
from anyio import to_thread

from ckptd import errors, units
from ckptd.checkpoint import pin
from ckptd.checkpoint.open_files import OpenFiles
from ckptd.jobs.job import ACQUIRABLE, Job, State
from ckptd.jobs.store import JobStore, Sighting, Verdict
from ckptd.pipeline.definition import Definition
from ckptd.service import pinned
from ckptd.service.pinned import Pin, Pinned
from ckptd.telemetry.status import PinStatus
from ckptd.watch import scan

log = structlog.get_logger()

LOOK_S = 10.0
"""Seconds between two looks of the janitor."""
_KEPT = frozenset({State.FAILED, State.HELD})
_NEEDED = ACQUIRABLE | _KEPT | {State.RUNNING}


def work_path(state_path: Path, job_id: str) -> Path:
    """Return the staging folder of a job."""
    return state_path / "work" / job_id


def tidy(job: Job, state_path: Path) -> None:
    """Remove what `job` no longer needs in its state; safe to call twice. Blocks."""
    if job.state not in _NEEDED:
        pin.release(Path(job.spec.pinned_path))
        shutil.rmtree(work_path(state_path, job.job_id), ignore_errors=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class PinLimits:
    """How much and how long pins may be kept: see `Settings.pin_limit` and `pin_age`."""

    max_bytes: int
    max_age_s: float


class Janitor:
    """Removes what nobody needs any more; `definitions` gives those in use.

    `definitions` returns None while a definition file is broken: then nobody knows which are gone.
    """

    def __init__(
        self,
        *,
        owner: str,
        state_path: Path,
        store: JobStore,
        held: OpenFiles,
        limits: PinLimits,
        definitions: Callable[[], dict[str, Definition] | None],
    ) -> None:
        self._pinned = Pinned(owner=owner, state_path=state_path)
        self._state_path = state_path
        self._store = store
        self._held = held
        self._limits = limits
        self._definitions = definitions
        self.status = PinStatus(limit_bytes=limits.max_bytes, max_age_s=limits.max_age_s)

    async def sweep(self) -> None:
        """Remove what a daemon that was killed left behind; before anything is watched.

        It looks at what is on the disk, not at every job that ever was: a start takes no longer
        after years.
        """
        needed = await self._store.list(states=_NEEDED)
        pins = {Path(job.spec.pinned_path) for job in needed}
        found = await to_thread.run_sync(self._pinned.all)
        await self._tidy([one.path for one in found if not one.live and one.path not in pins])
        for path in await to_thread.run_sync(self._idle_work, {job.job_id for job in needed}):
            await to_thread.run_sync(functools.partial(shutil.rmtree, path, ignore_errors=True))
        await to_thread.run_sync(self._pinned.sweep, pins)

    async def run(self) -> None:
        """Look again and again until cancelled."""
        while True:
            try:
                await self.look(now=time.time())
            except (errors.CkptdError, OSError) as error:
                log.warning("pins not looked after", why=str(error))
            await anyio.sleep(LOOK_S)

    async def look(self, *, now: float) -> None:
        """Remove what is to go, and bring the status up to date.

        Raises:
            StorageFailed: the job store cannot be read or written.
            OSError: a folder of pins cannot be listed.
        """
        needed = await self._store.list(states=_NEEDED)
        jobs = {Path(job.spec.pinned_path): job for job in needed}
        found = await to_thread.run_sync(self._pinned.all)
        await self._tidy([one.path for one in found if not one.live and one.path not in jobs])
        await self._tidy(await to_thread.run_sync(self._idle_work, {job.job_id for job in needed}))
        await self._drop_strays([one for one in found if one.live], now=now)
        await self._drop_aged(found, jobs, now=now)
        await self._drop_surplus(jobs, now=now)

    def _idle_work(self, needed: Collection[str]) -> list[Path]:
        """Return the staging folders of jobs that are not `needed`."""
        return [path for path in (self._state_path / "work").glob("*") if path.name not in needed]

    async def _tidy(self, left: Iterable[Path]) -> None:
        """Remove folders of jobs that have ended; one that has no job yet is about to get it."""
        for path in left:
            try:
                job = await self._store.get(path.name.partition("-")[0])
            except errors.UsageError:
                continue
            await to_thread.run_sync(tidy, job, self._state_path)

    async def _drop_strays(self, live: Iterable[Pin], *, now: float) -> None:
        definitions = self._definitions()
        if definitions is None:
            return
        for stray in live:
            if _is_followed(stray, definitions):
                continue
            why = (
                f"pipeline {stray.pipeline} watches this place no more: its definition was changed"
            )
            log.info("pin dropped", checkpoint=str(stray.source), why=why)
            self._held.release(stray.path)
            await to_thread.run_sync(pin.release, stray.path)
            seen = await self._store.sighting(str(stray.source), stray.pipeline)
            if seen is None or seen.verdict in (Verdict.SETTLING, Verdict.INCOMPLETE):
                await self._store.note(
                    Sighting(
                        source_path=str(stray.source),
                        pipeline=stray.pipeline,
                        fingerprint_id="",
                        verdict=Verdict.SKIPPED,
                        reason=why,
                        at=now,
                    )
                )

    async def _drop_aged(self, found: Iterable[Pin], jobs: dict[Path, Job], *, now: float) -> None:
        for one in found:
            job = jobs.get(one.path)
            if job is None or job.state not in _KEPT:
                continue
            if now - job.updated_at > self._limits.max_age_s:
                age = units.format_duration(self._limits.max_age_s)
                await self._give_up(job, f"its pin was dropped after {age} (pin_age)", now=now)

    async def _drop_surplus(self, jobs: dict[Path, Job], *, now: float) -> None:
        """Drop the oldest pins until the rest is within the limit; what runs keeps its own."""
        kept: set[Path] = set()
        while True:
            found = await to_thread.run_sync(self._pinned.all)
            held = await to_thread.run_sync(pinned.held_bytes, found)
            total = sum(held.values()) + self._held.deleted_bytes()
            self._tell(len(found), total)
            droppable = [
                jobs[one.path]
                for one in found
                if held.get(one.path)
                and one.path in jobs
                and one.path not in kept
                and jobs[one.path].state in _NEEDED - {State.RUNNING}
            ]
            if total <= self._limits.max_bytes or not droppable:
                return
            oldest = min(droppable, key=lambda job: job.spec.created_at)
            kept.add(Path(oldest.spec.pinned_path))
            why = (
                f"its pin was dropped: pins held {units.format_bytes(total)}, pin_limit is "
                f"{units.format_bytes(self._limits.max_bytes)}, and it was the oldest; raise "
                "pin_limit, or publish less often (take: newest)"
            )
            await self._give_up(oldest, why, now=now)

    async def _give_up(self, job: Job, why: str, *, now: float) -> None:
        """Record that the job loses its pin, then remove it; a job that runs meanwhile keeps it."""
        path = Path(job.spec.pinned_path)
        try:
            ino = (await to_thread.run_sync(path.stat)).st_ino
            moved = await self._store.unpin(job.job_id, reason=why, now=now)
        except (FileNotFoundError, errors.UsageError):
            return
        log.warning("pin dropped", job=job.job_id, checkpoint=job.spec.source_path, why=why)
        await to_thread.run_sync(lambda: pinned.dispose(path, ino=ino))
        if moved.state is not State.HELD:  # its output is there, and nowhere else
            work = work_path(self._state_path, job.job_id)
            await to_thread.run_sync(lambda: shutil.rmtree(work, ignore_errors=True))

    def _tell(self, num_pins: int, held_bytes: int) -> None:
        self.status = PinStatus(
            num_pins=num_pins,
            held_bytes=held_bytes,
            limit_bytes=self._limits.max_bytes,
            max_age_s=self._limits.max_age_s,
        )


def _is_followed(live: Pin, definitions: dict[str, Definition]) -> bool:
    """Whether a definition in use watches the source of a live pin, under the name it was pinned."""
    definition = definitions.get(live.pipeline)
    if definition is None:
        return False
    for watch in definition.watch:
        place = scan.parse(watch.path)
        if live.source.match(str(place.root_path.resolve().joinpath(*place.parts))):
            return True
    return False
