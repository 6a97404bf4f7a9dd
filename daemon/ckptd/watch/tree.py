"""The truth about a watched place: which candidates are there, at the price of what has changed.

Each folder on the way to the candidates is remembered with its signature. A folder whose signature
stands still is not listed again where the file system promises that its modification time moves
with every name that comes or goes (writes inside a file do not move it: they are the business of
whoever follows the candidates). Time stamps have a grain, so a listing is believed only if the
signature had stood for longer than any grain when it was made; signatures are compared for
equality alone, so that a clock that was set back deceives nobody.

So an idle look at a place costs one `stat` for each folder above its candidates, whatever is in
them. A folder is watched before it is listed, so that nothing falls between.
"""

from __future__ import annotations

import dataclasses
import os
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ckptd.watch import mounts, scan
from ckptd.watch.events import Folder
from ckptd.watch.mounts import FileSystem
from ckptd.watch.scan import Candidate, Entries, LeftOut, Place

TRUST_S = 2.5
"""For how long a signature must have stood when a folder is listed, for the listing to be believed:
longer than the coarsest time stamps (FAT's two seconds)."""
RELIST_S = 600.0
"""After this time also a folder that did not change is listed again: trust has an end."""

Signature = tuple[int, int, int, int, int]

_NOTHING = Entries()
_UNKNOWN = FileSystem()


def signature_of(path: Path) -> Signature | None:
    """Return what moves when names in the folder, or bytes of the file, at `path` change.

    None where there is nothing.

    Raises:
        OSError: it may not be looked at.
    """
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (
        status.st_dev,
        status.st_ino,
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_size if stat.S_ISREG(status.st_mode) else status.st_nlink,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What a refresh has found to be otherwise than before; false where nothing is."""

    added: frozenset[Path] = frozenset()
    """Candidates that came, or came into sight."""
    removed: frozenset[Path] = frozenset()
    """Candidates that went, or went out of sight."""
    folders_gone: frozenset[Path] = frozenset()
    """Folders above candidates that are no longer there."""

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.folders_gone)


_NO_CHANGES = Changes()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Level:
    """One folder of one level of the glob, as of its last listing."""

    signature: Signature | None = None
    """None where it could not be looked at."""
    since: float = 0.0
    """When the signature was first seen."""
    listed_at: float = float("-inf")
    is_trusted: bool = False
    file_system: FileSystem = _UNKNOWN
    entries: Entries = _NOTHING
    targets: tuple[Path, ...] = ()
    """Where its links lead, inside the root."""
    left_out: tuple[LeftOut, ...] = ()

    @property
    def found(self) -> tuple[Path, ...]:
        """What it holds, each maybe also reached another way."""
        return (*self.entries.children, *self.targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """One refresh: what it is to look at, and what it has reached."""

    now: float
    only: Collection[Path] | None
    root_path: Path
    reached: dict[tuple[Path, int], _Level]


class Tree:
    """What is known of one watched place; used by one thread at a time."""

    def __init__(self, place: Place, *, watch: Callable[[Folder], object]) -> None:
        """Know nothing of `place` yet; `watch` is called with each folder before it is listed."""
        self.place = place
        self.candidates: dict[Path, Candidate] = {}
        """What is there now, by path."""
        self.left_out: dict[Path, str] = {}
        """What matches and is not taken, or cannot be reached, and why."""
        self.network: str | None = None
        """The network file system that some of it lies on."""
        self.is_steady = False
        """Whether the last refresh listed no folder but those that are listed in each."""
        self._watch = watch
        self._matchers = [scan.matcher(part) for part in place.parts]
        self._levels: dict[tuple[Path, int], _Level] = {}
        self._root_path: Path | None = None
        self._num_ways: Counter[Path] = Counter()
        self._file_systems: dict[int, FileSystem] = {}

    @property
    def folders(self) -> frozenset[Path]:
        """The root and the levels between it and the candidates; empty while there is no root."""
        return frozenset(path for path, _ in self._levels)

    def concerned(self, names: Mapping[Path, Iterable[str]]) -> set[Path]:
        """Return the folders of this place where one of `names` means something to it."""
        found = set()
        for path, happened in names.items():
            for depth, matches in enumerate(self._matchers):
                if (path, depth) in self._levels and any(
                    not name or matches(name) for name in happened
                ):
                    found.add(path)
        return found

    def missed(self, deleted: Collection[Path]) -> list[Candidate]:
        """Return those of `deleted` that would be candidates, and are not there."""
        if not deleted:
            return []
        last = len(self._matchers) - 1
        root_path = self.place.root_path.resolve()
        return [
            Candidate(path=path, root_path=root_path)
            for path in sorted(deleted)
            if (path.parent, last) in self._levels
            and self._matchers[last](path.name)
            and path not in self.candidates
        ]

    def refresh(self, *, now: float, only: Collection[Path] | None = None) -> Changes:
        """Bring all up to date, or `only` these folders, and return what came and went.

        Blocks on the file system; raises nothing of it. `now` must never go back.
        """
        self.is_steady = True
        root_path: Path | None = None
        reached: dict[tuple[Path, int], _Level] = {}
        left_out: dict[Path, str] = {}
        try:
            root_path = self.place.root_path.resolve(strict=True)
        except (FileNotFoundError, NotADirectoryError):
            pass  # not there yet, or no longer
        except (OSError, RuntimeError) as exc:
            left_out[self.place.root_path] = f"cannot be reached: {exc}"
        else:
            if only is None and self._stands_still(root_path, now):
                return _NO_CHANGES
            self._visit(
                root_path, 0, _Pass(now=now, only=only, root_path=root_path, reached=reached)
            )
        for level in reached.values():
            for left in (*level.entries.left_out, *level.left_out):
                left_out[left.path] = left.reason
        self.left_out = left_out
        return self._take_stock(reached, root_path)

    def _stands_still(self, root_path: Path, now: float) -> bool:
        """Whether every folder is believed and as it was: the usual case, at one call for each."""
        if (root_path, 0) not in self._levels:
            return False
        for (path, _), level in self._levels.items():
            if not level.is_trusted or level.entries.links or now - level.listed_at >= RELIST_S:
                return False
            try:
                if signature_of(path) != level.signature:
                    return False
            except OSError:
                return False
        return True

    def _visit(self, path: Path, depth: int, this: _Pass) -> None:
        """Bring the folder at `path` and what lies below it up to date."""
        key = (path, depth)
        if key in this.reached:
            return
        level = self._levels.get(key)
        if level is None or this.only is None or path in this.only:
            level = self._look(path, depth, level or _Level(), this)
            if level is None:
                return
            level = self._with_links_followed(level, this.root_path, depth)
        this.reached[key] = level
        if depth + 1 < len(self._matchers):
            for child in level.found:
                self._visit(child, depth + 1, this)

    def _look(self, path: Path, depth: int, level: _Level, this: _Pass) -> _Level | None:
        """Return `level` up to date, with its folder listed if need be; None where it is gone."""
        try:
            signature = signature_of(path)
            if signature is None:
                return None
            stood = signature == level.signature
            age_s = this.now - level.listed_at
            if stood and level.is_trusted and this.only is None and age_s < RELIST_S:
                return level
            if depth == 0 and (level.signature or ())[:2] != signature[:2]:
                self._file_systems.clear()  # another root: maybe mounted anew
            on = self._file_system(signature[0], path)
            if on.network is None:
                self._watch(Folder(path=path, dev=signature[0], ino=signature[1]))
            self.is_steady = self.is_steady and not on.exact_mtimes
            entries = scan.entries(path, self._matchers[depth], files=self._wants_files(depth))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as exc:
            reason = f"cannot be listed: {exc.strerror}"
            return _Level(left_out=(LeftOut(path=path, reason=reason),))
        since = level.since if stood else this.now
        return _Level(
            signature=signature,
            since=since,
            listed_at=this.now,
            is_trusted=on.exact_mtimes and stood and this.now - since >= TRUST_S,
            file_system=on,
            entries=entries,
            targets=level.targets,
        )

    def _wants_files(self, depth: int) -> bool:
        return self.place.wants_files and depth + 1 == len(self._matchers)

    def _with_links_followed(self, level: _Level, root_path: Path, depth: int) -> _Level:
        """Return `level` with where its links lead now."""
        if not level.entries.links and not level.targets:
            return level
        targets, left_out = [], []
        for link in level.entries.links:
            target = scan.resolved(link, root_path)
            if isinstance(target, LeftOut):
                left_out.append(target)
            elif target is not None and _is_kind(target, file=self._wants_files(depth)):
                targets.append(target)
        return dataclasses.replace(level, targets=tuple(targets), left_out=tuple(left_out))

    def _file_system(self, dev: int, path: Path) -> FileSystem:
        if dev not in self._file_systems:
            self._file_systems[dev] = mounts.file_system(path)
        return self._file_systems[dev]

    def _take_stock(
        self, reached: dict[tuple[Path, int], _Level], root_path: Path | None
    ) -> Changes:
        """Take in the levels of a pass; what did not change costs nothing."""
        before, self._levels = self._levels, reached
        gone = {path for path, _ in before} - {path for path, _ in reached}
        concerned: set[Path] = set()
        removed: set[Path] = set()
        if root_path != self._root_path:  # each candidate names its root: begin anew
            removed.update(self.candidates)
            self.candidates.clear()
            self._num_ways.clear()
            self._root_path, before = root_path, {}
        for levels, others, ways in ((before, reached, -1), (reached, before, 1)):
            for key, level in levels.items():
                if key[1] + 1 == len(self._matchers) and others.get(key) is not level:
                    concerned.update(level.found)
                    self._num_ways.update(dict.fromkeys(level.found, ways))
        added: set[Path] = set()
        for path in concerned:
            if self._num_ways[path] <= 0:
                del self._num_ways[path]
                if self.candidates.pop(path, None) is not None:
                    removed.add(path)
            elif path not in self.candidates and root_path is not None:
                self.candidates[path] = Candidate(path=path, root_path=root_path)
                added.add(path)
        networks = (level.file_system.network for level in reached.values())
        self.network = next((network for network in networks if network), None)
        return Changes(
            added=frozenset(added), removed=frozenset(removed), folders_gone=frozenset(gone)
        )


def _is_kind(path: Path, *, file: bool) -> bool:
    try:
        mode = path.stat().st_mode
    except OSError:
        return False  # gone again
    return stat.S_ISREG(mode) if file else stat.S_ISDIR(mode)
