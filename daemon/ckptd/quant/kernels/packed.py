"""The kernel of `formulas.packed`: codes to bytes to float32, a subtraction and a product each.

The product of a code of 8 bits and a scale of 16 is exact in float32, so that one cast at the end
rounds as a library does that multiplies in the scale's dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ckptd.errors import CheckpointCorrupt
from ckptd.quant.formula import Arith
from ckptd.quant.formulas.packed import Packed, Values
from ckptd.quant.kernels import bitstream, float8, grid, wide


@dataclass(frozen=True, slots=True, kw_only=True)
class _Grids:
    """What is applied to the codes, in float32; `places` is each column's group, if reordered."""

    scale: torch.Tensor
    zero: torch.Tensor | None
    bias: torch.Tensor | None
    places: torch.Tensor | None


def decode_packed(
    formula: Packed, rows: range, tensors: Sequence[torch.Tensor], out: torch.Tensor
) -> None:
    """Write `rows` of `formula` into `out`, of `(len(rows), formula.columns)`.

    Raises:
        CheckpointCorrupt: g_idx names a group that has no scale.
    """
    codes = tensors[0]
    grids = _grids(formula, rows, tensors)
    within = rows.start % formula.row_block
    room = bitstream.Room(out.device)
    for piece, x in wide.pieces(out):
        unpacked = bitstream.unpacked(
            codes[piece], bits=formula.bits, columns=formula.columns, dense=formula.dense, room=room
        )
        if formula.values is Values.E2M3:
            table = _e2m3(codes.device)
            x.copy_(table.index_select(0, unpacked.flatten().to(torch.int32)).view(x.shape))
        elif formula.offset and grids.zero is None:  # bytes wrap around: their difference is signed
            own = formula.bits < 8  # codes of 8 bits lie in the file's bytes
            less = unpacked.sub_(formula.offset) if own else unpacked - formula.offset
            x.copy_(less.view(torch.int8))
        else:
            x.copy_(unpacked)
        of_rows = slice(within + piece.start, within + piece.stop)
        _finish(formula, grids, of_rows, x, out[piece])


def _finish(
    formula: Packed, grids: _Grids, rows: slice, values: torch.Tensor, out: torch.Tensor
) -> None:
    """Make `values` of codes, which are rounded into `out` later; `out` is room until then.

    `rows` count from the first row of the first block of the grids.
    """

    def apply(operation: grid.Operation, x: torch.Tensor, values: torch.Tensor) -> None:
        of_rows = grid.rows_of(values, rows, formula.row_block)
        if grids.places is None:
            grid.apply(operation, x, of_rows, formula.group)
        else:
            operation(x, of_rows.index_select(1, grids.places), out=x)

    if grids.zero is not None:
        apply(torch.sub, values, grids.zero)
    apply(torch.mul, values, grids.scale)
    if grids.bias is None:
        return
    if formula.arith is Arith.LIBRARY and formula.rounds_product:
        values.copy_(out.copy_(values))
    apply(torch.add, values, grids.bias)


def _grids(formula: Packed, rows: range, tensors: Sequence[torch.Tensor]) -> _Grids:
    remaining = iter(tensors[1:])
    scale = next(remaining)
    if formula.scale_via is not None and formula.arith is Arith.LIBRARY:
        scale = scale.to(getattr(torch, str(formula.scale_via.torch_name)))
    scale = float8.values(scale)
    zero = bias = places = None
    if formula.zero is not None:
        zero = _zeros(formula, rows, next(remaining))
    if formula.bias is not None:
        bias = next(remaining).float()
    if formula.g_idx is not None:
        places = _places(formula, next(remaining).view(-1))
    return _Grids(scale=scale, zero=zero, bias=bias, places=places)


def _zeros(formula: Packed, rows: range, stored: torch.Tensor) -> torch.Tensor:
    """Return what is subtracted from unsigned codes, on the grid."""
    if not formula.zero_bits:
        return stored.float().add_(formula.offset)
    wanted = formula.grid_rows(rows)
    surplus = wanted.start % formula.zero_period
    by_column = stored.new_empty((stored.shape[1], stored.shape[0])).copy_(stored.T)
    raw = by_column.view(torch.uint8)
    codes = bitstream.unpacked(
        raw, bits=formula.zero_bits, columns=surplus + len(wanted), dense=formula.dense
    )
    return codes[:, surplus:].T.float().contiguous()


@functools.cache
def _e2m3(device: torch.device) -> torch.Tensor:
    """Return the values of all 64 codes: the exponent's lowest step is that of subnormals."""
    code = torch.arange(64)
    exponent, mantissa = (code >> 3) & 3, code & 7
    eighths = torch.where(exponent == 0, mantissa, (8 + mantissa) << (exponent - 1).clamp(min=0))
    values = eighths / 8.0
    return torch.where(code < 32, values, -values).to(device)


def _places(formula: Packed, g_idx: torch.Tensor) -> torch.Tensor | None:
    """Return each column's group, or None where they are in order: -1 says not reordered."""
    assert formula.g_idx is not None
    low, high = (int(value) for value in torch.aminmax(g_idx))
    if low == -1:
        return None
    if low < 0 or high >= formula.scale.columns:
        raise CheckpointCorrupt(
            "names a group that has no scale",
            path=formula.g_idx.extent.path,
            tensor=formula.g_idx.name,
            expected=f"0 to {formula.scale.columns - 1}",
            found=f"{low} to {high}",
        )
    return g_idx
