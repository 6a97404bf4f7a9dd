"""`(code - zero) * scale` for codes in bytes, with scales and zeros of groups along the columns.

Code minus zero is a small integer and its product with a scale of 16 bits is exact in float32, so
that one cast at the end rounds as a library does that multiplies in the scale's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ckptd.errors import CheckpointCorrupt
from ckptd.quant.kernels import grid, steps
from ckptd.quant.parts import Part

TILE_COLUMNS = 4096
"""About as many columns as are in hand at once on a CPU, in whole groups and words."""
TILE_ELEMENTS = steps.PIECE_ELEMENTS
"""Elements in hand at once on a CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """What belongs to each `(row, group)`, and which group a column is of.

    `scale` (float32) and `zero` are `(rows, groups)`; a zero is `U8` as the codes of `bits` are, or
    float32. One that is the same for all is 0-dimensional, and a whole number.
    `group` columns are one, unless `places` (int32) names each column's. A `scaled_zero` is added
    to the product instead. `divisor` is one value a column.
    """

    scale: torch.Tensor
    zero: torch.Tensor
    group: int
    bits: int
    places: torch.Tensor | None = None
    scaled_zero: bool = False
    divisor: torch.Tensor | None = None

    @property
    def step(self) -> int:
        """The columns of tiles are a multiple of this, whatever the tile."""
        return 1 if self.places is not None or self.scale.shape[1] == 1 else self.group

    def values(
        self, codes: torch.Tensor, room: torch.Tensor, rows: slice, columns: slice
    ) -> torch.Tensor:
        """Return `room`, float32 of the shape of `codes` and contiguous, with what they mean.

        `codes` (`U8`, overwritten) lie at `rows` and `columns`, which begin at a `step`.
        """
        in_bytes = self._in_bytes(codes)
        if in_bytes:
            self._spread(torch.sub, codes, self.zero[rows], columns)
            room.copy_(codes.view(torch.int8))
        else:
            room.copy_(self._less_zero(codes))
        if self.zero.ndim and not self.scaled_zero and not in_bytes:
            self._spread(torch.sub, room, self.zero[rows].float(), columns)
        self._spread(torch.mul, room, self.scale[rows], columns)
        if self.scaled_zero:
            self._spread(torch.add, room, self.zero[rows], columns)
        if self.divisor is not None:
            room.div_(self.divisor[columns])
        return room

    def _in_bytes(self, codes: torch.Tensor) -> bool:
        """Whether zeros can be subtracted from codes as bytes: the difference has 8 bits, too."""
        fits = self.zero.ndim > 0 and self.zero.dtype is torch.uint8 and self.bits < 8
        return fits and self.places is None and codes.is_contiguous()

    def _less_zero(self, codes: torch.Tensor) -> torch.Tensor:
        """Return codes less a zero that is the same for all, where there is one, as integers."""
        if self.zero.ndim:
            return codes
        zero = int(self.zero)
        if (1 << self.bits) - 128 <= zero <= 128:  # bytes wrap around: their difference is signed
            return codes.sub(zero).view(torch.int8)
        return codes.to(torch.int16).sub_(zero)

    def _spread(
        self, operation: grid.Operation, x: torch.Tensor, values: torch.Tensor, columns: slice
    ) -> None:
        if values.shape[1] == 1:
            operation(x, values, out=x)
        elif self.places is not None:
            operation(x, values.index_select(1, self.places[columns]), out=x)
        else:
            first = columns.start // self.group
            grid.apply(operation, x, values[:, first:], self.group)


class Work:
    """Float32 to compute in, allocated once for tiles of falling size."""

    def __init__(self, device: torch.device) -> None:
        self._room = torch.empty(0, device=device)

    def like(self, codes: torch.Tensor) -> torch.Tensor:
        """Return contiguous room of the shape of `codes`; what it returned before is void."""
        if self._room.numel() < codes.numel():
            self._room = self._room.new_empty(codes.numel())
        return self._room[: codes.numel()].view(codes.shape)


def zeros(values: torch.Tensor) -> torch.Tensor:
    """Return zeros as they are, 0-dimensional where all are the same, as symmetric ones are."""
    if not values.numel():
        return values
    first = values.reshape(-1)[0]
    return first if bool((values == first).all()) else values


def places(
    g_idx: torch.Tensor, part: Part, *, start: int, group: int, groups: int
) -> torch.Tensor | None:
    """Return the group of each column, or None where columns from `start` on are in order.

    Raises:
        CheckpointCorrupt: a group that has no scale.
    """
    if not g_idx.numel():
        return None
    low, high = (int(value) for value in torch.aminmax(g_idx))
    if low < 0 or high >= groups:
        raise CheckpointCorrupt(
            "names a group that has no scale",
            path=part.extent.path,
            tensor=part.name,
            expected=f"0 to {groups - 1}",
            found=f"{low} to {high}",
        )
    expected = torch.arange(start, start + len(g_idx), device=g_idx.device) // group
    if start % group == 0 and torch.equal(g_idx, expected.to(g_idx.dtype)):
        return None
    return g_idx


def tiles(
    rows: int, columns: int, *, steps: tuple[int, int], on_cpu: bool
) -> Iterator[tuple[slice, slice]]:
    """Yield rows and columns of tiles in whole `steps`: cache-sized ones on a CPU, else a single."""
    height, width = max(1, rows), max(1, columns)
    if on_cpu:
        width = min(width, math.ceil(TILE_COLUMNS / steps[1]) * steps[1])
        height = max(1, TILE_ELEMENTS // width // steps[0]) * steps[0]
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            yield slice(top, min(top + height, rows)), slice(left, min(left + width, columns))
