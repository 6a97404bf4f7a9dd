"""What every formula answers, torch aside: its shape, what it reads, and for which rows.

A formula is a frozen value that says how one weight, a matrix `(rows, columns)`, is computed from
parts of files. `ckptd.quant.kernels` computes it, some rows at a time and never depending on how
they were divided. `dtype` and `arith` are set by whoever asks for the weight.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

from ckptd.checkpoint.dtypes import Dtype
from ckptd.quant.parts import Part, Window


class Arith(enum.StrEnum):
    """In which order a formula rounds."""

    FLOAT32 = "float32"
    """Everything in float32, one rounding to the dtype of the result."""
    LIBRARY = "library"
    """As the library that wrote the format does: the same bits as its own dequantized tensor."""


class Formula(Protocol):
    """How one weight is computed. Frozen, keyword-only, slotted dataclasses implement it."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def dtype(self) -> Dtype:
        """The dtype of the result: a plain float. In `Arith.LIBRARY` it is the library's own."""

    @property
    def arith(self) -> Arith:
        """In which order is rounded."""

    @property
    def rows(self) -> int:
        """The rows of the result."""

    @property
    def columns(self) -> int:
        """The elements in each row."""

    @property
    def granule(self) -> int:
        """Rows are asked for in ranges that begin and end at multiples of this, or at the end."""

    def windows(self, rows: range) -> tuple[Window, ...]:
        """Return what the kernel needs in memory to make `rows`, in the order it expects them."""


def parts(formula: Formula) -> Iterator[Part]:
    """Yield every part of a formula, in the order of its fields."""
    for field in dataclasses.fields(formula):
        value = getattr(formula, field.name)
        if isinstance(value, Part):
            yield value


def settings(formula: Formula) -> list[Any]:
    """Return all fields of a formula, and of a part what it is, but not where: type and fields."""
    values = [getattr(formula, field.name) for field in dataclasses.fields(formula)]
    return [type(formula)] + [
        (value.dtype, value.rows, value.columns) if isinstance(value, Part) else value
        for value in values
    ]


def describe(formula: Formula) -> str:
    """Return the whole formula as text that names files, not the folder they lie in."""
    described = []
    for field in dataclasses.fields(formula):
        value = getattr(formula, field.name)
        if isinstance(value, Part):
            place = value.extent
            value = f"{place.path.name}:{place.offset}+{place.nbytes}:{value.dtype}"
        described.append(f"{field.name}={value}")
    return f"{type(formula).__name__}({','.join(described)})"


def ceil_div(value: int, by: int) -> int:
    """Return `value / by` rounded up: blocks and words that are only partly used count."""
    return -(-value // by)
