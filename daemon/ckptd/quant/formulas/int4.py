"""4-bit codes whose scales lie transposed or in tiles: torchao's layouts for its int4 kernels.

`Nibbles` has plain rows of codes, two a byte and the low one first, and grids with a row for each
group of columns. `Tiles` is the layout of the tensor cores' B operand: 8 rows by 128 columns are
512 bytes, in which a lane holds columns that are far apart.
Source: torchao's Int4Tensor, Int4PlainInt32Tensor and Int4TilePackedTo4dTensor, and torch's
conversion for `_weight_int4pack_mm`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ckptd.checkpoint.dtypes import Dtype
from ckptd.quant.formula import Arith, ceil_div
from ckptd.quant.parts import Part, Window

TILE_ROWS = 8
TILE_COLUMNS = 128
TILE_BYTES = TILE_ROWS * TILE_COLUMNS // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Nibbles:
    """Rows of nibbles with scales and zeros of `(groups, rows)`.

    `codes` is `U8` of (rows, columns / 2), `scale` and `zero` have `columns / group` rows. With
    `signed`, a code is -8 to 7 and a weight `code * scale + zero`; else a code is 0 to 15 and a
    weight `(code - zero) * scale`. `pre_scale` (1 x columns) multiplies activations in the library,
    so it multiplies the weight's columns. Its kernels round once, so `arith` changes nothing.
    """

    codes: Part
    scale: Part
    zero: Part
    pre_scale: Part | None = None
    group: int
    signed: bool
    dtype: Dtype
    arith: Arith = Arith.FLOAT32

    @property
    def rows(self) -> int:
        """The rows of the codes."""
        return self.codes.rows

    @property
    def columns(self) -> int:
        """Two for each byte of a row."""
        return self.codes.columns * 2

    @property
    def granule(self) -> int:
        """Any row."""
        return 1

    def windows(self, rows: range) -> tuple[Window, ...]:
        """Return codes, scales, zeros and, if there is one, the scale of columns.

        The grids' columns are the rows of the weight.
        """
        wanted = (
            self.codes.window(rows),
            self.scale.window(columns=rows),
            self.zero.window(columns=rows),
        )
        return wanted if self.pre_scale is None else (*wanted, self.pre_scale.window())


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Tiles of 8 x 128 codes with scales and zeros in pairs: `(code - 8) * scale + zero`.

    `codes` is `U8` with a row for 8 rows of the weight and 512 bytes for 128 columns: for each of
    32 lanes (a row and a quarter `q` of every 8 columns) four words, one for 32 columns each. A
    word's nibbles from the lowest on are columns 0, 8, 16, 24, 1, 9, 17, 25 after `2 * q`.
    `scale_and_zero` has a row for `group` columns and two values for each row of the weight. The
    tiles are padded: `height` and `width` are the weight's own rows and columns. `pre_scale` is as
    in `Nibbles`.
    """

    codes: Part
    scale_and_zero: Part
    pre_scale: Part | None = None
    group: int
    height: int
    width: int
    dtype: Dtype
    arith: Arith = Arith.FLOAT32

    @property
    def rows(self) -> int:
        """The weight's rows, without the padding."""
        return self.height

    @property
    def columns(self) -> int:
        """The weight's columns, without the padding."""
        return self.width

    @property
    def granule(self) -> int:
        """The rows of a tile."""
        return TILE_ROWS

    def windows(self, rows: range) -> tuple[Window, ...]:
        """Return whole tiles, scales and zeros of `rows`, and the scale of columns, if there is."""
        tiles = range(rows.start // TILE_ROWS, ceil_div(rows.stop, TILE_ROWS))
        groups = range(ceil_div(self.width, self.group))
        pairs = range(rows.start * 2, rows.stop * 2)
        wanted = (self.codes.window(tiles), self.scale_and_zero.window(groups, pairs))
        return wanted if self.pre_scale is None else (*wanted, self.pre_scale.window())
