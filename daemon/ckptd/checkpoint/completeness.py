"""Is a checkpoint whole? The verdict on a folder that has been quiet for a while.

`examine` gathers the facts from names, stats, headers and small JSON files; `verdict` is a pure
function of the facts and of how long the folder has been quiet. Neither a marker nor quiet is
enough alone: markers survive re-saves and files come after the "last" one, so a marker must be
newer than the weights, nothing may be half-written, and the structure (index, shards, header
lengths, file sizes) must hold.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import Path

from ckptd.checkpoint import adapter_files, gguf_files, gguf_model, header, layouts, weights
from ckptd.checkpoint.consolidate import consolidate
from ckptd.checkpoint.listing import Listing
from ckptd.errors import (
    CheckpointCorrupt,
    CheckpointIncomplete,
    CheckpointRefused,
    CheckpointUnsupported,
)

STALE_MARKER_QUIET_S = 60.0
"""A marker older than the weights is accepted after this much quiet: some trainers rewrite a file
after their marker, and a re-save in place never rests this long between two writes."""

_VETOES = (
    ".tmp*",
    "*.tmp",
    "*.part",
    "*.incomplete",
    ".incomplete",
    "*-unfinished",
    ".metadata.tmp",
    ".nfs*",
    "*.lock",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Complete:
    """Whole: may be pinned for good and worked on."""

    layout: str
    reason: str


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
    vetoes: tuple[str, ...]
    missing: CheckpointIncomplete | None
    error: CheckpointRefused | None
    marker: layouts.Marker | None
    marker_is_stale: bool
    done_file: str | None
    done_file_there: bool


def examine(
    path: Path,
    listing: Listing,
    *,
    layout: str = "auto",
    done_file: str | None = None,
    assets: Path | None = None,
    folder: Path | None = None,
    seen: Listing | None = None,
) -> Facts:
    """Return the facts of the folder at `path`; reads headers and small JSON files only.

    Where `path` is a pin, `folder` is what the trainer calls it and `seen` what is in the trainer's
    folder: half-written files are not pinned, but they are a veto.

    Raises:
        OSError: a listed file can no longer be opened (it vanished).
    """
    named = path if folder is None else folder
    if gguf_files.is_file(path):
        listing = gguf_files.beside(path)
    names = [file.relpath for file in listing.files]
    seen_names = names if seen is None else [file.relpath for file in seen.files]
    chosen, reason = layouts.choose(named, seen or listing, layout)
    vetoes = tuple(n for n in seen_names if _vetoed(Path(n).name))
    missing: CheckpointIncomplete | None = None
    error: CheckpointRefused | None = None
    weight_names: tuple[str, ...] = ()
    try:
        if chosen is layouts.LAYOUTS["gguf"]:
            weight_names = _examine_gguf(path, names, assets)
        elif chosen is layouts.LAYOUTS["peft"]:
            weight_names = (adapter_files.find(path, names),)
            header.read(path / weight_names[0])
        elif chosen.name in layouts.FAMILIES:
            base = path if path.is_dir() else path.parent
            found = consolidate.read(
                layouts.FAMILIES[chosen.name], base, listing, assets=assets, run=named.parent
            )
            weight_names = tuple(
                file.relative_to(base).as_posix() for file in found.gathered.stamps
            )
        else:
            weight_names = weights.find(path, listing).shards
            for shard in weight_names:
                header.read(path / shard)
            _require_config(path, names, assets)
    except CheckpointIncomplete as caught:
        missing = caught
    except (CheckpointCorrupt, CheckpointUnsupported) as caught:
        error = caught
    marker = chosen.marker(path, listing, named.name)
    ages = {file.relpath: file.mtime_ns for file in listing.files}
    newest = max((ages[name] for name in weight_names), default=0)
    return Facts(
        layout=chosen.name,
        reason=reason,
        vetoes=vetoes,
        missing=missing,
        error=error,
        marker=marker,
        marker_is_stale=marker is not None and ages.get(marker.name, newest) < newest,
        done_file=done_file,
        done_file_there=done_file is not None
        and any(fnmatch.fnmatchcase(name, done_file) for name in seen_names),
    )


def verdict(facts: Facts, *, quiet_s: float, settle_s: float) -> Verdict:
    """Return the verdict on `facts` after `quiet_s` seconds without a change.

    `settle_s` is the quiet period the definition asks for; a done file, where one is named, is
    authoritative and takes the marker's place.
    """
    if facts.done_file is not None and not facts.done_file_there:
        return Waiting(why=f"the done file {facts.done_file!r} is not there")
    if facts.vetoes:
        return Waiting(why=f"a write is in progress: {facts.vetoes[0]}")
    if quiet_s < settle_s:
        return Waiting(why=f"quiet for {quiet_s:.1f} of {settle_s:.1f} seconds")
    if facts.error is not None:
        return Broken(error=facts.error)
    if facts.missing is not None:
        return Waiting(why=str(facts.missing))
    if facts.done_file is None and facts.marker is not None:
        if facts.marker.problem is not None:
            return Waiting(why=f"{facts.marker.name}: {facts.marker.problem}")
        if facts.marker_is_stale and quiet_s < max(settle_s, STALE_MARKER_QUIET_S):
            return Waiting(why=f"{facts.marker.name} is older than the weights")
    return Complete(layout=facts.layout, reason=facts.reason)


def _vetoed(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _VETOES)


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


def _require_config(path: Path, names: list[str], assets: Path | None) -> None:
    if _has_config(names, assets):
        return
    raise CheckpointIncomplete(
        f"{weights.CONFIG_NAME} is missing",
        path=path,
        hint="name a folder that has it with `assets:` in the definition (--assets on the "
        "command line)",
    )
