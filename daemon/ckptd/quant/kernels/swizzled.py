"""The kernel of `formulas.swizzled`: scales out of their tiles, then the plain formula's kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ckptd.quant.formulas.fp4 import Fp4
from ckptd.quant.formulas.swizzled import TILE_ROWS, Swizzled
from ckptd.quant.kernels import fp4, scaled, steps


def decode_swizzled(
    formula: Swizzled, rows: range, tensors: Sequence[torch.Tensor], out: torch.Tensor
) -> None:
    """Write `rows` of `formula` into `out`, of `(len(rows), formula.columns)`."""
    codes, tiles, *globals_ = tensors
    plain = formula.plain()
    for piece in steps.of_rows(len(rows), formula.columns, out.device, step=TILE_ROWS):
        few = tiles[piece.start // TILE_ROWS : -(-piece.stop // TILE_ROWS)]
        groups = -(-formula.columns // formula.group)
        scales = _untiled(few)[: piece.stop - piece.start, :groups].contiguous()
        within = range(rows.start + piece.start, rows.start + piece.stop)
        given = (codes[piece], scales.view(tiles.dtype), *globals_)
        if isinstance(plain, Fp4):
            fp4.decode_fp4(plain, within, given, out[piece])
        else:
            scaled.decode_scaled(plain, within, given, out[piece])


def _untiled(tiles: torch.Tensor) -> torch.Tensor:
    """Return `U8` of (128 * rows of tiles, 4 * columns of tiles) from one row a row of tiles."""
    count = tiles.shape[0]
    fours = tiles.view(torch.int32).view(count, -1, 32, 4)  # the four scales of a row as one
    upright = fours.permute(0, 3, 2, 1).reshape(count * TILE_ROWS, -1)
    return upright.view(torch.uint8)
