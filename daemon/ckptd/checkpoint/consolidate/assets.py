"""Where the files lie that a trainer keeps apart from its shards: config.json, tokenizer, base.

Looked into, in this order: folders of the checkpoint that the family names, the `assets` that a
person named, and the run's folder above the checkpoint. From the last only files of known names are
taken, for it may hold anything.
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


def find(
    name: str, path: Path, listing: Listing, *, inner: Sequence[str], assets: Path | None, run: Path
) -> Path | None:
    """Return the file `name` of the first place that has it; `run` is the run's folder."""
    for place in ("", *(f"{folder}/" for folder in inner)):
        if place + name in listing.by_name:
            return path / place / name
    if assets is not None and (assets / name).is_file():
        return assets / name
    return run / name if _is_plain(run / name) else None


def beside(path: Path, listing: Listing, *, inner: Sequence[str], run: Path) -> tuple[Path, ...]:
    """Return the model's files in folders of the checkpoint and in the run's folder."""
    names = [f"{folder}/{name}" for folder in inner for name in BESIDE]
    own = [path / name for name in names if name in listing.by_name]
    return (*own, *(run / name for name in BESIDE if _is_plain(run / name)))


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


def _is_plain(path: Path) -> bool:
    """Whether a regular file is there, and no link, which could lead anywhere."""
    return path.is_file() and not path.is_symlink()
