"""A checkpoint in pieces as one: its family's tensors under the model's names, with its config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptd.checkpoint import index, weights
from ckptd.checkpoint.consolidate import assets as assets_
from ckptd.checkpoint.consolidate import names
from ckptd.checkpoint.consolidate.gathered import Family, Gathered
from ckptd.checkpoint.listing import Listing
from ckptd.checkpoint.pieces import Assembled, Tensor
from ckptd.errors import CheckpointCorrupt, CheckpointIncomplete


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
    inner = gathered.assets
    config_path = assets_.find(
        weights.CONFIG_NAME, path, listing, inner=inner, assets=assets, run=run
    )
    if config_path is None:
        raise CheckpointIncomplete(
            f"{weights.CONFIG_NAME} is missing",
            path=path,
            found="none here, nor in the run's folder above",
            hint="name a folder that has it (the base model) with `assets:` in the definition "
            "(--assets on the command line)",
        )
    config = index.read_json(config_path)
    base = assets_.base_names([assets] if assets is not None else [])
    found = names.resolve(gathered.tensors, config=config, base=base, path=path)
    tensors = {found[name]: _named(t, found[name]) for name, t in gathered.tensors.items()}
    if not tensors:
        raise CheckpointCorrupt("holds no tensors", path=path)
    masters = frozenset(found[name] for name in gathered.masters)
    tensors, left_out = names.without_aliases(tensors, config)
    return Consolidated(
        gathered=dataclasses.replace(
            gathered,
            tensors=tensors,
            masters=masters,
            notes=(*gathered.notes, *left_out, *names.notes(tensors), *_of_masters(masters)),
        ),
        config=config,
        config_path=config_path,
        beside=assets_.beside(path, listing, inner=inner, run=run),
    )


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
