"""Tensors whose bytes lie in several places: boxes of a grid, each an extent of a file.

Trainers on many devices write the parts of a tensor where they are. A part is a box: some rows,
some columns, or a range of the tensor's elements where they were put in one row before they were
divided. What lies in one piece is a `StoredTensor`, as in a safetensors file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptd.checkpoint.header import Extent, StoredTensor, TensorSpec
from ckptd.checkpoint.inert import TensorRef
from ckptd.checkpoint.torch_file import TorchFile
from ckptd.errors import CheckpointCorrupt, CheckpointUnsupported

MAX_STRIDED_ROWS = 65_536
"""Pieces into which one tensor with gaps between its rows may fall; a transposed one has more."""


@dataclass(frozen=True, slots=True)
class Box:
    """Elements that lie in a row in a file: their shape, and where in the grid the first goes.

    With `step` 2, of a matrix: every second row of the extent, from its row `first` on.
    """

    at: tuple[int, ...]
    shape: tuple[int, ...]
    extent: Extent
    step: int = 1
    first: int = 0


@dataclass(frozen=True, slots=True)
class Assembled:
    """A tensor made of `boxes` that cover `grid`, the spec's shape or all its elements in a row."""

    spec: TensorSpec
    grid: tuple[int, ...]
    boxes: tuple[Box, ...]


Tensor = StoredTensor | Assembled
"""A tensor of a checkpoint, in one piece or in several."""


def files_of(tensor: Tensor) -> tuple[Path, ...]:
    """Return the files that hold the tensor's bytes, in the order of its pieces, each once."""
    if isinstance(tensor, StoredTensor):
        return (tensor.extent.path,)
    return tuple(dict.fromkeys(box.extent.path for box in tensor.boxes))


def assemble(
    spec: TensorSpec, boxes: Sequence[Box], *, path: Path, grid: tuple[int, ...] | None = None
) -> Tensor:
    """Return the tensor that `boxes` make; `grid` None: they are boxes of its shape.

    `path` is a file of the checkpoint: errors name it, and a tensor without elements lies in it.

    Whether boxes overlap is for planning to find; their number of elements is checked here.

    Raises:
        CheckpointCorrupt: they do not cover the grid, or reach out of it; names `path`.
    """
    grid = spec.shape if grid is None else grid
    full = tuple(box for box in boxes if math.prod(box.shape))
    found = sum(math.prod(box.shape) for box in full)
    if found != math.prod(grid):
        raise CheckpointCorrupt(
            "its pieces do not make the whole",
            path=path,
            tensor=spec.name,
            expected=f"{math.prod(grid)} elements",
            found=f"{found}",
            hint="a rank's part is missing or of another save: save again",
        )
    for box in full:
        sides = zip(box.at, box.shape, grid, strict=True)
        if any(at < 0 or at + length > whole for at, length, whole in sides):
            raise CheckpointCorrupt(
                "a piece reaches out of it",
                path=box.extent.path,
                tensor=spec.name,
                expected=f"inside of {list(grid)}",
                found=f"{list(box.shape)} at {list(box.at)}",
            )
    if not full:
        extent = boxes[0].extent if boxes else Extent(path, 0, 0)
        return StoredTensor(spec, Extent(extent.path, extent.offset, 0))
    if len(full) == 1 and full[0].step == 1:
        return StoredTensor(spec, full[0].extent)
    return Assembled(spec, grid, full)


def boxes_of(
    file: TorchFile, tensor: TensorRef, *, name: str, at: tuple[int, ...] | None = None
) -> list[Box]:
    """Return the pieces of a tensor of a torch file, the first of them at `at` (None: the begin).

    One whose elements lie in a row is one piece. One with gaps (some columns of a matrix, a row
    that stands for many) is a piece for each stretch without.

    Raises:
        CheckpointCorrupt: its storage is missing or too short.
        CheckpointUnsupported: its elements are in another order than its shape says.
    """
    origin = (0,) * len(tensor.shape) if at is None else at
    if tensor.is_contiguous:
        return [Box(origin, tensor.shape, file.extent(tensor))]
    inner = len(tensor.shape)
    length = 1
    while tensor.shape[inner - 1] == 1 or tensor.stride[inner - 1] == length:
        inner -= 1
        length *= tensor.shape[inner]
    outer = tensor.shape[:inner]
    if math.prod(outer) > MAX_STRIDED_ROWS:
        raise CheckpointUnsupported(
            "its elements are not in the order of its shape",
            path=file.path,
            tensor=name,
            found=f"shape {list(tensor.shape)} with strides {list(tensor.stride)}",
            hint="save it as .contiguous()",
        )
    shape = (1,) * inner + tensor.shape[inner:]
    boxes = []
    for place in itertools.product(*map(range, outer)):
        steps = zip(place, tensor.stride[:inner], strict=True)
        offset = tensor.offset + sum(number * step for number, step in steps)
        stride = (length,) * inner + tensor.stride[inner:]
        row = TensorRef(tensor.storage, offset, shape, stride, tensor.dtype)
        here = tuple(o + p for o, p in zip(origin, place, strict=False)) + origin[inner:]
        boxes.append(Box(here, shape, file.extent(row)))
    return boxes


def stored(file: TorchFile, tensor: TensorRef, name: str) -> Tensor:
    """Return a tensor of a torch file under `name`.

    Raises:
        CheckpointRefused: see `boxes_of`.
    """
    spec = TensorSpec(name, tensor.dtype, tensor.shape)
    return assemble(spec, boxes_of(file, tensor, name=name), path=file.path)
