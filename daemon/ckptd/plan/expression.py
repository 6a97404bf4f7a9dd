"""Building and dividing expressions: what a tensor of the output is, in bytes of the source.

The functions `cast`, `rows`, `concat`, `view` and `tiles` make the values of `plan.nodes` and check
shapes at once; they also simplify, so that whatever is only moved stays a `Load` (or a `Concat` of
loads) and can be copied byte for byte. Here nothing is read.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import Extent, StoredTensor
from ckptd.plan.nodes import (
    ByRows,
    Cast,
    Changed,
    Columns,
    Concat,
    Decode,
    Expression,
    Grown,
    Load,
    LowRank,
    Reading,
    Tile,
    Tiles,
    View,
    row_axis,
)


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
    if isinstance(source, View):
        return View(cast(source.source, dtype), source.shape)
    if isinstance(source, Tiles):
        return Tiles(
            tuple(Tile(cast(part.source, dtype), part.at) for part in source.parts), source.shape
        )
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
        case Grown() | Decode() if source.axis == axis:
            return dataclasses.replace(source, shape=shape, first=source.first + start)
        case View(source=inner):
            width = math.prod(source.shape[axis + 1 :])
            return view(rows(inner, start * width, stop * width), shape)
        case Tiles() if source.axis == axis:
            return Tiles(tuple(_tile_rows(source.parts, start, stop, axis)), shape)
        case LowRank() if source.axis == axis:
            magnitude, whole = source.magnitude, source.whole
            if magnitude is not None and whole is None:
                magnitude = rows(magnitude, start, stop)
            return dataclasses.replace(
                source,
                base=rows(source.base, start, stop, axis=axis),
                up=rows(source.up, start, stop),
                magnitude=magnitude,
            )
        case Changed() if source.axis == axis:
            return dataclasses.replace(
                source,
                base=rows(source.base, start, stop, axis=axis),
                by_row=tuple(rows(part, start, stop) for part in source.by_row),
                first=source.first + start,
            )
        case Columns(turned=True):
            first = source.first + start * source.step
            return dataclasses.replace(source, first=first, count=stop - start)
        case Columns(source=inner):
            return dataclasses.replace(source, source=rows(inner, start, stop))
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


def view(source: Expression, shape: tuple[int, ...]) -> Expression:
    """Return the elements of a flat `source` as a tensor of `shape`.

    Raises:
        ValueError: not as many elements, or the source is not one row.
    """
    if len(source.shape) != 1 or source.shape[0] != math.prod(shape):
        raise ValueError(f"{source.shape} is not {shape} in one row")
    match source:
        case Load(extent=extent):
            return Load(extent, source.dtype, shape)
        case Cast(source=Load() as inner):
            return Cast(view(inner, shape), source.dtype)
        case _:
            return View(source, shape)


def tiles(parts: Sequence[Tile], shape: tuple[int, ...]) -> Expression:
    """Return the tensor of `shape` that `parts` cover; parts one after the other are a `Concat`.

    Raises:
        ValueError: the parts do not cover the shape exactly, or their dtypes differ.
    """
    full = [part for part in parts if numel(part.source)]
    if sum(numel(part.source) for part in full) != math.prod(shape):
        raise ValueError(f"the parts do not cover {shape}")
    for part in full:
        ends = [at + length for at, length in zip(part.at, part.source.shape, strict=True)]
        if min(part.at, default=0) < 0 or any(e > n for e, n in zip(ends, shape, strict=True)):
            raise ValueError(f"a part at {part.at} of {part.source.shape} is outside of {shape}")
    if not full:
        return parts[0].source
    axis = row_axis(shape)
    full.sort(key=lambda part: part.at)
    _require_apart(full)
    if all(
        part.source.shape[:axis] + part.source.shape[axis + 1 :] == shape[:axis] + shape[axis + 1 :]
        for part in full
    ):
        return concat([part.source for part in full], axis=axis) if shape else full[0].source
    if len({part.source.dtype for part in full}) > 1:
        raise ValueError("the parts differ in dtype")
    return Tiles(tuple(full), shape)


def flat(source: Expression) -> Expression:
    """Return the elements of `source`, which is not made row by row, as one long row.

    Raises:
        ValueError: a part is made row by row.
    """
    match source:
        case Load():
            return Load(source.extent, source.dtype, (numel(source),))
        case Cast(source=inner):
            return Cast(flat(inner), source.dtype)
        case Concat(parts=parts):
            return concat([flat(part) for part in parts])
        case View(source=inner):
            return flat(inner)
        case _:
            raise ValueError(f"{type(source).__name__} is made row by row")


def made_by_rows(source: Expression) -> ByRows | None:
    """Return what `source` is, as it is or cast, if that is made row by row; else None."""
    while isinstance(source, Cast):
        source = source.source
    return source if isinstance(source, ByRows) else None


def numel(expression: Expression) -> int:
    """Return the number of elements."""
    return math.prod(expression.shape)


def nbytes(expression: Expression) -> int:
    """Return the bytes the value takes in a file."""
    if isinstance(expression, Load):
        return expression.extent.nbytes
    return numel(expression) * expression.dtype.bits // 8


def readings(expression: Expression) -> Iterator[Reading]:
    """Yield everything that the value is made from."""
    if isinstance(expression, Grown):
        yield from readings(expression.source)
    else:
        yield from _own_readings(expression)
        for source in _sources(expression):
            yield from readings(source)


def loads(expression: Expression) -> Iterator[Reading]:
    """Yield what to hold in memory for the value; rows' statistics stream theirs."""
    yield from _own_readings(expression)
    for source in _sources(expression):
        yield from loads(source)


def _own_readings(expression: Expression) -> Iterator[Reading]:
    if isinstance(expression, Load):
        yield expression.extent
    elif isinstance(expression, Decode):
        yield from expression.windows


def _sources(expression: Expression) -> Iterator[Expression]:
    """Yield the expressions whose values a value is computed from."""
    match expression:
        case Cast(source=source) | View(source=source) | Columns(source=source):
            yield source
        case Concat(parts=parts):
            yield from parts
        case Tiles(parts=boxes):
            yield from (box.source for box in boxes)
        case LowRank(base=base, down=down, up=up, magnitude=magnitude):
            yield from (base, up)
            yield from (one for one in (down, magnitude) if one is not None)
        case Changed(base=base, by_row=by_row, whole=parts):
            yield from (base, *by_row, *parts)


def _tile_rows(parts: Sequence[Tile], start: int, stop: int, axis: int) -> Iterator[Tile]:
    for part in parts:
        begin = part.at[axis]
        low, high = max(start, begin), min(stop, begin + part.source.shape[axis])
        if low < high:
            at = (*part.at[:axis], low - start, *part.at[axis + 1 :])
            yield Tile(rows(part.source, low - begin, high - begin, axis=axis), at)


def _require_apart(parts: Sequence[Tile]) -> None:
    """Refuse parts that overlap: with the right number of elements they would leave a hole.

    Parts are compared along the axis that divides them most, so that only neighbours are.
    """
    axes = range(len(parts[0].at))
    axis = max(axes, key=lambda axis: len({part.at[axis] for part in parts}), default=0)
    ordered = sorted(parts, key=lambda part: part.at[axis : axis + 1])
    for place, one in enumerate(ordered):
        for other in itertools.islice(ordered, place + 1, None):
            if other.at and other.at[axis] >= one.at[axis] + one.source.shape[axis]:
                break
            if all(
                a < b + m and b < a + n
                for a, n, b, m in zip(
                    one.at, one.source.shape, other.at, other.source.shape, strict=True
                )
            ):
                raise ValueError(f"parts at {one.at} and {other.at} overlap")


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
