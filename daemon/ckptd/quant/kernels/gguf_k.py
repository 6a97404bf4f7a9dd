"""Blocks of 256 elements with scales of 4 to 8 bits in them: the K types, and the ternary ones.

`w = (d * s) * q - (dmin * m)`: each product is exact in float32, so that only the subtraction
rounds. Source: ggml's `dequantize_row_q?_K` and `dequantize_row_tq?_0`.
"""

from __future__ import annotations

import torch

from ckptd.quant.kernels.gguf_fields import (
    bytes_of,
    fields,
    half,
    merged,
    packed,
    scaled,
    six_bit_pairs,
    six_bit_scales,
    typed,
)

_POWERS_OF_THREE = (1, 3, 9, 27, 81)


def q2_k(blocks: torch.Tensor, x: torch.Tensor) -> None:
    """2 bits; a scale and a minimum of 4 bits for each 16 elements."""
    scales = blocks[:, :16].contiguous()
    scale = half(blocks, 80) * (scales & 15)
    minimum = half(blocks, 82) * (scales >> 4)
    codes = fields(packed(blocks[:, 16:80]), bits=2, width=32)
    scaled(x, bytes_of(codes), scale, minimum)


def q3_k(blocks: torch.Tensor, x: torch.Tensor) -> None:
    """3 bits, 4 subtracted where the high one is not set; scales of 6 bits for each 16 elements."""
    low = fields(packed(blocks[:, 32:96]), bits=2, width=32)
    high = fields(packed(blocks[:, :32]), bits=1, width=32)
    codes = bytes_of(merged(low, high, at=2)).sub_(4).view(torch.int8)
    scales = six_bit_scales(blocks[:, 96:108]).sub_(32).view(torch.int8)
    scaled(x, codes, half(blocks, 108) * scales)


def q4_k(blocks: torch.Tensor, x: torch.Tensor) -> None:
    """4 bits; a scale and a minimum of 6 bits for each 32 elements."""
    scales, minima = six_bit_pairs(blocks[:, 4:16])
    codes = fields(packed(blocks[:, 16:]), bits=4, width=32)
    scaled(x, bytes_of(codes), scales.mul_(half(blocks, 0)), minima.mul_(half(blocks, 2)))


def q5_k(blocks: torch.Tensor, x: torch.Tensor) -> None:
    """As Q4_K, with the fifth bits in 32 bytes: bit j of each for sub-block j."""
    scales, minima = six_bit_pairs(blocks[:, 4:16])
    low = fields(packed(blocks[:, 48:]), bits=4, width=32)
    codes = bytes_of(merged(low, fields(packed(blocks[:, 16:48]), bits=1, width=32), at=4))
    scaled(x, codes, scales.mul_(half(blocks, 0)), minima.mul_(half(blocks, 2)))


def q6_k(blocks: torch.Tensor, x: torch.Tensor) -> None:
    """6 bits minus 32; a signed scale of 8 bits for each 16 elements."""
    low = fields(packed(blocks[:, :128]), bits=4, width=64)
    high = fields(packed(blocks[:, 128:192]), bits=2, width=32)
    codes = bytes_of(merged(low, high, at=4)).sub_(32).view(torch.int8)
    scaled(x, codes, half(blocks, 208) * typed(blocks[:, 192:208], torch.int8))


def tq1_0(blocks: torch.Tensor, x: torch.Tensor) -> None:
    """-1, 0 or 1, five of them in a byte as a fraction in base three, in the last bytes four."""
    last = _trits(blocks[:, 48:52].contiguous(), count=4).transpose(0, 1)
    parts = (
        _trits(packed(blocks[:, :32]).view(torch.uint8), count=5),
        _trits(packed(blocks[:, 32:48]).view(torch.uint8), count=5),
        packed(last.reshape(len(blocks), -1)).view(torch.uint8).unsqueeze(0),
    )
    words = torch.cat([part.flatten(0, 1) for part in parts]).view(torch.int64)
    scaled(x, bytes_of(words).sub_(1).view(torch.int8), half(blocks, 52))


def tq2_0(blocks: torch.Tensor, x: torch.Tensor) -> None:
    """-1, 0 or 1, each in 2 bits."""
    codes = bytes_of(fields(packed(blocks[:, :64]), bits=2, width=32))
    scaled(x, codes.sub_(1).view(torch.int8), half(blocks, 64))


def _trits(raw: torch.Tensor, *, count: int) -> torch.Tensor:
    """Return the digits of bytes `(rows, columns)` as `(count, rows, columns)`.

    The byte times 3 ** k, cut to 8 bits, is the fraction from digit k on.
    """
    powers = torch.tensor(_POWERS_OF_THREE[:count], dtype=torch.uint8, device=raw.device)
    fraction = raw.unsqueeze(0) * powers.view(-1, 1, 1)
    return fraction.ge(86).to(torch.uint8).add_(fraction.ge(171))  # thirds of 256, rounded up
