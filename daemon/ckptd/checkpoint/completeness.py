"""Is a checkpoint whole? The verdict on a folder that has been quiet for a while.

`examine` gathers the facts from names, stats, headers and small JSON files; `verdict` is a pure
function of the facts and of how long the folder has been quiet (now, less when it last changed).
Neither a marker nor quiet is enough alone: markers survive re-saves and files come after the "last"
one, so a marker must be newer than the weights, nothing may be half-written, and the structure
(index, shards, header lengths, file sizes) must hold. Three kinds of facts speak against a folder:

- what is not there yet, or says "not ended": waited for, however long it takes;
- what is wrong: broken, once the save has ended or nobody has written for `PATIENCE_S`;
- a doubt (a file that the checkpoint before had, a tracker that names an earlier step): waited out
  for `PATIENCE_S`; then the checkpoint is judged by its own structure, or it would wait for ever.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptd.checkpoint import (
    adapter_files,
    beside,
    ending,
    gguf_files,
    gguf_model,
    header,
    layouts,
    parts,
    weights,
)
from ckptd.checkpoint.consolidate import assets as run_assets
from ckptd.checkpoint.consolidate import consolidate, dcp_safetensors, pickled
from ckptd.checkpoint.ending import Ending
from ckptd.checkpoint.layouts import Layout
from ckptd.checkpoint.listing import ListedFile, Listing
from ckptd.checkpoint.signs import components, file_set, side_content, unfinished
from ckptd.checkpoint.signs.file_set import FileSet
from ckptd.errors import (
    CheckpointCorrupt,
    CheckpointIncomplete,
    CheckpointRefused,
    CheckpointUnsupported,
)

PATIENCE_S = 60.0
"""Quiet after which a doubt is dropped, and after which a fault is not put down to a save that is
still going on: no writer rests for so long between two files."""

_EMBEDDINGS = ("embed_tokens.weight", "tok_embeddings.weight", "wte.weight", "embed_in.weight")
"""Tensors with at least a row for each token of the vocabulary."""
_UNCOUNTED = frozenset({dcp_safetensors.DCP_SAFETENSORS.name})
"""Layouts that do not say how many files they have: only the checkpoint before tells."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Complete:
    """Whole: may be pinned for good and worked on.

    `doubts` is what speaks against it all the same: each was waited out, and whoever takes the
    checkpoint says so.
    """

    layout: str
    reason: str
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """Not whole yet; `why` says what is missing."""

    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """Quiet and wrong: `error` says which file and tensor. A later change is judged again."""

    error: CheckpointRefused


Verdict = Complete | Waiting | Broken


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What names, stats, headers and markers say of a folder at one moment."""

    layout: str
    reason: str
    vetoes: tuple[str, ...] = ()
    """Names of what says that a write is going on."""
    not_ended: str | None = None
    """Why the layout's last file, or the done file, does not end this save."""
    missing: CheckpointIncomplete | None = None
    error: CheckpointRefused | None = None
    doubts: tuple[str, ...] = ()
    """What may mean that more is to come."""
    file_set: FileSet | None = None
    """What there is, for the next checkpoint of the run to be compared with."""
    ended_by: str | None = None
    """The last file, where it is there and ends this save."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Structure:
    """The weights, as far as they could be read, and what was wrong with them."""

    weights: tuple[ListedFile, ...] = ()
    num_elements: int = 0
    missing: CheckpointIncomplete | None = None
    error: CheckpointRefused | None = None


def examine(
    path: Path,
    listing: Listing,
    *,
    layout: str = "auto",
    done_file: str | None = None,
    assets: Path | None = None,
    folder: Path | None = None,
    seen: Listing | None = None,
    before: FileSet | None = None,
) -> Facts:
    """Return the facts of the folder at `path`; reads headers and small JSON files only.

    Where `path` is a pin, `folder` is what the trainer calls it and `seen` what is in the trainer's
    folder: half-written files are not pinned, but they are a veto. `before` is the file set of the
    checkpoint of the same run that was accepted last.

    Raises:
        OSError: a listed file can no longer be opened (it vanished).
    """
    named = path if folder is None else folder
    if gguf_files.is_file(path):
        listing = gguf_files.beside(path)
    seen = listing if seen is None else seen
    chosen, reason = layouts.choose(named, seen, layout)
    structure = _structure(chosen, path, listing, run=named.parent, assets=assets)
    own = structure.weights
    ended = (
        ending.of_layout(chosen, path, listing, seen=seen, weight_files=own, named=named)
        if done_file is None
        else ending.of_done_file(done_file, seen, own)
    )
    vetoes, leftovers = _signs(named, seen, structure, ended)
    files = seen.files if path.is_dir() else ()  # of a single file, the name is no sign
    now = file_set.of(
        named.name,
        chosen.name,
        files,
        weights={file.relpath for file in own},
        elements=structure.num_elements,
    )
    doubts = [*leftovers, *ended.doubts, *side_content.torn_state(named, seen.files)]
    wrong = structure.error
    if isinstance(wrong, CheckpointCorrupt) and wrong.path.name == Path(ended.name or "").name:
        doubts.append(f"{ended.name} is not whole")
    not_ended = ended.problem
    if before is not None:
        if chosen.name in _UNCOUNTED and done_file is None:
            not_ended = not_ended or file_set.shrunk(now, before)
        lacking = file_set.lacks(now, before, state=named == path or seen.path != listing.path)
        doubts += [] if lacking is None else [lacking]
    facts = Facts(
        layout=chosen.name,
        reason=reason,
        vetoes=vetoes,
        not_ended=not_ended,
        missing=structure.missing,
        error=structure.error,
        doubts=tuple(doubts),
        file_set=now,
        ended_by=ended.name if ended.problem is None else None,
    )
    return _with_side_files(facts, path, listing)


def verdict(facts: Facts, *, quiet_s: float, settle_s: float, gone: bool = False) -> Verdict:
    """Return the verdict on `facts` after `quiet_s` seconds without a change.

    `settle_s` is the quiet period the definition asks for. `gone` says that the trainer's folder is
    no longer there: nothing more will come, and no doubt can be waited out.
    """
    if facts.vetoes:
        return Waiting(why=f"a write is in progress: {facts.vetoes[0]}")
    if quiet_s < settle_s:
        return Waiting(why=f"quiet for {quiet_s:.1f} of {settle_s:.1f} seconds")
    is_patient = not gone and quiet_s >= max(settle_s, PATIENCE_S)
    hesitation = facts.not_ended or next(iter(facts.doubts), None)
    if facts.error is not None:
        if hesitation is None or is_patient:
            return Broken(error=facts.error)
        return Waiting(why=f"{hesitation}; {facts.error}")
    if facts.missing is not None:
        return Waiting(why=str(facts.missing))
    if facts.not_ended is not None:
        return Waiting(why=facts.not_ended)
    if facts.doubts and not is_patient:
        return Waiting(why=facts.doubts[0])
    return Complete(layout=facts.layout, reason=facts.reason, doubts=facts.doubts)


def _structure(
    chosen: Layout, path: Path, listing: Listing, *, run: Path, assets: Path | None
) -> _Structure:
    """Read the headers of the weights; what goes wrong is part of what is returned."""
    try:
        names, num_elements = _read(chosen, path, listing, run=run, assets=assets)
    except CheckpointIncomplete as caught:
        return _Structure(weights=_presumed(chosen, listing), missing=caught)
    except (CheckpointCorrupt, CheckpointUnsupported) as caught:
        return _Structure(weights=_presumed(chosen, listing), error=caught)
    files = tuple(listing.by_name[name] for name in names if name in listing.by_name)
    return _Structure(weights=files, num_elements=num_elements)


def _read(
    chosen: Layout, path: Path, listing: Listing, *, run: Path, assets: Path | None
) -> tuple[tuple[str, ...], int]:
    """Return the names of the weight files and the number of elements in their tensors.

    Raises:
        CheckpointRefused: they are not whole, or not of a kind that is read.
    """
    names = [file.relpath for file in listing.files]
    if chosen is layouts.LAYOUTS["gguf"]:
        return _examine_gguf(path, names, assets), 0
    if chosen is layouts.LAYOUTS["peft"]:
        folder = layouts.adapter_folder(listing) or ""
        found = folder + adapter_files.find(path / folder, listing.below(folder).by_name)
        if found.endswith(adapter_files.PICKLED_NAME):
            read = pickled.of_file(path / found)
            return (found,), sum(tensor.spec.numel for tensor in read.tensors.values())
        return (found,), _num_elements(path, (found,))
    if chosen.name in layouts.FAMILIES:
        family = layouts.FAMILIES[chosen.name]
        base = path if path.is_dir() else path.parent
        whole = consolidate.read(family, base, listing, assets=assets, run=run)
        if family is dcp_safetensors.DCP_SAFETENSORS:
            _require_vocabulary(whole, base)
        tensors = whole.gathered.tensors.values()
        stamped = tuple(file.relative_to(base).as_posix() for file in whole.gathered.stamps)
        return stamped, sum(tensor.spec.numel for tensor in tensors)
    if chosen.name in layouts.IN_PARTS or parts.is_file(path):
        base = path if path.is_dir() else path.parent
        kind = parts.FLAT if parts.is_file(path) else chosen.name
        shards = tuple(name for one in parts.find(kind, base, listing) for name in one.files)
        if kind == parts.DIFFUSERS:
            components.require(base, listing)
        return shards, _num_elements(base, shards)
    shards = weights.find(path, listing).shards
    num_elements = _num_elements(path, shards)
    beside.require_config(path, listing, assets, run=run_assets.run_folder(path, run))
    return shards, num_elements


def _num_elements(path: Path, shards: Sequence[str]) -> int:
    return sum(t.spec.numel for shard in shards for t in header.read(path / shard).tensors)


def _presumed(chosen: Layout, listing: Listing) -> tuple[ListedFile, ...]:
    """Return what looks like weights where they could not be read."""
    family = layouts.FAMILIES.get(chosen.name)
    if family is None:
        return tuple(f for f in listing.files if f.relpath.endswith(".safetensors"))
    return tuple(f for f in listing.files if family.holds(f.relpath))


def _require_vocabulary(whole: consolidate.Consolidated, path: Path) -> None:
    """Shards without a list of shards may lack the last: then rows of the vocabulary are missing.

    Raises:
        CheckpointIncomplete: the input embedding has fewer rows than config.json says.
    """
    said = whole.config.get("vocab_size")
    for name, tensor in whole.gathered.tensors.items():
        rows = tensor.spec.shape[0] if tensor.spec.shape else 0
        if name.endswith(_EMBEDDINGS) and type(said) is int and rows < said:
            raise CheckpointIncomplete(
                "rows of the vocabulary are missing",
                path=path,
                tensor=name,
                expected=f"{said} rows, as in config.json",
                found=f"{rows}",
                hint="the last rank's files are missing: wait for the save to end, or copy them",
            )


def _signs(
    named: Path, seen: Listing, structure: _Structure, ended: Ending
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the vetoes, and the doubts about temporary files older than the end of the save."""
    end_ns = ended.mtime_ns
    if end_ns is None and not ended.is_expected and structure.weights:
        end_ns = min(file.mtime_ns for file in structure.weights)
    vetoes, leftovers = [], []
    for sign in unfinished.signs(named, seen.files):
        if sign.mtime_ns is None or end_ns is None or sign.mtime_ns >= end_ns:
            vetoes.append(sign.name)
        else:
            leftovers.append(f"{sign.name} may be of a write in progress")
    return tuple(vetoes), tuple(leftovers)


def _with_side_files(facts: Facts, path: Path, listing: Listing) -> Facts:
    """Return `facts` with what the content of the files beside the weights adds to them."""
    if not path.is_dir():
        return facts
    try:
        side_content.check(path, listing.files)
        doubts = (*facts.doubts, *side_content.doubts(path, listing.files))
    except CheckpointCorrupt as caught:
        return dataclasses.replace(facts, error=facts.error or caught)
    return dataclasses.replace(facts, doubts=doubts)


def _examine_gguf(path: Path, names: list[str], assets: Path | None) -> tuple[str, ...]:
    """Return the names of the GGUF files of the model at `path`: a folder, or one of them.

    Raises:
        CheckpointRefused: they are not whole, or there is no config and none can be made.
    """
    folder, wanted = (path.parent, path.name) if gguf_files.is_file(path) else (path, None)
    files = gguf_files.find(folder, names, wanted=wanted)
    model = gguf_model.open_model(folder, files)
    if not _has_config(names, assets):
        model.config(None)
    return files.names


def _has_config(names: list[str], assets: Path | None) -> bool:
    there = assets is not None and (assets / weights.CONFIG_NAME).is_file()
    return weights.CONFIG_NAME in names or there
