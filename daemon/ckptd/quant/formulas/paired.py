"""Codes of 4 bits packed across rows: a byte holds the same column of two rows, the even one low.

`w[r, c] = value(code) * scale[r // bm, c // bn] * pre_scale[c]`; with a global scale, that times the
scale comes first. Source: `pack_int4_in_uint8` of nvidia-modelopt 0.47 (W4A16_AWQ), and its experts
of Llama 4 in NVFP4, whose matrices are packed transposed.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ckptd.checkpoint.dtypes import Dtype
from ckptd.quant.formula import Arith, ceil_div
from ckptd.quant.parts import Part, Window


class Kind(enum.StrEnum):
    """What the four bits mean."""

    INT4 = "int4"
    """-8 to 7, two's complement."""
    E2M1 = "e2m1"
    """A sign and one of 0, 0.5, 1, 1.5, 2, 3, 4, 6."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """Pairs of rows with scales on a grid.

    `codes` is `U8` of (rows / 2, columns); `scale` has a grid of `block` (rows, columns), a block of
    more than one row an even number of them. `global_scale` is 1 x 1, `pre_scale` 1 x columns. The
    E2M1 code of -0 is 0, as in ModelOpt's own table.
    """

    codes: Part
    scale: Part
    global_scale: Part | None = None
    pre_scale: Part | None = None
    block: tuple[int, int]
    kind: Kind
    dtype: Dtype
    arith: Arith = Arith.FLOAT32

    @property
    def rows(self) -> int:
        """Two for each row of the codes."""
        return self.codes.rows * 2

    @property
    def columns(self) -> int:
        """The columns of the codes."""
        return self.codes.columns

    @property
    def granule(self) -> int:
        """Pairs, in whole blocks."""
        return max(2, self.block[0])

    def windows(self, rows: range) -> tuple[Window, ...]:
        """Return codes, scales and, where there are, the global scale and that of columns."""
        grid = range(rows.start // self.block[0], ceil_div(rows.stop, self.block[0]))
        pairs = range(rows.start // 2, ceil_div(rows.stop, 2))
        wanted = (self.codes.window(pairs), self.scale.window(grid))
        whole = (part.window() for part in (self.global_scale, self.pre_scale) if part is not None)
        return (*wanted, *whole)
