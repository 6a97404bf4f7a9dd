"""From what is seen to jobs: pin early, judge when quiet, identify, queue.

One intake serves one watched place of one definition. Pins are made at first sight and kept up to
date while the folder grows, so that a trainer's rotation takes nothing. Judging and hashing happen
one checkpoint after the other, in the order in which they settled, so that jobs keep the order of
steps. Every checkpoint that was seen has a sighting in the store that says what became of it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anyio
import structlog
from anyio import from_thread, to_thread

from ckptd import errors
from ckptd.checkpoint import completeness, listing
from ckptd.checkpoint.completeness import Broken, Complete, Waiting
from ckptd.checkpoint.listing import Listing
from ckptd.jobs.job import State
from ckptd.jobs.store import JobStore, Sighting, Verdict
from ckptd.pipeline.definition import Definition, Watch
from ckptd.service import identify
from ckptd.service.identify import KnownBases
from ckptd.service.pins import Pins
from ckptd.watch.watcher import Changed, Seen, Settled, Vanished, Watcher, WatchEvent

log = structlog.get_logger()

ABANDON_S = 3600.0
"""An incomplete checkpoint that nobody writes for this long is given up, until it changes."""
ROOM_S = 2.0
"""How often it is asked whether the queue has room again."""
_UNFINISHED = frozenset({State.QUEUED, State.RUNNING, State.RETRYING, State.WAITING})
_REJUDGE_S = 15.0
"""How often a quiet but incomplete checkpoint is judged again."""
_ENDED_BADLY = frozenset({State.FAILED, State.REFUSED, State.HELD})
_DECIDED = frozenset({Verdict.TAKEN, Verdict.REFUSED, Verdict.SKIPPED})


@dataclass(slots=True, kw_only=True)
class _Candidate:
    """One checkpoint that is followed: its last listing, and since when it is quiet."""

    path: Path
    seen: Listing
    pin_path: Path
    quiet_since: float
    settled: bool = False
    gone: bool = False
    ended: bool = False
    why: str | None = None

    def told(self, text: str) -> str:
        """Return `text` about the folder that the trainer wrote, where it names the pin."""
        return text.replace(str(self.pin_path), str(self.path))


class Intake:
    """What happens with the checkpoints of one watched place; owned by the task that runs it."""

    def __init__(
        self,
        *,
        definition: Definition,
        watch: Watch,
        watcher: Watcher,
        pins: Pins,
        store: JobStore,
        bases: KnownBases,
        queued: Callable[[], None],
        max_queued: int,
    ) -> None:
        self._definition = definition
        self._watch = watch
        self._watcher = watcher
        self._pins = pins
        self._store = store
        self._bases = bases
        self._queued = queued
        self._max_queued = max_queued
        self._held_back = False
        self._candidates: dict[Path, _Candidate] = {}
        self._log = log.bind(pipeline=definition.pipeline)

    async def run(
        self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        """Follow the place until cancelled; started when the first scan was taken in."""
        send_events, events = anyio.create_memory_object_stream[WatchEvent](64)
        send_due, due = anyio.create_memory_object_stream[_Candidate](float("inf"))
        for orphan in await to_thread.run_sync(self._orphans):
            send_due.send_nowait(orphan)
        async with anyio.create_task_group() as group, send_due:
            group.start_soon(self._judge_all, due)
            group.start_soon(self._rejudge, send_due)

            async def watch() -> None:
                # Beside the loop below: a first scan may find more than the stream holds.
                await group.start(self._watcher.run, send_events)
                task_status.started()

            group.start_soon(watch)
            async with events:
                async for event in events:
                    await self._on(event, send_due)

    def _orphans(self) -> list[_Candidate]:
        """Pins whose source went away while nobody watched, to be judged as they are. Blocks."""
        found = []
        for path, pin_path in self._pins.orphans():
            try:
                seen = listing.list_files(pin_path)
            except errors.CkptdError as error:
                self._log.warning("pin unreadable", pin=str(pin_path), why=str(error))
                continue
            orphan = _Candidate(path=path, seen=seen, pin_path=pin_path, quiet_since=0.0, gone=True)
            found.append(orphan)
        return found

    async def _on(self, event: WatchEvent, due: anyio.abc.ObjectSendStream[_Candidate]) -> None:
        path = event.candidate.path
        match event:
            case Seen() | Changed():
                if await self._is_decided(path, event.listing):
                    return
                candidate = await self._follow(path, event.candidate.root_path, event.listing)
                await self._pin(candidate)
            case Settled():
                if await self._is_decided(path, event.listing):
                    return
                candidate = await self._follow(path, event.candidate.root_path, event.listing)
                candidate.settled = True
                await due.send(candidate)
            case Vanished():
                vanished = self._candidates.pop(path, None)
                if vanished is not None:
                    vanished.gone = True
                    await due.send(vanished)

    async def _follow(self, path: Path, root_path: Path, seen: Listing) -> _Candidate:
        candidate = self._candidates.get(path)
        if candidate is None or candidate.seen.fingerprint != seen.fingerprint:
            pin_path = await to_thread.run_sync(self._pins.live_path, path, root_path)
            candidate = _Candidate(
                path=path, seen=seen, pin_path=pin_path, quiet_since=time.monotonic()
            )
            if path not in self._candidates:
                self._log.info("checkpoint seen", checkpoint=str(path))
            self._candidates[path] = candidate
        return candidate

    async def _is_decided(self, path: Path, seen: Listing) -> bool:
        """Whether this very state of the folder was dealt with, maybe before a restart."""
        sighting = await self._store.sighting(str(path), self._definition.pipeline)
        if sighting is None or sighting.verdict not in _DECIDED:
            return False
        if sighting.fingerprint_id != self._identity(seen, sighting.verdict):
            return False
        return sighting.job_id is None or not await self._deserves_another(sighting.job_id)

    async def _deserves_another(self, job_id: str) -> bool:
        """Whether a job ended badly under a definition that has been changed since."""
        known = await identify.known_job(self._store, job_id)
        if known is None:
            return True
        return known.state in _ENDED_BADLY and known.spec.definition != self._definition.dump()

    def _identity(self, seen: Listing, verdict: Verdict) -> str:
        """What a verdict holds for: a refusal only under the definition that brought it about."""
        if verdict is Verdict.TAKEN:
            return seen.fingerprint_id
        definition = json.dumps(self._definition.dump(), sort_keys=True).encode()
        return f"{seen.fingerprint_id} {hashlib.sha256(definition).hexdigest()[:16]}"

    async def _pin(self, candidate: _Candidate) -> None:
        """Pin what is there, where that costs nothing; a failure shows when it is judged."""
        try:
            await to_thread.run_sync(self._pins.refresh_early, candidate.pin_path, candidate.seen)
        except errors.CkptdError as error:
            self._log.warning("not pinned yet", checkpoint=str(candidate.path), why=str(error))

    async def _judge_all(self, due: anyio.abc.ObjectReceiveStream[_Candidate]) -> None:
        async with due:
            async for candidate in due:
                current = self._candidates.get(candidate.path)
                if candidate.ended or (not candidate.gone and current is not candidate):
                    continue  # judged already, or changed since: a newer one will come
                try:
                    await self._await_room(candidate)
                    await self._judge(candidate)
                except errors.CheckpointVanished:
                    await self._lost(candidate)
                except errors.CkptdError as error:
                    await self._refuse(candidate, error)
                except OSError as error:  # of the file system, not of the checkpoint: not final
                    await self._wait(candidate, f"{candidate.path}: {error}")

    async def _await_room(self, candidate: _Candidate) -> None:
        """Hold everything behind this checkpoint back while there are jobs enough.

        It stays pinned as it is seen; what the trainer makes of it meanwhile is judged afterwards.
        """
        while True:
            counts = await self._store.counts()
            if sum(counts.get(state, 0) for state in _UNFINISHED) < self._max_queued:
                self._held_back = False
                return
            if not self._held_back:
                self._held_back = True
                reason = f"{self._max_queued} jobs are unfinished (max_queued): waits for its own"
                self._log.warning("queue full", checkpoint=str(candidate.path), why=reason)
                await self._note(candidate, Verdict.INCOMPLETE, reason=reason)
            await anyio.sleep(ROOM_S)

    async def _judge(self, candidate: _Candidate) -> None:
        if not candidate.gone:
            seen = candidate.seen
            await to_thread.run_sync(self._pins.refresh_fully, candidate.pin_path, seen)
            now = await to_thread.run_sync(listing.list_files, candidate.path)
            if now.fingerprint != seen.fingerprint:
                return  # the watcher will say so
        pinned = await to_thread.run_sync(listing.list_files, candidate.pin_path)
        facts = await to_thread.run_sync(
            lambda: completeness.examine(
                candidate.pin_path,
                pinned,
                layout=self._watch.layout,
                done_file=self._watch.done_file,
                assets=self._definition.assets,
                folder=candidate.path,
                seen=pinned if candidate.gone else candidate.seen,
            )
        )
        quiet_s = float("inf") if candidate.gone else time.monotonic() - candidate.quiet_since
        # The watcher has waited for the quiet period: what it measured is not measured again.
        verdict = completeness.verdict(
            facts, quiet_s=max(quiet_s, self._watch.settle), settle_s=self._watch.settle
        )
        match verdict:
            case Complete():
                await self._take(candidate)
            case Waiting() if candidate.gone:
                await self._lost(candidate, verdict.why)
            case Waiting():
                await self._wait(candidate, verdict.why)
            case Broken():
                await self._refuse(candidate, verdict.error)

    async def _take(self, candidate: _Candidate) -> None:
        """Identify the checkpoint by content and queue a job, unless there is one already."""
        spec = await to_thread.run_sync(
            lambda: identify.spec_of(
                candidate.path,
                candidate.pin_path,
                definition=self._definition,
                watch=self._watch,
                frozen_path=lambda job_id: self._pins.frozen_path(candidate.pin_path, job_id),
                bases=self._bases,
                now=time.time(),
                check=from_thread.check_cancelled,
            )
        )
        known = await identify.known_job(self._store, spec.job_id)
        if known is not None:
            await to_thread.run_sync(self._pins.release, candidate.pin_path)
            self._log.info(
                "checkpoint known", checkpoint=str(candidate.path), job=spec.job_id,
                state=known.state.value,
            )  # fmt: skip
        else:
            frozen_path = Path(spec.pinned_path)
            await to_thread.run_sync(self._pins.freeze, candidate.pin_path, frozen_path)
            await self._store.enqueue(spec, now=time.time())
            self._log.info(
                "job queued", checkpoint=str(candidate.path), job=spec.job_id, step=spec.step,
                digest=spec.content_digest[:19], target=spec.target,
            )  # fmt: skip
            self._queued()
        await self._note(candidate, Verdict.TAKEN, job_id=spec.job_id)

    async def _wait(self, candidate: _Candidate, why: str) -> None:
        why = candidate.told(why)
        if candidate.why == why:
            return
        candidate.why = why
        self._log.info("checkpoint incomplete", checkpoint=str(candidate.path), why=why)
        await self._note(candidate, Verdict.INCOMPLETE, reason=why)

    async def _rejudge(self, due: anyio.abc.ObjectSendStream[_Candidate]) -> None:
        """Judge quiet, incomplete checkpoints again: some verdicts change with time alone."""
        while True:
            await anyio.sleep(_REJUDGE_S)
            if self._held_back:
                continue
            for candidate in list(self._candidates.values()):
                if candidate.why is None or not candidate.settled:
                    continue
                if time.monotonic() - candidate.quiet_since > ABANDON_S:
                    why = f"given up after {ABANDON_S / 60:.0f} minutes: {candidate.why}"
                    await self._drop(candidate, Verdict.SKIPPED, why)
                else:
                    await due.send(candidate)

    async def _lost(self, candidate: _Candidate, why: str | None = None) -> None:
        error = errors.CheckpointVanished(path=candidate.path)
        reason = str(error) if why is None else f"{error} ({why})"
        await self._drop(candidate, Verdict.VANISHED, reason)

    async def _refuse(self, candidate: _Candidate, error: errors.CkptdError) -> None:
        if error.retry is errors.Retry.NEVER:
            await self._drop(candidate, Verdict.REFUSED, str(error))
        else:
            await self._wait(candidate, str(error))

    async def _drop(self, candidate: _Candidate, verdict: Verdict, reason: str) -> None:
        reason = candidate.told(reason)
        self._log.warning(f"checkpoint {verdict.value}", checkpoint=str(candidate.path), why=reason)
        await to_thread.run_sync(self._pins.release, candidate.pin_path)
        await self._note(candidate, verdict, reason=reason)

    async def _note(
        self,
        candidate: _Candidate,
        verdict: Verdict,
        *,
        reason: str | None = None,
        job_id: str | None = None,
    ) -> None:
        candidate.ended = verdict in _DECIDED or verdict is Verdict.VANISHED
        if candidate.ended and self._candidates.get(candidate.path) is candidate:
            del self._candidates[candidate.path]
        await self._store.note(
            Sighting(
                source_path=str(candidate.path),
                pipeline=self._definition.pipeline,
                fingerprint_id=self._identity(candidate.seen, verdict),
                verdict=verdict,
                # Names on disk may be no text; the store takes nothing else.
                reason=None if reason is None else reason.encode("utf-8", "replace").decode(),
                job_id=job_id,
                at=time.time(),
            )
        )
