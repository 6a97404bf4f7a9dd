"""4-bit codes of a table, scaled by the largest absolute value of each block: nf4 and fp4.

Blocks are runs of `block` elements of the flattened tensor, whatever its rows. Two codes a byte,
the high nibble first: `w[i] = quant_map[code[i]] * scale[i // block]`. The scale is `absmax`, or
where that is nested `nested_map[absmax[b]] * nested_absmax[b // nested_block] + nested_offset`.
Source: QLoRA (Dettmers et al. 2023), and bitsandbytes' QuantState.
"""

from __future__ import annotations

from dataclasses import dataclass

from ckptd.checkpoint.dtypes import Dtype
from ckptd.quant.formula import Arith, ceil_div
from ckptd.quant.parts import Part, Window


@dataclass(frozen=True, slots=True, kw_only=True)
class Blockwise:
    """A matrix within a flat tensor that was quantized in blocks.

    `codes` is `U8` of (1, ceil(elements / 2)); `absmax` is (1, blocks), a float or, nested, `U8`;
    `quant_map` is (1, 16), `nested_absmax` (1, ceil(blocks / nested_block)), `nested_map` (1, 256).
    The matrix is `shape`, (rows, columns), its first element the flat tensor's number `first`. With
    `transposed` the result is that matrix transposed.
    """

    codes: Part
    absmax: Part
    quant_map: Part
    nested_absmax: Part | None = None
    nested_map: Part | None = None
    nested_offset: float = 0.0
    block: int
    nested_block: int = 256
    shape: tuple[int, int]
    first: int = 0
    transposed: bool = False
    dtype: Dtype
    arith: Arith = Arith.FLOAT32

    @property
    def rows(self) -> int:
        """The rows of the result."""
        return self.shape[1] if self.transposed else self.shape[0]

    @property
    def columns(self) -> int:
        """The columns of the result."""
        return self.shape[0] if self.transposed else self.shape[1]

    @property
    def granule(self) -> int:
        """One row; all of them where the result is transposed, as blocks run along its columns."""
        return max(1, self.rows) if self.transposed else 1

    def elements(self, rows: range) -> range:
        """Return the elements of the flat tensor that `rows` are made of."""
        stored = range(self.shape[0]) if self.transposed else rows
        width = self.shape[1]
        return range(self.first + stored.start * width, self.first + stored.stop * width)

    def blocks(self, rows: range) -> range:
        """Return the blocks whose `absmax` is in memory for `rows`: whole nested blocks."""
        elements = self.elements(rows)
        start = elements.start // self.block
        if self.nested_absmax is not None:
            start -= start % self.nested_block
        return range(start, max(start, ceil_div(elements.stop, self.block)))

    def first_byte(self, rows: range) -> int:
        """Return the first byte of `codes` in memory for `rows`: that of a block."""
        return self.elements(rows).start // self.block * self.block // 2

    def windows(self, rows: range) -> tuple[Window, ...]:
        """Return codes, absmax, the table and, where nested, the absmax' own scales and table."""
        blocks = self.blocks(rows)
        stop = max(self.first_byte(rows), ceil_div(self.elements(rows).stop, 2))
        wanted = (
            self.codes.window(columns=range(self.first_byte(rows), stop)),
            self.absmax.window(columns=blocks),
            self.quant_map.window(),
        )
        if self.nested_absmax is None or self.nested_map is None:
            return wanted
        nested = range(blocks.start // self.nested_block, ceil_div(blocks.stop, self.nested_block))
        return (*wanted, self.nested_absmax.window(columns=nested), self.nested_map.window())
