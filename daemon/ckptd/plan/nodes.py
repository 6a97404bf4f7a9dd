"""What a tensor of the output is, said in terms of bytes of the source: the values.

An expression is a small frozen value with a known dtype and shape. `plan.expression` builds and
divides them, `plan.evaluate` computes their values; here nothing is read.

Rows are the entries along the first axis whose length is not 1 before the data (axis 0, or axis 1
of a `[1, V]` bias): the axes before it have length 1, so rows are contiguous bytes.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import Extent
from ckptd.quant.formula import Formula
from ckptd.quant.parts import Window


class NewRows(enum.StrEnum):
    """How rows that have no source are made."""

    MEAN = "mean"
    """Around the mean of the source rows, with their covariance scaled by 1e-9."""
    NORMAL = "normal"
    """Independent normal values of mean 0 and a given standard deviation."""
    BIAS_MEAN = "bias mean"
    """For vectors: the mean of the source, with 1e-9 of its standard deviation."""
    ZERO = "zero"


@dataclass(frozen=True, slots=True)
class Load:
    """The bytes of an extent, as they are."""

    extent: Extent
    dtype: Dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cast:
    """The source's values in another dtype, each rounded once."""

    source: Expression
    dtype: Dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The source's shape."""
        return self.source.shape


@dataclass(frozen=True, slots=True)
class Concat:
    """Parts of equal dtype, one after the other along `axis`."""

    parts: tuple[Expression, ...]
    axis: int

    @property
    def dtype(self) -> Dtype:
        """The dtype of every part."""
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The first part's shape with the lengths along `axis` added up."""
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(shape)


@dataclass(frozen=True, slots=True)
class Grown:
    """Rows that the source does not have, made from its statistics and a seed.

    `shape` and `axis` are those of the new rows alone, the first of which is number `first` of
    all that are made (values depend on the row's number, not on how rows are grouped); `std` is
    used by `NewRows.NORMAL`; `source` is what the statistics are taken over.
    """

    source: Expression
    shape: tuple[int, ...]
    axis: int
    first: int
    method: NewRows
    std: float
    seed: int

    @property
    def dtype(self) -> Dtype:
        """The source's dtype."""
        return self.source.dtype


@dataclass(frozen=True, slots=True)
class Decode:
    """Rows of a quantized weight: `shape[axis]` of its formula's rows, from number `first` on.

    The axes of `shape` before `axis` have length 1, those after it are the formula's columns.
    """

    formula: Formula
    shape: tuple[int, ...]
    axis: int
    first: int = 0

    @property
    def dtype(self) -> Dtype:
        """The formula's dtype."""
        return self.formula.dtype

    @property
    def span(self) -> range:
        """The formula's rows to compute for these: whole granules around them."""
        granule, stop = self.formula.granule, self.first + self.shape[self.axis]
        begin = self.first - self.first % granule
        return range(begin, min(-(-stop // granule) * granule, self.formula.rows))

    @property
    def windows(self) -> tuple[Window, ...]:
        """What the formula needs in memory for `span`."""
        return self.formula.windows(self.span)


@dataclass(frozen=True, slots=True)
class View:
    """The elements of a flat `source`, in order, as a tensor of `shape`."""

    source: Expression
    shape: tuple[int, ...]

    @property
    def dtype(self) -> Dtype:
        """The source's dtype."""
        return self.source.dtype


@dataclass(frozen=True, slots=True)
class Tile:
    """A part of a tensor that was divided along several axes, and where its first element goes."""

    source: Expression
    at: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tiles:
    """A tensor of `shape` put together from boxes that cover it without overlap."""

    parts: tuple[Tile, ...]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> Dtype:
        """The dtype of every part."""
        return self.parts[0].source.dtype

    @property
    def axis(self) -> int:
        """The axis of its rows."""
        return row_axis(self.shape)


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns `first`, `first + step`, ... of a matrix, `count` of them; as rows, if `turned`.

    `source` is `(rows, columns)` and small (a factor of an adapter): all of it is read for each
    block of turned rows.
    """

    source: Expression
    count: int
    first: int = 0
    step: int = 1
    turned: bool = False

    @property
    def dtype(self) -> Dtype:
        """The source's dtype."""
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """`(rows, count)`, or `(count, rows)` if turned."""
        rows = self.source.shape[0]
        return (self.count, rows) if self.turned else (rows, self.count)

    @property
    def axis(self) -> int:
        """The axis of its rows."""
        return 0


@dataclass(frozen=True, slots=True)
class LowRank:
    """`base + scale * up @ down` in float32, rounded once to `dtype`: a merged LoRA adapter.

    `base` is a matrix, with any axes of length 1 before it; one of more axes counts as its first
    axis times the others. `down` is `(rank, columns)`, `up` `(rows, rank)`; without `down`, `up`
    is added as it is. With `magnitude`, of `(rows,)`, each row of the sum is scaled to that length
    (DoRA). A `magnitude` of `(columns,)` scales the columns of `whole`, of which this is some rows.
    """

    base: Expression
    down: Expression | None
    up: Expression
    scale: float
    dtype: Dtype
    magnitude: Expression | None = None
    whole: LowRank | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The base's shape."""
        return self.base.shape

    @property
    def axis(self) -> int:
        """The axis of its rows."""
        return row_axis(self.shape)


class Change(enum.StrEnum):
    """How an adapter that is no product of two matrices changes a weight `(rows, columns)`."""

    ROWS = "rows"
    """Each row times its number: `by_row` is the `(rows,)` or `(rows, 1)` of them."""
    COLUMNS = "columns"
    """Each column times its number: `whole` is the `(columns,)` or `(1, columns)` of them."""
    HADAMARD = "hadamard"
    """`scale` times the product, element by element, of two products of matrices is added; those of
    `(rows, rank)` are in `by_row`, those of `(rank, columns)` in `whole`."""
    KRONECKER = "kronecker"
    """`scale` times the Kronecker product of two matrices is added; both are in `whole`."""
    KRONECKER_LEFT = "kronecker left"
    """The same, where the first matrix is the product of two."""
    KRONECKER_RIGHT = "kronecker right"
    """The same, where the second matrix is the product of two."""
    KRONECKER_BOTH = "kronecker both"
    """The same, where each matrix is the product of two."""
    ROTATION = "rotation"
    """Each stretch of columns is rotated: `whole` is `(stretches, size * (size - 1) / 2)`, what stands
    above the diagonal of skew matrices Q; a rotation is (1 - Q) / (1 + Q), or with a `scale` above
    0 the first so many terms of its series. One row is for all stretches. A `number` bounds the
    length of each Q."""
    HADAMARD_KERNEL = "hadamard kernel"
    """As `HADAMARD`, of two products of three: `(rows, rank)`, of `by_row`, a core `(rank, rank, kernel)`
    and `(rank, columns / kernel)`, in `whole` one product after the other."""
    KRONECKER_KERNEL = "kronecker kernel"
    """As `KRONECKER`, where the second matrix is a core `(rank, rank, kernel)` times `(rank, rows)` and
    `(rank, columns / kernel)`; before them in `whole` the first matrix, or the two it is the product of."""
    BUTTERFLY = "butterfly"
    """Columns are rotated in blocks, once for each of `(turns, blocks, size, size)`, each time mixed
    in another way; then each row times its number, of `by_row`."""
    FOURIER = "fourier"
    """`scale` times the real part of an inverse Fourier transform is added, of the numbers in `whole`;
    `numbers` are the seed of their places, the rows of the spectrum, its columns, and whether the
    weight is turned."""
    CIRCULANT = "circulant"
    """`scale` times a matrix of blocks is added, each made of one row of `(down, across, size)`, moved
    along by one from row to row."""
    REFLECTION = "reflection"
    """Each row is reflected at the planes across the columns of `whole`, one after the other, or with
    a `scale` of 1 at all of them together, made perpendicular to each other."""


@dataclass(frozen=True, slots=True)
class Changed:
    """A weight, changed in float32 and rounded once to `dtype`.

    `base` is a matrix with `width` columns, with any axes of length 1 before it; one of more axes
    counts as its first axis times the others. It is row `first` and those after it of the whole.
    `numbers` are what a change needs besides tensors.
    """

    base: Expression
    width: int
    change: Change
    by_row: tuple[Expression, ...]
    whole: tuple[Expression, ...]
    scale: float
    dtype: Dtype
    first: int = 0
    numbers: tuple[float, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The base's shape."""
        return self.base.shape

    @property
    def axis(self) -> int:
        """The axis of its rows."""
        return row_axis(self.shape)


Expression = Load | Cast | Concat | Grown | Decode | View | Tiles | Columns | LowRank | Changed

ByRows = Grown | Decode | Tiles | LowRank | Columns | Changed
"""What is made row by row, not element by element."""

Reading = Extent | Window
"""Bytes of a file that a value needs: a range, or equal ranges at a fixed distance."""


def row_axis(shape: tuple[int, ...]) -> int:
    """The first axis that is not of length 1, or the last."""
    return next((axis for axis, length in enumerate(shape) if length != 1), max(0, len(shape) - 1))
