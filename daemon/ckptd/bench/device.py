"""The limits of a CUDA device: to it, from it, and within its memory. Imports torch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ckptd.bench.limits import TURNS, Limit

_BYTES = 256 << 20


def measure(device: str) -> tuple[Limit, ...]:
    """Return the limits of `device`, a CUDA device that is there."""
    host = torch.empty(_BYTES, dtype=torch.uint8, pin_memory=True)
    one, other = (torch.empty(_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    pinned = "pinned memory, one stream"
    return (
        _limit("host to device", lambda: one.copy_(host, non_blocking=True), what=pinned),
        _limit("device to host", lambda: host.copy_(one, non_blocking=True), what=pinned),
        _limit("device memory", lambda: other.copy_(one), what="a copy, read and written"),
    )


def _limit(name: str, call: Callable[[], torch.Tensor], *, what: str) -> Limit:
    best = 0.0
    call()
    for _ in range(TURNS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call] # torch has no types for it
        begin.record()
        call()
        end.record()
        end.synchronize()
        best = max(best, _BYTES / (begin.elapsed_time(end) / 1000))
    moved = 2 if name == "device memory" else 1
    return Limit(name=name, bytes_per_s=moved * best, what=what)
