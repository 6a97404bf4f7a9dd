"""Scales of 16 or 32 columns in the tiles that Blackwell's tensor cores read.

128 rows by 4 scales are 512 bytes: row `r` of them lies at `16 * (r % 32) + 4 * (r // 32)`. Both
axes are padded to whole tiles, which follow each other along the columns. Apart from that a weight
is one of `Fp4` or `Scaled`.
Source: the layout of block scaling factors in cuBLAS's documentation, as torchao writes it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ckptd.checkpoint.dtypes import Dtype
from ckptd.quant.formula import Arith, ceil_div
from ckptd.quant.formulas.fp4 import Fp4
from ckptd.quant.formulas.scaled import Scaled
from ckptd.quant.parts import Part, Window

TILE_ROWS = 128
TILE_COLUMNS = 4
TILE_BYTES = TILE_ROWS * TILE_COLUMNS


@dataclass(frozen=True, slots=True, kw_only=True)
class Swizzled:
    """E2M1 codes (`U8`, two a byte) or FP8 codes, with tiled 8-bit scales of `group` columns.

    `scale` has a row for 128 rows of the weight and 512 bytes for four groups; `global_scale` is
    1 x 1 and multiplies.
    """

    codes: Part
    scale: Part
    global_scale: Part | None = None
    group: int
    dtype: Dtype
    arith: Arith = Arith.FLOAT32

    @property
    def rows(self) -> int:
        """The rows of the codes."""
        return self.codes.rows

    @property
    def columns(self) -> int:
        """The elements in each row."""
        return self.codes.columns * (2 if self.codes.dtype is Dtype.U8 else 1)

    @property
    def granule(self) -> int:
        """The rows of a tile."""
        return TILE_ROWS

    def windows(self, rows: range) -> tuple[Window, ...]:
        """Return codes, whole tiles of scales and, where there is one, the global scale."""
        tiles = range(rows.start // TILE_ROWS, ceil_div(rows.stop, TILE_ROWS))
        wanted = (self.codes.window(rows), self.scale.window(tiles))
        return wanted if self.global_scale is None else (*wanted, self.global_scale.window())

    def plain(self) -> Fp4 | Scaled:
        """Return the same weight with scales in rows; they lie nowhere, only its shape counts."""
        if self.codes.dtype is Dtype.U8:
            return Fp4(
                codes=self.codes,
                scale=self.scale,
                global_scale=self.global_scale,
                group=self.group,
                dtype=self.dtype,
                arith=self.arith,
            )
        return Scaled(
            codes=self.codes,
            scale=self.scale,
            block=(1, self.group),
            dtype=self.dtype,
            arith=self.arith,
        )
