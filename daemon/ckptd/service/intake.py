"""From what is seen to jobs: pin early, judge when quiet, identify, queue.

One intake serves one watched place of one definition. Pins are made at first sight and kept up to
date while the folder grows, so that a trainer's rotation takes nothing; what is gone before it was
quiet is judged by what was pinned when all of it was there. Judging and hashing happen one
checkpoint after the other, in the order in which they settled, so that jobs keep the order of steps
(under `take: newest` the newest goes first). Every checkpoint that was seen has a sighting in the
store that says what became of it.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import structlog
from anyio import to_thread

from ckptd import errors
from ckptd.checkpoint import listing, whole
from ckptd.checkpoint.completeness import Broken, Complete, Waiting
from ckptd.checkpoint.listing import Listing
from ckptd.jobs.store import JobStore, Verdict
from ckptd.pipeline.definition import Definition, Watch
from ckptd.service import judging, policies
from ckptd.service.admission import QueueRoom
from ckptd.service.earlier import Earlier
from ckptd.service.identify import KnownBases
from ckptd.service.judging import Candidate, Judgement, Lost
from ckptd.service.pins import AGAIN, Pins
from ckptd.service.sightings import DECIDED, Sightings
from ckptd.service.taking import Accepted, Taker
from ckptd.watch.watcher import Changed, Seen, Settled, Vanished, Watcher, WatchEvent

log = structlog.get_logger()

ABANDON_S = 3600.0
"""An incomplete checkpoint that nobody writes for this long is given up, until it changes."""
_REJUDGE_S = 15.0
"""How often a quiet but incomplete checkpoint is judged again."""
_GATHER_S = 0.1
"""How long checkpoints that settled at the same time are gathered, so that the newest goes first."""


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
        self._taker = Taker(definition=definition, watch=watch, pins=pins, store=store, bases=bases)
        self._queued = queued
        self._sightings = Sightings(store, definition)
        self._earlier = Earlier(store, definition.pipeline)
        self._candidates: dict[Path, Candidate] = {}
        self._parting: set[Path] = set()
        self._late: dict[Path, Candidate] = {}
        self._room = QueueRoom(store, max_queued=max_queued)
        self._log = log.bind(pipeline=definition.pipeline)

    async def run(
        self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        """Follow the place until cancelled; started when the place is watched."""
        send_events, events = anyio.create_memory_object_stream[WatchEvent](64)
        send_due, due = anyio.create_memory_object_stream[Candidate](float("inf"))
        for orphan in await to_thread.run_sync(self._orphans):
            await self._part(orphan, send_due)
        async with anyio.create_task_group() as group, send_due:
            self._tasks = group
            group.start_soon(self._judge_all, due)
            group.start_soon(self._rejudge, send_due)
            await group.start(self._watcher.run, send_events)
            task_status.started()
            async with events:
                async for event in events:
                    await self._on(event, send_due)

    def _orphans(self) -> list[Candidate]:
        """Pins whose source went away while nobody watched, to be judged as they are. Blocks."""
        found = []
        for path, pin_path in self._pins.orphans():
            try:
                seen = listing.list_files(pin_path)
            except errors.CkptdError as error:
                self._log.warning("pin unreadable", pin=str(pin_path), why=str(error))
                continue
            orphan = Candidate(path=path, seen=seen, pin_path=pin_path, quiet_since=0.0, gone=True)
            found.append(orphan)
        return found

    async def _on(self, event: WatchEvent, due: anyio.abc.ObjectSendStream[Candidate]) -> None:
        path = event.candidate.path
        if isinstance(event, Vanished):
            await self._went(path, due)
            return
        seen = event.listing
        if await self._sightings.is_decided(path, seen) or await self._leaves_out(path, seen):
            return
        candidate = await self._follow(event, due)
        if candidate is None:
            return  # gone again: the watcher will say so
        if isinstance(event, Settled):
            candidate.settled = True
            await due.send(candidate)
        else:
            await self._pin(candidate)

    async def _went(self, path: Path, due: anyio.abc.ObjectSendStream[Candidate]) -> None:
        """Have what is gone judged by its pin; say it of what went before it could be looked at."""
        gone = self._candidates.pop(path, None)
        if gone is not None:
            await self._part(gone, due)
        elif not await self._sightings.is_known(path):
            reason = str(errors.CheckpointVanished(path=path))
            self._log.warning("checkpoint vanished", checkpoint=str(path), why=reason)
            await self._sightings.note(path, None, Verdict.VANISHED, reason=reason)

    async def _part(self, gone: Candidate, due: anyio.abc.ObjectSendStream[Candidate]) -> None:
        """Judge a candidate without its folder; its pin is its own until then."""
        gone.gone = True
        self._parting.add(gone.pin_path)
        await due.send(gone)

    async def _follow(
        self, event: Seen | Changed | Settled, due: anyio.abc.ObjectSendStream[Candidate]
    ) -> Candidate | None:
        """Return the candidate in the state that the event tells of; None where it is gone."""
        path, seen = event.candidate.path, event.listing
        known = self._candidates.get(path)
        if known is not None and known.seen.fingerprint == seen.fingerprint:
            return known
        pin_path = await to_thread.run_sync(self._pins.live_path, path, event.candidate.root_path)
        if pin_path is None:
            return None
        if known is not None and known.pin_path.name.rstrip(AGAIN) == pin_path.name:
            pin_path = known.pin_path
        elif known is not None:  # deleted and made anew between two looks
            await self._part(known, due)
        while known is None and pin_path in self._parting:  # inode numbers are used again
            pin_path = pin_path.with_name(pin_path.name + AGAIN)
        if known is None:
            self._log.info("checkpoint seen", checkpoint=str(path))
        candidate = Candidate(path=path, seen=seen, pin_path=pin_path, quiet_since=time.monotonic())
        self._candidates[path] = candidate
        return candidate

    async def _leaves_out(self, path: Path, seen: Listing) -> bool:
        """Whether `take` passes over the step in the checkpoint's name; said once, nothing pinned."""
        why = policies.passed_over(self._definition.take, step=policies.step_in_name(path))
        if why is None:
            return False
        if not await self._sightings.is_known(path, reason=why):
            self._log.info("checkpoint skipped", checkpoint=str(path), why=why)
            await self._sightings.note(path, seen, Verdict.SKIPPED, reason=why)
        return True

    async def _pin(self, candidate: Candidate) -> None:
        """Pin what is there, where that costs nothing; a failure shows when it is judged."""
        try:
            unsure = await to_thread.run_sync(
                self._pins.refresh_early, candidate.pin_path, candidate.path
            )
            if unsure:
                self._tasks.start_soon(self._look_again, candidate)
        except errors.CheckpointVanished:
            return  # the watcher will say so
        except errors.CkptdError as error:
            self._log.warning("not pinned yet", checkpoint=str(candidate.path), why=str(error))

    async def _look_again(self, candidate: Candidate) -> None:
        """Make sure that what was seen of a checkpoint was not being deleted then."""
        await anyio.sleep(whole.CERTAIN_S)
        if self._candidates.get(candidate.path) is candidate:
            await self._pin(candidate)

    async def _judge_all(self, due: anyio.abc.ObjectReceiveStream[Candidate]) -> None:
        waiting: list[Candidate] = []
        async with due:
            async for candidate in due:
                waiting.append(candidate)
                while waiting:
                    await self._gather(due, waiting)
                    await self._judge_one(waiting.pop(0))

    async def _gather(
        self, due: anyio.abc.ObjectReceiveStream[Candidate], waiting: list[Candidate]
    ) -> None:
        """Under `take: newest`, put the newest of what waits to be judged first."""
        if self._definition.take != "newest":
            return
        with anyio.move_on_after(_GATHER_S), contextlib.suppress(anyio.EndOfStream):
            while True:
                waiting.append(await due.receive())
        waiting.sort(key=lambda one: policies.step_in_name(one.path) or 0, reverse=True)

    async def _judge_one(self, candidate: Candidate) -> None:
        if self._is_stale(candidate):
            return  # judged already, or changed since: a newer one will come
        try:
            await self._room.wait(functools.partial(self._tell_full, candidate))
            await self._judge(candidate)
        except errors.CheckpointVanished:
            await self._lost(candidate)
        except errors.SourceChanged as error:
            await self._void(candidate, error)
        except errors.CkptdError as error:
            await self._refuse(candidate, error)
        except OSError as error:  # of the file system, not of the checkpoint: not final
            await self._wait(candidate, f"{candidate.path}: {error}")

    async def _tell_full(self, candidate: Candidate, why: str) -> None:
        self._log.warning("queue full", checkpoint=str(candidate.path), why=why)
        await self._note(candidate, Verdict.INCOMPLETE, reason=why)

    def _is_stale(self, candidate: Candidate) -> bool:
        current = self._candidates.get(candidate.path)
        return candidate.ended or (not candidate.gone and current is not candidate)

    async def _judge(self, candidate: Candidate) -> None:
        if not candidate.gone and not await self._is_as_seen(candidate):
            return  # the watcher will say so
        before = await self._earlier.of(candidate.path.parent)
        judgement = await to_thread.run_sync(
            lambda: judging.judge(
                candidate,
                pins=self._pins,
                watch=self._watch,
                assets=self._definition.assets,
                before=before,
            )
        )
        match judgement.verdict:
            case Complete(doubts=doubts):
                await self._take(candidate, judgement, doubts)
            case Waiting(why=why):
                await self._wait(candidate, why)
            case Broken(error=error):
                await self._refuse(candidate, error)
            case Lost(why=why):
                await self._lost(candidate, why)

    async def _is_as_seen(self, candidate: Candidate) -> bool:
        """Pin a quiet checkpoint to the last file; whether it is still what was seen, or gone.

        Where it went meanwhile it is `gone` from here on, and judged by its pin.
        """
        seen = candidate.seen
        await to_thread.run_sync(self._pins.refresh_fully, candidate.pin_path, seen)
        try:
            now = await to_thread.run_sync(listing.list_files, candidate.path)
        except errors.CheckpointVanished:
            candidate.gone = True
            return True
        return now.fingerprint == seen.fingerprint

    async def _take(
        self, candidate: Candidate, judgement: Judgement, doubts: tuple[str, ...]
    ) -> None:
        assert judgement.pinned is not None
        if judgement.file_set is not None:
            self._earlier.note(candidate.path.parent, judgement.file_set)
        doubts = tuple(candidate.told(doubt) for doubt in doubts)
        accepted = Accepted(pinned=judgement.pinned, file_set=judgement.file_set, doubts=doubts)
        taken = await self._taker.take(candidate.path, candidate.pin_path, accepted)
        if taken.skipped is not None:
            await self._drop(candidate, Verdict.SKIPPED, taken.skipped)
            return
        if taken.waits is not None:
            await self._wait(candidate, taken.waits)
            return
        if doubts:
            self._log.warning(
                "checkpoint taken in doubt", checkpoint=str(candidate.path), why=doubts
            )
        if taken.is_new:
            self._queued()
        else:
            await to_thread.run_sync(self._pins.release, candidate.pin_path)
        await self._note(candidate, Verdict.TAKEN, job_id=taken.job_id, reason=taken.note)

    async def _wait(self, candidate: Candidate, why: str) -> None:
        why = candidate.told(why)
        if candidate.gone and candidate.pin_path not in self._late:
            candidate.quiet_since = time.monotonic()
            self._late[candidate.pin_path] = candidate
        if candidate.why == why:
            return
        candidate.why = why
        self._log.info("checkpoint incomplete", checkpoint=str(candidate.path), why=why)
        await self._note(candidate, Verdict.INCOMPLETE, reason=why)

    async def _rejudge(self, due: anyio.abc.ObjectSendStream[Candidate]) -> None:
        """Judge quiet, incomplete checkpoints again: some verdicts change with time alone."""
        while True:
            await anyio.sleep(_REJUDGE_S)
            if self._room.is_full:
                continue
            for candidate in [*self._candidates.values(), *self._late.values()]:
                if candidate.why is None or not (candidate.settled or candidate.gone):
                    continue
                if time.monotonic() - candidate.quiet_since > ABANDON_S:
                    why = f"given up after {ABANDON_S / 60:.0f} minutes: {candidate.why}"
                    await self._drop(candidate, Verdict.SKIPPED, why)
                else:
                    await due.send(candidate)

    async def _void(self, candidate: Candidate, error: errors.SourceChanged) -> None:
        """Give up what was rewritten while it was identified; what is there now is judged anew."""
        if candidate.gone:
            await self._lost(candidate, str(error))
        elif not self._is_stale(candidate):
            await self._wait(candidate, str(error))

    async def _lost(self, candidate: Candidate, why: str | None = None) -> None:
        error = errors.CheckpointVanished(path=candidate.path)
        reason = str(error) if why is None else f"{error} ({why})"
        await self._drop(candidate, Verdict.VANISHED, reason)

    async def _refuse(self, candidate: Candidate, error: errors.CkptdError) -> None:
        if error.retry is errors.Retry.NEVER:
            await self._drop(candidate, Verdict.REFUSED, str(error))
        else:
            await self._wait(candidate, str(error))

    async def _drop(self, candidate: Candidate, verdict: Verdict, reason: str) -> None:
        reason = candidate.told(reason)
        self._log.warning(f"checkpoint {verdict.value}", checkpoint=str(candidate.path), why=reason)
        await to_thread.run_sync(self._pins.release, candidate.pin_path)
        await self._note(candidate, verdict, reason=reason)

    async def _note(
        self,
        candidate: Candidate,
        verdict: Verdict,
        *,
        reason: str | None = None,
        job_id: str | None = None,
    ) -> None:
        candidate.ended = verdict in DECIDED or verdict is Verdict.VANISHED
        if candidate.ended:
            self._parting.discard(candidate.pin_path)
            self._late.pop(candidate.pin_path, None)
        if candidate.ended and self._candidates.get(candidate.path) is candidate:
            del self._candidates[candidate.path]
        await self._sightings.note(
            candidate.path, candidate.seen, verdict, reason=reason, job_id=job_id
        )
