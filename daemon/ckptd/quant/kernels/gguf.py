"""The kernel of `formulas.gguf`: blocks to float32, then one rounding.

What a block means is in `gguf_legacy`, `gguf_k` and `gguf_iq`. Every product of a code and a scale
is exact in float32, so that the library's order of roundings and ours are the same. A block whose
own scale is infinite or not a number is refused here: it lies between the codes, where nobody else
sees it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from ckptd.checkpoint.dtypes import Dtype
from ckptd.errors import CheckpointCorrupt
from ckptd.quant.formulas.gguf import Gguf
from ckptd.quant.kernels import gguf_iq, gguf_k, gguf_legacy, steps
from ckptd.quant.kernels.gguf_fields import typed

Unpack = Callable[[torch.Tensor, torch.Tensor], None]
"""`unpack(blocks, x)`: `U8 (number, block_bytes)` to float32 `(number, elements)`."""

UNPACK: dict[str, Unpack] = {
    "Q4_0": gguf_legacy.q4_0,
    "Q4_1": gguf_legacy.q4_1,
    "Q5_0": gguf_legacy.q5_0,
    "Q5_1": gguf_legacy.q5_1,
    "Q8_0": gguf_legacy.q8_0,
    "Q8_1": gguf_legacy.q8_1,
    "Q8_K": gguf_legacy.q8_k,
    "Q1_0": gguf_legacy.q1_0,
    "Q2_0": gguf_legacy.q2_0,
    "MXFP4": gguf_legacy.mxfp4,
    "NVFP4": gguf_legacy.nvfp4,
    "IQ4_NL": gguf_legacy.iq4_nl,
    "Q2_K": gguf_k.q2_k,
    "Q3_K": gguf_k.q3_k,
    "Q4_K": gguf_k.q4_k,
    "Q5_K": gguf_k.q5_k,
    "Q6_K": gguf_k.q6_k,
    "TQ1_0": gguf_k.tq1_0,
    "TQ2_0": gguf_k.tq2_0,
    "IQ4_XS": gguf_iq.iq4_xs,
    "IQ2_XXS": gguf_iq.iq2_xxs,
    "IQ2_XS": gguf_iq.iq2_xs,
    "IQ2_S": gguf_iq.iq2_s,
    "IQ3_XXS": gguf_iq.iq3_xxs,
    "IQ3_S": gguf_iq.iq3_s,
    "IQ1_S": gguf_iq.iq1_s,
    "IQ1_M": gguf_iq.iq1_m,
}

_HALVES: dict[str, tuple[int, int]] = {
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "Q2_K": (80, 2),
    "Q3_K": (108, 1),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208, 1),
    "TQ1_0": (52, 1),
    "TQ2_0": (64, 1),
}
"""From which byte of a block on float16 scales lie and how many, if not one at its beginning."""


def decode_gguf(
    formula: Gguf, rows: range, tensors: Sequence[torch.Tensor], out: torch.Tensor
) -> None:
    """Write `rows` of `formula` into `out`, of `(len(rows), formula.columns)`.

    Raises:
        CheckpointCorrupt: a block's scale is infinite or not a number.
    """
    raw = tensors[0] if formula.partner is None else _woven(formula, tensors[0], tensors[1])
    if formula.transposed:
        _transposed(formula, raw, out)
        return
    whole = out.view(raw.shape[0], -1)
    work = out.new_empty((0, whole.shape[1]), dtype=torch.float32)
    for piece in steps.of_rows(len(whole), whole.shape[1], out.device, step=formula.head_rows):
        blocks = _stored_order(raw[piece], formula.head_rows)
        if out.dtype is torch.float32:
            _values(formula, blocks, whole[piece])
            continue
        if len(work) != len(blocks):
            work = out.new_empty((len(blocks), whole.shape[1]), dtype=torch.float32)
        _values(formula, blocks, work)
        whole[piece].copy_(work)


def _woven(formula: Gguf, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the bytes of both parts in turns: row by row, or element by element of a row."""
    size = first.shape[1] if formula.transposed else formula.block_bytes
    units = (first.reshape(len(first), -1, size), second.reshape(len(second), -1, size))
    both = torch.stack(units, dim=2)
    return both.view(-1, size) if formula.transposed else both.view(len(first), -1)


def _transposed(formula: Gguf, raw: torch.Tensor, out: torch.Tensor) -> None:
    """Write the columns whose blocks `raw` has as rows."""
    work = out.new_empty((0, out.shape[0]), dtype=torch.float32)
    for piece in steps.of_rows(raw.shape[0], out.shape[0], raw.device):
        blocks = raw[piece]
        if len(work) != len(blocks):
            work = out.new_empty((len(blocks), out.shape[0]), dtype=torch.float32)
        _values(formula, blocks, work)
        out[:, piece].copy_(work.T)


def _stored_order(raw: torch.Tensor, head_rows: int) -> torch.Tensor:
    """Return the stored rows of whole heads, first halves before second ones."""
    if head_rows == 1:
        return raw
    heads = raw.view(-1, head_rows // 2, 2, raw.shape[1])
    return heads.transpose(1, 2).reshape(raw.shape)


def _values(formula: Gguf, raw: torch.Tensor, x: torch.Tensor) -> None:
    """Write the float32 values of rows of blocks into `x`, contiguous."""
    unpack = UNPACK.get(formula.encoding)
    if unpack is None:
        name = Dtype(formula.encoding).torch_name
        x.copy_(typed(raw, getattr(torch, str(name))))
    else:
        blocks = raw.view(-1, formula.block_bytes)
        _require_finite(formula, blocks)
        unpack(blocks, x.view(len(blocks), -1))
    if formula.shift:
        x.add_(formula.shift)


def _require_finite(formula: Gguf, blocks: torch.Tensor) -> None:
    scales = _scales(formula.encoding, blocks)
    if scales is None or math.isfinite(float(scales.sum(dtype=torch.float32))):
        return  # no sum of so many float16 is too large for float32
    bad = ~torch.isfinite(scales).all(dim=1)
    if not bool(bad.any()):
        return
    raise CheckpointCorrupt(
        "a scale is infinite or not a number",
        path=formula.blocks.extent.path,
        tensor=formula.blocks.name,
        expected=f"finite scales in its {formula.encoding} blocks",
        found=f"{int(bad.sum())} others among {len(blocks)} blocks",
        hint="quantize it again; these weights would be NaN in any library",
    )


def _scales(encoding: str, blocks: torch.Tensor) -> torch.Tensor | None:
    """Return what must be finite in each block, `(number, any)`; None where everything is."""
    if encoding == "NVFP4":
        return None  # its bytes have no infinity, and their NaN counts as zero
    if encoding == "MXFP4":
        return torch.where(blocks[:, :1] == 255, torch.nan, 0.0)
    if encoding == "IQ1_M":
        return gguf_iq.iq1_m_scale(blocks)
    if encoding == "Q8_K":
        return typed(blocks[:, :4], torch.float32)
    at, count = _HALVES.get(encoding, (0, 1))
    return typed(blocks, torch.float16)[:, at // 2 : at // 2 + count]
