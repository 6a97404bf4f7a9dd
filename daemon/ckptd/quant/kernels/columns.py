"""The kernel of `formulas.columns`: words transposed, so that codes lie along rows, then unpacked.

Transposing words moves many codes at once; afterwards all steps run along memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ckptd.quant.formulas.columns import BLOCK, Columns, Packing, Zeros
from ckptd.quant.kernels import affine, bitstream

_PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
"""The widths of planes from the low bits on; codes of other widths are a single plane."""


def decode_columns(
    formula: Columns, rows: range, tensors: Sequence[torch.Tensor], out: torch.Tensor
) -> None:
    """Write `rows` of `formula` into `out`, of `(len(rows), formula.columns)`.

    Raises:
        CheckpointCorrupt: g_idx names a group that has no scale.
    """
    words = tensors[0]
    outputs, inputs = len(rows), formula.inputs
    target = out
    if not formula.transposed:
        outputs, inputs = formula.outputs, len(rows)
        target = out.T
    groups = _groups(formula, 0 if formula.transposed else rows.start, outputs, tensors)
    tiles = affine.tiles(
        outputs,
        inputs,
        steps=(1, math.lcm(BLOCK, groups.step)),
        on_cpu=out.device.type == "cpu",
    )
    work = affine.Work(out.device)
    for down, along in tiles:
        held = formula.words(range(along.start, along.stop))
        raw = _turned(words[held.start : held.stop, down])
        codes = _codes(raw, formula, along.stop - along.start)
        target[down, along].copy_(groups.values(codes, work.like(codes), down, along))


def _turned(words: torch.Tensor) -> torch.Tensor:
    """Return the transpose of a tile of words, contiguous, as bytes.

    Torch transposes a contiguous matrix in blocks, a strided one element by element.
    """
    turned = words.new_empty((words.shape[1], words.shape[0]))
    return turned.copy_(words.contiguous().T).view(torch.uint8)


def _codes(raw: torch.Tensor, formula: Columns, count: int) -> torch.Tensor:
    """Return `count` codes a row, `U8`, from rows of words given as bytes."""
    widths = _PLANES.get(formula.bits)
    if formula.packing is Packing.STREAM or widths is None:
        return bitstream.unpacked(raw, bits=formula.bits, columns=count)
    blocks = raw.view(torch.int32).view(len(raw), -1, formula.bits)
    codes = torch.zeros((len(raw), blocks.shape[1] * BLOCK), dtype=torch.uint8, device=raw.device)
    offset = 0
    for width in widths:
        plane = blocks[:, :, offset : offset + width].flatten(1).contiguous().view(torch.uint8)
        codes |= bitstream.unpacked(plane, bits=width, columns=codes.shape[1]) << offset
        offset += width
    return codes[:, :count]


def _groups(
    formula: Columns, first_input: int, outputs: int, tensors: Sequence[torch.Tensor]
) -> affine.Groups:
    _, packed, scale, *indices = tensors
    places = None
    if indices:
        assert formula.g_idx is not None
        places = affine.places(
            indices[0].view(-1),
            formula.g_idx,
            start=first_input,
            group=formula.group,
            groups=formula.scale.rows,
        )
    skipped = 0 if places is not None or not indices else first_input // formula.group
    zeros = affine.zeros(_zeros(formula, packed, outputs))
    return affine.Groups(
        scale=scale[skipped:].T.float().contiguous(),
        zero=zeros if zeros.ndim == 0 else zeros[skipped:].T.contiguous(),
        group=formula.group,
        bits=formula.bits,
        places=places,
    )


def _zeros(formula: Columns, words: torch.Tensor, outputs: int) -> torch.Tensor:
    """Return the zeros, `U8` of `(groups, outputs)`."""
    words = words.contiguous()
    if formula.zero_rule is Zeros.WORDS:
        words = words + _ones(formula.bits, words.dtype)
    codes = _codes(words.view(torch.uint8), formula, outputs)
    if formula.zero_rule is Zeros.FIELDS:
        return codes.add(1).bitwise_and_((1 << formula.bits) - 1)
    return codes


def _ones(bits: int, dtype: torch.dtype) -> int:
    """Return 1 in every field of a word; fields are wider than a bit, so the sign is free."""
    return sum(1 << place for place in range(0, torch.iinfo(dtype).bits, bits))
