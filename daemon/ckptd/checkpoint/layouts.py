"""The layouts ckptd reads, and how it tells them apart.

A layout is what one family of trainers leaves in a folder: which files are required, which file
is written last, and where the weights are. `recognise` answers with the reason, so that
`ckptd inspect` can say why. The first layout of `LAYOUTS` that recognises a folder has it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ckptd.checkpoint.listing import Listing
from ckptd.errors import CheckpointUnsupported

TRAINER_STATE_NAME = "trainer_state.json"
_STEP_FOLDER = re.compile(r"^checkpoint-(\d+)$")
_STEP_IN_NAME = re.compile(r"(?:step|checkpoint|iter|ckpt)[-_]?(\d+)$|[-_](\d+)$", re.IGNORECASE)
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
            step = json.loads((path / TRAINER_STATE_NAME).read_bytes()).get("global_step")
        except (ValueError, AttributeError, RecursionError):
            return Marker(name=TRAINER_STATE_NAME, problem="not whole JSON yet")
        folder = _STEP_FOLDER.match(folder_name)
        if folder and step != int(folder[1]):
            return Marker(
                name=TRAINER_STATE_NAME,
                problem=f"global_step is {step}, the folder says {folder[1]}: of an earlier save",
            )
        return Marker(name=TRAINER_STATE_NAME, problem=None)


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


LAYOUTS: dict[str, Layout] = {"hf-trainer": HfTrainer(), "gguf": GgufModel(), "hf": HfFolder()}
"""In the order in which they are asked."""


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


def step_of(path: Path, folder_name: str) -> int | None:
    """Return the training step that trainer_state.json or the folder's name gives, if any."""
    try:
        step = json.loads((path / TRAINER_STATE_NAME).read_bytes()).get("global_step")
    except (OSError, ValueError, AttributeError, RecursionError):
        step = None
    if type(step) is int:
        return step
    match = _STEP_IN_NAME.search(folder_name)
    return int(match[1] or match[2]) if match else None
