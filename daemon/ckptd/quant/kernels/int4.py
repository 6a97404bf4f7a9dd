"""The kernels of `formulas.int4`: nibbles to whole numbers to float32, a product and a sum each.

A code of 4 bits times a scale of 16 is exact in float32, so that product and sum round once, as a
fused multiply-add does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ckptd.quant.formulas.int4 import TILE_ROWS, Nibbles, Tiles
from ckptd.quant.kernels import bitstream, grid, wide

_SPREAD = 1 << 12 | 1 << 24
"""A byte times this, in int32, has its nibbles at the top of the two halves."""
_TWO_CODES = 0x000F000F
"""The lowest nibble of each half of a word."""


def decode_nibbles(
    formula: Nibbles, rows: range, tensors: Sequence[torch.Tensor], out: torch.Tensor
) -> None:
    """Write `rows` of `formula` into `out`, of `(len(rows), formula.columns)`."""
    codes, scale, zero, *pre_scale = tensors
    room = bitstream.Room(out.device)
    words: torch.Tensor | None = None
    for piece, x in wide.pieces(out):
        raw = codes[piece]
        if formula.signed:
            words = raw.new_empty(raw.shape, dtype=torch.int32) if words is None else words
            halves = words[: len(raw)].copy_(raw).mul_(_SPREAD).view(torch.int16)
            x.copy_(halves.bitwise_right_shift_(12))
        else:
            x.copy_(bitstream.unpacked(raw, bits=4, columns=formula.columns, room=room))
        scales, zeros = _upright(scale[:, piece]), _upright(zero[:, piece])
        if formula.signed:
            grid.apply(torch.mul, x, scales, formula.group)
            grid.apply(torch.add, x, zeros, formula.group)
        else:
            grid.apply(torch.sub, x, zeros, formula.group)
            grid.apply(torch.mul, x, scales, formula.group)
        for one in pre_scale:
            x.mul_(one)


def decode_tiles(
    formula: Tiles, rows: range, tensors: Sequence[torch.Tensor], out: torch.Tensor
) -> None:
    """Write `rows` of `formula` into `out`, of `(len(rows), formula.columns)`."""
    codes, pairs, *pre_scale = tensors
    pairs = pairs.view(len(pairs), len(rows), 2)
    for piece, x in wide.pieces(out, step=TILE_ROWS):
        tiles = slice(piece.start // TILE_ROWS, -(-piece.stop // TILE_ROWS))
        x.copy_(_untiled(codes[tiles]).sub_(8)[: len(x), : formula.columns])
        scales, zeros = pairs[:, piece, 0], pairs[:, piece, 1]
        grid.apply(torch.mul, x, _upright(scales), formula.group)
        grid.apply(torch.add, x, _upright(zeros), formula.group)
        for one in pre_scale:
            x.mul_(one[:, : formula.columns])


def _upright(values: torch.Tensor) -> torch.Tensor:
    """Return `(groups, rows)` as float32 of `(rows, groups)`."""
    return values.T.to(torch.float32, memory_format=torch.contiguous_format)


def _untiled(tiles: torch.Tensor) -> torch.Tensor:
    """Return `I16` codes of (8 * tiles, padded columns) from `U8` of (tiles, bytes).

    A word's nibbles `o` and `o + 4` are neighbours in the weight: one shift and mask makes two
    codes of 16 bits of them, where they belong.
    """
    count = tiles.shape[0]
    # (tile, columns / 128, row, q, word) to (tile, row, columns / 128, word, q)
    words = tiles.view(torch.int32).view(count, -1, TILE_ROWS, 4, 4).permute(0, 2, 1, 4, 3)
    words = words.reshape(count * TILE_ROWS, -1, 4)
    codes = words.new_empty((*words.shape[:2], 4, 4))
    for place in range(4):
        torch.bitwise_right_shift(words, 4 * place, out=codes[:, :, place])
    codes.bitwise_and_(_TWO_CODES)
    return codes.view(torch.int16).view(len(words), -1)
