"""Weights that are not one transformers model: a pipeline's components, and single files.

A **part** is a set of weight files of its own: where they lie below the checkpoint, what they are
called, and the metadata of their headers. Its tensors are told from those of other parts by its
folder, which stands before their names (`unet/conv_in.weight`), and goes into no file. What has
parts has no model's config.json at the top; all else of it travels as it lies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ckptd.checkpoint import weights
from ckptd.checkpoint.listing import Listing
from ckptd.errors import CheckpointIncomplete, CheckpointUnsupported

DIFFUSERS, FLAT = "diffusers", "flat"
"""The names of the two layouts."""
PIPELINE_NAME = "model_index.json"
SUFFIX = ".safetensors"
MAX_PARTS = 64
"""Components of a pipeline; the largest known has nine."""
STEMS = ("diffusion_pytorch_model", "model")
"""What weight files of components are called: those of diffusers, and those of transformers."""
_WEIGHTS = re.compile(
    r"^(?P<folder>(?:[^/]+/)?)(?P<stem>diffusion_pytorch_model|model)(?P<variant>(?:\.[A-Za-z]\w*)?)"
    r"(?P<part>(?:-\d{5}-of-\d{5})?)\.safetensors$"
)
_PICKLED = re.compile(r"^(?P<folder>(?:[^/]+/)?)(diffusion_pytorch_model|pytorch_model)[^/]*\.bin$")
_SHARDED = re.compile(r"-\d{5,}-of-\d{5,}\.safetensors$")
_ANOTHERS = re.compile(r"^((ft-)?model|adapter_model|diffusion_pytorch_model|shard|optimizer)\b")
"""Files that belong to a folder; a lone one is not a checkpoint."""
_STEP = re.compile(r"-step(\d+)(?=\.|$)")
_CONFIGS = ("config.json", "adapter_config.json", PIPELINE_NAME)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A set of weight files.

    `folder` is where they lie, with a slash, or empty; a `single` part is one file, always. `metadata`
    is written into the headers instead of that of transformers.
    """

    folder: str
    stem: str
    variant: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    single: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A part and its files' names, relative to the checkpoint; `weight_map` as in `weights.find`."""

    part: Part
    files: tuple[str, ...]
    weight_map: Mapping[str, str] | None
    notes: tuple[str, ...] = ()


def is_file(path: Path) -> bool:
    """Return whether `path` is a safetensors file by name, and no folder."""
    return path.name.endswith(SUFFIX) and path.is_file()


def recognise_pipeline(listing: Listing) -> str | None:
    """Return why a folder holds components of diffusers, or None."""
    names = listing.by_name
    if PIPELINE_NAME in names:
        return f"{PIPELINE_NAME} is there"
    for name in names:
        match = _WEIGHTS.match(name)
        if match and match["stem"] == STEMS[0]:
            return f"{name} is there"
    return next((f"{n} is there" for n in names if _PICKLED.match(n) and STEMS[0] in n), None)


def recognise_file(listing: Listing) -> str | None:
    """Return why a folder holds files that are each a checkpoint of its own, or None."""
    found = _flat_names(listing)
    if not found or any(name in listing.by_name for name in _CONFIGS):
        return None
    return f"{found[0]} is there, and no config.json"


def find(layout: str, path: Path, listing: Listing) -> tuple[Found, ...]:
    """Return the parts of a checkpoint of one of the two layouts.

    Raises:
        CheckpointIncomplete: no weights, or shards that an index names are missing.
        CheckpointUnsupported: pickled components, or several files of which each is a checkpoint.
    """
    return (_single(path, listing),) if layout == FLAT else _components(path, listing)


def refusal(path: Path) -> str | None:
    """Return why the safetensors file at `path` is no checkpoint by itself; None if it is one."""
    if _SHARDED.search(path.name):
        return "one of several shards; point at the folder that holds them"
    if _ANOTHERS.match(path.name):
        return "a file; point at the folder that holds it"
    return None


def step(metadata: Mapping[str, str], name: str) -> int | None:
    """Return the training step that a file's name or kohya's metadata say, if they do."""
    match = _STEP.search(name)
    said = match[1] if match else metadata.get("ss_steps", "")
    return int(said) if said.isdecimal() and len(said) < 16 else None


def _flat_names(listing: Listing) -> list[str]:
    return [
        name
        for name in listing.by_name
        if name.endswith(SUFFIX)
        and "/" not in name
        and not name.startswith(".")
        and not _SHARDED.search(name)
        and not _ANOTHERS.match(name)
    ]


def _single(path: Path, listing: Listing) -> Found:
    is_one = listing.path != listing.base_path  # a file was named, whatever its name
    names = [file.relpath for file in listing.files] if is_one else _flat_names(listing)
    if not names:
        raise CheckpointIncomplete(
            "no safetensors file", path=path, hint="wait for the save to end"
        )
    if len(names) > 1:
        raise CheckpointUnsupported(
            f"holds {len(names)} files, each a checkpoint of its own",
            path=path,
            found=", ".join(names[:4]),
            hint="name one of these files instead of the folder, or watch FOLDER/*.safetensors",
        )
    part = Part(folder="", stem=names[0].removesuffix(SUFFIX), single=True)
    return Found(part=part, files=(names[0],), weight_map=None)


def _components(path: Path, listing: Listing) -> tuple[Found, ...]:
    found: dict[tuple[str, str], set[str]] = {}
    for name in listing.by_name:
        if match := _WEIGHTS.match(name):
            key = (match["folder"], match["stem"])
            found.setdefault(key, set()).add(match["variant"].removeprefix("."))
    held = {folder for folder, _ in found}
    for name in listing.by_name:
        if (match := _PICKLED.match(name)) and match["folder"] not in held:
            raise CheckpointUnsupported(
                "a component with pickled weights",
                path=path / name,
                hint="save the pipeline with safe_serialization=True (the default)",
            )
    if not found:
        raise CheckpointIncomplete(
            "no weights of any component",
            path=path,
            expected=f"{STEMS[0]}.safetensors in a component's folder",
            hint="wait for the save to end",
        )
    if len(found) > MAX_PARTS or len(held) != len(found):
        raise CheckpointUnsupported(
            "several sets of weights in one component",
            path=path,
            found=", ".join(sorted(folder + stem for folder, stem in found)[:4]),
            hint="remove those that are left over from an earlier save",
        )
    return tuple(
        _component(path, listing, folder, stem, variants)
        for (folder, stem), variants in sorted(found.items())
    )


def _component(path: Path, listing: Listing, folder: str, stem: str, variants: set[str]) -> Found:
    """Return one component; its plain weights, or those of its only variant."""
    variant = "" if "" in variants else min(variants)
    if "" not in variants and len(variants) > 1:
        raise CheckpointUnsupported(
            f"a component with weights of several variants: {', '.join(sorted(variants))}",
            path=path / folder,
            hint="keep the plain weights, or those of one variant",
        )
    names = weights.Names.of(variant or None, stem=stem)
    within = listing.below(folder)
    chosen = weights.find(path / folder, within, variant=variant or None, stem=stem)
    notes = [f"{folder}{note}" for note in chosen.notes]
    others = sorted(variants - {variant})
    notes += [f"{folder}{names.single}: weights of variant {one} left out" for one in others]
    return Found(
        part=Part(folder=folder, stem=stem, variant=variant or None),
        files=tuple(folder + shard for shard in chosen.shards),
        weight_map=chosen.weight_map,
        notes=tuple(notes),
    )
