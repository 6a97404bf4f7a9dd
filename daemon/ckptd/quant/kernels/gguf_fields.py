"""Bit fields of GGUF blocks: codes and scales that share bytes, unpacked side by side.

Codes are worked on eight bytes at a time, as int64 `(units, number * 2)`: rows of 16 bytes of each
block, so that every operation runs over long rows whatever the size of a block. `bytes_of` turns
them back. Fields stay in their bytes: shifts from one byte into the next are masked away.
Tables are made once a device.
"""

from __future__ import annotations

import functools

import torch

_EACH_BYTE = 0x0101010101010101
_EACH_BYTE_OF_4 = 0x01010101


def half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """Return the float16 at byte `at` (even) of each block, as float32 `(number, 1)`."""
    return typed(blocks, torch.float16)[:, at // 2].float().unsqueeze(1)


def typed(raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return bytes `(number, bytes)` as values of `dtype`: a copy where they are not contiguous,
    or not aligned.
    """
    if not raw.is_contiguous() or raw.storage_offset() % dtype.itemsize:
        raw = raw.clone(memory_format=torch.contiguous_format)
    return raw.view(-1).view(dtype).view(raw.shape[0], -1)


def packed(raw: torch.Tensor) -> torch.Tensor:
    """Return bytes `(number, bytes)`, 16 times `units` of them, as int64 `(units, number * 2)`."""
    return _exchanged(typed(raw, torch.complex128))


def bytes_of(words: torch.Tensor) -> torch.Tensor:
    """Return the bytes of int64 `(units, number * 2)` as `U8 (number, units * 16)`."""
    return _exchanged(words.view(torch.complex128)).view(torch.uint8)


def fields(words: torch.Tensor, *, bits: int, width: int) -> torch.Tensor:
    """Return fields of `bits`, a byte each: the lowest of `width` bytes first, then the next ones.

    `(units, number * 2)` becomes `(units * 8 / bits, number * 2)`. The lowest fields of the first
    `width` bytes (a multiple of 16) come first, then the next ones of the same bytes; after them
    the next `width` bytes.
    """
    grouped = words.view(-1, 1, width // 16, words.shape[1])
    shifted = grouped >> _shifts(bits, words.device)
    return shifted.bitwise_and_(((1 << bits) - 1) * _EACH_BYTE).flatten(0, 2)


def merged(low: torch.Tensor, high: torch.Tensor, *, at: int) -> torch.Tensor:
    """Return `low` (overwritten) with `high` (overwritten) from bit `at` of each byte on."""
    return low.bitwise_or_(high.bitwise_left_shift_(at))


def in_byte(raw: torch.Tensor, *, bits: int) -> torch.Tensor:
    """Return fields of `bits` of bytes `(number, bytes)`, those of a byte side by side."""
    table = _spread(bits, raw.device)
    found = table.index_select(0, raw.flatten().int()).view(torch.uint8)
    return found.view(raw.shape[0], -1)


def words(raw: torch.Tensor, *, nbytes: int) -> torch.Tensor:
    """Return little-endian words of 2 or 4 bytes as int32 `(number, words)`."""
    if nbytes == 4:
        return typed(raw, torch.int32)
    return typed(raw, torch.int16).to(torch.int32).bitwise_and_(0xFFFF)


def scaled(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None = None
) -> None:
    """Write `codes * scale - minimum` into `x`, both `(number, elements)`.

    `scale` and `minimum` are float32 `(number, groups)`, one for so many neighbours each.
    """
    x.copy_(codes)
    grouped = x.view(x.shape[0], scale.shape[1], -1)
    grouped.mul_(scale.unsqueeze(2))
    if minimum is not None:
        grouped.sub_(minimum.unsqueeze(2))


def six_bit_pairs(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the 8 scales and 8 minima of 6 bits in the 12 bytes of Q4_K and Q5_K, as float32.

    The first four of each are the low bits of bytes 0 to 7. The others have their low four bits
    in the nibbles of bytes 8 to 11, and their high two at the top of the first eight bytes.
    """
    scale, minimum, nibbles = typed(raw, torch.int32).unbind(1)
    six, four, two = (bits * _EACH_BYTE_OF_4 for bits in (0x3F, 0x0F, 0x30))
    scales = (scale & six, (scale >> 2).bitwise_and_(two).bitwise_or_(nibbles & four))
    nibbles = (nibbles >> 4).bitwise_and_(four)
    minima = (minimum & six, (minimum >> 2).bitwise_and_(two).bitwise_or_(nibbles))
    return _floats(scales), _floats(minima)


def six_bit_scales(raw: torch.Tensor) -> torch.Tensor:
    """Return the 16 scales of 6 bits in the 12 bytes of Q3_K, `U8 (number, 16)`.

    Low nibbles of bytes 0 to 7 are the low bits of the first eight, high nibbles those of the
    others; the high two bits of scale `i` are field `i // 4` of byte `8 + i % 4`.
    """
    first, second, high = typed(raw, torch.int32).unbind(1)
    four, two = 0x0F * _EACH_BYTE_OF_4, 0x30 * _EACH_BYTE_OF_4
    parts = (
        (first & four) | ((high << 4) & two),
        (second & four) | ((high << 2) & two),
        ((first >> 4) & four) | (high & two),
        ((second >> 4) & four) | ((high >> 2) & two),
    )
    return torch.stack(parts, dim=1).view(torch.uint8)


def _floats(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.stack(parts, dim=1).view(torch.uint8).float()


def _exchanged(pairs: torch.Tensor) -> torch.Tensor:
    """Return 16-byte elements `(a, b)` as int64 `(b, a * 2)`.

    Complex numbers are the widest elements that torch moves; nothing is computed with them.
    """
    return pairs.t().clone(memory_format=torch.contiguous_format).view(torch.int64)


@functools.cache
def _shifts(bits: int, device: torch.device) -> torch.Tensor:
    return torch.arange(0, 8, bits, dtype=torch.int64, device=device).view(-1, 1, 1)


@functools.cache
def _spread(bits: int, device: torch.device) -> torch.Tensor:
    """Return for each byte its fields, as one integer of a byte for each."""
    raw = torch.arange(256, dtype=torch.int64).view(-1, 1)
    shifts = torch.arange(0, 8, bits, dtype=torch.int64)
    spread = ((raw >> shifts) & ((1 << bits) - 1)).to(torch.uint8)
    word = {1: torch.int64, 2: torch.int32, 4: torch.int16}[bits]
    return spread.view(word).view(-1).to(device)
