"""What a tensor of the output is, said in terms of bytes of the source.

An expression is a small frozen value with a known dtype and shape. The functions `cast`, `rows`
and `concat` build them and check shapes at once; they also simplify, so that whatever is only moved
stays a `Load` (or a `Concat` of loads) and can be copied byte for byte. Values are computed in
`plan.evaluate`, block of rows by block of rows; here nothing is read.

Rows are the entries along the first axis whose length is not 1 before the data (axis 0, or axis 1
of a `[1, V]` bias): the axes before it have length 1, so rows are contiguous bytes.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import Extent, StoredTensor


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


Expression = Load | Cast | Concat | Grown


def load(tensor: StoredTensor) -> Load:
    """Return the expression that is a stored tensor as it is."""
    return Load(tensor.extent, tensor.spec.dtype, tensor.spec.shape)


def cast(source: Expression, dtype: Dtype) -> Expression:
    """Return `source` in `dtype`; the source itself where it has that dtype.

    A cast of parts becomes parts that are cast, so that each part keeps its own way to be computed.
    """
    if source.dtype is dtype:
        return source
    if isinstance(source, Concat):
        return Concat(tuple(cast(part, dtype) for part in source.parts), source.axis)
    return Cast(source, dtype)


def rows(source: Expression, start: int, stop: int, *, axis: int = 0) -> Expression:
    """Return rows `start` to `stop` of `source` along `axis`; the axes before it have length 1.

    Raises:
        ValueError: rows outside the source, rows that are not whole bytes, or an axis whose rows
            are not contiguous.
    """
    _require_contiguous(source.shape, axis)
    length = source.shape[axis]
    if not 0 <= start <= stop <= length:
        raise ValueError(f"rows {start}:{stop} of {length}")
    if (start, stop) == (0, length):
        return source
    shape = (*source.shape[:axis], stop - start, *source.shape[axis + 1 :])
    match source:
        case Load(extent=extent):
            row_bits = math.prod(source.shape[axis + 1 :]) * source.dtype.bits
            if start * row_bits % 8 or stop * row_bits % 8:
                raise ValueError(f"rows of {row_bits} bits are not whole bytes")
            begin, end = start * row_bits // 8, stop * row_bits // 8
            part = Extent(extent.path, extent.offset + begin, end - begin)
            return Load(part, source.dtype, shape)
        case Cast(source=inner):
            return Cast(rows(inner, start, stop, axis=axis), source.dtype)
        case Concat() if source.axis == axis:
            parts = list(_concat_rows(source, start, stop))
            return concat(parts or [rows(source.parts[0], 0, 0, axis=axis)], axis=axis)
        case Grown() if source.axis == axis:
            return dataclasses.replace(source, shape=shape, first=source.first + start)
        case _:
            raise ValueError(f"{type(source).__name__} has its rows along axis {source.axis}")


def concat(parts: Sequence[Expression], *, axis: int = 0) -> Expression:
    """Return `parts` one after the other along `axis`; empty parts are dropped.

    Raises:
        ValueError: no parts, or dtypes or the other axes differ.
    """
    if not parts:
        raise ValueError("nothing to concatenate")
    first = parts[0]
    _require_contiguous(first.shape, axis)
    for part in parts:
        same = part.shape[:axis] == first.shape[:axis]
        if not same or part.shape[axis + 1 :] != first.shape[axis + 1 :]:
            raise ValueError(f"shapes {first.shape} and {part.shape} do not join along {axis}")
        if part.dtype is not first.dtype:
            raise ValueError(f"dtypes {first.dtype} and {part.dtype} do not join")
    full = tuple(part for part in parts if part.shape[axis]) or (first,)
    return full[0] if len(full) == 1 else Concat(full, axis)


def flat(source: Expression) -> Expression:
    """Return the elements of `source`, made of loads and casts alone, as one long row.

    Raises:
        ValueError: a part is made from statistics of rows, which have no meaning element by element.
    """
    match source:
        case Load():
            return Load(source.extent, source.dtype, (numel(source),))
        case Cast(source=inner):
            return Cast(flat(inner), source.dtype)
        case Concat(parts=parts):
            return concat([flat(part) for part in parts])
        case Grown():
            raise ValueError("grown rows have no elements of their own")


def grown_in(source: Expression) -> Grown | None:
    """Return the grown rows that `source` is, as they are or cast, or None if it is anything else."""
    while isinstance(source, Cast):
        source = source.source
    return source if isinstance(source, Grown) else None


def numel(expression: Expression) -> int:
    """Return the number of elements."""
    return math.prod(expression.shape)


def nbytes(expression: Expression) -> int:
    """Return the bytes the value takes in a file."""
    if isinstance(expression, Load):
        return expression.extent.nbytes
    return numel(expression) * expression.dtype.bits // 8


def extents(expression: Expression) -> Iterator[Extent]:
    """Yield every extent the value is made from."""
    match expression:
        case Load(extent=extent):
            yield extent
        case Concat(parts=parts):
            for part in parts:
                yield from extents(part)
        case Cast(source=source) | Grown(source=source):
            yield from extents(source)


def loads(expression: Expression) -> Iterator[Extent]:
    """Yield the extents to hold in memory for the value; rows' statistics stream theirs."""
    match expression:
        case Load(extent=extent):
            yield extent
        case Cast(source=source):
            yield from loads(source)
        case Concat(parts=parts):
            for part in parts:
                yield from loads(part)
        case Grown():
            return


def _concat_rows(source: Concat, start: int, stop: int) -> Iterator[Expression]:
    begin = 0
    for part in source.parts:
        length = part.shape[source.axis]
        low, high = max(start - begin, 0), min(stop - begin, length)
        if low < high:
            yield rows(part, low, high, axis=source.axis)
        begin += length


def _require_contiguous(shape: tuple[int, ...], axis: int) -> None:
    if axis >= len(shape) or any(length != 1 for length in shape[:axis]):
        raise ValueError(f"axis {axis} of shape {shape} has no contiguous rows")
