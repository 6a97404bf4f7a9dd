"""One checkpoint under judgement: by its pin, whether the trainer still has it or not.

What is still there is judged when it was quiet for long enough. What is gone is judged by what the
pin has of the last intact look at it (`checkpoint.whole`): all of that must be there, and either it
was quiet then, or the file that ends a save said that it was all; and where that look was not
certain, it must have what the run's last checkpoint had. Everything else is lost: half a checkpoint
is never taken for one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from ckptd.checkpoint import adapter_files, completeness, listing, weights
from ckptd.checkpoint.completeness import Broken, Complete, Facts, Waiting
from ckptd.checkpoint.listing import Listing
from ckptd.checkpoint.signs import file_set
from ckptd.checkpoint.signs.file_set import FileSet
from ckptd.checkpoint.whole import Noted
from ckptd.pipeline.definition import Watch
from ckptd.service.pins import Pins

_ENDS_OF_WEIGHTS = frozenset({weights.INDEX_NAME, adapter_files.CONFIG_NAME})
"""Last files of a model or adapter alone, after which others may follow."""


@dataclass(slots=True, kw_only=True)
class Candidate:
    """One checkpoint that is followed: its last listing, and since when it is quiet."""

    path: Path
    seen: Listing
    pin_path: Path
    quiet_since: float
    settled: bool = False
    gone: bool = False
    ended: bool = False
    why: str | None = None

    def told(self, text: str) -> str:
        """Return `text` about the folder that the trainer wrote, where it names the pin."""
        return text.replace(str(self.pin_path), str(self.path))


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """Gone, and not pinned whole; `why` says more where there is more to say."""

    why: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """The verdict on a checkpoint and what it rests on; `pinned` is what the pin holds."""

    verdict: Complete | Waiting | Broken | Lost
    pinned: Listing | None = None
    file_set: FileSet | None = None


def judge(
    candidate: Candidate, *, pins: Pins, watch: Watch, assets: Path | None, before: FileSet | None
) -> Judgement:
    """Return what to make of the checkpoint, which was pinned up to its last file. Blocks.

    `before` is the file set of the run's checkpoint that was accepted last.

    Raises:
        CheckpointVanished: there is no pin.
        NoSpace, StorageFailed: what was held open cannot be copied.
        OSError: a pinned file cannot be read.
    """
    gone, seen = candidate.gone, candidate.seen
    noted = pins.last_intact(candidate.pin_path) if gone else None
    if noted is not None:
        seen = noted.listing
    elif gone:
        return Judgement(verdict=Lost())
    pinned = listing.list_files(candidate.pin_path)
    facts = completeness.examine(
        candidate.pin_path,
        pinned,
        layout=watch.layout,
        done_file=watch.done_file,
        assets=assets,
        folder=candidate.path,
        seen=seen,
        before=before,
    )
    quiet_s = float("inf") if gone else time.monotonic() - candidate.quiet_since
    # The watcher has waited for the quiet period: what it measured is not measured again.
    verdict = completeness.verdict(
        facts, quiet_s=max(quiet_s, watch.settle), settle_s=watch.settle, gone=gone
    )
    return Judgement(
        verdict=verdict if noted is None else _of_gone(verdict, facts, noted, before),
        pinned=pinned,
        file_set=facts.file_set,
    )


def _of_gone(
    verdict: completeness.Verdict, facts: Facts, noted: Noted, before: FileSet | None
) -> Complete | Broken | Lost:
    """Return the verdict on what will never change again; a doubt is never in its favour."""
    match verdict:
        case Waiting():
            return Lost(why=verdict.why)
        case Broken() if not noted.settled:
            return Lost(why=str(verdict.error))
        case Complete() if not noted.settled and not _has_end(facts):
            return Lost(why="no file that ends a save told that it was whole")
        case Complete() if not noted.settled and not noted.certain:
            # What the run's last checkpoint had and this one has not is a doubt, so: waited for.
            if not _is_compared(facts, before):
                return Lost(
                    why="it may have been half deleted already when it was pinned, and no earlier "
                    "checkpoint of its run tells what it should have"
                )
    return verdict


def _is_compared(facts: Facts, before: FileSet | None) -> bool:
    now = facts.file_set
    if now is None or before is None or now.name == before.name:
        return False
    return file_set.of_one_run(now, before)


def _has_end(facts: Facts) -> bool:
    """Whether a file that is written last says that all was written, tokenizer and all."""
    return facts.ended_by is not None and facts.ended_by not in _ENDS_OF_WEIGHTS
