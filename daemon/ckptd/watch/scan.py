"""A watched place: what its glob means, and what one folder on the way holds of it.

A glob is expanded level by level (`tree` remembers what was found); the scan never goes below it.
The part before the first wildcard is the root, which no link leaves. Names that begin with a dot
(`.ckptd` above all) do not exist here.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable
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
class LeftOut:
    """Something that the glob matches and that is not taken."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """What one folder holds of one level of the glob."""

    children: tuple[Path, ...] = ()
    """Folders; at the last level what the place wants, folders or regular files."""
    links: tuple[Path, ...] = ()
    """Symbolic links, wherever they lead: that may change while the folder does not."""
    left_out: tuple[LeftOut, ...] = ()


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


def matcher(part: str) -> Callable[[str], bool]:
    """Return what says whether a name belongs to the level of the glob that `part` is."""
    matches = re.compile(fnmatch.translate(part)).match
    return lambda name: not name.startswith(".") and matches(name) is not None


def entries(folder: Path, matches: Callable[[str], bool], *, files: bool) -> Entries:
    """Return the entries of `folder` that match: regular files, or folders. Blocks.

    Raises:
        OSError: the folder is not there, or may not be listed.
    """
    children, links, left_out = [], [], []
    with os.scandir(folder) as found:
        for entry in found:
            if not matches(entry.name):
                continue
            path = Path(entry.path)
            if not _is_text(entry.name):
                left_out.append(LeftOut(path=path, reason="its name is not UTF-8 text"))
            elif entry.is_symlink():
                links.append(path)
            elif _is_wanted(entry, files=files):
                children.append(path)
    return Entries(children=tuple(children), links=tuple(links), left_out=tuple(left_out))


def resolved(link: Path, root_path: Path) -> Path | LeftOut | None:
    """Return what `link` leads to; what is left out of it; or None where it leads nowhere."""
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError):
        return None  # dangling, or a loop
    inside = target.is_relative_to(root_path)
    if not inside or any(part.startswith(".") for part in target.relative_to(root_path).parts):
        return LeftOut(path=link, reason="a link that leaves the watched root")
    return target


def natural_key(path: Path) -> tuple[tuple[int, str], ...]:
    """Return a sort key that takes digits as numbers."""
    pieces = re.split(r"(\d+)", str(path))
    return tuple((int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces)


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_wanted(entry: os.DirEntry[str], *, files: bool) -> bool:
    try:
        if files:
            return entry.is_file(follow_symlinks=False)
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False  # gone again
