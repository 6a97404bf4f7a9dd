"""Tensors made of others by moving rows: experts taken apart, rotary halves brought together.

Nothing is computed and nothing is read. A part of a tensor is a part of its extents; rows that are
every second one of the source are boxes with a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from ckptd.checkpoint import pieces
from ckptd.checkpoint.header import Extent, StoredTensor, TensorSpec
from ckptd.checkpoint.pieces import Assembled, Box, Tensor
from ckptd.errors import CheckpointUnsupported

MAX_HEADS = 16_384
"""Heads of an attention layer; the largest known has 512. Each becomes two boxes or more."""


def entries(tensor: Tensor, names: list[str], *, path: Path) -> list[Tensor]:
    """Return the entries along the first axis, each a tensor of its own with one of `names`.

    Raises:
        CheckpointUnsupported: not as many entries as names, or it lies in flat pieces.
    """
    spec = tensor.spec
    if not spec.shape or spec.shape[0] != len(names):
        raise CheckpointUnsupported(
            "does not hold as many entries as the model has experts",
            path=path,
            tensor=spec.name,
            expected=f"{len(names)}",
            found=f"shape {list(spec.shape)}",
            hint="check that config.json is that of the model that was trained",
        )
    parts: list[list[Box]] = [[] for _ in names]
    for box in _boxes(tensor, path):
        length = math.prod(box.shape[1:])
        nbytes = length * spec.dtype.bits // 8
        for place in range(box.shape[0]):
            extent = Extent(box.extent.path, box.extent.offset + place * nbytes, nbytes)
            parts[box.at[0] + place].append(Box(box.at[1:], box.shape[1:], extent))
    return [
        pieces.assemble(TensorSpec(name, spec.dtype, spec.shape[1:]), boxes, path=path)
        for name, boxes in zip(names, parts, strict=True)
    ]


def halves_together(tensor: Tensor, name: str, num_heads: int, *, path: Path) -> Tensor:
    """Return a matrix with, in each head, its even rows before its odd ones.

    So a projection for rotary positions on pairs of neighbours becomes one for positions on halves
    of a head, as transformers has it.

    Raises:
        CheckpointUnsupported: the rows are not those of `num_heads` heads, or it lies in flat pieces.
    """
    spec = tensor.spec
    rows = spec.shape[0] if len(spec.shape) == 2 else 0
    if not 1 <= num_heads <= MAX_HEADS or not rows or rows % (2 * num_heads):
        raise CheckpointUnsupported(
            "its rows are not those of as many heads as config.json says",
            path=path,
            tensor=spec.name,
            expected=f"{num_heads} heads of an even number of rows each",
            found=f"shape {list(spec.shape)}",
            hint="check that config.json is that of the model that was trained",
        )
    size = rows // num_heads
    made = [
        piece
        for box in _boxes(tensor, path)
        for head in range(box.at[0] // size, -(-(box.at[0] + box.shape[0]) // size))
        for piece in _of_head(box, head * size, size, spec.dtype.bits)
    ]
    return pieces.assemble(TensorSpec(name, spec.dtype, spec.shape), made, path=path)


def _of_head(box: Box, start: int, size: int, bits: int) -> Iterator[Box]:
    """Yield the rows of a box that are of the head that begins at row `start`, where they go."""
    row_bytes = box.shape[1] * bits // 8
    begin, end = max(box.at[0], start), min(box.at[0] + box.shape[0], start + size)

    def piece(row: int, count: int, step: int, first: int) -> Box:
        place = row + first - start
        target = start + place % 2 * (size // 2) + place // 2
        offset = box.extent.offset + (row - box.at[0]) * row_bytes
        extent = Extent(box.extent.path, offset, count * step * row_bytes)
        return Box((target, box.at[1]), (count, box.shape[1]), extent, step, first)

    pairs = (end - begin) // 2
    if pairs:
        yield piece(begin, pairs, 2, 0)
        yield piece(begin, pairs, 2, 1)
    if (end - begin) % 2:
        yield piece(end - 1, 1, 1, 0)


def _boxes(tensor: Tensor, path: Path) -> tuple[Box, ...]:
    shape = tensor.spec.shape
    if isinstance(tensor, StoredTensor):
        return (Box((0,) * len(shape), shape, tensor.extent),)
    if not isinstance(tensor, Assembled) or tensor.grid != shape or _has_steps(tensor):
        raise CheckpointUnsupported(
            "lies in flat pieces, in which its rows cannot be moved",
            path=path,
            tensor=tensor.spec.name,
            hint="save with the trainer's Hugging Face option",
        )
    return tensor.boxes


def _has_steps(tensor: Assembled) -> bool:
    return any(box.step != 1 for box in tensor.boxes)
