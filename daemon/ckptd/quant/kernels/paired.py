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
    is_int4 = formula.kind is Kind.INT4
    for piece, x in wide.pieces(out, step=2):
        held = codes[piece.start // 2 : piece.stop // 2]
        if room is None:
            kind = torch.int8 if is_int4 else torch.int16
            room = torch.empty_like(held if is_int4 else x, dtype=kind)
        if is_int4:
            _signed_rows(held.view(torch.int8), room[: len(held)], x)
        else:
            _e2m1_rows(held, room[: len(x)], x)
        scales = grid.rows_of(scale, piece, block_rows)
        if one is not None:
            scales = scales * one
        grid.apply(torch.mul, x, scales, block_columns)
        if pre_scale is not None:
            x.mul_(pre_scale)


def _signed_rows(held: torch.Tensor, room: torch.Tensor, x: torch.Tensor) -> None:
    """Write the signed nibbles of each row of bytes (`I8`) into two rows of `x`, low ones first."""
    torch.bitwise_left_shift(held, 4, out=room)
    x[0::2].copy_(room.bitwise_right_shift_(4))
    x[1::2].copy_(torch.bitwise_right_shift(held, 4, out=room))


def _e2m1_rows(held: torch.Tensor, halves: torch.Tensor, x: torch.Tensor) -> None:
    """Write the E2M1 values of each row of bytes into two rows of `x`, low nibbles first."""
    words = held.to(torch.int16)
    for place in range(2):  # each nibble at the top of its half
        torch.bitwise_left_shift(words, 12 - 4 * place, out=halves[place::2])
    fp4.widen(halves, x)
    x.mul_(fp4.FACTOR).add_(0.0)  # -0 becomes 0
