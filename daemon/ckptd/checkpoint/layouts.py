"""The layouts ckptd reads, and how it tells them apart.

A layout is what one family of trainers leaves in a folder: which files are required, which file
is written last, and where the weights are. `recognise` answers with the reason, so that
`ckptd inspect` can say why. The first layout of `LAYOUTS` that recognises a folder has it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ckptd.checkpoint import adapter_files, index, parts
from ckptd.checkpoint.consolidate import (
    dcp,
    dcp_safetensors,
    inner,
    pickled,
    ranks,
    refused,
    zero,
)
from ckptd.checkpoint.consolidate.gathered import Family, has_plain_weights
from ckptd.checkpoint.listing import Listing
from ckptd.errors import CheckpointCorrupt, CheckpointUnsupported

TRAINER_STATE_NAME = "trainer_state.json"
_ADAPTER_FOLDERS = ("", "model/", "lora_adapter/", "actor/lora_adapter/")
"""Where trainers put an adapter: PEFT itself, NeMo Automodel, verl."""
_STEP_FOLDER = re.compile(r"^checkpoint-(\d+)$")
_STEP_NAMED = re.compile(r"(?:step|checkpoint|iter|ckpt)[-_=]?(\d{1,15})(?=$|[-_])", re.IGNORECASE)
_STEP_AT_END = re.compile(r"[-_](\d{1,15})$")
_TRAINER_ONLY = re.compile(r"^(trainer_state\.json|training_args\.bin|rng_state.*\.pth)$")
_TRAINER_FILES = re.compile(r"^(optimizer\.(pt|bin)|scheduler\.pt|scaler\.pt|rng_state.*\.pth)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """The file a trainer writes last: its name, and what is wrong with it, if anything."""

    name: str
    problem: str | None


class Layout(Protocol):
    """What one family of trainers leaves on disk."""

    @property
    def name(self) -> str:
        """The name in a definition's `layout`."""

    def recognise(self, folder_name: str, listing: Listing) -> str | None:
        """Return why the folder is of this layout, or None if it is not."""

    def marker(self, path: Path, listing: Listing, folder_name: str) -> Marker | None:
        """Return the layout's last file, judged; None where the layout has none.

        `path` is where the files are, `folder_name` what the trainer called the folder: the two
        differ for a pinned checkpoint.
        """


@dataclass(frozen=True, slots=True)
class HfTrainer:
    """A checkpoint of the Hugging Face Trainer: `trainer_state.json` is rank 0's last file."""

    name: str = "hf-trainer"

    def recognise(self, folder_name: str, listing: Listing) -> str | None:
        """Return the file that only this trainer writes."""
        names = {file.relpath for file in listing.files}
        if any(name.startswith("random_states_") for name in names):
            return None  # of accelerate, which has an optimizer.bin, too, and no last file
        in_step_folder = _STEP_FOLDER.match(folder_name) is not None
        if TRAINER_STATE_NAME in names:
            return f"{TRAINER_STATE_NAME} is there"
        if in_step_folder and "training_args.bin" in names:
            return "a step folder with training_args.bin"
        return next(
            (f"{name} is there" for name in sorted(names) if _TRAINER_FILES.match(name)), None
        )

    def marker(self, path: Path, listing: Listing, folder_name: str) -> Marker | None:
        """Return trainer_state.json: absent, unreadable, of another step, or good."""
        if TRAINER_STATE_NAME not in {file.relpath for file in listing.files}:
            return Marker(name=TRAINER_STATE_NAME, problem="not written yet")
        try:
            step = index.read_json(path / TRAINER_STATE_NAME).get("global_step")
        except CheckpointCorrupt:
            return Marker(name=TRAINER_STATE_NAME, problem="not whole JSON yet")
        folder = _STEP_FOLDER.match(folder_name)
        if folder and step != int(folder[1]):
            return Marker(
                name=TRAINER_STATE_NAME,
                problem=f"global_step is {step}, the folder says {folder[1]}: of an earlier save",
            )
        return Marker(name=TRAINER_STATE_NAME, problem=None)


@dataclass(frozen=True, slots=True)
class Peft:
    """An adapter as PEFT saves it, alone or in a Trainer's checkpoint."""

    name: str = "peft"

    def recognise(self, folder_name: str, listing: Listing) -> str | None:
        """Return the file of the adapter that is there."""
        folder = adapter_folder(listing)
        if folder is None:
            return None
        found = adapter_files.recognise(listing.below(folder).by_name)
        return f"{folder}{found} is there, and no whole model"

    def marker(self, path: Path, listing: Listing, folder_name: str) -> Marker | None:
        """Return the Trainer's last file, where one saved it, else adapter_config.json."""
        if HfTrainer().recognise(folder_name, listing) is not None:
            return HfTrainer().marker(path, listing, folder_name)
        name = (adapter_folder(listing) or "") + adapter_files.CONFIG_NAME
        return Marker(name=name, problem=None if name in listing.by_name else "not written yet")


@dataclass(frozen=True, slots=True)
class HfFolder:
    """A folder written by save_pretrained: config and weights, no file that ends the save."""

    name: str = "hf"

    def recognise(self, folder_name: str, listing: Listing) -> str | None:
        """Return the Hugging Face file that is there."""
        names = {file.relpath for file in listing.files}
        for name in ("model.safetensors.index.json", "model.safetensors", "config.json"):
            if name in names:
                return f"{name} is there"
        return None

    def marker(self, path: Path, listing: Listing, folder_name: str) -> Marker | None:
        """Return None: only quiet tells that save_pretrained has ended."""
        return None


@dataclass(frozen=True, slots=True)
class Diffusers:
    """A pipeline of diffusers, components that accelerate saved, or one component alone."""

    name: str = parts.DIFFUSERS

    def recognise(self, folder_name: str, listing: Listing) -> str | None:
        """Return the file that only diffusers writes."""
        return parts.recognise_pipeline(listing)

    def marker(self, path: Path, listing: Listing, folder_name: str) -> Marker | None:
        """Return None: components are written in any order, and nothing ends the save."""
        return None


@dataclass(frozen=True, slots=True)
class FlatFile:
    """A safetensors file that is a checkpoint by itself: kohya's, and LoRAs of diffusers."""

    name: str = parts.FLAT

    def recognise(self, folder_name: str, listing: Listing) -> str | None:
        """Return the file, where nothing says that it belongs to a model's folder."""
        return parts.recognise_file(listing)

    def marker(self, path: Path, listing: Listing, folder_name: str) -> Marker | None:
        """Return None: only quiet tells that the file has been written."""
        return None


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A model as llama.cpp has it: GGUF files, and no weights of another kind."""

    name: str = "gguf"

    def recognise(self, folder_name: str, listing: Listing) -> str | None:
        """Return the first GGUF file."""
        names = sorted(file.relpath for file in listing.files)
        if "model.safetensors" in names or "model.safetensors.index.json" in names:
            return None
        found = (name for name in names if name.endswith(".gguf") and "/" not in name)
        return next((f"{name} is there" for name in found), None)

    def marker(self, path: Path, listing: Listing, folder_name: str) -> Marker | None:
        """Return None: only quiet tells that the file has been written."""
        return None


@dataclass(frozen=True, slots=True)
class Consolidated:
    """A layout whose weights a family gathers; its last file is the Trainer's where that wrote."""

    family: Family

    @property
    def name(self) -> str:
        """The family's name."""
        return self.family.name

    def recognise(self, folder_name: str, listing: Listing) -> str | None:
        """Return what the family recognises it by."""
        return self.family.recognise(folder_name, listing)

    def marker(self, path: Path, listing: Listing, folder_name: str) -> Marker | None:
        """Return trainer_state.json in a folder of the Trainer, else the family's last file."""
        if any(_TRAINER_ONLY.match(name) for name in listing.by_name):
            return HfTrainer().marker(path, listing, folder_name)
        name = self.family.marker_name(folder_name, listing)
        if name is None:
            return None
        return Marker(name=name, problem=None if name in listing.by_name else "not written yet")


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        refused.MLX,
        refused.MEGATRON,
        refused.MEGATRON_LEGACY,
        refused.ORBAX,
        refused.ZERO_UNIVERSAL,
        refused.OLMO_CORE,
        refused.MODEL_PARALLEL,
        refused.TUNE_PARTS,
        refused.SEVERAL_MODELS,
        refused.SEVERAL_FSDP,
        refused.NEMO,
        refused.SENTENCE_TRANSFORMERS,
        inner.INNER,
        zero.ZERO,
        dcp_safetensors.DCP_SAFETENSORS,
        dcp.DCP,
        ranks.VERL,
        ranks.FSDP_RANKS,
        pickled.PICKLED,
        pickled.LIGHTNING,
    )
}
"""Layouts whose weights are gathered from pieces and pickles (or that are refused by name)."""

LAYOUTS: dict[str, Layout] = {
    refused.MLX.name: Consolidated(refused.MLX),
    "peft": Peft(),
    parts.DIFFUSERS: Diffusers(),
    **{name: Consolidated(family) for name, family in FAMILIES.items()},
    "gguf": GgufModel(),
    parts.FLAT: FlatFile(),
    "hf-trainer": HfTrainer(),
    "hf": HfFolder(),
}
"""In the order in which they are asked."""
TITLES = {
    "peft": "an adapter of PEFT",
    parts.DIFFUSERS: "components of diffusers",
    parts.FLAT: "a file that is a checkpoint by itself",
    "hf-inner": "a model for transformers in a folder of the checkpoint",
    "deepspeed": "DeepSpeed ZeRO's partitions",
    "dcp": "torch's distributed checkpoint",
    "dcp-safetensors": "safetensors shards of torch's distributed checkpoint",
    "verl": "verl's files, one a rank",
    "fsdp-ranks": "FSDP's files, one a rank",
    "pickled": "weights of torch.save",
    "lightning": "a checkpoint of Lightning",
    "hf-trainer": "a checkpoint of the Hugging Face Trainer",
    "gguf": "a model of llama.cpp",
    "hf": "a model for transformers",
}
"""What a layout is, for people; those that are refused say so themselves."""
IN_PARTS = frozenset({parts.DIFFUSERS, parts.FLAT})
"""Layouts whose weights are no transformers model: see `parts`."""


def choose(path: Path, listing: Listing, layout: str = "auto") -> tuple[Layout, str]:
    """Return the layout of the folder at `path` and why; `layout` names one or says `auto`.

    Raises:
        CheckpointUnsupported: no layout recognises the folder, or `layout` is not known.
    """
    if layout != "auto":
        if layout not in LAYOUTS:
            raise CheckpointUnsupported(
                f"unknown layout {layout!r}", path=path, expected=f"auto, {', '.join(LAYOUTS)}"
            )
        return LAYOUTS[layout], "named by the definition"
    for candidate in LAYOUTS.values():
        reason = candidate.recognise(path.name, listing)
        if reason is not None:
            return candidate, reason
    return LAYOUTS["hf"], "nothing else recognised it"


def adapter_folder(listing: Listing) -> str | None:
    """Return where below the checkpoint an adapter is, with a slash; None where there is none."""
    if has_plain_weights(listing):
        return None
    for folder in _ADAPTER_FOLDERS:
        if adapter_files.recognise(listing.below(folder).by_name) is not None:
            return folder
    return None


def family_of(folder_name: str, listing: Listing, layout: str = "auto") -> Family | None:
    """Return the family that gathers the weights of a folder of this name, if one does."""
    try:
        chosen, _ = choose(Path(folder_name), listing, layout)
    except CheckpointUnsupported:
        return None
    return FAMILIES.get(chosen.name)


def step_of(path: Path, folder_name: str) -> int | None:
    """Return the training step that trainer_state.json or the folder's name gives, if any."""
    state_path = path / TRAINER_STATE_NAME
    step = None
    try:
        # A link may lead out of the folder, and a FIFO would be read for ever.
        if state_path.is_file() and not state_path.is_symlink():
            step = index.read_json(state_path).get("global_step")
    except (OSError, CheckpointCorrupt):
        step = None
    if type(step) is int:
        return step
    name = folder_name.removesuffix(".safetensors")
    for suffix in pickled.SUFFIXES:
        name = name.removesuffix(suffix)
    match = _STEP_NAMED.search(name) or _STEP_AT_END.search(name)
    return int(match[1]) if match else None
