"""Codes of 1 to 8 bits out of little-endian words, one byte each: shifts and masks over whole rows.

A byte or a word's bits are widened to an integer that holds four codes, which a few shifts and
masks spread to a byte each: every step is element-wise over contiguous memory, without tables.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch.nn import functional

_PERIOD = 32
"""So many codes of `bits` bits fill exactly `bits` words."""


class Room:
    """Memory to unpack in, kept from one tile to the next: fresh pages cost more than the work."""

    def __init__(self, device: torch.device) -> None:
        self._pair = [torch.empty(0, dtype=torch.int16, device=device) for _ in range(2)]

    def pair(self, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
        """Return two `I16` of `shape`, contiguous; what was returned before is void."""
        if self._pair[0].numel() < shape.numel():
            self._pair = [one.new_empty(shape.numel()) for one in self._pair]
        first, second = (one[: shape.numel()].view(shape) for one in self._pair)
        return first, second


def unpacked(
    raw: torch.Tensor, *, bits: int, columns: int, dense: bool = True, room: Room | None = None
) -> torch.Tensor:
    """Return the codes in `raw`, the bytes of words, as `U8` of `(rows, columns)`.

    `raw` is `U8` of (rows, bytes), each row on its own; `dense` says that codes may straddle words.
    The result may be a view of `raw`, or have rows that are not next to each other. Given a `room`,
    it may lie there until the next call.
    """
    if bits == 8:
        return raw[:, :columns]
    if not dense and 32 % bits:
        return _in_words(raw, bits, columns)
    if bits == 4:
        return _halved(raw, room or Room(raw.device))[:, :columns]
    if bits == 2:
        return _quartered(raw.to(torch.int32), 2)[:, :columns]
    if bits == 1:
        return _quartered(_halved(raw, Room(raw.device)).to(torch.int32), 1)[:, :columns]
    return _straddling(raw, bits, columns)


def _halved(raw: torch.Tensor, room: Room) -> torch.Tensor:
    """Return the low and the high nibble of every byte as two bytes."""
    wide, moved = room.pair(raw.shape)
    torch.bitwise_left_shift(wide.copy_(raw), 4, out=moved)
    return wide.bitwise_or_(moved).bitwise_and_(0x0F0F).view(torch.uint8)


def _quartered(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the four codes in the low `4 * bits` of each 32-bit integer; overwrites `value`.

    The halves go to 16 bits each, then the codes in them to 8: masks keep neighbours apart, and
    whatever stands above the four codes away.
    """
    half, mask = (1 << 2 * bits) - 1, (1 << bits) - 1
    high = (value << (16 - 2 * bits)).bitwise_and_(half << 16)
    value.bitwise_and_(half).bitwise_or_(high)
    torch.bitwise_left_shift(value, 8 - bits, out=high)
    high.bitwise_and_((mask << 8) * 0x00010001)
    value.bitwise_and_(mask * 0x00010001).bitwise_or_(high)
    return value.view(torch.uint8)


def _straddling(raw: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Return codes that straddle bytes, four by four, by planes of equal places in the periods.

    The words of one place lie together in a plane, so that all steps but the two transpositions
    run over contiguous memory.
    """
    periods = -(-columns // _PERIOD)
    missing = periods * bits * 4 - raw.shape[1]
    if missing > 0:
        raw = functional.pad(raw, (0, missing))
    held = raw[:, : periods * bits * 4].contiguous().view(torch.int32)
    words = held.view(-1, bits).T.contiguous()
    places = _Places.of(bits, raw.device)
    fours = words.index_select(0, places.word)
    fours.bitwise_right_shift_(places.right).bitwise_and_(places.unsigned)
    after = words.index_select(0, places.next_word)
    fours.bitwise_or_(after.bitwise_left_shift_(places.left))
    codes = _quartered(fours, bits).view(torch.int32)
    return codes.T.contiguous().view(torch.uint8).view(len(raw), -1)[:, :columns]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Places:
    """Where each of the eight fours of codes in a period begins, and how it is put together.

    `word` shifted `right`, without the copies of its sign (`unsigned`), has the first bits;
    `next_word` shifted `left` what follows, above the four codes where they do not straddle.
    """

    word: torch.Tensor
    next_word: torch.Tensor
    right: torch.Tensor
    left: torch.Tensor
    unsigned: torch.Tensor

    @classmethod
    @functools.cache
    def of(cls, bits: int, device: torch.device) -> _Places:
        """Return the places for codes of `bits`; `word` are I64 of (8,), the rest I32 of (8, 1)."""
        starts = torch.arange(8) * 4 * bits
        word, shift = starts // 32, starts % 32
        unsigned = torch.where(shift == 0, -1, (1 << 32 - shift.clamp(min=1)) - 1)
        return cls(
            word=word.to(device),
            next_word=(word + 1).clamp(max=bits - 1).to(device),
            right=shift[:, None].to(device, torch.int32),
            left=(32 - shift).clamp(max=31)[:, None].to(device, torch.int32),
            unsigned=unsigned[:, None].to(device, torch.int32),
        )


def _in_words(raw: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Return codes of which each word holds as many as fit, from its low bits on."""
    in_word = 32 // bits
    words = raw.view(torch.int32)
    codes = torch.empty((*words.shape, in_word), dtype=torch.uint8, device=raw.device)
    for place in range(in_word):
        codes[:, :, place] = (words >> place * bits) & (1 << bits) - 1
    return codes.flatten(1)[:, :columns]
