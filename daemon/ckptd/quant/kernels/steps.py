"""Dividing a kernel's work into pieces that stay in the cache on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch

PIECE_ELEMENTS = 1 << 18
"""Elements that a kernel on the CPU has in hand at once: 512 KB in float32, within an L2 cache."""


def of_rows(num_rows: int, columns: int, device: torch.device, *, step: int = 1) -> Iterator[slice]:
    """Yield the rows in pieces of whole `step`s: all at once on a GPU, cache-sized on a CPU."""
    size = num_rows
    if device.type == "cpu":
        size = max(1, PIECE_ELEMENTS // max(1, columns * step)) * step
    for start in range(0, num_rows, max(1, size)):
        yield slice(start, min(start + size, num_rows))
