"""Codes of 4 bits packed across rows, taken apart into their two rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ckptd.quant.formulas.paired import Kind, Paired
from ckptd.quant.kernels import float8, fp4, grid, wide


def decode_paired(
    formula: Paired, rows: range, tensors: Sequence[torch.Tensor], out: torch.Tensor
) -> None:
    """Write `rows` of `formula` into `out`, of `(len(rows), formula.columns)`."""
    codes, scale = tensors[0], tensors[1]
    one = None if formula.global_scale is None else float8.values(tensors[2]).reshape(())
    pre_scale = None if formula.pre_scale is None else float8.values(tensors[-1])
    block_rows, block_columns = formula.block
    room: torch.Tensor | None = None
    for piece, x in wide.pieces(out, step=2):
        if room is None:
            room = torch.empty_like(x, dtype=torch.int16)
        halves = room[: len(x)]
        held = codes[piece.start // 2 : piece.stop // 2].to(torch.int16)
        for place in range(2):  # each nibble at the top of its half
            torch.bitwise_left_shift(held, 12 - 4 * place, out=halves[place::2])
        if formula.kind is Kind.INT4:
            x.copy_(halves.bitwise_right_shift_(12))
        else:
            fp4.widen(halves, x)
            x.mul_(fp4.FACTOR).add_(0.0)  # -0 becomes 0
        scales = grid.rows_of(scale, piece, block_rows)
        if one is not None:
            scales = scales * one
        grid.apply(torch.mul, x, scales, block_columns)
        if pre_scale is not None:
            x.mul_(pre_scale)
