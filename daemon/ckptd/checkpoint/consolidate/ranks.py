"""One file of `torch.save` a rank, each with its part of every tensor: verl, accelerate without DCP.

A tensor is a DTensor: the rank's local part, the whole shape, and placements (sharded along an
axis, or replicated). Parts are put together in the order of ranks. What is divided along several
mesh axes at once (tensor parallel under FSDP) is refused by name.
Sources: verl's FSDP checkpoint manager and model merger; `torch.distributed.tensor`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptd.checkpoint import inert, pieces, torch_file
from ckptd.checkpoint.consolidate.gathered import Gathered, has_plain_weights
from ckptd.checkpoint.header import TensorSpec
from ckptd.checkpoint.inert import Inert, TensorRef
from ckptd.checkpoint.listing import Listing
from ckptd.checkpoint.pieces import Box, Tensor
from ckptd.checkpoint.torch_file import TorchFile
from ckptd.errors import CheckpointCorrupt, CheckpointIncomplete, CheckpointUnsupported

_VERL = re.compile(
    r"^(?P<folder>(?:(?:actor|policy)/)?)model_world_size_(?P<world>\d+)_rank_(?P<rank>\d+)\.pt$"
)
_ACCELERATE = re.compile(
    r"^(?P<folder>)pytorch_model_fsdp(?:_\d+)?_rank(?P<rank>\d+)(?P<world>)\.bin$"
)
_DTENSOR = "torch.distributed.tensor.DTensor"
_FULL = "save a full or a distributed (DCP) state dict"


@dataclass(frozen=True, slots=True)
class Ranks:
    """A folder with one file a rank, named by `pattern`."""

    name: str
    pattern: re.Pattern[str]

    def recognise(self, folder_name: str, listing: Listing) -> str | None:
        """Return the first rank's file."""
        if has_plain_weights(listing):
            return None
        return next((f"{name} is there" for name in listing.by_name if self.holds(name)), None)

    def marker_name(self, folder_name: str, listing: Listing) -> str | None:
        """Return None: the marker of verl is beside the checkpoint, for all of them."""
        return None

    def holds(self, relpath: str) -> bool:
        """Return whether it is a rank's file."""
        return self.pattern.match(relpath) is not None

    def gather(self, path: Path, listing: Listing) -> Gathered:
        """Return the tensors of all ranks' files."""
        names = self._names(path, listing)
        files = [torch_file.read(path / name) for name in names]
        states = [_state(file) for file in files]
        if any(state.keys() != states[0].keys() for state in states):
            raise CheckpointCorrupt("its ranks have other tensors than each other", path=path)
        tensors: dict[str, Tensor] = {}
        left_out = []
        for name in states[0]:
            parts = [state[name] for state in states]
            if isinstance(parts[0], TensorRef):
                tensors[name] = pieces.stored(files[0], parts[0], name)
            elif isinstance(parts[0], Inert) and parts[0].of == _DTENSOR:
                tensors[name] = _joined(name, files, parts)
            elif isinstance(parts[0], Inert) and not name.endswith("_extra_state"):
                raise _unsupported(files[0], name, f"is a {parts[0].of}")
            else:
                left_out.append(name)
        folder = self._match(names[0])["folder"]
        return Gathered(
            tensors=tensors,
            stamps={file.path: file.stamp for file in files},
            notes=(f"no tensors, left out: {', '.join(left_out[:5])}",) if left_out else (),
            assets=(f"{folder}huggingface",),
        )

    def _match(self, name: str) -> re.Match[str]:
        match = self.pattern.match(name)
        assert match is not None
        return match

    def _names(self, path: Path, listing: Listing) -> list[str]:
        """Return the files of all ranks in order, none missing.

        Raises:
            CheckpointIncomplete: a rank is missing.
            CheckpointUnsupported: files of several saves.
        """
        found = {int(m["rank"]): n for n in listing.by_name if (m := self.pattern.match(n))}
        matches = [m for n in listing.by_name if (m := self.pattern.match(n))]
        worlds = {(match["world"], match["folder"]) for match in matches}
        if len(worlds) > 1:
            raise CheckpointUnsupported(
                "files of several numbers of ranks", path=path, hint="remove those of one save"
            )
        if not found:
            raise CheckpointIncomplete("no rank files", path=path, hint="wait for the save to end")
        said = matches[0]["world"]
        world = int(said) if said else max(found) + 1
        if world > len(listing.files):
            missing = next(rank for rank in range(world) if rank not in found)
        else:
            missing = next((rank for rank in range(world) if rank not in found), -1)
        if missing >= 0 or len(found) != world:
            raise CheckpointIncomplete(
                f"the file of rank {missing} is missing",
                path=path,
                expected=f"{world} files",
                found=f"{len(found)}",
                hint="wait for the save to end, or copy the missing file",
            )
        return [found[rank] for rank in range(world)]


VERL = Ranks("verl", _VERL)
FSDP_RANKS = Ranks("fsdp-ranks", _ACCELERATE)


def _state(file: TorchFile) -> Mapping[str, Any]:
    value = file.value
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise CheckpointUnsupported("holds no state dict", path=file.path, hint=_FULL)
    return value


def _joined(name: str, files: Sequence[TorchFile], parts: Sequence[Any]) -> Tensor:
    """Return the tensor that the ranks' DTensors are parts of.

    Raises:
        CheckpointUnsupported: placements of a kind that is not put together.
        CheckpointCorrupt: the parts do not make the whole.
    """
    shape, axis = _placed(files[0], name, parts[0])
    boxes: list[Box] = []
    begin = 0
    dtype = None
    for file, part in zip(files, parts, strict=True):
        if not isinstance(part, Inert) or _placed(file, name, part) != (shape, axis):
            raise CheckpointCorrupt(
                "is placed otherwise than on rank 0", path=file.path, tensor=name
            )
        local = inert.fields(part.state).get("_local_tensor")
        if not isinstance(local, TensorRef):
            raise _unsupported(file, name, "has no plain local part")
        if dtype not in (None, local.dtype) or len(local.shape) != len(shape):
            raise CheckpointCorrupt(
                "its parts differ in dtype or axes", path=file.path, tensor=name
            )
        dtype = local.dtype
        if axis is None:
            spec = TensorSpec(name, dtype, shape)
            return pieces.assemble(spec, pieces.boxes_of(file, local, name=name), path=file.path)
        at = tuple(begin if place == axis else 0 for place in range(len(shape)))
        boxes += pieces.boxes_of(file, local, name=name, at=at)
        begin += local.shape[axis]
        if begin >= shape[axis] > 0:
            break  # the ranks after these hold copies (hybrid sharding), or nothing
    assert dtype is not None
    return pieces.assemble(TensorSpec(name, dtype, shape), boxes, path=files[0].path)


def _placed(file: TorchFile, name: str, part: Inert) -> tuple[tuple[int, ...], int | None]:
    """Return the whole shape and the axis it is divided along (None: not at all).

    Raises:
        CheckpointUnsupported: divided along several axes of the mesh, or a sum of parts.
    """
    shape = part.args[2] if len(part.args) > 2 else None
    placements = inert.fields(inert.fields(part.state).get("_spec")).get("placements")
    if not isinstance(shape, tuple) or not all(type(n) is int and 0 <= n < 1 << 62 for n in shape):
        raise _unsupported(file, name, "has no shape")
    if not isinstance(placements, list | tuple) or not placements:
        raise _unsupported(file, name, "has no placements")
    axes: list[int] = []
    for place, one in enumerate(placements):
        kind = one.of.rpartition(".")[2] if isinstance(one, Inert) else ""
        if kind == "Replicate":
            if axes:
                raise _unsupported(file, name, "is replicated within its parts")
            continue
        axis = inert.fields(one).get("dim") if isinstance(one, Inert) else None
        if kind != "Shard" or type(axis) is not int or not -len(shape) <= axis < len(shape):
            raise _unsupported(file, name, f"has the placement {kind or type(one).__name__}")
        axes.append(axis % len(shape))
        if place != len(placements) - 1:
            raise _unsupported(file, name, "is divided along several axes of the device mesh")
    return shape, axes[0] if axes else None


def _unsupported(file: TorchFile, name: str, what: str) -> CheckpointUnsupported:
    return CheckpointUnsupported(what, path=file.path, tensor=name, hint=_FULL)
