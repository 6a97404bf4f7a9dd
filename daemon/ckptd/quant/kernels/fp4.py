"""Packed E2M1 codes times scales of groups.

A nibble moved to the right place of a float16 is the same number times 2 ** -14 (the difference
of the exponent biases), with sign and subnormal; the 2 ** 14 goes into the scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ckptd.quant.formulas.fp4 import Fp4
from ckptd.quant.kernels import float8, grid, wide

FACTOR = 2.0**14
"""What results of `widen` are still to be multiplied by."""
_HELD = 1 << 19
"""Words that are transposed at once (1 MB): fewer would touch a page of memory for each of them."""
_SPREAD = 1 << 12 | 1 << 24
"""A byte times this, in int32, has its nibbles at the top of the two halves."""
_KEPT = ~0x71FF
"""Of an int16 with a nibble at its top, shifted right by 3: sign, two of exponent, one of mantissa;
what is cleared are copies of the sign and lower nibbles."""


def decode_fp4(
    formula: Fp4, rows: range, tensors: Sequence[torch.Tensor], out: torch.Tensor
) -> None:
    """Write `rows` of `formula` into `out`, of `(len(rows), formula.columns)`."""
    codes, scale = tensors[0], tensors[1]
    scales_of = _scaling(formula, scale, None if formula.global_scale is None else tensors[2])
    pre_scale = None if formula.pre_scale is None else float8.values(tensors[-1])
    if formula.transposed:
        _decode_transposed(formula, codes, scale, scales_of, out)
        return
    room: torch.Tensor | None = None
    for piece, x in wide.pieces(out):
        if room is None:
            room = x.new_empty((len(x), codes.shape[1]), dtype=torch.int32)
        halves = room[: len(x)].copy_(codes[piece]).mul_(_SPREAD).view(torch.int16)
        widen(halves, x)
        if not formula.signed_zero:
            x.add_(0.0)
        scales, rest = scales_of(scale[piece])
        if rest != 1.0:
            x.mul_(rest)
        grid.apply(torch.mul, x, scales, formula.group)
        if pre_scale is not None:
            x.mul_(pre_scale)


def _decode_transposed(
    formula: Fp4,
    codes: torch.Tensor,
    scale: torch.Tensor,
    scales_of: Callable[[torch.Tensor], tuple[torch.Tensor, float]],
    out: torch.Tensor,
) -> None:
    """Transpose the packed words, four nibbles or two each, and take them apart in their rows."""
    group, words, nibbles = formula.group, codes, 2
    if codes.shape[1] % 2 == 0:
        words, nibbles = codes.view(torch.int16), 4
    step = max(1, _HELD // max(1, len(codes)) * nibbles // group) * group
    room: torch.Tensor | None = None
    for start in range(0, len(out), step):
        some = out[start : start + step]
        columns = slice(start // nibbles, (start + step) // nibbles)
        held = words[:, columns].to(torch.int16).contiguous().t().contiguous()
        groups = slice(start // group, (start + step) // group)
        scales, rest = scales_of(scale[:, groups].t().contiguous())
        for piece, x in wide.pieces(some, step=group):
            if room is None:
                room = torch.empty_like(x, dtype=torch.int16)
            halves = room[: len(x)]
            here = held[piece.start // nibbles : piece.stop // nibbles]
            for place in range(nibbles):
                torch.bitwise_left_shift(here, 12 - 4 * place, out=halves[place::nibbles])
            widen(halves, x)
            if not formula.signed_zero:
                x.add_(0.0)
            if rest != 1.0:
                x.mul_(rest)
            _scale_rows(x, scales[piece.start // group :], group)


def widen(halves: torch.Tensor, x: torch.Tensor) -> None:
    """Write the values of the nibbles at the top of `halves`, times 2 ** -14."""
    x.copy_(halves.bitwise_right_shift_(3).bitwise_and_(_KEPT).view(torch.float16))


def _scale_rows(x: torch.Tensor, scales: torch.Tensor, group: int) -> None:
    """Multiply each `group` rows by a row of `scales`; the last group may be partial."""
    whole = len(x) // group
    x[: whole * group].view(whole, group, x.shape[1]).mul_(scales[:whole, None])
    if len(x) % group:
        x[whole * group :].mul_(scales[whole : whole + 1])


def _scaling(
    formula: Fp4, scale: torch.Tensor, global_scale: torch.Tensor | None
) -> Callable[[torch.Tensor], tuple[torch.Tensor, float]]:
    """Return what makes float32 scales of stored ones, and the power of two left to multiply by."""
    one = None if global_scale is None else float8.values(global_scale).reshape(())
    if one is not None and formula.global_divisor != 1.0:
        one = one / formula.global_divisor
    moderate = grid.is_moderate(scale) and (one is None or 2.0**-60 < abs(float(one)) < 2.0**60)

    def scales_of(stored: torch.Tensor) -> tuple[torch.Tensor, float]:
        scales = float8.values(stored)
        if one is not None:
            scales = scales / one if formula.divides else scales * one
        return (scales * FACTOR, 1.0) if moderate else (scales, FACTOR)

    return scales_of
