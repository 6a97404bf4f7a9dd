"""Float32 to compute in, piece by piece, rounded once into the result."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ckptd.quant.kernels import steps


def pieces(out: torch.Tensor, *, step: int = 1) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield rows of `out` and float32 of their shape, `(rows, columns)` and contiguous, to fill.

    Whatever is in it when the next piece is asked for is rounded into `out`. A result in float32
    is filled itself. The rows of pieces are whole `step`s, but for the last.
    """
    room: torch.Tensor | None = None
    for rows in steps.of_rows(out.shape[0], out.shape[1], out.device, step=step):
        if out.dtype is torch.float32:
            yield rows, out[rows]
            continue
        if room is None:  # the first piece is the largest
            room = out.new_empty(out[rows].shape, dtype=torch.float32)
        x = room[: rows.stop - rows.start]
        yield rows, x
        out[rows].copy_(x)
