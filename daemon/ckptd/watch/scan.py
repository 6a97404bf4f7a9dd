"""The truth about a watched place: which candidates are there right now.

A glob is expanded level by level with `os.scandir`, so that a look costs milliseconds however large
the checkpoints are: the scan never goes below the glob. The part before the first wildcard is the
root; it is resolved in each scan, and no link leads out of it. Names that begin with a dot
(`.ckptd` above all) do not exist here.
"""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
"""A glob that ends in one of these watches single files; every other one watches folders."""

_MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A watched glob, taken apart."""

    pattern: str
    root_path: Path
    """The folders before the first wildcard; pins live in its `.ckptd`."""
    parts: tuple[str, ...]
    """One pattern for each level below the root."""
    wants_files: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A folder or file that the glob matches: perhaps a checkpoint."""

    path: Path
    """With links resolved: the same checkpoint has the same path, however it was reached."""
    root_path: Path
    """The root it lies in, resolved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """A folder the scan went through, and which one it was: a new one may bear the same name."""

    path: Path
    dev: int
    ino: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """Something that the glob matches and that is not taken."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What one look has found."""

    candidates: tuple[Candidate, ...]
    """In natural order: `checkpoint-9` before `checkpoint-10`."""
    folders: tuple[Folder, ...]
    """The root and the levels between it and the candidates; empty while there is no root."""
    left_out: tuple[LeftOut, ...]


def parse(pattern: str) -> Place:
    """Return the watched glob `pattern` taken apart; it is absolute and without `**` or `..`."""
    parts = PurePosixPath(pattern).parts
    depth = next((depth for depth, part in enumerate(parts) if _MAGIC.search(part)), len(parts) - 1)
    return Place(
        pattern=pattern,
        root_path=Path(*parts[:depth]),
        parts=parts[depth:],
        wants_files=parts[-1].endswith(WEIGHT_SUFFIXES),
    )


def scan(place: Place) -> Scan:
    """Return what is at `place` now. Blocks on the file system; raises nothing of it."""
    looking = _Look(place)
    looking.run()
    candidates = sorted(looking.candidates.values(), key=lambda found: natural_key(found.path))
    return Scan(
        candidates=tuple(candidates),
        folders=tuple(looking.folders),
        left_out=tuple(looking.left_out),
    )


def natural_key(path: Path) -> tuple[tuple[int, str], ...]:
    """Return a sort key that takes digits as numbers."""
    pieces = re.split(r"(\d+)", str(path))
    return tuple((int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces)


class _Look:
    """One expansion of one glob."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.candidates: dict[Path, Candidate] = {}
        self.folders: list[Folder] = []
        self.left_out: list[LeftOut] = []

    def run(self) -> None:
        """Expand the glob from its root."""
        try:
            self.root_path = self.place.root_path.resolve(strict=True)
        except (FileNotFoundError, NotADirectoryError):
            return
        except (OSError, RuntimeError) as exc:
            self._leave_out(self.place.root_path, f"cannot be reached: {exc}")
            return
        self._level(self.root_path, 0)

    def _level(self, folder: Path, depth: int) -> None:
        """Match the entries of `folder` against the pattern of its level."""
        last = depth == len(self.place.parts) - 1
        for entry in self._entries(folder, self.place.parts[depth]):
            path = self._inside(entry)
            if path is None:
                continue
            try:
                mode = path.stat().st_mode
            except OSError:
                continue  # gone again
            if not last:
                if stat.S_ISDIR(mode):
                    self._level(path, depth + 1)
            elif stat.S_ISREG(mode) if self.place.wants_files else stat.S_ISDIR(mode):
                self.candidates[path] = Candidate(path=path, root_path=self.root_path)

    def _entries(self, folder: Path, pattern: str) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as found:
                status = folder.stat()
                self.folders.append(Folder(path=folder, dev=status.st_dev, ino=status.st_ino))
                entries = list(found)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as exc:
            self._leave_out(folder, f"cannot be listed: {exc.strerror}")
            return
        for entry in entries:
            if not entry.name.startswith(".") and fnmatch.fnmatchcase(entry.name, pattern):
                yield entry

    def _inside(self, entry: os.DirEntry[str]) -> Path | None:
        """Return where `entry` really is, or None where it must not be followed."""
        path = Path(entry.path)
        try:
            entry.name.encode("utf-8")
        except UnicodeEncodeError:
            self._leave_out(path, "its name is not UTF-8 text")
            return None
        if not entry.is_symlink():
            return path
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError):
            return None  # dangling, or a loop
        below = (
            target.relative_to(self.root_path) if target.is_relative_to(self.root_path) else None
        )
        if below is None or any(part.startswith(".") for part in below.parts):
            self._leave_out(path, "a link that leaves the watched root")
            return None
        return target

    def _leave_out(self, path: Path, reason: str) -> None:
        self.left_out.append(LeftOut(path=path, reason=reason))
