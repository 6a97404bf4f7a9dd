"""Blocks whose codes choose points of a fixed grid: IQ1, IQ2, IQ3, and IQ4_XS with its levels.

A code names 4 or 8 neighbours at once; signs come beside it. The grids are those that ggml was
trained with (`gguf_grids.json`: levels, and for each point the places of its values among them).
Source: ggml's `dequantize_row_iq*` and the tables of its ggml-common.h.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from typing import Any

import torch

from ckptd.quant.kernels.gguf_fields import half, in_byte, scaled, typed, words
from ckptd.quant.kernels.gguf_legacy import IQ4_LEVELS, of_nibbles

_GRIDS_NAME = "gguf_grids.json"


def iq4_xs(blocks: torch.Tensor, x: torch.Tensor) -> None:
    """The levels of IQ4_NL; scales of 6 bits minus 32 for each 32 elements."""
    low = in_byte(blocks[:, 4:8], bits=4)
    high = in_byte(blocks[:, 2:4], bits=2)
    scales = low.bitwise_or_(high.bitwise_left_shift_(4)).sub_(32).view(torch.int8)
    codes = of_nibbles(blocks[:, 8:], IQ4_LEVELS, width=16)
    scaled(x, codes, half(blocks, 0) * scales)


def iq2_xxs(blocks: torch.Tensor, x: torch.Tensor) -> None:
    """For each 32 elements four codes of 8 bits, four of 7 bits for signs, a scale of 4 bits."""
    raw = blocks[:, 2:].reshape(-1, 8, 8)
    tail = words(raw[:, :, 4:].reshape(-1, 32), nbytes=4)
    codes = _points("IQ2_XXS", raw[:, :, :4].reshape(-1).int())
    signs = _even_signs(_sevens(tail))
    scaled(x, _signed(codes, signs, x), half(blocks, 0) * (_top_nibble(tail) + 0.5) * 0.25)


def iq2_xs(blocks: torch.Tensor, x: torch.Tensor) -> None:
    """For each 8 elements a code of 9 bits and 7 for signs; scales of 4 bits for each 16."""
    pairs = words(blocks[:, 2:66], nbytes=2)
    codes = _points("IQ2_XS", pairs.bitwise_and(511).view(-1))
    signs = _even_signs(pairs.bitwise_right_shift(9))
    scale = half(blocks, 0) * (in_byte(blocks[:, 66:], bits=4) + 0.5) * 0.25
    scaled(x, _signed(codes, signs, x), scale)


def iq2_s(blocks: torch.Tensor, x: torch.Tensor) -> None:
    """For each 8 elements a code of 10 bits and 8 signs; scales of 4 bits for each 16."""
    high = in_byte(blocks[:, 66:74], bits=2).int().bitwise_left_shift_(8)
    codes = _points("IQ2_S", high.bitwise_or_(blocks[:, 2:34]).view(-1))
    scale = half(blocks, 0) * (in_byte(blocks[:, 74:], bits=4) + 0.5) * 0.25
    scaled(x, _signed(codes, _signs(blocks[:, 34:66]), x), scale)


def iq3_xxs(blocks: torch.Tensor, x: torch.Tensor) -> None:
    """For each 4 elements a code of 8 bits; signs and scales as in IQ2_XXS."""
    tail = words(blocks[:, 66:], nbytes=4)
    codes = _points("IQ3_XXS", blocks[:, 2:66].flatten().int())
    scale = half(blocks, 0) * (_top_nibble(tail) + 0.5) * 0.5
    scaled(x, _signed(codes, _even_signs(_sevens(tail)), x), scale)


def iq3_s(blocks: torch.Tensor, x: torch.Tensor) -> None:
    """For each 4 elements a code of 8 bits and 1 more, 4 signs; scales of 4 bits for each 32."""
    high = in_byte(blocks[:, 66:74], bits=1).int().bitwise_left_shift_(8)
    codes = _points("IQ3_S", high.bitwise_or_(blocks[:, 2:66]).view(-1))
    scale = half(blocks, 0) * (in_byte(blocks[:, 106:], bits=4) * 2 + 1)
    scaled(x, _signed(codes, _signs(blocks[:, 74:106]), x), scale)


def iq1_s(blocks: torch.Tensor, x: torch.Tensor) -> None:
    """For each 8 elements a code of 8 bits and 3 more; a scale of 3 bits and a sign for each 32.

    `w = d * s * (point + delta)`, delta an eighth up or down: points are kept eight times as large.
    """
    high = words(blocks[:, 34:], nbytes=2)
    threes = _threes(high, x.device).bitwise_left_shift_(8).view(-1, 32)
    codes = _points("IQ1_S", threes.bitwise_or_(blocks[:, 2:34]).view(-1)).view(-1, 8, 32)
    down = high.bitwise_right_shift(15).to(torch.int8).unsqueeze(2)
    eighths = codes.mul_(8).add_(1).sub_(down * 2)
    scale = half(blocks, 0) * (high.bitwise_right_shift(12).bitwise_and_(7) * 2 + 1) * 0.125
    scaled(x, eighths.view(x.shape), scale)


def iq1_m(blocks: torch.Tensor, x: torch.Tensor) -> None:
    """As IQ1_S, scales for each 16, signs for each 8; `d` is in the top nibbles of the scales."""
    scales = words(blocks[:, 48:], nbytes=2)
    nibbles = in_byte(blocks[:, 32:48], bits=4)
    high = nibbles.bitwise_and(7).int().bitwise_left_shift_(8)
    codes = _points("IQ1_S", high.bitwise_or_(blocks[:, :32]).view(-1)).view(-1, 32, 8)
    down = nibbles.bitwise_right_shift(3).view(torch.int8).unsqueeze(2)
    eighths = codes.mul_(8).add_(1).sub_(down * 2)
    scale = iq1_m_scale(blocks) * (_threes(scales, x.device).view(-1, 16) * 2 + 1) * 0.125
    scaled(x, eighths.view(x.shape), scale)


def iq1_m_scale(blocks: torch.Tensor) -> torch.Tensor:
    """Return the float16 of each IQ1_M block, whose nibbles lie apart, as float32 `(number, 1)`."""
    high = blocks[:, 49::2] >> 4
    low = high[:, 0::2] | (high[:, 1::2] << 4)
    return typed(low, torch.float16).float()


def _signed(codes: torch.Tensor, signs: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return codes.view(x.shape).mul_(signs.view(x.shape))


def _top_nibble(tail: torch.Tensor) -> torch.Tensor:
    return tail.bitwise_right_shift(28).bitwise_and_(15)


def _sevens(tail: torch.Tensor) -> torch.Tensor:
    """Return the four fields of 7 bits in the low 28 of each word, `(number, words * 4)`."""
    shifts = torch.arange(0, 28, 7, dtype=torch.int32, device=tail.device)
    return (tail.unsqueeze(2) >> shifts).bitwise_and_(127).view(tail.shape[0], -1)


def _threes(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the four fields of 3 bits in the low 12 of each word, `(number, words, 4)`."""
    shifts = torch.arange(0, 12, 3, dtype=torch.int32, device=device)
    return (value.unsqueeze(2) >> shifts).bitwise_and_(7)


def _points(name: str, codes: torch.Tensor) -> torch.Tensor:
    """Return the grid's points for `codes`, int8, all in a row."""
    return _grid(name, codes.device).index_select(0, codes).view(torch.int8)


def _signs(bits: torch.Tensor) -> torch.Tensor:
    """Return -1 for each set bit of the bytes and 1 for others, int8 `(number, bits)`."""
    found = _sign_table(bits.device).index_select(0, bits.flatten().int())
    return found.view(torch.int8).view(bits.shape[0], -1)


def _even_signs(codes: torch.Tensor) -> torch.Tensor:
    """Return eight signs for each code of 7 bits; the eighth makes the number of -1 even."""
    parity = codes ^ (codes >> 4)
    parity = parity ^ (parity >> 2)
    parity = (parity ^ (parity >> 1)) & 1
    return _signs(codes | (parity << 7))


@functools.cache
def _sign_table(device: torch.device) -> torch.Tensor:
    """Return for each byte its eight signs, as one int64."""
    raw = torch.arange(256, dtype=torch.uint8).view(-1, 1)
    signs = 1 - 2 * in_byte(raw, bits=1).view(torch.int8)
    return signs.view(torch.int64).view(-1).to(device)


@functools.cache
def _grid(name: str, device: torch.device) -> torch.Tensor:
    """Return the points of a grid, each as one integer of 4 or 8 bytes."""
    grid = _grids()[name]
    levels = torch.tensor(grid["levels"], dtype=torch.int8)
    places = torch.frombuffer(bytearray(grid["entries"], "ascii"), dtype=torch.uint8).sub_(ord("0"))
    word = torch.int64 if grid["width"] == 8 else torch.int32
    return levels.index_select(0, places.int()).view(word).to(device)


@functools.cache
def _grids() -> dict[str, Any]:
    """Return what the file of grids says."""
    source = importlib.resources.files("ckptd.quant.kernels") / _GRIDS_NAME
    found: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    return found
