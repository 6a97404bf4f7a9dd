"""The weight files of a save: names, division, headers and index, before a byte is written.

Inside a file tensors lie by falling alignment, then by name, as the safetensors library lays them
out; so every tensor begins at a multiple of its element size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ckptd.checkpoint import dtypes, header, index
from ckptd.checkpoint.header import TensorSpec
from ckptd.plan import shards

METADATA = {"format": "pt"}
"""What readers of older transformers demand in every file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """One file: its header and the tensors that follow it without gaps."""

    name: str
    head: bytes
    tensors: tuple[tuple[TensorSpec, torch.Tensor], ...]

    @property
    def nbytes(self) -> int:
        """The size of the file."""
        return len(self.head) + sum(spec.nbytes for spec, _ in self.tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightPlan:
    """All files of a save, in the order in which they are written; the index comes last."""

    files: tuple[WeightFile, ...]
    index_name: str
    index: bytes | None
    """None where one file holds everything."""

    @property
    def nbytes(self) -> int:
        """The bytes of all weight files."""
        return sum(file.nbytes for file in self.files)

    @property
    def names(self) -> list[str]:
        """The names that stand in the folder afterwards."""
        return [file.name for file in self.files] + [self.index_name] * (self.index is not None)


def plan(
    tensors: Mapping[str, torch.Tensor],
    *,
    max_shard_bytes: int,
    total_parameters: int,
    stem: str = "model",
    variant: str | None = None,
) -> WeightPlan:
    """Return the files that hold `tensors`, divided in the order given.

    Args:
        tensors: plain tensors with data; see `require_plain`.
        max_shard_bytes: no file has more tensor bytes, unless one tensor alone does.
        total_parameters: noted in the index.
        stem: `model` or `adapter_model`.
        variant: part of every name.

    Raises:
        ValueError: safetensors has no name for a tensor's dtype.
    """
    specs = {name: _spec(name, tensor) for name, tensor in tensors.items()}
    sizes = {name: spec.nbytes for name, spec in specs.items()}
    groups = shards.by_size(sizes, max_shard_bytes)
    names = shards.file_names(len(groups), stem=stem, variant=variant)
    files = []
    weight_map: dict[str, str] = {}
    for file_name, group in zip(names, groups, strict=True):
        inside = sorted((specs[name] for name in group), key=_layout)
        head = header.encode(inside, metadata=METADATA)
        pairs = tuple((spec, tensors[spec.name]) for spec in inside)
        files.append(WeightFile(name=file_name, head=head, tensors=pairs))
        weight_map |= dict.fromkeys(group, file_name)
    content = None
    if len(files) > 1:
        total = sum(spec.nbytes for spec in specs.values())
        content = index.encode(weight_map, total_size=total, total_parameters=total_parameters)
    return WeightPlan(
        files=tuple(files),
        index_name=shards.index_name(stem=stem, variant=variant),
        index=content,
    )


def require_plain(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor whose bytes are not simply its values.

    Raises:
        RuntimeError: it has no data, is distributed, sparse, or a wrapper around other tensors:
            what to write would be a guess.
    """
    what = None
    if tensor.device.type == "meta":
        what = "has no data (it is on the meta device): load or initialise it first"
    elif hasattr(tensor, "full_tensor"):
        what = "is distributed over processes: gather a full state dict and pass it as state_dict"
    elif tensor.layout is not torch.strided:
        what = f"is not dense ({tensor.layout}): safetensors holds dense tensors only"
    elif hasattr(tensor, "__tensor_flatten__"):
        what = f"is a {type(tensor).__name__} around other tensors: dequantize it first"
    if what is not None:
        raise RuntimeError(f"cannot save {name!r}: it {what}")


def _spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    try:
        dtype = dtypes.from_torch_name(str(tensor.dtype))
    except ValueError as error:
        raise ValueError(f"cannot save {name!r}: {error}") from error
    return TensorSpec(name, dtype, tuple(tensor.shape))


def _layout(spec: TensorSpec) -> tuple[int, str]:
    return -spec.dtype.bits, spec.name
