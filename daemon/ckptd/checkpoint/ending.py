"""Has the save ended? What the layout's last file, a done file or a tracker of the run says.

A done file that the definition names is authoritative and takes the place of the layout's own. What
a file says counts only if it is of this save: see `signs.last_file`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptd.checkpoint import layouts, weights
from ckptd.checkpoint.layouts import Layout, Marker
from ckptd.checkpoint.listing import ListedFile, Listing
from ckptd.checkpoint.signs import last_file, side_content
from ckptd.checkpoint.signs.last_file import Age, Beside

_DEEPSPEED = "deepspeed"
_LATEST = "latest"
_LATE_S = {_DEEPSPEED: last_file.REWRITE_S}
"""Rank 0 writes `latest` without waiting for the others: their shards are counted instead."""
_TO_CONSOLIDATE = ("sharded/", "model/sharded/")
"""Where DCP's Hugging Face writer puts the shards that it is going to put together itself."""
_STRICT = frozenset({"dcp"})
"""Layouts of which nothing is ever rewritten after the last file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What the last file says: `mtime_ns` is None where there is none, or where it says no."""

    problem: str | None = None
    doubts: tuple[str, ...] = ()
    name: str | None = None
    mtime_ns: int | None = None
    is_expected: bool = False
    """Whether this layout has a last file at all, or the definition names a done file."""


def of_done_file(pattern: str, seen: Listing, weight_files: Sequence[ListedFile]) -> Ending:
    """Return what the done file says that the definition names."""
    done = [file for file in seen.files if fnmatch.fnmatchcase(file.relpath, pattern)]
    if not done:
        return Ending(problem=f"the done file {pattern!r} is not there", is_expected=True)
    newest = max(done, key=lambda file: file.mtime_ns)
    return _judged(newest.relpath, newest.mtime_ns, weight_files, seen)


def of_layout(
    chosen: Layout,
    path: Path,
    listing: Listing,
    *,
    seen: Listing,
    weight_files: Sequence[ListedFile],
    named: Path,
) -> Ending:
    """Return what the layout's last file says, or a tracker in the run's folder."""
    marker = chosen.marker(path, listing, named.name) or _index_marker(chosen, listing)
    if marker is None:
        return _without(chosen, path, seen, weight_files, named)
    problem = _problem(marker, chosen, path, listing, weight_files)
    if problem is not None:
        return Ending(problem=problem, is_expected=True)
    late_s = _LATE_S.get(chosen.name, 0.0)
    mtime_ns = listing.by_name[marker.name].mtime_ns
    found = _judged(marker.name, mtime_ns, weight_files, seen, late_s=late_s)
    if found.doubts and chosen.name in _STRICT:
        return Ending(problem=found.doubts[0], is_expected=True)
    lag = _lag(last_file.beside(named.parent, last_file.ANY), layouts.step_of(path, named.name))
    return found if lag is None else dataclasses.replace(found, doubts=(*found.doubts, lag))


def _problem(
    marker: Marker,
    chosen: Layout,
    path: Path,
    listing: Listing,
    weight_files: Sequence[ListedFile],
) -> str | None:
    """Return why a last file is not there, or not whole, in words."""
    if marker.problem is not None or marker.name not in listing.by_name:
        return f"{marker.name}: {marker.problem or 'not written yet'}"
    if marker.name.endswith(".pt") and not side_content.is_zip(path / marker.name):
        return f"{marker.name}: not whole yet"
    if chosen.name == _DEEPSPEED and marker.name == _LATEST:
        said = last_file.text(path / _LATEST)
        if not any(file.relpath.startswith(f"{said}/") for file in weight_files):
            return f"{_LATEST} names {said!r}, which is not there"
    return None


def _without(
    chosen: Layout, path: Path, seen: Listing, weight_files: Sequence[ListedFile], named: Path
) -> Ending:
    """Return what there is to say where there is no last file."""
    if chosen.name == _DEEPSPEED and any("/" in file.relpath for file in weight_files):
        return Ending(doubts=(f"{_LATEST} is not written yet",))  # the shards are counted, too
    if any(file.relpath.startswith(_TO_CONSOLIDATE) for file in weight_files):
        return Ending(doubts=("its shards are not consolidated yet",))
    tracker = last_file.beside(named.parent, chosen.name)
    if tracker is None:
        return Ending()
    lag = _lag(tracker, layouts.step_of(path, named.name))
    if lag is not None:
        return Ending(doubts=(lag,))
    name, late_s = f"../{tracker.name}", _LATE_S.get(chosen.name, 0.0)
    if last_file.age(tracker.mtime_ns, weight_files, seen.files, late_s=late_s) is Age.STALE:
        return Ending(doubts=(f"{name} is older than the weights",))
    found = _judged(name, tracker.mtime_ns, weight_files, seen, late_s=late_s)
    return dataclasses.replace(found, is_expected=False)


def _lag(tracker: Beside | None, step: int | None) -> str | None:
    """Return in words that a tracker in the run's folder has not come to `step` yet."""
    if tracker is None or tracker.number is None or step is None or tracker.number >= step:
        return None
    return f"../{tracker.name} says {tracker.number}, not yet {step}"


def _index_marker(chosen: Layout, listing: Listing) -> Marker | None:
    """Return the index of a plain folder: `save_pretrained` writes it after the shards."""
    is_plain = chosen is layouts.LAYOUTS["hf"] and weights.SINGLE_NAME not in listing.by_name
    if is_plain and weights.INDEX_NAME in listing.by_name:
        return Marker(name=weights.INDEX_NAME, problem=None)
    return None


def _judged(
    name: str,
    mtime_ns: int,
    weight_files: Sequence[ListedFile],
    seen: Listing,
    *,
    late_s: float = 0.0,
) -> Ending:
    """Return what a last file that is there and whole says: is it of this save?"""
    own = [file for file in weight_files if file.relpath != name]
    match last_file.age(mtime_ns, own, seen.files, late_s=late_s):
        case Age.FRESH:
            return Ending(name=name, mtime_ns=mtime_ns, is_expected=True)
        case Age.REWRITTEN:
            why = f"{name} is older than the weights"
            return Ending(doubts=(why,), mtime_ns=mtime_ns, is_expected=True)
        case Age.MIXED:
            why = f"{name} is newer than some weights and older than others: of two saves"
            return Ending(problem=why, is_expected=True)
        case Age.STALE:
            why = (
                f"{name} is older than the weights: of an earlier save "
                "(touch it if the checkpoint is whole)"
            )
            return Ending(problem=why, is_expected=True)
