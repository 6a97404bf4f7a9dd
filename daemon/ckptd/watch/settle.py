"""When is a checkpoint quiet? A pure machine: one observation in, what it means out.

    SEEN ──> SETTLING ──> SETTLED
      │          ^ │         │ │
      └──────────┼─┴─────────┘ └─> VANISHED when it is gone, from every state
                 └── whenever the fingerprint changes, also after it was settled

The machine knows fingerprints and a clock that only goes forward; it reads no file, and no time of
day and no time stamp is ever compared with another but for being equal. A resumed run that writes
into a folder that was settled re-arms it: the folder settles a second time. A folder that was gone
and is there again begins anew.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
from dataclasses import dataclass

from ckptd.checkpoint.listing import Listing

_DIGEST_BYTES = 16


class State(enum.Enum):
    """What is known of a candidate."""

    SEEN = "seen"
    """There, looked at once."""
    SETTLING = "settling"
    """There, and not quiet for long enough."""
    SETTLED = "settled"
    """Unchanged for the quiet period."""


class Change(enum.Enum):
    """What an observation means to whoever follows the candidate."""

    SEEN = "seen"
    """First sight: pin what is there."""
    CHANGED = "changed"
    """Files came, went or were written."""
    SETTLED = "settled"
    """Quiet: judge it. Said once for each time it becomes quiet."""
    VANISHED = "vanished"
    """It is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """What must stand still while nobody writes; of one size, however many files there are."""

    content: bytes
    """Digest of every file's name, inode, size and modification time."""
    changes: bytes
    """Digest of every file's change time: it also moves where a writer puts the others back."""
    access: bytes
    """Digest of who may read each file: what could not be read may be readable now."""
    num_links: int
    """Hard links of all files together. Where they move along with `changes` somebody has linked
    files, the pin of this very checkpoint above all, and has not written them."""

    def is_quiet_since(self, before: Fingerprint) -> bool:
        """Whether nothing was written between `before` and this."""
        return (self.content, self.access) == (before.content, before.access) and (
            self.changes == before.changes or self.num_links != before.num_links
        )


def fingerprint_of(listing: Listing) -> Fingerprint:
    """Return the fingerprint of what was listed."""
    changes = [file.ctime_ns for file in listing.files]
    return Fingerprint(
        content=_digest(listing.fingerprint),
        changes=_digest(changes),
        access=_digest([file.access for file in listing.files]),
        num_links=sum(file.num_links for file in listing.files),
    )


def _digest(value: object) -> bytes:
    return hashlib.blake2b(repr(value).encode(), digest_size=_DIGEST_BYTES).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """One candidate as of the last observation."""

    state: State
    fingerprint: Fingerprint
    quiet_since: float
    """When this fingerprint was first observed, on the clock of the caller."""


def observe(
    track: Track | None, fingerprint: Fingerprint | None, *, now: float, quiet_s: float
) -> tuple[Track | None, tuple[Change, ...]]:
    """Return the track after an observation, and what it means, in order.

    `track` is None at first sight; `fingerprint` is None where the candidate is gone, and then so
    is the track. `now` must never go back.
    """
    if fingerprint is None:
        return None, (() if track is None else (Change.VANISHED,))
    changes: tuple[Change, ...] = ()
    if track is None:
        track = Track(state=State.SEEN, fingerprint=fingerprint, quiet_since=now)
        changes = (Change.SEEN,)
    elif not fingerprint.is_quiet_since(track.fingerprint):
        track = Track(state=State.SETTLING, fingerprint=fingerprint, quiet_since=now)
        changes = (Change.CHANGED,)
    else:
        state = State.SETTLING if track.state is State.SEEN else track.state
        track = dataclasses.replace(track, state=state, fingerprint=fingerprint)
    if track.state is not State.SETTLED and now - track.quiet_since >= quiet_s:
        return dataclasses.replace(track, state=State.SETTLED), (*changes, Change.SETTLED)
    return track, changes


def rearm(track: Track, *, now: float) -> Track:
    """Return `track` as settling from `now`: it will be said to be settled once more."""
    return dataclasses.replace(track, state=State.SETTLING, quiet_since=now)


def due_at(track: Track, *, quiet_s: float) -> float | None:
    """Return when the candidate settles if nothing changes; None where it has."""
    return None if track.state is State.SETTLED else track.quiet_since + quiet_s
