"""Stored tensors seen as matrices of elements, and rectangles of them.

A decoder reads a rectangle of each part to make some rows of a weight: whole rows of codes, columns
of a matrix that is packed along its other axis. A window is such a rectangle: equal ranges of bytes
at a fixed distance in a file, one after the other in memory.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import Extent, StoredTensor


@dataclass(frozen=True, slots=True)
class Window:
    """A rectangle of a part: `count` ranges of `width_bytes`, one every `stride_bytes`.

    `extent` reaches from the first byte to the last. In memory it is a tensor `(rows, columns)` of
    `dtype`; one of `F4` arrives as `U8`, two elements a byte and half as many columns.
    """

    extent: Extent
    count: int
    width_bytes: int
    stride_bytes: int
    dtype: Dtype
    rows: int
    columns: int
    is_scale: bool = False

    @property
    def path(self) -> Path:
        """The file."""
        return self.extent.path

    @property
    def nbytes(self) -> int:
        """The bytes in memory."""
        return self.count * self.width_bytes

    @property
    def contiguous(self) -> bool:
        """Whether the ranges lie side by side in the file."""
        return self.nbytes == self.extent.nbytes


@dataclass(frozen=True, slots=True)
class Part:
    """A stored tensor, or a contiguous piece of one, as `(rows, columns)` elements of `dtype`.

    `is_scale` marks values that must be finite: a decoder refuses a weight whose scales are not.
    """

    name: str
    extent: Extent
    dtype: Dtype
    rows: int
    columns: int
    is_scale: bool = False

    @property
    def row_bytes(self) -> int:
        """The bytes of one row, which are whole ones."""
        return self.columns * self.dtype.bits // 8

    def window(self, rows: range | None = None, columns: range | None = None) -> Window:
        """Return the rectangle of `rows` and `columns` (steps of 1; all of them where None).

        Raises:
            ValueError: outside of the part, or columns that are not whole bytes.
        """
        rows = range(self.rows) if rows is None else rows
        columns = range(self.columns) if columns is None else columns
        outside = not (0 <= rows.start <= rows.stop <= self.rows)
        if outside or not (0 <= columns.start <= columns.stop <= self.columns):
            raise ValueError(f"{rows} x {columns} of {self.rows} x {self.columns}")
        bits = self.dtype.bits
        if columns.start * bits % 8 or columns.stop * bits % 8:
            raise ValueError(f"columns {columns} of {bits} bits are not whole bytes")
        width = len(columns) * bits // 8
        count = len(rows)
        begin = rows.start * self.row_bytes + columns.start * bits // 8
        reach = (count - 1) * self.row_bytes + width if count and width else 0
        extent = Extent(self.extent.path, self.extent.offset + begin, reach)
        stride = self.row_bytes
        if width == self.row_bytes or count <= 1:  # one range in the file
            count, width, stride = 1, count * width, count * width
        return Window(
            extent, count, width, stride, self.dtype, len(rows), len(columns), self.is_scale
        )


def part(
    tensor: StoredTensor,
    *,
    rows: int | None = None,
    columns: int | None = None,
    dtype: Dtype | None = None,
    is_scale: bool = False,
) -> Part:
    """Return `tensor` as a matrix; by default the last axis is the columns, a scalar is 1 x 1.

    `dtype` reads the same bytes as another type (a `U8` exponent as `F8_E8M0`, packed words as
    bytes); then give `columns` or `rows` as they are in that type.

    Raises:
        ValueError: the bytes are not those of such a matrix; a decoder checks shapes before.
    """
    shape = tensor.spec.shape
    dtype = tensor.spec.dtype if dtype is None else dtype
    elements = tensor.extent.nbytes * 8 // dtype.bits
    if rows is None and columns is None:
        columns = (shape[-1] if shape else 1) * tensor.spec.dtype.bits // dtype.bits
        rows = math.prod(shape[:-1])
    elif rows is None:
        assert columns is not None
        rows = elements // columns if columns else 0
    elif columns is None:
        columns = elements // rows if rows else 0
    assert rows is not None
    assert columns is not None
    if rows * columns * dtype.bits != tensor.extent.nbytes * 8:
        raise ValueError(f"{tensor.spec.name}: {tensor.spec.shape} is not {rows} x {columns}")
    return Part(tensor.spec.name, tensor.extent, dtype, rows, columns, is_scale)


def stacked(whole: Part, count: int) -> list[Part]:
    """Return the `count` pieces of equal rows that a part of experts is made of, first to last."""
    rows = whole.rows // count if count else 0
    nbytes = rows * whole.row_bytes
    return [
        dataclasses.replace(
            whole,
            extent=Extent(whole.extent.path, whole.extent.offset + place * nbytes, nbytes),
            rows=rows,
        )
        for place in range(count)
    ]
