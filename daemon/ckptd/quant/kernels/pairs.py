"""8-bit codes with one scale for all: a table of every pair of codes, one look-up for two of them.

The table has the values that the arithmetic gives, rounded to the result's dtype, so that it is
the same bit for bit. It is for results of 16 bits on a CPU, of which two are moved as one word.
"""

from __future__ import annotations

import torch

from ckptd.quant.formula import Arith
from ckptd.quant.formulas.scaled import Scaled
from ckptd.quant.kernels import float8, steps

_LEAST = 1 << 20
"""Fewer elements than this do not pay for making the table."""


def are_apt(formula: Scaled, codes: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether a table gives the weight, and sooner."""
    single = formula.scale.rows * formula.scale.columns == 1
    plain = formula.zero is None and formula.pre_scale is None
    words = out.element_size() == 2 and codes.shape[1] % 2 == 0 and codes.is_contiguous()
    pays = out.device.type == "cpu" and out.numel() >= _LEAST
    return single and plain and words and pays and not formula.transposed


def decode_pairs(
    formula: Scaled, codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor
) -> None:
    """Write the values of `codes` into `out`, contiguous and of their shape."""
    table = _table(formula, codes.dtype, scale, out.dtype)
    twos = codes.view(-1).view(torch.uint16)
    words = out.view(-1).view(torch.int32)
    places: torch.Tensor | None = None
    for piece in steps.of_rows(len(twos), 1, out.device):
        held = twos[piece]
        places = torch.empty(len(held), dtype=torch.int32) if places is None else places
        index = places[: len(held)].copy_(held)
        torch.index_select(table, 0, index, out=words[piece])


def _table(
    formula: Scaled, kind: torch.dtype, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return for each little-endian pair of codes its two values of `dtype`, as one `I32`."""
    if formula.scale_via is not None and formula.arith is Arith.LIBRARY:
        scale = scale.to(getattr(torch, str(formula.scale_via.torch_name)))
    every = torch.arange(256, dtype=torch.uint8).view(kind)
    values = float8.values(every) * float8.values(scale).reshape(())
    if formula.factor != 1.0:
        values.mul_(formula.factor)
    halves = values.to(dtype)
    both = torch.stack((halves.expand(256, 256), halves[:, None].expand(256, 256)), dim=-1)
    return both.contiguous().view(torch.int32).view(-1)
