"""The kernel of `formulas.blockwise`: a table of all bytes, two values each, one look-up a byte.

Two float32 are moved as one 64-bit integer, which halves the look-ups; they are what takes the
time. Pieces are cut by `split`, as making views one by one in Python costs a sixth of the rest.
Everything is in float32 and in the library's order, so both kinds of arithmetic are the same.
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
    source = _Source(formula, rows, tensors)
    if not formula.transposed:
        source.into(out.view(-1), 0)
        return
    height, width = formula.shape
    for piece in steps.of_rows(height, width, out.device):
        tile = out.new_empty((piece.stop - piece.start, width))
        source.into(tile.view(-1), piece.start * width)
        out[:, piece].copy_(tile.T)


class _Source:
    """The flat elements of some rows, to be had from whichever one on."""

    def __init__(self, formula: Blockwise, rows: range, tensors: Sequence[torch.Tensor]) -> None:
        self._block = formula.block
        self._codes = tensors[0].view(-1)
        self._scales = _Scales(formula, rows, tensors)
        pairs = _pairs(tensors[2].view(-1), signed_zero=formula.shape[1] % 2 == 0)
        self._room = _Room(pairs, formula.block)
        self._on_cpu = self._codes.device.type == "cpu"
        self._skipped = formula.elements(rows).start - formula.first_byte(rows) * 2

    def into(self, target: torch.Tensor, begin: int) -> None:
        """Fill `target` with the elements from number `begin` on, counted from the rows' first."""
        first, skipped = divmod(self._skipped + begin, self._block)
        if skipped:  # it begins within a block, which is computed from its begin on
            head = min(len(target), self._block - skipped)
            block = target.new_empty(skipped + head)
            self._whole_blocks(block, first)
            target[:head].copy_(block[skipped:])
            target, first = target[head:], first + 1
        held = _HELD_SCALES if self._on_cpu else -(-len(target) // self._block)
        for place, part in enumerate(torch.split(target, max(1, held) * self._block)):
            self._whole_blocks(part, first + place * held)

    def _whole_blocks(self, target: torch.Tensor, first: int) -> None:
        """Fill `target` with the elements from the begin of block number `first` on."""
        block = self._block
        num_blocks = -(-len(target) // block)
        at_once = steps.PIECE_ELEMENTS // block if self._on_cpu else num_blocks
        blocks = max(1, at_once)
        start = first * block // 2
        held = self._codes[start : start + -(-len(target) // 2)]
        codes = torch.split(held, blocks * block // 2)
        scales = torch.split(self._scales.of(first, first + num_blocks)[:, None], blocks)
        pieces = torch.split(target, blocks * block)
        for code, scale, out in zip(codes, scales, pieces, strict=True):
            out.copy_(self._room.values(code, scale, len(out)))


class _Room:
    """Where pieces are computed; the views of a size are made once."""

    def __init__(self, pairs: torch.Tensor, block: int) -> None:
        self._pairs = pairs
        self._block = block
        self._held = pairs.new_empty(0)
        self._resize(0, 0)

    def values(self, codes: torch.Tensor, scales: torch.Tensor, count: int) -> torch.Tensor:
        """Return `count` values in float32, valid until the next call."""
        if len(codes) != len(self._words) or count != len(self._values):
            self._resize(len(codes), count)
        self._places.copy_(codes)
        torch.index_select(self._pairs, 0, self._places, out=self._words)
        _multiply(self._blocks, self._rest, scales)
        return self._values

    def _resize(self, num_bytes: int, count: int) -> None:
        if num_bytes > len(self._held):
            self._held = self._held.new_empty(num_bytes)
            self._all_places = self._held.new_empty(num_bytes, dtype=torch.int32)
        elif not num_bytes:
            self._all_places = self._held.to(torch.int32)
        self._words, self._places = self._held[:num_bytes], self._all_places[:num_bytes]
        self._values = self._words.view(torch.float32)[:count]
        self._blocks, self._rest = _divided(self._values, self._block)


class _Scales:
    """The scales of all blocks in memory, made some at a time where they are nested."""

    def __init__(self, formula: Blockwise, rows: range, tensors: Sequence[torch.Tensor]) -> None:
        self._absmax = tensors[1].view(-1)
        self._nested = tuple(tensor.view(-1) for tensor in tensors[3:])
        self._size, self._offset = formula.nested_block, formula.nested_offset
        first = formula.first_byte(rows) * 2 // formula.block
        self._before = first - formula.blocks(rows).start

    def of(self, start: int, stop: int) -> torch.Tensor:
        """Return the scales of blocks `start` to `stop` in float32, counted from the rows' first."""
        start, stop = start + self._before, stop + self._before
        if not self._nested:
            return self._absmax[start:stop].to(torch.float32)
        size = self._size
        whole = start - start % size
        nested_absmax, nested_map = self._nested
        made = torch.index_select(nested_map, 0, self._absmax[whole:stop].to(torch.int32))
        _multiply(*_divided(made, size), nested_absmax[whole // size :, None])
        return made.add_(self._offset)[start - whole :]


def _divided(values: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the whole blocks of `values` as rows, and the elements after them."""
    whole = len(values) // block
    return values[: whole * block].view(whole, block), values[whole * block :]


def _multiply(blocks: torch.Tensor, rest: torch.Tensor, scales: torch.Tensor) -> None:
    """Multiply each block by its row of `scales` in place, and the rest by the next one."""
    whole = len(blocks)
    torch.mul(blocks, scales if len(scales) == whole else scales[:whole], out=blocks)
    if len(rest):
        rest.mul_(scales[whole])


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
