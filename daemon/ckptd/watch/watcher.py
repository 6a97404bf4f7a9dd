"""One watched place, followed for as long as the daemon runs.

A scan finds the candidates, their listings go through the settle machine, and what that says goes
to the caller through a bounded memory stream: `Seen` at first sight (pin at once: some checkpoints
live for ten milliseconds), `Changed`, `Settled` (judge it) and `Vanished`. Scans come at an
interval, when a candidate is due to settle, and as soon as an event hints at a change. All is
level-triggered: a missed event costs time, never a checkpoint.
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

from ckptd import errors
from ckptd.checkpoint import listing
from ckptd.checkpoint.listing import Listing
from ckptd.telemetry.status import WatchStatus
from ckptd.watch import mounts, scan, settle
from ckptd.watch.events import Events
from ckptd.watch.scan import Candidate, Folder
from ckptd.watch.settle import Change, Track

MIN_GAP_S = 0.1
"""Least time between two scans, however many events there are."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """What one look has found, before it is compared with the look before."""

    folders: tuple[Folder, ...]
    listings: tuple[tuple[Candidate, Folder, Listing], ...]
    problems: dict[Path, str]
    network: str | None


class Watcher:
    """Follows one watched glob; owned by the task that runs it."""

    def __init__(
        self,
        *,
        key: str,
        pattern: str,
        settle_s: float,
        scan_interval_s: float = 5.0,
        network_scan_interval_s: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        limiter: anyio.CapacityLimiter | None = None,
    ) -> None:
        """Follow `pattern`; `key` (the pipeline's name) stands in every event.

        Scans take a thread from `limiter` (anyio's own where it is None).
        """
        self._key = key
        self._place = scan.parse(pattern)
        self._settle_s = settle_s
        self._interval_s = scan_interval_s
        self._network_interval_s = network_scan_interval_s
        self._clock = clock
        self._wall_clock = wall_clock
        self._limiter = limiter
        self._tracks: dict[Path, tuple[Candidate, Track]] = {}
        self._problems: dict[Path, str] = {}
        self._root: Folder | None = None
        self._network: str | None = None
        self._last_scan_at: float | None = None
        self._poked = anyio.Event()
        self._events = Events(self.poke, place=pattern)

    def poke(self) -> None:
        """Scan soon; many pokes make one scan."""
        self._poked.set()

    def rearm(self, path: Path) -> None:
        """Say once more that the candidate at `path` is settled, after another quiet period."""
        if path in self._tracks:
            candidate, track = self._tracks[path]
            self._tracks[path] = (candidate, settle.rearm(track, now=self._clock()))
            self.poke()

    @property
    def status(self) -> WatchStatus:
        """What this watcher sees, as a value."""
        tracks = [track for _, track in self._tracks.values()]
        return WatchStatus(
            pipeline=self._key,
            pattern=self._place.pattern,
            mode=self._events.mode,
            num_candidates=len(tracks),
            num_settling=sum(track.state is not settle.State.SETTLED for track in tracks),
            last_scan_at=self._last_scan_at,
            problem=next((f"{path}: {why}" for path, why in self._problems.items()), None),
        )

    async def run(
        self,
        send: MemoryObjectSendStream[WatchEvent],
        *,
        task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Send what happens until cancelled; started when the first scan has been sent.

        A receiver that is slow slows the scans; nothing is lost by it.
        """
        async with anyio.create_task_group() as tasks, send:
            await tasks.start(self._events.run)
            first = True
            while True:
                self._poked = anyio.Event()
                found = await to_thread.run_sync(self._gather, limiter=self._limiter)
                events = self._absorb(found)
                for event in events:
                    await send.send(event)
                if first:
                    task_status.started()
                    first = False
                with anyio.move_on_after(self._pause_s()):
                    await anyio.sleep(min(MIN_GAP_S, self._interval_s))
                    await self._poked.wait()

    def look(self) -> list[WatchEvent]:
        """Scan once and return what it means. Blocks; `run` does the same without blocking."""
        return self._absorb(self._gather())

    def _gather(self) -> _Look:
        """Return what is there now; runs in a thread and changes nothing of this object."""
        found = scan.scan(self._place)
        problems = {left.path: left.reason for left in found.left_out}
        listings: list[tuple[Candidate, Folder, Listing]] = []
        for candidate in found.candidates:
            try:
                status = candidate.path.stat()
                folder = Folder(path=candidate.path, dev=status.st_dev, ino=status.st_ino)
                listings.append((candidate, folder, listing.list_files(candidate.path)))
            except (FileNotFoundError, NotADirectoryError, errors.CheckpointVanished):
                continue
            except OSError as exc:
                problems[candidate.path] = f"cannot be reached: {exc.strerror}"
            except errors.CheckpointRefused as exc:
                problems[candidate.path] = exc.message
        root = found.folders[0] if found.folders else None
        network = self._network
        if root is not None and root != self._root:
            network = mounts.network_type(root.path)
        return _Look(
            folders=found.folders,
            listings=tuple(listings),
            problems=problems,
            network=network,
        )

    def _absorb(self, found: _Look) -> list[WatchEvent]:
        """Take in one look and return what it means."""
        events: list[WatchEvent] = []
        following = list(found.folders)
        for candidate, folder, files in found.listings:
            events += self._observe(candidate, files)
            if self._tracks[candidate.path][1].state is not settle.State.SETTLED:
                following.append(folder)
        there = {candidate.path for candidate, _, _ in found.listings}
        for path in [path for path in self._tracks if path not in there]:
            if not found.problems.keys() & {
                path,
                *path.parents,
            }:  # else it may be there, unreadable
                candidate, _ = self._tracks.pop(path)
                events.append(Vanished(key=self._key, candidate=candidate))
        self._tell(found.problems)
        self._root = found.folders[0] if found.folders else None
        self._network = found.network
        self._last_scan_at = self._wall_clock()
        if found.network is None:
            self._events.follow(found.folders if self._place.wants_files else following)
        else:
            self._events.poll_only(f"{found.network} is a network file system")
        return events

    def _observe(self, candidate: Candidate, files: Listing) -> list[WatchEvent]:
        _, before = self._tracks.get(candidate.path, (None, None))
        track, changes = settle.observe(
            before, files.fingerprint, now=self._clock(), quiet_s=self._settle_s
        )
        assert track is not None
        self._tracks[candidate.path] = (candidate, track)
        return [
            _WITH_LISTING[change](key=self._key, candidate=candidate, listing=files)
            for change in changes
        ]

    def _pause_s(self) -> float:
        """Return the seconds until the next scan that nobody has to ask for."""
        interval_s = self._interval_s if self._network is None else self._network_interval_s
        now = self._clock()
        for _, track in self._tracks.values():
            due_at = settle.due_at(track, quiet_s=self._settle_s)
            if due_at is not None:
                interval_s = min(interval_s, due_at - now)
        return max(MIN_GAP_S, interval_s)

    def _tell(self, problems: dict[Path, str]) -> None:
        for path, why in problems.items():
            if self._problems.get(path) != why:
                log.warning("not watched", path=str(path), why=why, place=self._place.pattern)
        self._problems = problems
