"""The mathematics of new rows: a normal distribution around the mean of the old ones.

Pure functions on torch tensors, for the stream's blocks and for modules in memory alike. Values
depend on the seed, the row number and the source alone, never on the device's generator or on how
the work is divided: randomness comes from CPU generators seeded by group of rows and by step.

The documented behaviour of `resize_token_embeddings` with `mean_resizing` is a normal distribution
with the mean of the old rows and their covariance (divided by n) times 1e-9, or the mean exactly
where that covariance is not positive definite. Instead of a covariance matrix and its Cholesky
factor, one pass computes `(W - mu)^T z` for independent normal z of length n:
`mu + sqrt(1e-9 / n) (W - mu)^T z` has that distribution exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch

from ckptd.plan.blocks import GROWN_GROUP_ROWS, STATISTICS_BYTES

COVARIANCE_SCALE = 1e-9
"""The factor on the old rows' covariance; transformers' `resize_token_embeddings` has the same."""


def step_rows(width: int) -> int:
    """Return how many source rows of `width` elements make one statistics step."""
    return max(1, STATISTICS_BYTES // (4 * max(1, width)))


def around_mean(
    steps: Iterable[torch.Tensor],
    *,
    num_rows: int,
    first: int,
    num_new: int,
    seed: int,
    device: torch.device,
) -> torch.Tensor:
    """Return new rows `(num_new, width)` in float32 on `device`.

    Args:
        steps: all source rows in order, each step `(rows, width)` in float32 on `device`, of
            `step_rows(width)` rows but for the last.
        num_rows: how many rows that are, at least one.
        first: the number of the first new row, counted from the end of the source.
        num_new: how many to make.
        seed: of the values.
        device: where the work is done.
    """
    groups = _groups(first, num_new)
    sums: _Sums | None = None
    for step, rows in enumerate(steps, start=1):
        if sums is None:
            sums = _Sums(len(groups) * GROWN_GROUP_ROWS, rows.shape[1], device)
        sums.take(rows)
        for place, group in enumerate(groups):
            noise = _group_noise(seed, group, step=step, width=len(rows)).to(device)
            here = slice(place * GROWN_GROUP_ROWS, (place + 1) * GROWN_GROUP_ROWS)
            sums.scatter[here] += noise @ rows
            sums.weight[here] += noise.sum(1, keepdim=True)
    assert sums is not None
    mean = (sums.total / num_rows).to(torch.float32)
    if num_rows <= len(mean) or bool((sums.low == sums.high).any()):
        return mean.expand(num_new, len(mean))
    scale = math.sqrt(COVARIANCE_SCALE / num_rows)
    spread = sums.scatter.addcmul_(sums.weight, mean, value=-1).mul_(scale).add_(mean)
    start = first - groups[0] * GROWN_GROUP_ROWS
    return spread[start : start + num_new]


def around_bias_mean(old: torch.Tensor, *, first: int, num_new: int, seed: int) -> torch.Tensor:
    """Return new elements `(num_new,)` in float64 for a bias: its mean, 1e-9 of its deviation."""
    values = old.flatten().to(torch.float64)
    std = values.std() if values.numel() > 1 else values.new_zeros(())
    noise = normal(first=first, num_new=num_new, width=1, seed=seed).flatten().to(values)
    return noise.mul_(COVARIANCE_SCALE * std).add_(values.mean())


def normal(*, first: int, num_new: int, width: int, seed: int) -> torch.Tensor:
    """Return standard normal values `(num_new, width)` in float32 on the CPU."""
    out = torch.empty((num_new, width))
    for group in _groups(first, num_new):
        begin = group * GROWN_GROUP_ROWS - first
        rows = _group_noise(seed, group, step=0, width=width)
        low, high = max(0, begin), min(len(out), begin + GROWN_GROUP_ROWS)
        out[low:high] = rows[low - begin : high - begin]
    return out


def steps_of(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the rows of a matrix `(rows, width)` in memory as `around_mean` takes them."""
    size = step_rows(matrix.shape[1])
    for start in range(0, len(matrix), size):
        yield matrix[start : start + size].to(torch.float32)


class _Sums:
    """What one pass over the source gathers, on the device."""

    def __init__(self, num_new: int, width: int, device: torch.device) -> None:
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.low = torch.full((width,), math.inf, device=device)
        self.high = torch.full((width,), -math.inf, device=device)
        self.scatter = torch.zeros((num_new, width), device=device)
        self.weight = torch.zeros((num_new, 1), device=device)

    def take(self, rows: torch.Tensor) -> None:
        self.total += rows.sum(0, dtype=torch.float64)
        self.low = torch.minimum(self.low, rows.amin(0))
        self.high = torch.maximum(self.high, rows.amax(0))


def _groups(first: int, num_new: int) -> range:
    """The groups of rows that the new rows belong to."""
    return range(first // GROWN_GROUP_ROWS, (first + num_new - 1) // GROWN_GROUP_ROWS + 1)


def _group_noise(seed: int, group: int, *, step: int, width: int) -> torch.Tensor:
    """Standard normal values (rows of a group, width), by seed, group and statistics step alone."""
    generator = torch.Generator().manual_seed(_mix(seed, group, step))
    return torch.randn((GROWN_GROUP_ROWS, width), generator=generator)


def _mix(*numbers: int) -> int:
    """A 63-bit seed from small numbers (splitmix64 finalizer, Steele et al. 2014)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1
