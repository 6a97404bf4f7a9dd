"""Blocks of a GGUF file, rows of them reordered, transposed or shifted: how one weight is made.

A block packs neighbours of a row with their scales; `ckptd.checkpoint.ggml` has the sizes. What
llama.cpp's converters do to a weight besides is undone here: rows of each head interleaved for
another rotary embedding, `Conv1D` matrices transposed, one added to the weights of a norm.
A matrix that was divided by even and odd columns is put together again.
Source: ggml's block structures, and the `modify_tensors` of llama.cpp's converters.
"""

from __future__ import annotations

from dataclasses import dataclass

from ckptd.checkpoint import ggml
from ckptd.checkpoint.dtypes import Dtype
from ckptd.quant.formula import Arith, ceil_div
from ckptd.quant.parts import Part, Window


@dataclass(frozen=True, slots=True, kw_only=True)
class Gguf:
    """A weight `(rows, columns)` from `blocks`, `U8` rows of whole blocks of the type `encoding`.

    `encoding` is the name of a block type, or of a plain dtype. A vector has one column, and each
    row of `blocks` is then `elements` rows of it. With `head_rows` the rows of the weight are
    heads of so many rows: row `j` of the first half of a head is stored at `2 * j`, row `j` of the
    second at `2 * j + 1`. `transposed`: the weight is the stored matrix transposed. `shift` is
    added, in float32, to every value. With a `partner`, a part of the same shape and encoding, the
    weight's even columns are those of `blocks`, its odd ones the partner's; then it is transposed,
    or of a plain dtype.
    """

    blocks: Part
    partner: Part | None = None
    encoding: str
    columns: int
    head_rows: int = 1
    transposed: bool = False
    shift: float = 0.0
    dtype: Dtype
    arith: Arith = Arith.FLOAT32

    @property
    def elements(self) -> int:
        """The elements in one block."""
        kind = ggml.BLOCK_TYPES.get(self.encoding)
        return 1 if kind is None else kind.elements

    @property
    def block_bytes(self) -> int:
        """The bytes of one block."""
        kind = ggml.BLOCK_TYPES.get(self.encoding)
        return Dtype(self.encoding).bits // 8 if kind is None else kind.block_bytes

    @property
    def stored_columns(self) -> int:
        """The elements in each row of `blocks`."""
        return self.blocks.columns // self.block_bytes * self.elements

    @property
    def stored_width(self) -> int:
        """The columns of the weight that are of one part, where it is not transposed."""
        return self.columns if self.partner is None else self.columns // 2

    @property
    def rows(self) -> int:
        """The rows of the result."""
        if self.transposed:
            return self.stored_columns
        width = self.stored_width
        return self.blocks.rows * self.stored_columns // width if width else 0

    @property
    def granule(self) -> int:
        """Whole blocks of a column or vector, whole heads of rows."""
        if self.transposed or self.stored_width != self.stored_columns:
            return self.elements
        return self.head_rows

    def windows(self, rows: range) -> tuple[Window, ...]:
        """Return the blocks of `rows`, then the partner's, if there is one: whole rows of them, or
        columns where it is transposed.
        """
        stored_rows: range | None = rows
        columns: range | None = None
        if self.transposed:
            size = self.block_bytes
            begin, end = rows.start // self.elements, ceil_div(rows.stop, self.elements)
            stored_rows, columns = None, range(begin * size, end * size)
        elif self.stored_width != self.stored_columns:
            per_row = self.stored_columns // self.stored_width
            stored_rows = range(rows.start // per_row, ceil_div(rows.stop, per_row))
        parts = (self.blocks,) if self.partner is None else (self.blocks, self.partner)
        return tuple(part.window(stored_rows, columns) for part in parts)
