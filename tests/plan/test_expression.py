"""Expressions: shapes are checked when they are built, and what is only moved stays bytes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import Extent
from ckptd.plan import expression
from ckptd.plan.nodes import Cast, Concat, Grown, Load, NewRows

PATH = Path("model.safetensors")


def _load(shape: tuple[int, ...], dtype: Dtype = Dtype.F32, offset: int = 0) -> Load:
    nbytes = dtype.bits // 8
    for length in shape:
        nbytes *= length
    return Load(Extent(PATH, offset, nbytes), dtype, shape)


def _grown(source: Load, rows: int) -> Grown:
    shape = (rows, *source.shape[1:])
    return Grown(source, shape, 0, 0, NewRows.MEAN, 0.02, 0)


def test_rows_of_bytes_are_bytes() -> None:
    """Rows of a stored tensor are an extent of it, along axis 0 or behind axes of length 1."""
    assert expression.rows(_load((10, 4)), 2, 5) == Load(Extent(PATH, 32, 48), Dtype.F32, (3, 4))
    part = expression.rows(_load((1, 10)), 9, 10, axis=1)
    assert part == Load(Extent(PATH, 36, 4), Dtype.F32, (1, 1))


def test_all_rows_are_the_source_itself() -> None:
    """Nothing is wrapped without need."""
    source = _load((10, 4))
    assert expression.rows(source, 0, 10) is source
    assert expression.cast(source, Dtype.F32) is source
    assert expression.concat([source]) is source
    assert expression.concat([source, _load((0, 4))]) is source


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 11)])
def test_rows_outside_are_refused(start: int, stop: int) -> None:
    """Rows must exist."""
    with pytest.raises(ValueError, match="of 10"):
        expression.rows(_load((10, 4)), start, stop)


def test_rows_that_are_not_contiguous_are_refused() -> None:
    """An axis behind a longer one has no rows of consecutive bytes; a scalar has none at all."""
    for shape, axis in [((2, 10), 1), ((), 0), ((4,), 1)]:
        with pytest.raises(ValueError, match="contiguous"):
            expression.rows(_load(shape), 0, 1, axis=axis)


def test_rows_of_sub_byte_elements_must_be_whole_bytes() -> None:
    """Half a byte has no place in a file."""
    source = Load(Extent(PATH, 0, 6), Dtype.F4, (4, 3))
    assert expression.rows(source, 2, 4) == Load(Extent(PATH, 3, 3), Dtype.F4, (2, 3))
    with pytest.raises(ValueError, match="whole bytes"):
        expression.rows(source, 1, 2)


@given(st.data())
def test_rows_of_joined_parts_are_the_parts_rows(data: st.DataObject) -> None:
    """Cutting a concatenation anywhere gives the same bytes as cutting the whole."""
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
    total = sum(lengths)
    parts, offset = [], 0
    for length in lengths:
        parts.append(_load((length, 2), offset=offset))
        offset += 8 * length
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))

    cut = expression.rows(expression.concat(parts), start, stop)

    assert cut.shape == (stop - start, 2)
    pieces = [extent for extent in expression.readings(cut) if extent.nbytes]
    assert sum(extent.nbytes for extent in pieces) == 8 * (stop - start)
    if pieces:
        assert pieces[0].offset == 8 * start
        for left, right in itertools.pairwise(pieces):
            assert left.offset + left.nbytes == right.offset


def test_rows_of_grown_rows_keep_their_numbers() -> None:
    """A part of the new rows knows which ones it has, so that its values do not change."""
    new = _grown(_load((100, 4)), 50)
    part = expression.rows(expression.rows(new, 10, 40), 5, 10)
    assert isinstance(part, Grown)
    assert (part.first, part.shape) == (15, (5, 4))


def test_a_cast_of_parts_is_parts_that_are_cast() -> None:
    """Old and new rows stay apart under a cast, each with its own way to be computed."""
    old = _load((10, 4))
    value = expression.cast(expression.concat([old, _grown(old, 6)]), Dtype.BF16)
    assert isinstance(value, Concat)
    assert [type(part) for part in value.parts] == [Cast, Cast]
    assert (value.dtype, value.shape) == (Dtype.BF16, (16, 4))
    assert expression.nbytes(value) == 16 * 4 * 2
    assert expression.made_by_rows(value.parts[0]) is None
    assert expression.made_by_rows(value.parts[1]) == _grown(old, 6)


@pytest.mark.parametrize(
    "other", [_load((3, 5)), _load((3, 4), Dtype.F16), _load((3,)), _load((3, 4, 1))]
)
def test_parts_that_do_not_fit_are_refused(other: Load) -> None:
    """Dtypes and all axes but the joined one must agree."""
    with pytest.raises(ValueError, match="do not join"):
        expression.concat([_load((2, 4)), other])


def test_elements_in_a_row_have_the_same_bytes() -> None:
    """Loads and casts flatten; grown rows, which depend on each other, do not."""
    value = expression.cast(_load((2, 3, 4)), Dtype.BF16)
    flat = expression.flat(value)
    assert flat.shape == (24,)
    assert list(expression.readings(flat)) == list(expression.readings(value))
    joined = expression.concat([_load((1, 3)), _load((1, 2), offset=12)], axis=1)
    assert expression.flat(joined).shape == (5,)
    with pytest.raises(ValueError, match="row by row"):
        expression.flat(_grown(_load((5, 4)), 2))


def test_statistics_are_read_but_not_held() -> None:
    """Grown rows read their source and load nothing of it into the block."""
    new = _grown(_load((100, 4)), 50)
    assert list(expression.readings(new)) == [Extent(PATH, 0, 1600)]
    assert list(expression.loads(new)) == []
