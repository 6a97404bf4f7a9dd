"""The files of a checkpoint as compared with those of the one that was accepted before.

Checkpoints of one run have the same files: one that lacks some is probably not whole, whatever the
layout. It need not be so (the final model has no optimizer, a resumed run may have fewer ranks), so
this raises a doubt and decides nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from ckptd.checkpoint import sidefiles
from ckptd.checkpoint.listing import ListedFile
from ckptd.checkpoint.sidefiles import Fate

_STEP = re.compile(
    r"((?:step|iter(?:ation)?|epoch|checkpoint|ckpt|batch|ba|ep)[-_=]?)\d+", re.IGNORECASE
)
_STEP_NAME = re.compile(r"^\d+$|^.*[-_]\d{6,}(\.\w+)?$")
_PASSING = re.compile(
    r"^(events\.out\.|training_loss|.*\.(png|log|jsonl|csv|index(\.\w+)?\.json)$)"
)
"""Logs and pictures, which some checkpoints have and others do not, and lists of shards."""
_STATIC = re.compile(
    r"(^|/)(tokenizer[^/]*|vocab[^/]*|merges\.txt|special_tokens_map\.json|added_tokens\.json"
    r"|[^/]*\.jinja|[^/]*\.model|[^/]*\.spm|[^/]*\.tiktoken|preprocessor_config\.json"
    r"|processor_config\.json|[^/]*\.py)$"
)
"""Files that training does not change: a smaller one was cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSet:
    """What an accepted checkpoint had; numbers of steps in the names are taken out."""

    name: str
    layout: str
    published: Mapping[str, int]
    """Name -> size of the files that travel with the weights."""
    state: frozenset[str]
    """Names of the trainer's own files."""
    num_elements: int
    """Elements of the model's tensors together."""


def of(
    name: str, layout: str, files: Iterable[ListedFile], *, weights: Collection[str], elements: int
) -> FileSet:
    """Return the file set of the checkpoint that the trainer calls `name`.

    Files with the names in `weights` are left out: their number may change, that of the `elements`
    in them may not.
    """
    published: dict[str, int] = {}
    state = set()
    for file in files:
        kind = sidefiles.fate(file.relpath)
        parts = PurePosixPath(file.relpath).parts
        if kind is Fate.UNKNOWN or _PASSING.match(parts[-1]) or file.relpath in weights:
            continue
        plain = _STEP.sub(r"\1#", file.relpath)
        if kind is Fate.TRAINER_STATE:
            state.add(plain)
        else:
            published[plain] = file.size
    return FileSet(
        name=name,
        layout=layout,
        published=published,
        state=frozenset(state),
        num_elements=elements,
    )


def lacks(now: FileSet, before: FileSet, *, state: bool) -> str | None:
    """Return what `now` lacks of `before`, in words; None if nothing, or if they do not compare.

    Only checkpoints of one layout whose names differ by the step are of one run.
    The trainer's own files count if `state` is set: a pin has few of them.
    """
    if not of_one_run(now, before):
        return None
    missing = sorted(before.published.keys() - now.published.keys())
    if state:
        missing += sorted(before.state - now.state)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        return f"{', '.join(missing[:3])}{more}, which {before.name} had, not there"
    for name, size in before.published.items():
        if _STATIC.search(name) and now.published[name] < size:
            return f"{name} is smaller than in {before.name}: {now.published[name]} of {size} bytes"
    return shrunk(now, before)


def shrunk(now: FileSet, before: FileSet) -> str | None:
    """Return in words that the weights have fewer elements than those of the checkpoint before."""
    if not of_one_run(now, before) or now.num_elements >= before.num_elements:
        return None
    return (
        f"the weights have fewer elements than those of {before.name}: "
        f"{now.num_elements:,} of {before.num_elements:,}"
    )


def of_one_run(now: FileSet, before: FileSet) -> bool:
    """Whether two checkpoints compare: they are of one layout, and their names differ by the step."""
    return now.layout == before.layout and _run_name(now.name) == _run_name(before.name)


def _run_name(name: str) -> str:
    """Return the name without the step; names without one stay as they are."""
    return re.sub(r"\d+", "#", name) if _STEP_NAME.match(name) else _STEP.sub(r"\1#", name)
