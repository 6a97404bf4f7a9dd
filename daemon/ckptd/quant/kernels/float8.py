"""Bytes that are float8 or int8, as float32: faster than torch's own conversion, the same values.

A float8 byte moved to the right place of a float16 is the same number times a power of two, with
subnormals and sign. Three integer operations and the processor's float16 instructions then take a
tenth of the time of torch's conversion, which goes value by value. The power of two is left for
the caller to put into scales.
"""

from __future__ import annotations

import functools

import torch

_FACTORS: dict[torch.dtype, float] = {
    torch.float8_e4m3fn: 2.0**8,
    torch.float8_e4m3fnuz: 2.0**7,
}
"""Two to the difference between the exponent biases of float16 and of the type."""


def factor(dtype: torch.dtype) -> float:
    """Return what results of `widen` are still to be multiplied by, a power of two."""
    return _FACTORS.get(dtype, 1.0)


def widen(codes: torch.Tensor, out: torch.Tensor, room: torch.Tensor) -> None:
    """Write `codes / factor(codes.dtype)` into `out`: float32 of the same shape.

    `room` is int16 of that shape to work in. NaN codes become NaN.
    """
    kind = codes.dtype
    by_bits = kind is torch.float8_e5m2 or (kind in _FACTORS and not _holds_nan(codes))
    if not by_bits:
        out.copy_(codes)
        if kind in _FACTORS:
            out.div_(_FACTORS[kind])
        return
    if kind is torch.float8_e5m2:  # the upper half of a float16
        room.copy_(codes.view(torch.int8)).mul_(256)
    else:  # the sign stands twice after the shift: the lower copy is the exponent's highest bit
        room.copy_(codes.view(torch.int8)).mul_(128).bitwise_and_(~0x4000)
    out.copy_(room.view(torch.float16))


def values(tensor: torch.Tensor) -> torch.Tensor:
    """Return a small tensor (scales, zero points) of any dtype in float32; it may be the same."""
    if tensor.dtype.itemsize > 1 or not tensor.dtype.is_floating_point:
        return tensor.to(torch.float32)
    places = tensor.reshape(-1).view(torch.uint8).to(torch.int32)
    return torch.index_select(_table(tensor.dtype, tensor.device), 0, places).view(tensor.shape)


def _holds_nan(codes: torch.Tensor) -> bool:
    """Whether a code is NaN, by extremes: they cost a tenth of what a comparison of each does."""
    if codes.is_cuda:  # waiting for an answer costs more than torch's conversion there
        return True
    signed = codes.view(torch.int8)
    if codes.dtype is torch.float8_e4m3fnuz:  # NaN is what would be -0
        return int(signed.amin()) == -128
    return int(signed.amax()) == 127 or int(codes.view(torch.uint8).amax()) == 255


@functools.cache
def _table(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float32).to(device)
