"""Integer codes packed in slabs along the first axis: HQQ, quanto's qint4 and qint2, BitNet.

A matrix of codes `(height, width)` is cut into slabs of equal rows, one for each field of bits of a
byte or a 32-bit word, and the slabs are laid over each other: a packed matrix as high as one slab.
The last slab may be partly padding. Read row by row the codes are the weight read row by row; its
rows and the matrix's are not the same ones (a row of the matrix is a group, or has one of each).

Source: the state dicts of hqq, optimum-quanto and transformers' BitLinear, as their files show.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from ckptd.checkpoint.dtypes import Dtype
from ckptd.quant.formula import Arith, ceil_div
from ckptd.quant.parts import Part, Window


class Rule(enum.StrEnum):
    """What scale and zero do to a code; each step rounds to the result's dtype in the library."""

    ZERO_FIRST = "(code - zero) * scale"
    ZERO_LAST = "code * scale - zero"
    DIVIDE = "(code - 1) / scale"
    MULTIPLY = "(code - 1) * scale"


@dataclass(frozen=True, slots=True)
class Segment:
    """Codes that lie in one slab: a rectangle of the packed matrix, contiguous in the weight."""

    slab: int
    rows: range
    columns: range
    row: int
    """The first row, counted in the matrix of codes."""

    @property
    def numel(self) -> int:
        """The codes."""
        return len(self.rows) * len(self.columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slabs:
    """Codes in slabs with a scale, and mostly a zero, for each row or column of their matrix.

    `codes` is the packed matrix, `U8` or `I32`; `bits` the width of its fields, the slab in the
    highest ones being the first where `high_first`, else the last. Of the matrix's rows `height`
    count. `scale` and `zero` are (height, 1), (1, width) or 1 x 1.
    """

    codes: Part
    scale: Part
    zero: Part | None = None
    bits: int
    high_first: bool
    height: int
    columns: int
    rule: Rule
    dtype: Dtype
    arith: Arith = Arith.FLOAT32

    @property
    def rows(self) -> int:
        """The rows of the result."""
        return self.height * self.width // self.columns if self.columns else 0

    @property
    def width(self) -> int:
        """The columns of the matrix of codes."""
        return self.codes.columns

    @property
    def granule(self) -> int:
        """Any row: rows of codes may be divided."""
        return 1

    @property
    def num_slabs(self) -> int:
        """The fields of a word that are used."""
        return self.codes.dtype.bits // self.bits

    def shift(self, slab: int) -> int:
        """Return the lowest bit of the field of `slab`."""
        return self.bits * (self.num_slabs - 1 - slab if self.high_first else slab)

    def segments(self, rows: range) -> Iterator[Segment]:
        """Yield the segments that `rows` of the result are made of, in their order."""
        first, head = divmod(rows.start * self.columns, self.width)
        last, tail = divmod(rows.stop * self.columns, self.width)
        if first == last:
            yield self._segment(first, range(head, tail))
            return
        if head:
            yield self._segment(first, range(head, self.width))
            first += 1
        while first < last:
            slab, row = divmod(first, self.codes.rows)
            count = min(last - first, self.codes.rows - row)
            yield Segment(slab, range(row, row + count), range(self.width), first)
            first += count
        if tail:
            yield self._segment(last, range(tail))

    def hull(self, rows: range) -> range | None:
        """Return the packed rows to read once, or None where each segment is read on its own.

        Whatever is less: many rows of a weight are several slabs, which lie in the same words.
        """
        segments = list(self.segments(rows))
        hull = range(min(s.rows.start for s in segments), max(s.rows.stop for s in segments))
        apart = sum(segment.numel for segment in segments)
        return hull if len(hull) * self.width <= apart and len(segments) > 1 else None

    def matrix_rows(self, rows: range) -> range:
        """Return the rows of the matrix of codes that `rows` of the result touch."""
        start = rows.start * self.columns // self.width
        return range(start, ceil_div(rows.stop * self.columns, self.width))

    def matrix_columns(self, rows: range) -> range:
        """Return the columns that `rows` of the result touch: all of them, unless within one row."""
        segments = list(self.segments(rows))
        return segments[0].columns if len(segments) == 1 else range(self.width)

    def windows(self, rows: range) -> tuple[Window, ...]:
        """Return scales, zeros where there are any, then codes: one window or one a segment."""
        wanted = [self._grid(self.scale, rows)]
        if self.zero is not None:
            wanted.append(self._grid(self.zero, rows))
        hull = self.hull(rows)
        if hull is not None:
            return (*wanted, self.codes.window(hull))
        segments = self.segments(rows)
        return (*wanted, *(self.codes.window(one.rows, one.columns) for one in segments))

    def _segment(self, row: int, columns: range) -> Segment:
        slab, packed = divmod(row, self.codes.rows)
        return Segment(slab, range(packed, packed + 1), columns, row)

    def _grid(self, part: Part, rows: range) -> Window:
        by_row = part.rows == self.height and part.columns == 1
        if by_row and self.height > 1:
            return part.window(self.matrix_rows(rows))
        if part.columns > 1:
            return part.window(columns=self.matrix_columns(rows))
        return part.window()
