"""Packed E2M1 codes times scales of groups: MXFP4, NVFP4 and their relatives.

Two codes a byte, the low nibble first. `w = value(code) * scale[r, c // group]`, and with a global
scale `w = value(code) * (scale * global)`, or `(scale / global)` where `divides`; `pre_scale[c]`
multiplies that.
Source: OCP Microscaling Formats (MX) v1.0 for E2M1 and E8M0.
"""

from __future__ import annotations

from dataclasses import dataclass

from ckptd.checkpoint.dtypes import Dtype
from ckptd.quant.formula import Arith, ceil_div
from ckptd.quant.parts import Part, Window


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp4:
    """E2M1 codes with a scale for each `group` columns.

    `codes` is `U8` of (rows, columns / 2); `scale` is (rows, ceil(columns / group)) of `F8_E8M0`
    (a power of two), `F8_E4M3` or a wider float; `global_scale` is 1 x 1, and divided by
    `global_divisor` before its use. With `transposed` the result is the codes' matrix transposed:
    its rows are their columns. `pre_scale`, 1 x columns, is what activations were multiplied by
    instead of the weight (never `transposed`). Without `signed_zero` the code of -0 is 0, as
    ModelOpt's own table has it.
    """

    codes: Part
    scale: Part
    global_scale: Part | None = None
    pre_scale: Part | None = None
    group: int
    divides: bool = False
    global_divisor: float = 1.0
    transposed: bool = False
    signed_zero: bool = True
    dtype: Dtype
    arith: Arith = Arith.FLOAT32

    @property
    def rows(self) -> int:
        """The rows of the result."""
        return self.codes.columns * 2 if self.transposed else self.codes.rows

    @property
    def columns(self) -> int:
        """The columns of the result."""
        return self.codes.rows if self.transposed else self.codes.columns * 2

    @property
    def granule(self) -> int:
        """Rows of the codes, or groups of their columns."""
        return self.group if self.transposed else 1

    def windows(self, rows: range) -> tuple[Window, ...]:
        """Return codes, scales and, where there are, the global scale and that of columns."""
        if self.transposed:
            columns = range(rows.start // 2, ceil_div(rows.stop, 2))
            groups = range(rows.start // self.group, ceil_div(rows.stop, self.group))
            wanted = (self.codes.window(columns=columns), self.scale.window(columns=groups))
        else:
            wanted = (self.codes.window(rows), self.scale.window(rows))
        whole = (part.window() for part in (self.global_scale, self.pre_scale) if part is not None)
        return (*wanted, *whole)
