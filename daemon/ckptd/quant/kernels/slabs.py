"""The kernel of `formulas.slabs`: a shift and a mask over bytes, then two steps of arithmetic.

Both steps are done in float32. In `Arith.LIBRARY` scales, zeros and what is between the steps are
rounded to the dtype of the result, as where a library computes in 16 bits: the same bits as torch's
own operations of that dtype, in half the time. Each segment is a contiguous piece of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ckptd.quant.formula import Arith
from ckptd.quant.formulas.slabs import Rule, Segment, Slabs
from ckptd.quant.kernels import steps

_TILE_COLUMNS = 1 << 14
"""A row of codes may be the whole weight's width times its groups: it is cut into tiles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Grids:
    """Scale and zero in float32, and where they begin in the matrix."""

    scale: torch.Tensor
    zero: torch.Tensor | None
    row: int
    column: int

    def under(self, grid: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
        """Return what of `grid` is at `rows` and `columns` of the matrix, ready to broadcast."""
        if grid.shape[0] > 1:
            return grid[rows.start - self.row : rows.stop - self.row]
        if grid.shape[1] > 1:
            return grid[:, columns.start - self.column : columns.stop - self.column]
        return grid


def decode_slabs(
    formula: Slabs, rows: range, tensors: Sequence[torch.Tensor], out: torch.Tensor
) -> None:
    """Write `rows` of `formula` into `out`, of `(len(rows), formula.columns)`."""
    num_grids = 1 if formula.zero is None else 2
    grids = _grids(formula, rows, tensors[:num_grids], out.dtype)
    stored = tensors[num_grids:]
    hull = formula.hull(rows)
    flat, begin = out.view(-1), 0
    for place, segment in enumerate(formula.segments(rows)):
        if hull is None:
            packed = stored[place]
        else:
            start = segment.rows.start - hull.start
            packed = stored[0][start : start + len(segment.rows), segment.columns.start :]
            packed = packed[:, : len(segment.columns)]
        end = begin + segment.numel
        _segment(formula, segment, packed, grids, flat[begin:end].view(packed.shape))
        begin = end


def _segment(
    formula: Slabs, segment: Segment, packed: torch.Tensor, grids: _Grids, out: torch.Tensor
) -> None:
    """Write the codes in one slab of `packed` into `out`, of the same shape."""
    shift, mask = formula.shift(segment.slab), (1 << formula.bits) - 1
    rounds = formula.arith is Arith.LIBRARY and out.dtype is not torch.float32
    fields: torch.Tensor | None = None
    for rows, columns in _tiles(packed):
        tile = packed[rows, columns]
        if fields is None or fields.shape != tile.shape:
            fields = torch.empty_like(tile)
            room = torch.empty(tile.shape, device=tile.device)
        torch.bitwise_right_shift(tile, shift, out=fields)
        room.copy_(fields.bitwise_and_(mask))
        first = segment.row + rows.start
        in_rows = slice(first, first + len(tile))
        first = segment.columns.start + columns.start
        in_columns = slice(first, first + tile.shape[1])
        made = out[rows, columns]
        for place, (operation, operand) in enumerate(_steps(formula.rule, grids)):
            if place and rounds:
                made.copy_(room)
                room.copy_(made)
            if isinstance(operand, torch.Tensor):
                operation(room, grids.under(operand, in_rows, in_columns), out=room)
            else:
                operation(room, operand, out=room)
        made.copy_(room)


def _steps(rule: Rule, grids: _Grids) -> tuple[tuple[Callable[..., Any], torch.Tensor | int], ...]:
    """Return the operations that turn a code into a value, with their right operands."""
    multiply = (torch.mul, grids.scale)
    if rule is Rule.DIVIDE:
        return (torch.sub, 1), (torch.div, grids.scale)
    if rule is Rule.MULTIPLY:
        return (torch.sub, 1), multiply
    assert grids.zero is not None
    subtract = (torch.sub, grids.zero)
    return (subtract, multiply) if rule is Rule.ZERO_FIRST else (multiply, subtract)


def _grids(
    formula: Slabs, rows: range, tensors: Sequence[torch.Tensor], dtype: torch.dtype
) -> _Grids:
    rounded = [each.to(dtype) if formula.arith is Arith.LIBRARY else each for each in tensors]
    return _Grids(
        scale=rounded[0].to(torch.float32),
        zero=rounded[1].to(torch.float32) if len(rounded) > 1 else None,
        row=formula.matrix_rows(rows).start,
        column=formula.matrix_columns(rows).start,
    )


def _tiles(matrix: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    num_rows, num_columns = matrix.shape
    width = num_columns if matrix.is_cuda else min(num_columns, _TILE_COLUMNS)
    for start in range(0, num_columns, max(1, width)):
        columns = slice(start, min(start + width, num_columns))
        for rows in steps.of_rows(num_rows, len(range(num_columns)[columns]), matrix.device):
            yield rows, columns
