"""The file that is written last: is it of this save, or left over from an earlier one?

Markers survive re-saves, so one that is older than the weights says nothing, or worse. Three things
look alike and must not be confused:

- a folder that was copied: its times are those of the copying, file after file without a gap, in
  any order; the marker's age means nothing;
- a trainer that rewrites weights after its marker: all of them are a little newer;
- a save into the same folder that has not ended, or was killed: the marker is much older, or older
  than some of the weights and newer than others, which then are of two saves.
"""

from __future__ import annotations

import enum
import itertools
import os
import stat
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptd.checkpoint.listing import ListedFile

REWRITE_S = 60.0
"""By so much weights may be newer than the marker where a trainer rewrites them after it."""
_COPY_BYTES_PER_S = 20_000_000
"""A copy is at least so fast; what takes longer between two files is not one."""
_COPY_GAP_S = 0.2
_REWRITERS = frozenset({"value_head.safetensors", "value_head.bin"})
"""LLaMA-Factory takes the value head out of the weights after the Trainer has ended its save."""
_REWRITERS_S = 3600.0
_MAX_TRACKER_BYTES = 256
_ONLY_A_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
"""No link is followed, and no pipe waited for."""
ANY = "any"
"""Stands for savers that write the files of any layout in the background."""


class Age(enum.Enum):
    """How a last file stands to the weights."""

    FRESH = "fresh"
    """Not older than any of them, or the whole folder was copied."""
    REWRITTEN = "rewritten"
    """A little older than all of them."""
    MIXED = "mixed"
    """Older than some and newer than others."""
    STALE = "stale"
    """Older than all of them, by a training interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """A file in the run's folder that is rewritten when a save ends."""

    name: str
    mtime_ns: int
    number: int | None
    """The step it gives, where it gives one."""


def age(
    mtime_ns: int,
    weights: Sequence[ListedFile],
    files: Collection[ListedFile],
    *,
    late_s: float = 0.0,
) -> Age:
    """Return how a last file of this time stands to `weights`; `files` are all of the checkpoint.

    Where the file is written without waiting for all ranks, theirs may be newer by `late_s`.
    """
    newer = [file.mtime_ns for file in weights if file.mtime_ns > mtime_ns + late_s * 1e9]
    if not newer or _is_copied(mtime_ns, files):
        return Age.FRESH
    if len(newer) < len(weights):
        return Age.MIXED
    allowed_s = REWRITE_S
    if any(file.relpath in _REWRITERS for file in files):
        allowed_s = _REWRITERS_S
    return Age.REWRITTEN if max(newer) - mtime_ns <= allowed_s * 1e9 else Age.STALE


def beside(run: Path, layout: str) -> Beside | None:
    """Return the file in the run's folder that a trainer of this layout rewrites after a save."""
    for name in (*_TRACKERS.get(layout, ()), *_TRACKERS[ANY]):
        path = run / name
        try:
            with os.fdopen(os.open(path, _ONLY_A_FILE), "rb") as file:
                seen = os.fstat(file.fileno())
                if not stat.S_ISREG(seen.st_mode):
                    continue
                said = file.read(_MAX_TRACKER_BYTES).decode("utf-8", "replace").strip()
        except OSError:
            continue
        digits = "".join(itertools.takewhile(str.isdecimal, reversed(said)))[::-1]
        return Beside(name=name, mtime_ns=seen.st_mtime_ns, number=int(digits) if digits else None)
    return None


def text(path: Path) -> str:
    """Return what a short text file says.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return file.read(_MAX_TRACKER_BYTES).decode("utf-8", "replace").strip()


_TRACKERS: Mapping[str, tuple[str, ...]] = {
    "deepspeed": ("latest",),
    "verl": ("latest_checkpointed_iteration.txt",),
    ANY: ("dlrover_latest.txt",),
}
"""Layout -> what is rewritten in the run's folder at the end of each save."""


def _is_copied(mtime_ns: int, files: Collection[ListedFile]) -> bool:
    """Whether all times, that of the last file too, follow each other as fast as a copy goes."""
    stamps = sorted([(mtime_ns, 0), *((file.mtime_ns, file.size) for file in files)])
    return all(
        after - before <= (_COPY_GAP_S + size / _COPY_BYTES_PER_S) * 1e9
        for (before, _), (after, size) in itertools.pairwise(stamps)
    )
