"""Everything this daemon has pinned, of whatever definition, and what it holds on disk.

Each root that pins were made in is remembered in the state folder, so that those of a definition
that is gone are found. A pin is ours where its origin names our owner: daemons that share a root
leave each other's alone. Everything here blocks.

What a pin holds on disk is what would be free without it. A hard link costs nothing while the
trainer still has the file, and a reflink next to nothing; once the trainer has deleted it, the pin
is all that holds the bytes. So an inode counts where all its names are in pins of ours, once
however many pins have it, and a reflink where the file it was made of is gone or another.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ckptd.checkpoint import origin, pin, writer
from ckptd.checkpoint.pin import PinMethod

_ROOT_NAME = "root"
_DROPPED = ".dropped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """One pin of ours, of a job or live."""

    path: Path
    source: Path
    pipeline: str
    method: str
    live: bool


def base_in_state(state_path: Path, root_path: Path) -> Path:
    """Return the folder for what is pinned of `root_path` where that cannot be written."""
    name = hashlib.sha256(os.fsencode(root_path)).hexdigest()[:16]
    return state_path / "pins" / name


def frozen_name(job_id: str, owner: str) -> str:
    """Return the name of a job's pin: daemons that share a root have the same jobs."""
    return f"{job_id}-{owner[:8]}"


def remember(state_path: Path, root_path: Path) -> None:
    """Note that pins are made in `root_path`; safe to repeat.

    Raises:
        NoSpace, StorageFailed: the state folder cannot be written.
    """
    base = base_in_state(state_path, root_path)
    if not (base / _ROOT_NAME).exists():
        writer.make_folder(base)
        writer.write_file(base / _ROOT_NAME, os.fsencode(root_path))


def own_origin(path: Path, owner: str) -> dict[str, str] | None:
    """Return the origin of a pin that `owner` made, None for any other."""
    found = origin.read(path)
    if found is None or found.get("owner") != owner or "source" not in found:
        return None
    return found


def exists(path: Path) -> bool:
    """Whether something is there; what may not be looked at is taken to be."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


class Pinned:
    """All pins of one daemon; `owner` is its identity."""

    def __init__(self, *, owner: str, state_path: Path) -> None:
        self._owner = owner
        self._state_path = state_path

    def all(self) -> list[Pin]:
        """Return the pins of ours in every root that is remembered, frozen ones first."""
        return [*self._below("pins"), *self._below("live")]

    def sweep(self, needed: Collection[Path]) -> None:
        """Remove the frozen pins that no job in `needed` has; those of a crash go live again."""
        for base in self._bases():
            for path in base.glob(f"*/.*{_DROPPED}"):
                pin.release(path)
            for path in (base / "pins").glob(frozen_name("*", self._owner)):
                with contextlib.suppress(OSError):
                    path.rmdir()  # empty: killed when even what says whose it is was removed
        for found in self._below("pins"):
            if found.path in needed:
                continue
            live_path = found.path.parent.parent / "live" / found.path.name
            if not exists(found.source) and not live_path.exists():
                live_path.parent.mkdir(parents=True, exist_ok=True)
                found.path.rename(live_path)
            else:
                pin.release(found.path)

    def _below(self, kind: str) -> Iterator[Pin]:
        for base in self._bases():
            for path in sorted((base / kind).glob("*")):
                known = None if path.name[0] == "." else own_origin(path, self._owner)
                if known is not None:
                    yield Pin(
                        path=path,
                        source=Path(known["source"]),
                        pipeline=known.get("pipeline", ""),
                        method=known.get("method", str(PinMethod.COPY)),
                        live=kind == "live",
                    )

    def _bases(self) -> Iterator[Path]:
        for note in sorted((self._state_path / "pins").glob(f"*/{_ROOT_NAME}")):
            yield Path(os.fsdecode(note.read_bytes())) / pin.FOLDER_NAME
            yield note.parent


def held_bytes(pins: Iterable[Pin]) -> dict[Path, int]:
    """Return what each pin holds on disk, in bytes, by its path; what several hold, the first has."""
    files = [(found, entry, stat) for found in pins for entry, stat in _files(found.path)]
    names = Counter((stat.st_dev, stat.st_ino) for _, _, stat in files)
    held = dict.fromkeys((found.path for found, _, _ in files), 0)
    for found, entry, stat in files:
        inode = (stat.st_dev, stat.st_ino)
        if names.pop(inode, -1) == stat.st_nlink and not _is_shared(found, entry, stat):
            held[found.path] += stat.st_blocks * 512
    return held


def dispose(found: Path, *, ino: int) -> None:
    """Remove the pin at `found` if it is still the folder with this inode number.

    A checkpoint that came back may have been pinned there anew in the meantime.
    """
    doomed = found.with_name(f".{found.name}{_DROPPED}")
    try:
        if found.stat().st_ino != ino:
            return
        found.rename(doomed)
    except FileNotFoundError:
        return
    pin.release(doomed)


def _files(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for folder, _, names in os.walk(path):
        for name in names:
            entry = Path(folder, name)
            try:
                yield entry, entry.lstat()
            except FileNotFoundError:
                continue


def _is_shared(found: Pin, entry: Path, stat: os.stat_result) -> bool:
    """Whether a reflink still shares its blocks with the file it was made of, as far as stat says."""
    if found.method != PinMethod.REFLINK:
        return False
    base = found.source if found.source.is_dir() else found.source.parent
    try:
        source = (base / entry.relative_to(found.path)).stat()
    except OSError:
        return False
    return (source.st_size, source.st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
