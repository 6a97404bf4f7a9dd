"""A model that a trainer has saved for transformers, in a folder below its own checkpoint.

NeMo Automodel (`model/consolidated`), LeRobot (`pretrained_model`), verl (`huggingface`, where it was
asked for weights), ColossalAI (`modeling`), and others that put shards and a consolidated copy side by side. The copy is
read, for nothing has to be put together.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ckptd.checkpoint import header, weights
from ckptd.checkpoint.consolidate.gathered import Gathered, has_plain_weights
from ckptd.checkpoint.header import StoredTensor
from ckptd.checkpoint.listing import Listing
from ckptd.errors import CheckpointCorrupt, CheckpointIncomplete

FOLDERS = (
    "consolidated", "model/consolidated", "pretrained_model", "huggingface", "actor/huggingface",
    "hf", "hf_ckpt", "model", "weights", "policy/hf", "policy/weights/model/consolidated",
    "policy/huggingface", "modeling",
)  # fmt: skip
"""Looked into in this order."""


@dataclass(frozen=True, slots=True)
class Inner:
    """A folder without weights of its own, and a model in one of `FOLDERS`."""

    name: str = "hf-inner"

    def recognise(self, folder_name: str, listing: Listing) -> str | None:
        """Return the weights or the index in the first such folder."""
        if has_plain_weights(listing):
            return None
        folder = _folder(listing)
        if folder is None:
            return None
        within = (weights.SINGLE_NAME, weights.INDEX_NAME)
        return next(f"{folder}/{n} is there" for n in within if f"{folder}/{n}" in listing.by_name)

    def marker_name(self, folder_name: str, listing: Listing) -> str | None:
        """Return the index of several shards, which transformers writes last."""
        index = f"{_folder(listing)}/{weights.INDEX_NAME}"
        return index if index in listing.by_name else None

    def holds(self, relpath: str) -> bool:
        """Return whether it is a weight file of such a folder, or its index."""
        folder, _, name = relpath.rpartition("/")
        is_weights = name.endswith((".safetensors", ".safetensors.index.json"))
        return folder in FOLDERS and is_weights

    def gather(self, path: Path, listing: Listing) -> Gathered:
        """Return the tensors as their headers have them."""
        folder = _folder(listing)
        if folder is None:
            raise CheckpointIncomplete(
                "no model in a folder of it", path=path, hint="wait for the save to end"
            )
        place = path / folder
        found = weights.find(place, listing.below(folder))
        heads = [header.read(place / shard) for shard in found.shards]
        tensors: dict[str, StoredTensor] = {}
        for head in heads:
            for tensor in head.tensors:
                name = tensor.spec.name
                said = None if found.weight_map is None else found.weight_map.get(name)
                if name in tensors or said not in (None, head.path.name):
                    raise CheckpointCorrupt(
                        "the index and the shards disagree", path=head.path, tensor=name
                    )
                tensors[name] = tensor
        absent = next((n for n in found.weight_map or () if n not in tensors), None)
        if absent is not None:
            raise CheckpointCorrupt(
                "the index names it, and no shard holds it", path=place, tensor=absent
            )
        return Gathered(
            tensors=tensors,
            stamps={head.path: head.stamp for head in heads},
            notes=found.notes,
            assets=(folder,),
            metadata=tuple(head.metadata for head in heads),
            has_own_names=True,
        )


def _folder(listing: Listing) -> str | None:
    return next(
        (
            folder
            for folder in FOLDERS
            if f"{folder}/{weights.SINGLE_NAME}" in listing.by_name
            or f"{folder}/{weights.INDEX_NAME}" in listing.by_name
        ),
        None,
    )


INNER = Inner()
