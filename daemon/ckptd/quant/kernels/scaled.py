"""8-bit codes times scales on a grid.

Where one scale is for all, there are as many values as codes: a table of all pairs of them, looked
up two codes at once, takes half the time of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ckptd.quant.formula import Arith
from ckptd.quant.formulas.scaled import Scaled
from ckptd.quant.kernels import float8, grid, pairs, wide


def decode_scaled(
    formula: Scaled, rows: range, tensors: Sequence[torch.Tensor], out: torch.Tensor
) -> None:
    """Write `rows` of `formula` into `out`, of `(len(rows), formula.columns)`."""
    codes, scale = tensors[0], tensors[1]
    if pairs.are_apt(formula, codes, out):
        pairs.decode_pairs(formula, codes, scale, out)
        return
    zero = tensors[2] if formula.zero is not None else None
    pre_scale = None if formula.pre_scale is None else float8.values(tensors[-1])
    block_rows, block_columns = formula.block
    if formula.transposed:
        block_rows, block_columns = block_columns, block_rows
        codes, scale, zero = codes.T, scale.T, None if zero is None else zero.T
    if formula.scale_via is not None and formula.arith is Arith.LIBRARY:
        scale = scale.to(getattr(torch, str(formula.scale_via.torch_name)))
    rounds_difference = formula.rounds_difference and formula.arith is Arith.LIBRARY
    if zero is not None and rounds_difference:
        zero = zero.to(out.dtype)
    factor = float8.factor(codes.dtype)
    into_scale = zero is None and grid.is_moderate(scale)
    room: torch.Tensor | None = None
    for piece, x in wide.pieces(out):
        if room is None:
            room = torch.empty_like(x, dtype=torch.int16)
        float8.widen(codes[piece], x, room[: len(x)])
        scales = grid.rows_of(scale, piece, block_rows)
        if factor != 1.0 and into_scale:
            scales = scales * factor
        elif factor != 1.0:
            x.mul_(factor)
        if zero is not None:
            grid.apply(torch.sub, x, grid.rows_of(zero, piece, block_rows), block_columns)
            if rounds_difference:
                x.copy_(x.to(out.dtype))
        grid.apply(torch.mul, x, scales, block_columns)
        if formula.factor != 1.0:
            x.mul_(formula.factor)
        if pre_scale is not None:
            x.mul_(pre_scale)
