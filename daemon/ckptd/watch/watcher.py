"""One watched place, followed for as long as the daemon runs.

A scan finds the candidates, their listings go through the settle machine, and what that says goes
to the caller through a bounded memory stream: `Seen` at first sight (pin at once: some checkpoints
live for ten milliseconds), `Changed`, `Settled` (judge it) and `Vanished`. All is level-triggered:
a look comes as soon as an event hints at a change and then only where it happened; when a candidate
is due to settle; and at an interval over everything, which is what finds all that events miss.

The interval is the bound for what events miss. It is stretched only where one full pass costs more
than `SCAN_SHARE` of it, in trees of many thousands of folders above the checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anyio
import structlog
from anyio import to_thread
from anyio.abc import TaskStatus
from anyio.streams.memory import MemoryObjectSendStream

from ckptd.checkpoint.listing import Listing
from ckptd.telemetry.status import WatchStatus
from ckptd.watch import scan
from ckptd.watch.events import Events, Folder
from ckptd.watch.roster import Roster, Told
from ckptd.watch.scan import Candidate
from ckptd.watch.settle import Change
from ckptd.watch.tree import Changes, Tree

SCAN_SHARE = 0.006
"""Of a core, for full passes over the folders above the candidates."""
NETWORK_SETTLE_S = 30.0
"""Least quiet period on a network file system: clients cache sizes and times, NFS for 3 s at first
and for twice as long each time they are found unchanged. Within this they are asked for anew."""
MIN_GAP_S = 0.01
MAX_GAP_S = 1.0
"""Least time between two looks, however many events there are: ten times what the last one cost,
within these."""
STEP_S = 0.2
"""Longest that a look lists candidates before what it found is sent: thousands may be new at once."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A candidate at first sight: whatever is to be kept of it should be pinned now."""

    key: str
    candidate: Candidate
    listing: Listing


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """Files of a candidate came, went or were written."""

    key: str
    candidate: Candidate
    listing: Listing


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """A candidate did not change for the quiet period: judge it."""

    key: str
    candidate: Candidate
    listing: Listing


@dataclass(frozen=True, slots=True, kw_only=True)
class Vanished:
    """A candidate is gone."""

    key: str
    candidate: Candidate


WatchEvent = Seen | Changed | Settled | Vanished

_WITH_LISTING: dict[Change, type[Seen | Changed | Settled]] = {
    Change.SEEN: Seen,
    Change.CHANGED: Changed,
    Change.SETTLED: Settled,
}


class Watcher:
    """Follows one watched glob; owned by the task that runs it."""

    def __init__(
        self,
        *,
        key: str,
        pattern: str,
        settle_s: float,
        scan_interval_s: float = 1.0,
        network_scan_interval_s: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        limiter: anyio.CapacityLimiter | None = None,
    ) -> None:
        """Follow `pattern`; `key` (the pipeline's name) stands in every event.

        `settle_s` is the quiet period; on network file systems at least `NETWORK_SETTLE_S`.
        Looks take a thread from `limiter` (anyio's own where it is None). `clock` measures all
        durations and never goes back; `wall_clock` is only shown.
        """
        self._key = key
        self._place = scan.parse(pattern)
        self._settle_s = settle_s
        self._interval_s, self._network_interval_s = scan_interval_s, network_scan_interval_s
        self._clock, self._wall_clock = clock, wall_clock
        self._limiter = limiter
        self._events = Events(place=pattern, clock=clock)
        self._tree = Tree(self._place, watch=self._watch_level)
        self._roster = Roster(
            self._events,
            of_files=self._place.wants_files,
            settle_s=settle_s,
            clock=clock,
            cost_clock=self._cost_s,
        )
        self._problems: dict[Path, str] = {}
        self._rearmed: set[Path] = set()
        self._wants_full = True
        self._full_at, self._gap_s = float("-inf"), MIN_GAP_S
        self._is_on_network = False
        self._poked = anyio.Event()
        self._status = self._status_now(None)

    def poke(self) -> None:
        """Look at everything soon; many pokes make one look."""
        self._wants_full = True
        self._poked.set()

    def rearm(self, path: Path) -> None:
        """Say once more that the candidate at `path` is settled, after another quiet period."""
        self._rearmed.add(path)
        self.poke()

    @property
    def status(self) -> WatchStatus:
        """What this watcher saw at its last look, as a value."""
        return self._status

    async def run(
        self,
        send: MemoryObjectSendStream[WatchEvent],
        *,
        task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Send what happens until cancelled; started, before anything is sent, by the first look.

        A receiver that is slow slows the looks; nothing is lost by it.
        """
        try:
            async with send:
                is_started = False
                while True:
                    self._poked = anyio.Event()
                    events = await to_thread.run_sync(self.look, limiter=self._limiter)
                    if not is_started:
                        task_status.started()
                        is_started = True
                    for event in events:
                        await send.send(event)
                    if not self._roster.has_pending:
                        await self._pause()
        finally:
            self._events.close()

    def look(self) -> list[WatchEvent]:
        """Look once, at what is due or hinted at, and return what it means. Blocks.

        `run` calls it in a thread whenever there is reason to; never two at a time.
        """
        started, now = self._cost_s(), self._clock()
        hints = self._events.drain()
        is_full = hints.lost or now >= self._full_at
        if self._wants_full:  # a poke that comes meanwhile stays for the next look
            self._wants_full, is_full = False, True
        told = self._roster.forget(hints.deleted)
        if is_full:
            changes = self._tree.refresh(now=now)
            # What a change costs is no measure of the passes in which nothing changes.
            is_idle = self._tree.is_steady and not changes
            idle_cost_s = self._cost_s() - started if is_idle else 0.0
            self._full_at = now + self._pass_interval_s(idle_cost_s)
            told += self._scan(changes)
        elif concerned := self._tree.concerned(hints.names):
            told += self._scan(self._tree.refresh(now=now, only=concerned))
        known = {candidate.path for _, candidate, _ in told}
        told += [
            (Change.VANISHED, missed, None)
            for missed in self._tree.missed(hints.deleted)
            if missed.path not in known
        ]
        self._roster.hint(hints)
        while self._rearmed:
            self._roster.rearm(self._rearmed.pop())
        if is_full:
            told += self._roster.patrol(now, lost=hints.lost)
        told += self._roster.list_pending(most_s=STEP_S)
        self._tell({**self._tree.left_out, **self._roster.problems})
        self._gap_s = min(MAX_GAP_S, max(MIN_GAP_S, 10 * (self._cost_s() - started)))
        self._is_on_network = self._tree.network is not None
        self._status = self._status_now(self._wall_clock())
        return [self._event(*what) for what in told]

    def _scan(self, changes: Changes) -> list[Told]:
        """Take in what the tree has found."""
        network = self._tree.network
        self._events.poll_only(network and f"{network} is a network file system")
        least_s = 0.0 if network is None else NETWORK_SETTLE_S
        self._roster.settle_s = max(self._settle_s, least_s)
        for path in changes.folders_gone:
            self._events.forget(path)
        return self._roster.take_in(changes, self._tree.candidates, self._tree.left_out)

    def _watch_level(self, folder: Folder) -> None:
        self._events.watch(folder, with_files=self._place.wants_files)

    def _event(self, change: Change, candidate: Candidate, files: Listing | None) -> WatchEvent:
        if files is None:
            return Vanished(key=self._key, candidate=candidate)
        return _WITH_LISTING[change](key=self._key, candidate=candidate, listing=files)

    def _status_now(self, scanned_at: float | None) -> WatchStatus:
        problem = next((f"{path}: {why}" for path, why in self._problems.items()), None)
        return WatchStatus(
            pipeline=self._key,
            pattern=self._place.pattern,
            mode=self._events.mode,
            num_candidates=self._roster.num_followed,
            num_settling=self._roster.num_open,
            last_scan_at=scanned_at,
            problem=problem,
        )

    def _cost_s(self) -> float:
        """Return a clock of what looking costs: this thread's work, or all time on a network."""
        return time.perf_counter() if self._is_on_network else time.thread_time()

    def _pass_interval_s(self, cost_s: float) -> float:
        """Return the time until the next full pass after one that has cost this much."""
        network = self._tree.network
        interval_s = self._interval_s if network is None else self._network_interval_s
        return max(interval_s, cost_s / SCAN_SHARE)

    async def _pause(self) -> None:
        """Wait until there is reason to look again."""
        due_at = self._roster.due_at()
        wake_at = self._full_at if due_at is None else min(self._full_at, due_at)
        with anyio.move_on_after(max(MIN_GAP_S, wake_at - self._clock())):
            await anyio.sleep(self._gap_s)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._until_event, tasks.cancel_scope)
                await self._poked.wait()
                tasks.cancel_scope.cancel()

    async def _until_event(self, scope: anyio.CancelScope) -> None:
        fileno = self._events.fileno()
        if fileno is not None:
            await anyio.wait_readable(fileno)
            scope.cancel()

    def _tell(self, problems: dict[Path, str]) -> None:
        for path, why in problems.items():
            if self._problems.get(path) != why:
                log.warning("not watched", path=str(path), why=why, place=self._place.pattern)
        self._problems = problems
