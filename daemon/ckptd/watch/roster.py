"""The candidates that are followed: which of them to list now, and what a listing means.

A candidate that still changes is listed when an event hints at it, when it is due to settle, and
between times as often as its share of a core allows. One that is quiet costs next to nothing:

- its folders are watched, as far as there is room, so that an event tells of every rewrite;
- the signatures of its folders are compared, the youngest candidates' in every full pass, the
  others' in turn: that finds what was added, renamed or removed where events are lost;
- all its files are listed once in a while, in turn: that finds what was rewritten in place where
  events are lost.

The last two have a share of a core each, however many candidates there are: more of them make the
round longer, not the daemon busier. Of a quiet candidate a few digests are kept, no list of files.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ckptd import errors
from ckptd.checkpoint import listing
from ckptd.checkpoint.listing import Listing
from ckptd.watch import scan, settle, tree
from ckptd.watch.events import Events, Folder, Hints
from ckptd.watch.scan import Candidate
from ckptd.watch.settle import Change, State, Track
from ckptd.watch.tree import Changes, Signature

OPEN_SHARE = 0.005
"""Of a core, for listing candidates that change or cannot be read, beside hints and due times."""
FOLDERS_SHARE = 0.001
"""Of a core, for the signatures of all quiet candidates."""
FILES_SHARE = 0.002
"""Of a core, for listing all files of quiet candidates."""
NUM_YOUNG = 64
"""Quiet candidates whose signatures are compared in every full pass: those that settled last."""
ROUND_STEP_S = 0.005
"""Least time that one step of a round takes."""
_NUM_ROUNDS = 3
"""Listings in a row while each shows new folders to watch."""

Told = tuple[Change, Candidate, Listing | None]
"""What happened to a candidate; the listing is None where it is gone."""


class Pace:
    """Keeps work to a share of the time."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._next_at = float("-inf")

    def is_due(self, now: float) -> bool:
        """Whether the work may be done again."""
        return now >= self._next_at

    def spent(self, now: float, cost_s: float) -> None:
        """Say that the work has taken `cost_s` at `now`."""
        self._next_at = now + cost_s / self._share


class Round:
    """Goes through all quiet candidates, a step at a time, and keeps to a share of the time."""

    def __init__(self, share: float, cost_clock: Callable[[], float]) -> None:
        self._pace = Pace(share)
        self._cost_clock = cost_clock
        self._left: list[Path] = []

    def step(self, quiet: Collection[Path], now: float) -> Iterator[Path]:
        """Yield the next few of `quiet`, if it is time; what the caller does with each is charged."""
        if not self._pace.is_due(now):
            return
        started = self._cost_clock()
        if not self._left:
            self._left = [*quiet]
            self._left.reverse()
        while self._left and self._cost_clock() - started < ROUND_STEP_S:
            path = self._left.pop()
            if path in quiet:
                yield path
        self._pace.spent(now, self._cost_clock() - started)


@dataclass(slots=True, kw_only=True)
class _Followed:
    candidate: Candidate
    track: Track
    signatures: tuple[tuple[Path, Signature], ...]
    """Of its folders, or of itself where it is a file, from before its last listing."""


class Roster:
    """The candidates of one watched place; used by one thread at a time."""

    def __init__(
        self,
        events: Events,
        *,
        of_files: bool,
        settle_s: float,
        clock: Callable[[], float],
        cost_clock: Callable[[], float],
    ) -> None:
        """Follow nobody yet; `clock` never goes back, `cost_clock` says what work has cost.

        Candidates are single files where `of_files` says so: they have no folder to watch.
        """
        self.settle_s = settle_s
        """The quiet period."""
        self.problems: dict[Path, str] = {}
        """Candidates that cannot be listed, and why."""
        self._events = events
        self._of_files = of_files
        self._clock = clock
        self._cost_clock = cost_clock
        self._candidates: Mapping[Path, Candidate] = {}
        self._followed: dict[Path, _Followed] = {}
        self._open: dict[Path, None] = {}
        self._quiet: dict[Path, None] = {}
        self._pending: dict[Path, None] = {}
        self._missing: set[Path] = set()
        self._unlisted: set[Path] = set()
        self._owners: dict[Path, Path] = {}
        self._open_pace = Pace(OPEN_SHARE)
        self._folders_round = Round(FOLDERS_SHARE, cost_clock)
        self._files_round = Round(FILES_SHARE, cost_clock)

    @property
    def num_followed(self) -> int:
        """Candidates that are there."""
        return len(self._followed)

    @property
    def num_open(self) -> int:
        """Those of them that are not quiet."""
        return len(self._open)

    @property
    def has_pending(self) -> bool:
        """Whether some wait to be listed."""
        return bool(self._pending)

    def due_at(self) -> float | None:
        """Return when the next candidate settles if nothing changes."""
        return min((at for _, at in self._dues()), default=None)

    def take_in(
        self,
        changes: Changes,
        candidates: Mapping[Path, Candidate],
        out_of_sight: Collection[Path],
    ) -> list[Told]:
        """Follow what came and no longer what went, which is returned.

        Who lies at or below a path that is out of sight may be there, and is not taken for gone.
        `candidates` is all that is there now; it is looked up in until the next call.
        """
        self._candidates = candidates
        told: list[Told] = []
        if changes.removed or self._missing:
            hidden = set(out_of_sight)
            absent = {*changes.removed, *self._missing} - changes.added
            self._missing.clear()
            for path in sorted(absent, key=scan.natural_key):
                self._unlisted.discard(path)
                self.problems.pop(path, None)
                if path in self._followed and hidden.intersection((path, *path.parents)):
                    self._missing.add(path)
                elif path in self._followed:
                    told.append((Change.VANISHED, self._drop(path), None))
        for path in sorted(changes.added, key=scan.natural_key):
            self._pending[path] = None
        return told

    def hint(self, hints: Hints) -> None:
        """Take in where events came from: those candidates are listed next.

        Where a file was closed after writing the quiet period begins anew.
        """
        for path in hints.written:
            self.rearm(path if self._of_files else self._owners.get(path.parent, path))
        for folder, happened in hints.names.items():
            owner = self._owners.get(folder)
            if owner is not None:
                self._pending[owner] = None
            for name in happened:
                if name and (path := folder / name) in self._followed:
                    self._pending[path] = None

    def forget(self, deleted: Collection[Path]) -> list[Told]:
        """Follow those of `deleted` no longer: what has their names now is listed as new."""
        told: list[Told] = []
        for path in sorted(deleted, key=scan.natural_key):
            if path in self._followed:
                told.append((Change.VANISHED, self._drop(path), None))
                if path in self._candidates:
                    self._pending[path] = None
        return told

    def rearm(self, path: Path) -> None:
        """Say once more that the candidate at `path` is settled, after another quiet period."""
        followed = self._followed.get(path)
        if followed is not None:
            followed.track = settle.rearm(followed.track, now=self._clock())
            self._sort(path, followed.track)

    def patrol(self, now: float, *, lost: bool) -> list[Told]:
        """Do the part of a full pass that is about candidates; all of it where events were `lost`."""
        if lost or self._open_pace.is_due(now):
            self._pending.update(dict.fromkeys([*self._open, *self._unlisted]))
        youngest_first = reversed(self._quiet)
        young = youngest_first if lost else itertools.islice(youngest_first, NUM_YOUNG)
        for path in itertools.chain(young, self._folders_round.step(self._quiet, now)):
            if self._has_moved(path):
                self._pending[path] = None
        told: list[Told] = []
        for path in self._files_round.step(self._quiet, now):
            told += self._list(path)
        return told

    def list_pending(self, *, most_s: float) -> list[Told]:
        """List who is due or waits, in order, for `most_s` or a bit longer."""
        now = self._clock()
        self._pending.update((path, None) for path, at in self._dues() if at <= now)
        told: list[Told] = []
        started, num_open = self._cost_clock(), 0
        until = time.monotonic() + most_s
        while self._pending and time.monotonic() < until:
            path = next(iter(self._pending))
            del self._pending[path]
            told += self._list(path)
            num_open += path in self._open or path in self._unlisted
        if num_open:
            self._open_pace.spent(now, self._cost_clock() - started)
        return told

    def _dues(self) -> Iterator[tuple[Path, float]]:
        """Yield who settles if nothing changes, and when."""
        for path in self._open:
            due_at = settle.due_at(self._followed[path].track, quiet_s=self.settle_s)
            is_there = path in self._candidates and path not in self._unlisted
            if due_at is not None and is_there:
                yield path, due_at

    def _has_moved(self, path: Path) -> bool:
        try:
            return any(
                tree.signature_of(folder) != signature
                for folder, signature in self._followed[path].signatures
            )
        except OSError:
            return True  # listing it will say what is wrong

    def _list(self, path: Path) -> list[Told]:
        """List one candidate and return what that means."""
        candidate = self._candidates.get(path)
        if candidate is None:
            return []
        now = self._clock()
        followed = self._followed.get(path)
        try:
            files, signatures = self._look(candidate, followed)
        except (FileNotFoundError, NotADirectoryError, errors.CheckpointVanished):
            self._unlisted.add(path)  # the next full pass says whether it is gone
            return []
        except (OSError, errors.CheckpointRefused) as exc:
            self._unlisted.add(path)
            self.problems[path] = _reason(exc)
            return []
        self._unlisted.discard(path)
        self.problems.pop(path, None)
        track, changes = settle.observe(
            followed.track if followed else None,
            settle.fingerprint_of(files),
            now=now,
            quiet_s=self.settle_s,
        )
        assert track is not None
        self._disown(path)
        self._owners.update((folder, path) for folder, _ in signatures)
        self._followed[path] = _Followed(candidate=candidate, track=track, signatures=signatures)
        self._sort(path, track)
        return [(change, candidate, files) for change in changes]

    def _look(
        self, candidate: Candidate, followed: _Followed | None
    ) -> tuple[Listing, tuple[tuple[Path, Signature], ...]]:
        """Return the files of a candidate, and the signatures of its folders from before.

        Every folder is watched before the listing that is returned was made.
        """
        known = {path for path, _ in followed.signatures} if followed else set()
        known.add(candidate.path)
        is_quiet = followed is not None and followed.track.state is State.SETTLED
        for _ in range(_NUM_ROUNDS):
            before = {path: self._watched(path, make_room=not is_quiet) for path in known}
            files = listing.list_files(candidate.path)
            known = {self._folder_path(candidate, name) for name in files.folders or (".",)}
            if known <= before.keys():
                break
        found = ((path, before.get(path) or tree.signature_of(path)) for path in sorted(known))
        return files, tuple((path, signature) for path, signature in found if signature)

    def _watched(self, path: Path, *, make_room: bool) -> Signature | None:
        """Return the signature of a folder (or single file), which is watched from now on."""
        signature = tree.signature_of(path)
        if signature is not None and not self._of_files:
            folder = Folder(path=path, dev=signature[0], ino=signature[1])
            self._events.watch(folder, with_files=True, make_room=make_room)
        return signature

    @staticmethod
    def _folder_path(candidate: Candidate, name: str) -> Path:
        return candidate.path if name == "." else candidate.path / name

    def _sort(self, path: Path, track: Track) -> None:
        """Put a candidate among those that change or those that are quiet."""
        if track.state is not State.SETTLED:
            self._quiet.pop(path, None)
            self._open[path] = None
        elif path not in self._quiet:
            self._open.pop(path, None)
            self._quiet[path] = None
        if track.state is State.SETTLED:
            for folder, _ in self._followed[path].signatures:
                self._events.rest(folder)

    def _drop(self, path: Path) -> Candidate:
        for folder, _ in self._followed[path].signatures:
            self._events.forget(folder)
        self._disown(path)
        for where in (self._open, self._quiet, self._pending):
            where.pop(path, None)
        return self._followed.pop(path).candidate

    def _disown(self, path: Path) -> None:
        followed = self._followed.get(path)
        for folder, _ in followed.signatures if followed else ():
            self._owners.pop(folder, None)


def _reason(exc: OSError | errors.CheckpointRefused) -> str:
    if isinstance(exc, errors.CkptdError):
        return exc.message
    return f"cannot be reached: {exc.strerror}"
