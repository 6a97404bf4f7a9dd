"""Shards that DCP's Hugging Face writer leaves unconsolidated, one set of files a rank.

`shard-RRRRR-model-IIIII-of-NNNNN.safetensors` holds parts of tensors under the tensors' names; the
header's `DCP_SHARDING_INFO` says where each part begins. A tensor's full shape is nowhere: it is
what the parts reach to, so the files of the last rank are missed only if a part is.
Source: `torch.distributed.checkpoint.hf_storage`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptd.checkpoint import header, pieces
from ckptd.checkpoint.consolidate.gathered import Gathered, has_plain_weights
from ckptd.checkpoint.header import FileStamp, StoredTensor, TensorSpec
from ckptd.checkpoint.listing import Listing
from ckptd.checkpoint.pieces import Box, Tensor
from ckptd.errors import CheckpointCorrupt, CheckpointIncomplete, CheckpointUnsupported

_SHARD = re.compile(
    r"^(?P<folder>(?:(?:model|sharded|model/sharded|policy/weights/model)/)?)"
    r"shard-(?P<rank>\d{5})-model-(?P<part>\d{5})-of-(?P<parts>\d{5})\.safetensors$"
)
_INFO = "DCP_SHARDING_INFO"
_ASSETS = (
    "model/.hf_metadata", "model/.hf_metadata/tokenizer", ".hf_metadata", "huggingface",
    "policy/weights/model/.hf_metadata", "policy/tokenizer",
)  # fmt: skip
"""Where config and tokenizer are: NeMo Automodel's places, and that of others."""


@dataclass(frozen=True, slots=True)
class DcpSafetensors:
    """A folder with a rank's shards, or with `model/` or `sharded/` that has them."""

    name: str = "dcp-safetensors"

    def recognise(self, folder_name: str, listing: Listing) -> str | None:
        """Return the first shard."""
        if has_plain_weights(listing):
            return None
        return next((f"{name} is there" for name in listing.by_name if _SHARD.match(name)), None)

    def marker_name(self, folder_name: str, listing: Listing) -> str | None:
        """Return None: the writer has no last file."""
        return None

    def holds(self, relpath: str) -> bool:
        """Return whether it is a shard."""
        return _SHARD.match(relpath) is not None

    def gather(self, path: Path, listing: Listing) -> Gathered:
        """Return the tensors whose parts the headers hold."""
        names = _whole_set(path, listing)
        parts: dict[str, list[tuple[tuple[int, ...], StoredTensor]]] = {}
        stamps: dict[Path, FileStamp] = {}
        for name in names:
            head = header.read(path / name)
            stamps[head.path] = head.stamp
            offsets = _offsets(head)
            for tensor in head.tensors:
                at = offsets.get(tensor.spec.name, (0,) * len(tensor.spec.shape))
                if len(at) != len(tensor.spec.shape):
                    raise CheckpointCorrupt(
                        "its offsets have other axes than its shape",
                        path=head.path,
                        tensor=tensor.spec.name,
                    )
                parts.setdefault(tensor.spec.name, []).append((at, tensor))
        tensors = {name: _assembled(name, found) for name, found in parts.items()}
        return Gathered(tensors=tensors, stamps=stamps, assets=_ASSETS)


def _whole_set(path: Path, listing: Listing) -> list[str]:
    """Return the shards, of which no rank and no part may be missing."""
    found = {name: match for name in listing.by_name if (match := _SHARD.match(name))}
    if not found:
        raise CheckpointIncomplete("no shards", path=path, hint="wait for the save to end")
    folders = {match["folder"] for match in found.values()}
    totals = {match["parts"] for match in found.values()}
    if len(folders) > 1 or len(totals) > 1:
        raise CheckpointUnsupported(
            "shards of several saves", path=path, hint="point at the folder of one of them"
        )
    ranks = {int(match["rank"]) for match in found.values()}
    missing = set(range(1, max(ranks) + 1)) - ranks
    if missing:
        raise CheckpointIncomplete(
            f"the shards of rank {min(missing)} are missing",
            path=path,
            expected=f"{max(ranks)} ranks",
            found=f"{len(ranks)}",
            hint="wait for the save to end, or copy the missing files",
        )
    return sorted(found)


def _offsets(head: header.Header) -> Mapping[str, tuple[int, ...]]:
    raw = head.metadata.get(_INFO)
    try:
        info: Any = json.loads(raw) if raw is not None else {}
        return {name: _places(entry["saved_offsets"]) for name, entry in info.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointCorrupt(
            f"its {_INFO} cannot be read", path=head.path, hint="save again"
        ) from error


def _places(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(v) is int and 0 <= v < 1 << 62 for v in value):
        raise ValueError("not offsets")
    return tuple(value)


def _assembled(name: str, parts: list[tuple[tuple[int, ...], StoredTensor]]) -> Tensor:
    first = parts[0][1]
    boxes: dict[tuple[tuple[int, ...], tuple[int, ...]], Box] = {}
    for at, tensor in parts:
        if tensor.spec.dtype is not first.spec.dtype or len(at) != len(parts[0][0]):
            raise CheckpointCorrupt(
                "its parts differ in dtype or axes", path=tensor.extent.path, tensor=name
            )
        boxes.setdefault((at, tensor.spec.shape), Box(at, tensor.spec.shape, tensor.extent))
    shape = tuple(
        max(at[axis] + size[axis] for at, size in boxes) for axis in range(len(first.spec.shape))
    )
    spec = TensorSpec(name, first.spec.dtype, shape)
    return pieces.assemble(spec, list(boxes.values()), path=first.extent.path)


DCP_SAFETENSORS = DcpSafetensors()
