"""The layouts of AWQ: codes packed across the outputs, along the inputs, or four rows in a short.

All are a weight `(outputs, inputs)` of `(code - zero) * scale`, with scale and zero of `group`
inputs each; the third stores zeros as `-(zero * scale)` instead. Where there is an `act` scale, the
activation before this weight divided by it, which a plain model cannot: the weight does.
Source: the files of AutoAWQ, llm-awq and GPTQModel.
"""

from __future__ import annotations

from dataclasses import dataclass

from ckptd.checkpoint.dtypes import Dtype
from ckptd.quant.formula import Arith, ceil_div
from ckptd.quant.parts import Part, Window

BLOCK = 32
"""Codes after which one begins at the first bit of a word again, whatever their width."""
QUAD = 4
"""Rows of a weight in one row of shorts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Across:
    """Codes packed across the outputs (GEMM).

    `codes` are words (`I32`) of (inputs, ceil(outputs * bits / 32)), `zeros` of as many columns and
    a row a group, `scale` floats of (groups, outputs); a stream of bits along each row. With
    `interleaved`, of each 8 outputs the even ones come first. With `signed` (4 bits), codes and
    zeros are two's complements, as AMD Quark packs int4. `act` is 1 x inputs.
    """

    codes: Part
    zeros: Part
    scale: Part
    act: Part | None = None
    bits: int
    group: int
    interleaved: bool
    signed: bool = False
    dtype: Dtype
    arith: Arith = Arith.FLOAT32

    @property
    def rows(self) -> int:
        """The outputs."""
        return self.scale.columns

    @property
    def columns(self) -> int:
        """The inputs."""
        return self.codes.rows

    @property
    def granule(self) -> int:
        """Whole words of codes."""
        return BLOCK

    def windows(self, rows: range) -> tuple[Window, ...]:
        """Return codes, zeros, scales and, where there are any, the activation's scales."""
        words = range(rows.start * self.bits // 32, ceil_div(rows.stop * self.bits, 32))
        wanted = (
            self.codes.window(columns=words),
            self.zeros.window(columns=words),
            self.scale.window(columns=rows),
        )
        return wanted if self.act is None else (*wanted, self.act.window())


@dataclass(frozen=True, slots=True, kw_only=True)
class Along:
    """Codes of 4 bits packed along the inputs (GEMV).

    `codes` are bytes (`U8`) of (outputs, inputs / 2), the low nibble first; `zeros` bytes packed
    alike of (outputs, groups / 2 or more), `scale` floats of (outputs, groups or more). Only the
    first `ceil(inputs / group)` of each count. `act` is 1 x inputs.
    """

    codes: Part
    zeros: Part
    scale: Part
    act: Part | None = None
    group: int
    dtype: Dtype
    arith: Arith = Arith.FLOAT32

    @property
    def rows(self) -> int:
        """The outputs."""
        return self.codes.rows

    @property
    def columns(self) -> int:
        """The inputs."""
        return self.codes.columns * 2

    @property
    def granule(self) -> int:
        """Any row."""
        return 1

    def windows(self, rows: range) -> tuple[Window, ...]:
        """Return codes, zeros, scales and, where there are any, the activation's scales."""
        wanted = (self.codes.window(rows), self.zeros.window(rows), self.scale.window(rows))
        return wanted if self.act is None else (*wanted, self.act.window())


@dataclass(frozen=True, slots=True, kw_only=True)
class Quads:
    """Codes of 4 bits, four rows woven into one (GEMV-fast, llm-awq).

    `codes` are bytes (`U8`) of (outputs / 4, inputs * 2). For each 64 inputs 32 bytes of each of the
    four rows follow each other; within 32 inputs the order is that of a kernel. `scale` and `zeros`
    are floats of (groups or more, outputs), of which the first `ceil(inputs / group)` rows count,
    and `w = code * scale + zero`. `act` is 1 x inputs.
    """

    codes: Part
    zeros: Part
    scale: Part
    act: Part | None = None
    group: int
    dtype: Dtype
    arith: Arith = Arith.FLOAT32

    @property
    def rows(self) -> int:
        """The outputs."""
        return self.codes.rows * QUAD

    @property
    def columns(self) -> int:
        """The inputs."""
        return self.codes.columns // 2

    @property
    def granule(self) -> int:
        """Whole quads."""
        return QUAD

    def windows(self, rows: range) -> tuple[Window, ...]:
        """Return codes, zeros, scales and, where there are any, the activation's scales."""
        quads = range(rows.start // QUAD, ceil_div(rows.stop, QUAD))
        groups = range(ceil_div(self.columns, self.group))
        wanted = (
            self.codes.window(quads),
            self.zeros.window(groups, rows),
            self.scale.window(groups, rows),
        )
        return wanted if self.act is None else (*wanted, self.act.window())
