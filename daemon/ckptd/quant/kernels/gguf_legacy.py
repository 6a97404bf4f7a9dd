"""Blocks of 32 to 128 elements under one scale: Q4_0 to Q8_1, Q1_0, Q2_0, MXFP4, NVFP4, IQ4_NL.

Also the largest of these simple ones, Q8_K. Low nibbles are the first half of a block, high ones
the second, but for Q1_0 and Q2_0, whose fields lie in order. Source: ggml's `dequantize_row_*`.
"""

from __future__ import annotations

import functools

import torch

from ckptd.quant.kernels.gguf_fields import (
    bytes_of,
    fields,
    half,
    in_byte,
    merged,
    packed,
    scaled,
    typed,
)

E2M1_TWICE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the values of E2M1; the scales are halved, so that all codes are whole numbers."""
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def q4_0(blocks: torch.Tensor, x: torch.Tensor) -> None:
    """`d * (q - 8)`."""
    scaled(x, _nibbles(blocks[:, 2:]).sub_(8).view(torch.int8), half(blocks, 0))


def q4_1(blocks: torch.Tensor, x: torch.Tensor) -> None:
    """`d * q + m`."""
    scaled(x, _nibbles(blocks[:, 4:]), half(blocks, 0), -half(blocks, 2))


def q5_0(blocks: torch.Tensor, x: torch.Tensor) -> None:
    """`d * (q - 16)`, the fifth bits in a word of their own."""
    scaled(x, _five(blocks[:, 6:], blocks[:, 2:6]).sub_(16).view(torch.int8), half(blocks, 0))


def q5_1(blocks: torch.Tensor, x: torch.Tensor) -> None:
    """`d * q + m`, the fifth bits in a word of their own."""
    scaled(x, _five(blocks[:, 8:], blocks[:, 4:8]), half(blocks, 0), -half(blocks, 2))


def q8_0(blocks: torch.Tensor, x: torch.Tensor) -> None:
    """`d * q`."""
    scaled(x, typed(blocks[:, 2:], torch.int8), half(blocks, 0))


def q8_1(blocks: torch.Tensor, x: torch.Tensor) -> None:
    """`d * q`; the sum beside it only serves products."""
    scaled(x, blocks[:, 4:].view(torch.int8), half(blocks, 0))


def q8_k(blocks: torch.Tensor, x: torch.Tensor) -> None:
    """`d * q` with a scale in float32; the sums at the end only serve products."""
    scaled(x, blocks[:, 4:260].view(torch.int8), typed(blocks[:, :4], torch.float32))


def q1_0(blocks: torch.Tensor, x: torch.Tensor) -> None:
    """`d` or `-d`."""
    bits = in_byte(blocks[:, 2:], bits=1)
    scaled(x, bits.mul_(2).sub_(1).view(torch.int8), half(blocks, 0))


def q2_0(blocks: torch.Tensor, x: torch.Tensor) -> None:
    """`d * (q - 1)`."""
    scaled(x, in_byte(blocks[:, 2:], bits=2).sub_(1).view(torch.int8), half(blocks, 0))


def iq4_nl(blocks: torch.Tensor, x: torch.Tensor) -> None:
    """`d` times one of 16 uneven levels."""
    scaled(x, of_nibbles(blocks[:, 2:], IQ4_LEVELS, width=16), half(blocks, 0))


def mxfp4(blocks: torch.Tensor, x: torch.Tensor) -> None:
    """`2 ** (e - 127)` times an E2M1 value."""
    scale = _half_e8m0(blocks.device).index_select(0, blocks[:, 0].int()).unsqueeze(1)
    scaled(x, of_nibbles(blocks[:, 1:], E2M1_TWICE, width=16), scale)


def nvfp4(blocks: torch.Tensor, x: torch.Tensor) -> None:
    """An unsigned E4M3 scale for each 16 elements times E2M1 values."""
    codes = of_nibbles(blocks[:, 4:], E2M1_TWICE, width=8)
    table = _half_ue4m3(blocks.device)
    scale = table.index_select(0, blocks[:, :4].flatten().int()).view(-1, 4)
    scaled(x, codes, scale)


def of_nibbles(raw: torch.Tensor, levels: tuple[int, ...], *, width: int) -> torch.Tensor:
    """Return `levels` (whole numbers within int8) of nibbles, low ones of `width` bytes first."""
    low, high = _nibble_tables(levels, raw.device)
    index = raw.flatten().int()
    shape = (raw.shape[0], -1, width)
    pair = (low.index_select(0, index).view(shape), high.index_select(0, index).view(shape))
    return torch.stack(pair, dim=2).view(raw.shape[0], -1)


def _nibbles(raw: torch.Tensor) -> torch.Tensor:
    return bytes_of(fields(packed(raw), bits=4, width=16))


def _five(nibbles: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Return codes of five bits: nibbles, and the fifth bits in order in the bytes of `bits`."""
    high = packed(in_byte(bits, bits=1))
    return bytes_of(merged(fields(packed(nibbles), bits=4, width=16), high, at=4))


@functools.cache
def _half_e8m0(device: torch.device) -> torch.Tensor:
    """Return `2 ** (e - 128)` for each byte: the first three are no normal numbers of float32."""
    values = [2.0 ** (exponent - 128) for exponent in range(256)]
    return torch.tensor(values, dtype=torch.float32, device=device)


@functools.cache
def _nibble_tables(
    levels: tuple[int, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the level of the low and of the high nibble for each byte."""
    table = torch.tensor(levels, dtype=torch.int8, device=device)
    return table.repeat(16), table.repeat_interleave(16)


@functools.cache
def _half_ue4m3(device: torch.device) -> torch.Tensor:
    """Return half the value of each byte as E4M3 without a sign; its NaN counts as zero."""
    values = []
    for code in range(256):
        exponent, mantissa = (code >> 3) & 15, code & 7
        normal = (1 + mantissa / 8) * 2.0 ** (exponent - 8)
        values.append(normal if exponent else mantissa * 2.0**-10)
    values[127] = 0.0
    return torch.tensor(values, dtype=torch.float32, device=device)
