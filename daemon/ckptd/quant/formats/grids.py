"""Which rectangle of a weight lies under one scale, read off the shapes of both.

The grid of scales is a ceil-divided one: its last blocks may be partial, so that a block's size is
never the weight's divided by the grid's. The block that config.json declares is tried first; where
the grid contradicts it, only shapes that leave no doubt count (a scale a row, a group of 32...).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ckptd.checkpoint.header import StoredTensor
from ckptd.quant.formula import ceil_div
from ckptd.quant.parts import Part, stacked

Block = tuple[int, int]
"""(rows, columns) of a weight."""

_USUAL: Block = (128, 128)
"""DeepSeek's, which everybody took over."""
_GROUPS = (32, 16, 64, 128, 256)
"""Columns under one scale. A grid of more than one column fits at most one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """Codes, their scales and the block that one scale is for: matrices that make up a weight."""

    codes: Part
    scale: Part
    block: Block


def matrices(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return (count, rows, columns): experts are matrices one after the other.

    A convolution's weight is one matrix whose columns are all axes but the first.
    """
    if len(shape) == 3:  # no experts are one without rows
        return (shape[0], shape[1], shape[2]) if shape[0] else (1, 0, shape[2])
    return 1, shape[0] if shape else 1, math.prod(shape[1:])


def block_of(rows: int, columns: int, grid: Sequence[int], declared: Block | None) -> Block | None:
    """Return the block of a matrix with scales of shape `grid`, or None where none fits."""
    whole = (rows, columns)
    if grid == (1, 1):
        return whole
    for block in _candidates(rows, columns, declared):
        if grid == (ceil_div(rows, block[0]), ceil_div(columns, block[1])):
            return block
    return None


def scales(
    codes: Part, count: int, scale: StoredTensor, spread: Part, *, declared: Block | None
) -> list[Scales] | None:
    """Return the matrices of `codes`, `count` of equal rows, each with its part of the scales.

    `spread` is the tensor `scale` as a part of any shape. A single scale is for all; experts have
    one each or a grid each. Experts that are gate and up in one may have a grid for either half:
    they come as two matrices. None where the shapes do not fit.
    """
    rows, columns, shape = codes.rows // count if count else 0, codes.columns, scale.spec.shape
    numel = math.prod(shape)
    if not codes.rows * columns and numel > 1:
        return None
    if numel == 1 or not codes.rows * columns:
        size = (max(1, rows), max(1, columns))
        one = dataclasses.replace(spread, rows=1, columns=numel)
        return [Scales(codes=code, scale=one, block=size) for code in stacked(codes, count)]
    grid = _grid(shape, count, rows, columns)
    if grid is None:
        return None
    block = block_of(rows, columns, grid, declared)
    halves = 1
    if block is None and rows % 2 == 0 and grid[0] % 2 == 0 and "gate_up" in codes.name:
        halves = 2
        block = block_of(rows // 2, columns, (grid[0] // 2, grid[1]), declared)
    if block is None:
        return None
    spread = dataclasses.replace(spread, rows=count * grid[0], columns=grid[1])
    return [
        Scales(codes=code, scale=part, block=block)
        for code, part in zip(
            stacked(codes, count * halves), stacked(spread, count * halves), strict=True
        )
    ]


def expected(rows: int, columns: int, declared: Block | None) -> str:
    """Return in words which scales a matrix may have."""
    block = _USUAL if declared is None else declared
    grid = (ceil_div(rows, block[0]), ceil_div(columns, block[1]))
    return (
        f"scales of {list(grid)} for {rows} x {columns} in blocks of {block[0]} x {block[1]}, "
        f"of [{rows}, {ceil_div(columns, 32)}] for groups of 32, of [{rows}] for rows, or one"
    )


def _grid(shape: Sequence[int], count: int, rows: int, columns: int) -> Block | None:
    """Return the grid of each of `count` matrices of `rows`, or None where `shape` is no such."""
    if count > 1:
        if math.prod(shape) == count and shape[0] == count:
            return (1, 1)
        if shape[0] != count or len(shape) > 3:
            return None
        if len(shape) == 3:
            return (shape[1], shape[2])
        axes = [axis for axis in ((rows, 1), (1, columns)) if shape[-1] == max(axis)]
        return axes[0] if len(axes) == 1 else None  # both: nobody can tell
    if len(shape) == 4 and shape[1] == shape[3] == 1:  # (a, 1, b, 1), as amax over blocks is kept
        return (shape[0], shape[2])
    if len(shape) == 3 and shape[0] == 1:  # a single expert
        shape = shape[1:]
    if len(shape) > 2 and math.prod(shape) == shape[0]:  # (rows, 1, 1, 1) of a convolution
        shape = shape[:1]
    if len(shape) == 1:
        return (rows, 1) if shape[0] == rows else None
    return (shape[0], shape[1]) if len(shape) == 2 else None


def _candidates(rows: int, columns: int, declared: Block | None) -> Iterator[Block]:
    if declared is not None:
        yield declared
    yield (1, columns)
    yield (rows, 1)
    yield _USUAL
    yield from ((1, group) for group in _GROUPS)
    if declared is not None:  # experts whose matrices lie transposed
        yield declared[::-1]
    yield from ((group, 1) for group in _GROUPS)
