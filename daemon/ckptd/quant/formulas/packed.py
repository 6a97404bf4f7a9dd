"""Integer codes of 1 to 8 bits packed along the rows of a weight, with scales of groups.

Codes are unsigned and lie in little-endian 32-bit words: one stream of bits a row, or `32 // bits`
codes a word with the rest of the word unused. With scale, zero and bias at `[r // row_block,
c // group]`, or at `[r // row_block, g_idx[c]]`, a weight is

    (code - offset - zero) * scale      zeros that are stored plain
    (code - zero) * scale               zeros packed as the codes are, with the same offset
    (code - offset) * scale + bias

Codes of 6 bits may also be floats, E2M3: then they are values themselves, times scale.
Source: the packing of compressed-tensors and of MLX, as their files show it; OCP Microscaling
Formats (MX) v1.0 for E2M3.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ckptd.checkpoint.dtypes import Dtype
from ckptd.quant.formula import Arith, ceil_div
from ckptd.quant.parts import Part, Window


class Values(enum.StrEnum):
    """What a code stands for."""

    INTEGER = "integer"
    """Itself, a whole number from 0 on."""
    E2M3 = "e2m3"
    """A float of 6 bits: the sign, 2 of exponent, 3 of mantissa, without infinities."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Packed codes with scales and zeros, or scales and biases, of `group` columns each.

    `codes` are the bytes (`U8`) of the words, a row of them for a row of `columns` codes; `dense`
    tells a stream of bits from words that no code straddles. `scale` and `bias` (floats) and a
    plain `zero` (`I8`, `U8` or a float) are grids of (ceil(rows / row_block), ceil(columns /
    group)). A packed zero is the words (`I32`) of codes of `zero_bits` along that grid's first
    axis; 0 says that it is plain. `g_idx` (`I32`, 1 x columns) gives each column's group.

    In `Arith.LIBRARY` the product is rounded to `dtype` before the bias is added, where
    `rounds_product`; scales are rounded to `scale_via` before they multiply.
    """

    codes: Part
    scale: Part
    zero: Part | None = None
    bias: Part | None = None
    g_idx: Part | None = None
    bits: int
    columns: int
    group: int
    row_block: int = 1
    offset: int = 0
    zero_bits: int = 0
    dense: bool = True
    values: Values = Values.INTEGER
    rounds_product: bool = True
    scale_via: Dtype | None = None
    dtype: Dtype
    arith: Arith = Arith.FLOAT32

    @property
    def rows(self) -> int:
        """The rows of the codes."""
        return self.codes.rows

    @property
    def granule(self) -> int:
        """Any row: the kernel finds the scales of rows that begin within a block."""
        return 1

    def grid_rows(self, rows: range) -> range:
        """Return the rows of the grids that `rows` need."""
        return range(rows.start // self.row_block, ceil_div(rows.stop, self.row_block))

    @property
    def zero_period(self) -> int:
        """After how many packed zeros one begins at the first bit of a word again."""
        return 32 if self.dense else 32 // self.zero_bits

    def zero_words(self, grid: range) -> range:
        """Return the words along the first axis with the zeros of `grid`, from a period's begin."""
        words = self.zero_bits if self.dense else 1
        period = self.zero_period
        if self.dense:
            stop = ceil_div(grid.stop * self.zero_bits, 32)
        else:
            stop = ceil_div(grid.stop, period)
        return range(grid.start // period * words, stop)

    def windows(self, rows: range) -> tuple[Window, ...]:
        """Return codes, scales and, those that there are: zeros, biases, the columns' groups."""
        grid = self.grid_rows(rows)
        wanted = [self.codes.window(rows), self.scale.window(grid)]
        if self.zero is not None:
            wanted.append(self.zero.window(self.zero_words(grid) if self.zero_bits else grid))
        if self.bias is not None:
            wanted.append(self.bias.window(grid))
        if self.g_idx is not None:
            wanted.append(self.g_idx.window())
        return tuple(wanted)
