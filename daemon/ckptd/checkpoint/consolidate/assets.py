"""Where the files lie that a trainer keeps apart from its shards: config.json, tokenizer, base.

Looked into, in this order: folders of the checkpoint that the family names, the `assets` that a
person named, and the run's folder above the checkpoint (RUN/checkpoint-1, RUN/checkpoints/1). From
the last only files of known names are taken, for it may hold anything.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from ckptd.checkpoint import header, index, weights
from ckptd.checkpoint.listing import Listing

BESIDE = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)
"""What of a model may lie in the run's folder, beside the checkpoints."""
_HOLDERS = frozenset({"checkpoints", "checkpoint", "ckpts", "ckpt"})
"""What a folder within a run is called that holds nothing but its checkpoints."""
RUN_NAME = ".ckptd-run"
"""The folder in a pin that has such files of the run's folder as they were when it was made."""


def run_folder(path: Path, run: Path) -> Path:
    """Return the run's folder of the checkpoint at `path`: a pin's own copy of it, else `run`."""
    return path / RUN_NAME if (path / RUN_NAME).is_dir() else run


def beside(path: Path, listing: Listing, *, inner: Sequence[str], run: Path) -> tuple[Path, ...]:
    """Return the model's files in folders of the checkpoint and in the run's folder."""
    names = [f"{folder}/{name}" for folder in inner for name in BESIDE]
    own = [path / name for name in names if name in listing.by_name]
    return (*own, *in_run(run))


def in_run(run: Path) -> tuple[Path, ...]:
    """Return the model's files in the run's folder, or above it where it only holds checkpoints."""
    return tuple(path for name in BESIDE if (path := of_run(run, name)) is not None)


def of_run(run: Path, name: str) -> Path | None:
    """Return the file `name` of the run; None where it has none, or only a link."""
    places = (run, run.parent) if run.name in _HOLDERS else (run,)
    return next((place / name for place in places if is_plain(place / name)), None)


def base_names(places: Iterable[Path]) -> Collection[str]:
    """Return the names of a model's tensors as the first index or safetensors file has them.

    Raises:
        CheckpointCorrupt: that file is damaged.
    """
    for place in places:
        if (place / weights.INDEX_NAME).is_file():
            return frozenset(index.read_weight_map(place / weights.INDEX_NAME))
        if (place / weights.SINGLE_NAME).is_file():
            head = header.read(place / weights.SINGLE_NAME)
            return frozenset(tensor.spec.name for tensor in head.tensors)
    return frozenset()


def is_plain(path: Path) -> bool:
    """Whether a regular file is there, and no link, which could lead anywhere."""
    return path.is_file() and not path.is_symlink()
