"""Codes of 8 bits times scales on a grid: FP8 and int8 in all their groupings.

`w[r, c] = (codes[r, c] - zero) * scale * factor * pre_scale[c]` with scale and zero at
`[r // bm, c // bn]` of a grid of ceil(rows / bm) x ceil(columns / bn), whose last blocks may be
partial.
"""

from __future__ import annotations

from dataclasses import dataclass

from ckptd.checkpoint.dtypes import Dtype
from ckptd.quant.formula import Arith, ceil_div
from ckptd.quant.parts import Part, Window


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """8-bit codes (any `F8_*`, `I8`, `U8`) or plain floats with scales on a grid.

    `block` is (rows, columns) under one scale: (128, 128); (1, columns) is a scale a row, (rows, 1)
    one a column, (rows, columns) one for all. `scale` and `zero` are parts of exactly the grid's
    rows and columns. `scale_via` is what the library rounds scales to before it multiplies; where
    `rounds_difference`, it rounds zeros and what is left of codes to the dtype of the result. With
    `transposed` the result is all that transposed: its rows are the codes' columns. `pre_scale`,
    1 x columns, is what activations were multiplied by instead of the weight.
    """

    codes: Part
    scale: Part
    zero: Part | None = None
    pre_scale: Part | None = None
    block: tuple[int, int]
    factor: float = 1.0
    scale_via: Dtype | None = None
    rounds_difference: bool = False
    transposed: bool = False
    dtype: Dtype
    arith: Arith = Arith.FLOAT32

    @property
    def rows(self) -> int:
        """The rows of the result."""
        return self.codes.columns if self.transposed else self.codes.rows

    @property
    def columns(self) -> int:
        """The columns of the result."""
        return self.codes.rows if self.transposed else self.codes.columns

    @property
    def granule(self) -> int:
        """Whole blocks of rows; any row where a single block has them all."""
        return 1 if self._block_rows >= self.rows else self._block_rows

    @property
    def _block_rows(self) -> int:
        return self.block[1] if self.transposed else self.block[0]

    def windows(self, rows: range) -> tuple[Window, ...]:
        """Return codes, scales and, where there are any, zeros and the scale of columns."""
        grid = range(rows.start // self._block_rows, ceil_div(rows.stop, self._block_rows))
        held = [(self.codes, rows), (self.scale, grid)]
        if self.zero is not None:
            held.append((self.zero, grid))
        if self.transposed:
            windows = [part.window(columns=wanted) for part, wanted in held]
        else:
            windows = [part.window(wanted) for part, wanted in held]
        if self.pre_scale is not None:
            windows.append(self.pre_scale.window())
        return tuple(windows)
