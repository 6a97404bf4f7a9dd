"""Scales on a grid, spread over the elements under them without being written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ckptd.quant.kernels import float8

Operation = Callable[..., Any]
"""`operation(left, right, out=)`: torch.mul, torch.sub, torch.add."""

_LARGE = 2.0**48


def rows_of(grid: torch.Tensor, rows: slice, block_rows: int) -> torch.Tensor:
    """Return in float32 the grid's row for each of `rows`, or one where it is the same for all."""
    first, last = rows.start // block_rows, (rows.stop - 1) // block_rows
    found = float8.values(grid[first : last + 1])
    if block_rows == 1 or first == last:
        return found
    spread = found[:, None].expand(-1, block_rows, -1).flatten(0, 1)
    skipped = rows.start - first * block_rows
    return spread[skipped : skipped + rows.stop - rows.start]


def apply(operation: Operation, x: torch.Tensor, grid: torch.Tensor, block_columns: int) -> None:
    """Do `x[r, c] = operation(x[r, c], grid[r, c // block_columns])` in place.

    `x` is `(rows, columns)`, contiguous; `grid` is (rows or 1, ceil(columns / block_columns)). The
    last block may be partial.
    """
    columns = x.shape[1]
    if grid.shape[1] == 1 or block_columns == 1:
        operation(x, grid, out=x)
        return
    whole = columns // block_columns
    main = x[:, : whole * block_columns].view(len(x), whole, block_columns)
    operation(main, grid[:, :whole, None], out=main)
    if columns % block_columns:
        rest = x[:, whole * block_columns :]
        operation(rest, grid[:, whole:], out=rest)


def is_moderate(scale: torch.Tensor) -> bool:
    """Whether every scale is far from overflow: powers of two and global scales may be put into it."""
    if scale.dtype is torch.float8_e8m0fnu:
        return int(scale.view(torch.uint8).amax()) < 127 + 48
    if scale.dtype not in (torch.float32, torch.bfloat16):
        return True
    low, high = torch.aminmax(scale)
    return float(low) > -_LARGE and float(high) < _LARGE
