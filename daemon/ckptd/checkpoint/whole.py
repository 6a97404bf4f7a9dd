"""Was it all there when we looked? For checkpoints that are deleted before they were quiet.

A listing made while a folder is being deleted shows a part of it that looks like a whole: rotation
takes names in any order, and the file that ends a save goes among the last. A name that goes moves
the folder's time of change, as one that comes does; but one that comes brings a file that is at
least as young. So a look is intact where no folder is younger than the youngest file in it and
nothing came or went meanwhile. Times of files tick slowly (4 ms on many kernels): `confirm` waits
until the tick of the look has passed. It is certain only where the youngest file is younger than
every folder: a name that went in the tick in which the last one came leaves no trace, and the next
may take a while to go (a file of gigabytes). Where a look is not certain, one `CERTAIN_S` later at
folders that still stand makes it so.

The last intact look is noted in the pin, with all names, so that what is left when the source is
gone can be told from what there was. `changed` is the other half: what of a pin was rewritten.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ckptd.checkpoint import writer
from ckptd.checkpoint.listing import ListedFile, Listing, list_files

NOTE_NAME = ".ckptd-whole.json"
"""The file in a pin that keeps the last intact look."""
TICK_S = 0.01
"""Longer than the steps in which file systems count time, in seconds."""
CERTAIN_S = 0.5
"""How long folders must stand until nobody can be deleting them: longer than one file takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One listing of a source, and whether a name was missing from it already."""

    listing: Listing
    folders: Mapping[Path, int]
    """The time of the last change of each folder of the checkpoint, in nanoseconds."""
    intact: bool
    certain: bool
    """Intact, and no name can have gone in the tick in which the last one came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted:
    """What the last intact look showed; `settled` where the folder was quiet then."""

    listing: Listing
    settled: bool
    certain: bool


def look(source: Path) -> Look:
    """Return what is at `source` now.

    Raises:
        CheckpointVanished, CheckpointRefused: see `list_files`.
    """
    before = _times(list_files(source))
    listing = list_files(source)
    folders = _times(listing)
    youngest = max((_youngest(file) for file in listing.files), default=0)
    intact = before == folders and all(0 <= moment <= youngest for moment in folders.values())
    # Change times do not count here: a pin that let go of a file has moved them, too.
    written = max((file.mtime_ns for file in listing.files), default=0)
    certain = intact and all(moment < written for moment in folders.values())
    return Look(listing=listing, folders=folders, intact=intact, certain=certain)


def confirm(found: Look) -> bool:
    """Return whether `found` was intact and no name has come or gone since; waits for one tick."""
    if not found.intact or not found.folders:
        return found.intact
    age_s = time.time() - max(found.folders.values()) / 1e9
    if 0 <= age_s < TICK_S:
        time.sleep(TICK_S - age_s)
    return _times(found.listing) == found.folders


def note(pin_path: Path, listing: Listing, *, settled: bool, certain: bool) -> None:
    """Keep `listing` in the pin as its last intact look; not synced, for a crash may lose it.

    Raises:
        NoSpace, StorageFailed: it cannot be written.
    """
    value = {
        "settled": settled,
        "certain": certain,
        "path": str(listing.path),
        "base_path": str(listing.base_path),
        "files": [[file.relpath, file.size, file.mtime_ns] for file in listing.files],
    }
    temporary = pin_path / f".{NOTE_NAME}.new"
    try:
        temporary.write_text(json.dumps(value))
        temporary.rename(pin_path / NOTE_NAME)
    except OSError as error:
        raise writer.translated(error, pin_path / NOTE_NAME, len(listing.files) * 64) from error


def noted(pin_path: Path) -> Noted | None:
    """Return the last intact look; None where there was none, or it cannot be read any more."""
    try:
        value = json.loads((pin_path / NOTE_NAME).read_bytes())
        files = tuple(_noted_file(*entry) for entry in value["files"])
        listing = Listing(path=Path(value["path"]), base_path=Path(value["base_path"]), files=files)
        settled, certain = bool(value["settled"]), bool(value["certain"])
        return Noted(listing=listing, settled=settled, certain=certain)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _noted_file(relpath: str, size: int, mtime_ns: int) -> ListedFile:
    """Return a file as it was noted. Raises ValueError where a pin can hold no such file."""
    is_below = type(relpath) is str and not {"", ".", ".."}.intersection(relpath.split("/"))
    if not is_below or "\0" in relpath or type(size) is not int or type(mtime_ns) is not int:
        raise ValueError(relpath)
    return ListedFile(relpath=relpath, dev=0, ino=0, size=size, mtime_ns=mtime_ns)


def since_noted(pin_path: Path, now: Listing) -> str:
    """Return what is different in a pin, whose listing is `now`, from what was noted in it."""
    before = noted(pin_path)
    for file in before.listing.files if before is not None else ():
        found = now.by_name.get(file.relpath)
        if found is not None and (found.size, found.mtime_ns) != (file.size, file.mtime_ns):
            return f"{file.relpath} rewritten in place"
    return "others"


def changed(before: Listing, after: Listing) -> str | None:
    """Return which file of a pin was rewritten in place between two listings, and how; or None.

    A change time that moved alone counts unless the number of names did, too: the trainer deleting
    its own name of a linked file is no rewrite.
    """
    for name in sorted(before.by_name.keys() | after.by_name.keys()):
        old, new = before.by_name.get(name), after.by_name.get(name)
        if old is None or new is None:
            return f"{name} {'came' if old is None else 'went'}"
        if (old.ino, old.size, old.mtime_ns) != (new.ino, new.size, new.mtime_ns):
            return f"{name} was rewritten: {old.size} bytes before, {new.size} after"
        if old.ctime_ns != new.ctime_ns and old.num_links == new.num_links:
            return f"{name} was rewritten and its times put back"
    return None


def _times(listing: Listing) -> dict[Path, int]:
    """Return the listed folders with the times of their last change; -1 for one that is gone.

    A single file has none: the folder around it is not its own.
    """
    return {
        listing.base_path / relpath: _changed_at(listing.base_path / relpath)
        for relpath in listing.folders
    }


def _changed_at(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return -1


def _youngest(file: ListedFile) -> int:
    """Return when the file was last written or got its name.

    One with several names may have got the last of them from us, a hard link: only its writing
    counts, as with a symbolic link, whose target is what was listed.
    """
    if file.num_links > 1 or file.is_link:
        return file.mtime_ns
    return max(file.mtime_ns, file.ctime_ns)
