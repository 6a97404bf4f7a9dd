"""Computing rows of a formula: the one entrance to the kernels.

A kernel gets the windows of a formula as tensors on one device and writes the rows it was asked for
into `out` on the same one. It works in pieces that stay in the cache on a CPU, so that what it
takes besides is a few MB, whatever the size of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ckptd.quant.formula import Formula
from ckptd.quant.formulas.awq import Across, Along, Quads
from ckptd.quant.formulas.blockwise import Blockwise
from ckptd.quant.formulas.columns import Columns
from ckptd.quant.formulas.fp4 import Fp4
from ckptd.quant.formulas.gguf import Gguf
from ckptd.quant.formulas.int4 import Nibbles, Tiles
from ckptd.quant.formulas.packed import Packed
from ckptd.quant.formulas.paired import Paired
from ckptd.quant.formulas.scaled import Scaled
from ckptd.quant.formulas.slabs import Slabs
from ckptd.quant.formulas.swizzled import Swizzled
from ckptd.quant.kernels import (
    awq,
    blockwise,
    columns,
    fp4,
    gguf,
    int4,
    packed,
    paired,
    scaled,
    slabs,
    swizzled,
)

Kernel = Callable[[Any, range, Sequence[torch.Tensor], torch.Tensor], None]
"""`kernel(formula, rows, tensors, out)`: `tensors` as `formula.windows(rows)` lists them, `out` of
`(len(rows), formula.columns)` in `formula.dtype`, contiguous; `rows` begin and end at granules."""

KERNELS: dict[type[Formula], Kernel] = {
    Across: awq.decode_across,
    Along: awq.decode_along,
    Quads: awq.decode_quads,
    Columns: columns.decode_columns,
    Nibbles: int4.decode_nibbles,
    Tiles: int4.decode_tiles,
    Swizzled: swizzled.decode_swizzled,
    Blockwise: blockwise.decode_blockwise,
    Fp4: fp4.decode_fp4,
    Gguf: gguf.decode_gguf,
    Scaled: scaled.decode_scaled,
    Slabs: slabs.decode_slabs,
    Packed: packed.decode_packed,
    Paired: paired.decode_paired,
}


def rows_into(
    formula: Formula, rows: range, tensors: Sequence[torch.Tensor], out: torch.Tensor
) -> None:
    """Write `rows` of `formula` into `out`, which is on the device of `tensors`."""
    if out.numel():
        KERNELS[type(formula)](formula, rows, tensors, out)
