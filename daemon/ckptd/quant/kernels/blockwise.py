"""The kernel of `formulas.blockwise`: a table of all bytes, two values each, one look-up a byte.

Two float32 are moved as one 64-bit integer, which halves the look-ups; they are what takes the
time. Everything is in float32 and in the library's order, so both kinds of arithmetic are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ckptd.quant.formulas.blockwise import Blockwise
from ckptd.quant.kernels import steps

_HELD_SCALES = 1 << 16
"""Scales computed at once on the CPU: 256 KB, those of 4 million elements in blocks of 64."""
_SIGNS = torch.tensor([1.0] * 8 + [-1.0] * 8)


def decode_blockwise(
    formula: Blockwise, rows: range, tensors: Sequence[torch.Tensor], out: torch.Tensor
) -> None:
    """Write `rows` of `formula` into `out`, of `(len(rows), formula.columns)`."""
    reader = _Reader(formula, rows, tensors)
    if not formula.transposed:
        flat = out.view(-1)
        for piece in steps.of_rows(flat.numel(), 1, out.device):
            reader.into(flat[piece], piece.start)
        return
    height, width = formula.shape
    for piece in steps.of_rows(height, width, out.device):
        tile = out.new_empty((piece.stop - piece.start, width))
        reader.into(tile.view(-1), piece.start * width)
        out[:, piece].copy_(tile.T)


class _Reader:
    """The flat elements of some rows, from whichever one on."""

    def __init__(self, formula: Blockwise, rows: range, tensors: Sequence[torch.Tensor]) -> None:
        self._formula = formula
        self._codes = tensors[0].view(-1)
        self._pairs = _pairs(tensors[2].view(-1), signed_zero=formula.shape[1] % 2 == 0)
        self._scales = _Scales(formula, tensors)
        self._first_block = formula.first_byte(rows) * 2 // formula.block
        self._skipped_blocks = self._first_block - formula.blocks(rows).start
        self._skipped = formula.elements(rows).start - self._first_block * formula.block
        self._values = torch.empty(0, device=self._codes.device)
        self._places = torch.empty(0, dtype=torch.int32, device=self._codes.device)

    def into(self, target: torch.Tensor, begin: int) -> None:
        """Fill `target` with the elements from number `begin` on, counted from the rows' first."""
        block = self._formula.block
        start = self._skipped + begin
        stop = start + len(target)
        first, last = start // block, -(-stop // block)
        values = self._looked_up(first * block // 2, -(-stop // 2))[: stop - first * block]
        skipped = self._skipped_blocks
        _scale(values, self._scales.of(range(first + skipped, last + skipped)), block)
        target.copy_(values[start - first * block :])

    def _looked_up(self, start: int, stop: int) -> torch.Tensor:
        """Return the two values of each byte from `start` to `stop`, valid until the next call."""
        count = stop - start
        if len(self._places) < count:
            self._places = self._places.new_empty(count)
            self._values = self._values.new_empty(2 * count)
        places = self._places[:count].copy_(self._codes[start:stop])
        values = self._values[: 2 * count]
        torch.index_select(self._pairs, 0, places, out=values.view(torch.int64))
        return values


class _Scales:
    """The scales of all blocks in memory, made some at a time where they are nested."""

    def __init__(self, formula: Blockwise, tensors: Sequence[torch.Tensor]) -> None:
        self._formula = formula
        self._absmax = tensors[1].view(-1)
        self._nested = tuple(tensor.view(-1) for tensor in tensors[3:])
        self._held = range(0)
        self._made = self._absmax
        if not self._nested:
            self._held, self._made = range(len(self._absmax)), self._absmax.to(torch.float32)

    def of(self, blocks: range) -> torch.Tensor:
        """Return the scales of `blocks` in float32."""
        if blocks.start < self._held.start or blocks.stop > self._held.stop:
            self._make(blocks)
        return self._made[blocks.start - self._held.start : blocks.stop - self._held.start]

    def _make(self, blocks: range) -> None:
        """Undo the quantization of the scales themselves, for `blocks` and many after them."""
        size = self._formula.nested_block
        start = blocks.start - blocks.start % size
        ahead = _HELD_SCALES if self._absmax.device.type == "cpu" else len(self._absmax)
        self._held = range(start, min(max(blocks.stop, start + ahead), len(self._absmax)))
        codes = self._absmax[start : self._held.stop].to(torch.int32)
        nested_absmax, nested_map = self._nested
        made = torch.index_select(nested_map, 0, codes)
        _scale(made, nested_absmax[start // size :], size)
        self._made = made.add_(self._formula.nested_offset)


def _scale(values: torch.Tensor, scales: torch.Tensor, block: int) -> None:
    """Multiply each `block` of `values` by its scale in place; the last one may be partial."""
    whole = len(values) // block
    full = values[: whole * block].view(whole, block)
    torch.mul(full, scales[:whole, None], out=full)
    if len(values) % block:
        values[whole * block :].mul_(scales[whole])


def _pairs(quant_map: torch.Tensor, *, signed_zero: bool) -> torch.Tensor:
    """Return the two float32 that each byte stands for, high nibble first, as one int64.

    A zero at code 8, the sign alone, is fp4's. The table on disk says +0 and so do the library's
    decoders of rows of odd length, but its kernels make it -0.
    """
    if signed_zero:
        negative = torch.copysign(quant_map, _SIGNS.to(quant_map.device))
        quant_map = torch.where(quant_map == 0, negative, quant_map)
    high = quant_map[:, None].expand(16, 16)
    low = quant_map[None, :].expand(16, 16)
    return torch.stack([high, low], dim=-1).contiguous().view(torch.int64).view(-1)
