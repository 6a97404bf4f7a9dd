"""The kernels of `formulas.awq`: codes to bytes in the order of the weight, then the same sums.

The usual layout, nibbles across the outputs, is transposed word by word, and the words are taken
apart into rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ckptd.quant.formulas.awq import BLOCK, QUAD, Across, Along, Quads
from ckptd.quant.kernels import affine, bitstream

_EIGHT = 8
_QUAD_INPUTS = 64
"""Inputs of one row before another of the quad follows."""
_SIGNS = -0x77777778
"""The highest bit of each nibble (0x88888888): flipped, two's complements are codes above -8, which
falls out of the difference of code and zero."""
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where each of eight neighbours lies among them in the file."""


def decode_across(
    formula: Across, rows: range, tensors: Sequence[torch.Tensor], out: torch.Tensor
) -> None:
    """Write `rows` of `formula` into `out`, of `(len(rows), formula.columns)`."""
    words, packed, scale, *act = tensors
    flip = _SIGNS if formula.signed else 0
    if flip:
        packed = packed ^ flip
    zeros = affine.zeros(_in_order(packed, formula, len(rows)))
    groups = affine.Groups(
        scale=scale.T.float().contiguous(),
        zero=zeros if zeros.ndim == 0 else zeros.T.contiguous(),
        group=formula.group,
        bits=formula.bits,
        divisor=_divisor(act),
    )
    tiles = affine.tiles(
        len(rows), formula.columns, steps=(BLOCK, groups.step), on_cpu=out.device.type == "cpu"
    )
    lanes = formula.bits == 4 and formula.interleaved
    work = affine.Work(out.device)
    for down, along in tiles:
        held = slice(down.start * formula.bits // 32, -(-down.stop * formula.bits // 32))
        tile = words[along, held] ^ flip if flip else words[along, held]
        count = down.stop - down.start
        codes = _nibble_rows(tile)[:count] if lanes else _in_order(tile, formula, count).T
        out[down, along].copy_(groups.values(codes, work.like(codes), down, along))


def _in_order(words: torch.Tensor, formula: Across, count: int) -> torch.Tensor:
    """Return `count` codes, `U8`, of each row of words, in the order of the outputs."""
    whole = -(-count // _EIGHT) * _EIGHT if formula.interleaved else count
    raw = words.contiguous().view(torch.uint8)
    codes = bitstream.unpacked(raw, bits=formula.bits, columns=whole)
    if formula.interleaved:
        codes = codes.reshape(len(codes), -1, _EIGHT)[:, :, list(_PLACES)].flatten(1)
    return codes[:, :count]


def _nibble_rows(words: torch.Tensor) -> torch.Tensor:
    """Return the transposed codes, `U8` of `(8 * words, rows)`, of interleaved nibbles."""
    rows, count = words.shape
    turned = words.new_empty((count, rows)).copy_(words.contiguous().T)
    raw = torch.empty((count, 4, rows), dtype=torch.uint8, device=words.device)
    for place in range(4):
        if place:
            turned.bitwise_right_shift_(8)
        raw[:, place].copy_(turned)  # the low 8 bits
    # Byte 2 * a + b of a word has output 4 * b + a in its low nibble, and the second next above it.
    both = raw.view(count, 2, 2, rows).transpose(1, 2)
    codes = torch.empty((count, 2, 2, 2, rows), dtype=torch.uint8, device=words.device)
    torch.bitwise_and(both, 15, out=codes[:, :, 0])
    torch.bitwise_right_shift(both, 4, out=codes[:, :, 1])
    return codes.flatten(0, 3)


def decode_along(
    formula: Along, rows: range, tensors: Sequence[torch.Tensor], out: torch.Tensor
) -> None:
    """Write `rows` of `formula` into `out`, of `(len(rows), formula.columns)`."""
    raw, packed, scale, *act = tensors
    count = -(-formula.columns // formula.group)
    groups = affine.Groups(
        scale=scale[:, :count].float(),
        zero=affine.zeros(bitstream.unpacked(packed, bits=4, columns=count)),
        group=formula.group,
        bits=4,
        divisor=_divisor(act),
    )
    tiles = affine.tiles(
        len(rows),
        formula.columns,
        steps=(1, math.lcm(_EIGHT, groups.step)),
        on_cpu=out.device.type == "cpu",
    )
    work, room = affine.Work(out.device), bitstream.Room(out.device)
    for down, along in tiles:
        held = raw[down, along.start // 2 : along.stop // 2].contiguous()
        codes = bitstream.unpacked(held, bits=4, columns=along.stop - along.start, room=room)
        out[down, along].copy_(groups.values(codes, work.like(codes), down, along))


def decode_quads(
    formula: Quads, rows: range, tensors: Sequence[torch.Tensor], out: torch.Tensor
) -> None:
    """Write `rows` of `formula` into `out`, of `(len(rows), formula.columns)`."""
    raw, zero, scale, *act = tensors
    groups = affine.Groups(
        scale=scale.T.float().contiguous(),
        zero=zero.T.float().contiguous(),
        group=formula.group,
        bits=4,
        scaled_zero=True,
        divisor=_divisor(act),
    )
    tiles = affine.tiles(
        len(rows),
        formula.columns,
        steps=(QUAD, math.lcm(_QUAD_INPUTS, groups.step)),
        on_cpu=out.device.type == "cpu",
    )
    work = affine.Work(out.device)
    for down, along in tiles:
        tile = raw[down.start // QUAD : down.stop // QUAD, along.start * 2 : along.stop * 2]
        codes = _unwoven(tile)
        out[down, along].copy_(groups.values(codes, work.like(codes), down, along))


def _unwoven(raw: torch.Tensor) -> torch.Tensor:
    """Return codes, `U8` of (4 * quads, inputs), from `U8` of (quads, inputs * 2)."""
    # (quad, 64 inputs, row, their 32 bytes) with the rows made whole
    rows = raw.shape[0] * QUAD
    whole = raw.reshape(raw.shape[0], -1, QUAD, _QUAD_INPUTS // 2).transpose(1, 2).reshape(rows, -1)
    codes = bitstream.unpacked(whole, bits=4, columns=whole.shape[1] * 2)
    # of 32 codes the one at (eight, odd, pair) is of input 8 * pair + 2 * eight + odd
    eights = codes.reshape(rows, -1, QUAD, 2, QUAD)
    return eights.permute(0, 1, 4, 2, 3).reshape(rows, -1)


def _divisor(act: Sequence[torch.Tensor]) -> torch.Tensor | None:
    return act[0].view(-1).float() if act else None
