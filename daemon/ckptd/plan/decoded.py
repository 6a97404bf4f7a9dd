"""Decoded rows in the stream: from a block's bytes through a kernel, refused where they are wrong.

The checks that headers cannot make are here: scales must be finite, and a value must fit float16
where that is the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ckptd.checkpoint.dtypes import Dtype
from ckptd.errors import CheckFailed, CheckpointCorrupt
from ckptd.plan.nodes import Decode, Reading
from ckptd.quant.kernels import decode, float8
from ckptd.quant.parts import Window


def into(
    out: torch.Tensor, value: Decode, loaded: Mapping[Reading, torch.Tensor], tensor: str
) -> None:
    """Write the rows that `value` is into `out`, of its shape and dtype and contiguous.

    `loaded` are the bytes of its windows, anywhere; they are computed with where `out` is.

    Raises:
        CheckpointCorrupt: a scale is infinite or not a number.
        CheckFailed: a value is beyond the largest of float16.
    """
    if not out.numel():
        return
    parts = []
    for window in value.windows:
        part = _as_matrix(loaded[window].to(out.device), window)
        if window.is_scale:
            _require_finite(part, window, tensor)
        parts.append(part)
    formula, span = value.formula, value.span
    rows = out.view(value.shape[value.axis], formula.columns)
    if len(span) == len(rows):
        decode.rows_into(formula, span, parts, rows)
    else:
        whole = rows.new_empty((len(span), formula.columns))
        decode.rows_into(formula, span, parts, whole)
        begin = value.first - span.start
        rows.copy_(whole[begin : begin + len(rows)])
    if value.dtype is Dtype.F16:
        _require_fitting(out, tensor)


def _as_matrix(raw: torch.Tensor, window: Window) -> torch.Tensor:
    """Return a window's bytes as `(rows, columns)` of its dtype; two `F4` stay one byte."""
    name = window.dtype.torch_name
    dtype = torch.uint8 if name is None else getattr(torch, name)
    columns = window.columns if name is not None else window.columns * window.dtype.bits // 8
    return raw.view(dtype).view(window.rows, columns)


def _require_finite(part: torch.Tensor, window: Window, tensor: str) -> None:
    if not part.numel():
        return
    wide = float8.values(part)
    if all(math.isfinite(float(extreme)) for extreme in torch.aminmax(wide)):
        return  # a NaN is an extreme, too
    raise CheckpointCorrupt(
        "a scale is infinite or not a number",
        path=window.path,
        tensor=tensor,
        expected="finite scales",
        found=f"{int((~torch.isfinite(wide)).sum())} others among {wide.numel()}",
        hint="quantize it again; these weights would be NaN in any library",
    )


def _require_fitting(out: torch.Tensor, tensor: str) -> None:
    low, high = torch.aminmax(out)
    if not bool(torch.isinf(low) | torch.isinf(high)):
        return
    raise CheckFailed(
        f"tensor {tensor!r}: {int(torch.isinf(out).sum())} values are too large for float16",
        check="dequantize",
        hint="dequantize to bfloat16 or float32",
    )
