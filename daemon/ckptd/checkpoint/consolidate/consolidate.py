"""A checkpoint in pieces as one: its family's tensors under the model's names, with its config."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptd.checkpoint import beside, index
from ckptd.checkpoint.consolidate import assets as assets_
from ckptd.checkpoint.consolidate import foreign, names, native
from ckptd.checkpoint.consolidate.gathered import Family, Gathered
from ckptd.checkpoint.header import StoredTensor
from ckptd.checkpoint.listing import Listing
from ckptd.checkpoint.pieces import Assembled, Tensor
from ckptd.errors import CheckpointCorrupt


@dataclass(frozen=True, slots=True, kw_only=True)
class Consolidated:
    """What `open_checkpoint` needs of it; `beside` are the run's files that belong to the model."""

    gathered: Gathered
    config: Mapping[str, Any]
    config_path: Path
    beside: tuple[Path, ...]


def read(
    family: Family, path: Path, listing: Listing, *, assets: Path | None, run: Path
) -> Consolidated:
    """Return the checkpoint in the folder at `path`, whose files are `listing`.

    `run` is the folder above the trainer's checkpoint.

    Raises:
        CheckpointRefused: see `Family.gather` and `names.resolve`; no config is found.
        OSError: a file cannot be read.
    """
    gathered = family.gather(path, listing)
    foreign.require_known_names(gathered.tensors, path)
    run = assets_.run_folder(path, run)
    inner = gathered.assets
    config_path = beside.require_config(path, listing, assets, run=run, inner=inner)
    config = index.read_json(config_path)
    base = assets_.base_names([assets] if assets is not None else [])
    tensors, masters, said = _under_own_names(gathered, config, base=base, path=path)
    if not tensors:
        raise CheckpointCorrupt("holds no tensors", path=path)
    foreign.require_own_order(tensors, config, path)
    tensors, left_out = names.without_aliases(tensors, config)
    return Consolidated(
        gathered=dataclasses.replace(
            gathered,
            tensors=tensors,
            masters=masters,
            notes=(*gathered.notes, *said, *left_out, *_of_masters(masters)),
        ),
        config=config,
        config_path=config_path,
        beside=assets_.beside(path, listing, inner=inner, run=run),
    )


def unwrapped(
    tensors: Mapping[str, StoredTensor],
    config: Mapping[str, Any],
    *,
    assets: Path | None,
    path: Path,
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return a saved model's tensors without what wrappers have put into their names, and notes.

    Raises:
        CheckpointUnsupported: an adapter's layers, or it is not clear what the model's own are.
        CheckpointCorrupt: two tensors would get one name.
    """
    names.require_no_adapter(tensors, path)
    if not names.are_wrapped(tensors):
        return dict(tensors), ()
    base = assets_.base_names([assets] if assets is not None else [])
    found = names.resolve(tensors, config=config, base=base, path=path)
    changed = next(name for name in tensors if found[name] != name)
    note = f"names without what wrappers put there: {changed} is {found[changed]}"
    return {found[name]: _named(t, found[name]) for name, t in tensors.items()}, (note,)


def _under_own_names(
    gathered: Gathered, config: Mapping[str, Any], *, base: Collection[str], path: Path
) -> tuple[dict[str, Tensor], frozenset[str], tuple[str, ...]]:
    """Return tensors and masters under the model's names, and what a reader should know of them."""
    names.require_no_adapter(gathered.tensors, path)
    if gathered.has_own_names and not names.are_wrapped(gathered.tensors):
        return dict(gathered.tensors), gathered.masters, ()
    translated = native.translate(gathered.tensors, config, base=base, path=path)
    if translated is not None:
        former = translated.former
        masters = frozenset(name for name in former if former[name] in gathered.masters)
        return dict(translated.tensors), masters, (translated.note,)
    found = names.resolve(gathered.tensors, config=config, base=base, path=path)
    tensors = {found[name]: _named(t, found[name]) for name, t in gathered.tensors.items()}
    masters = frozenset(found[name] for name in gathered.masters)
    return tensors, masters, names.notes(tensors)


def _of_masters(masters: frozenset[str]) -> tuple[str, ...]:
    text = (
        f"{len(masters)} tensors are the optimizer's float32 copies: they are cast to the dtype of "
        "config.json, unless the pipeline has a stage cast (float32 keeps them)"
    )
    return (text,) if masters else ()


def _named(tensor: Tensor, name: str) -> Tensor:
    spec = dataclasses.replace(tensor.spec, name=name)
    if isinstance(tensor, Assembled):
        return Assembled(spec, tensor.grid, tensor.boxes)
    return dataclasses.replace(tensor, spec=spec)
