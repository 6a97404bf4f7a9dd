"""Computing expressions with torch: read blocks, evaluate them on a device, give bytes back.

The only module of the plan that imports torch; it is loaded when a plan computes something. Blocks
are self-contained expressions, so that any number of them can be in flight. Values never depend on
the device's generator or on how a tensor was divided into blocks: randomness comes from CPU
generators seeded by row group, statistics are taken over blocks of fixed size.

New rows around the mean follow the documented behaviour of `resize_token_embeddings` with
`mean_resizing`: a normal distribution with the mean of the old rows and their covariance (divided
by n) times 1e-9, or the mean exactly where that covariance is not positive definite. Instead of a
covariance matrix and its Cholesky factor, one pass computes `(W - mu)^T z` for independent normal
z of length n: `mu + sqrt(1e-9 / n) (W - mu)^T z` has that distribution exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import Extent
from ckptd.errors import CheckFailed
from ckptd.plan import expression
from ckptd.plan.blocks import GROWN_GROUP_ROWS, Block
from ckptd.plan.expression import Cast, Concat, Expression, Grown, Load, NewRows
from ckptd.plan.sources import Sources

COVARIANCE_SCALE = 1e-9
"""The factor on the old rows' covariance; transformers' `resize_token_embeddings` has the same."""
_STATISTICS_BYTES = 4 << 20
"""Source rows per statistics step, as float32 bytes; fixed, so that sums never depend on memory."""


@dataclass(frozen=True, slots=True)
class Staged:
    """Blocks with the bytes they need, as flat uint8 tensors in host memory."""

    blocks: Sequence[Block]
    loaded: dict[Extent, torch.Tensor]


class Evaluator:
    """Reads and evaluates blocks on one device; its methods block and may run in any threads."""

    def __init__(self, *, device: str, sources: Sources) -> None:
        self._device = torch.device(device)
        self._sources = sources
        self._pinned = self._device.type == "cuda"

    def read(self, blocks: Sequence[Block]) -> Staged:
        """Return `blocks` with everything they load read into host memory.

        Raises:
            SourceChanged: a source ended early.
        """
        loaded: dict[Extent, torch.Tensor] = {}
        for block in blocks:
            for extent in expression.loads(block.value):
                if extent not in loaded:
                    loaded[extent] = self._load(extent)
        return Staged(blocks, loaded)

    def compute(self, staged: Staged) -> list[memoryview]:
        """Return the bytes of each staged block, in order.

        Raises:
            CheckFailed: a finite value does not fit the dtype it is cast to.
        """
        with torch.inference_mode():
            return [
                _to_bytes(self._value(block.value, staged.loaded, block.tensor))
                for block in staged.blocks
            ]

    def _value(
        self, value: Expression, loaded: dict[Extent, torch.Tensor], tensor: str
    ) -> torch.Tensor:
        match value:
            case Load(extent=extent):
                raw = loaded[extent].to(self._device, non_blocking=self._pinned)
                return raw.view(_torch_dtype(value.dtype)).view(value.shape)
            case Cast(source=source):
                return _cast(self._value(source, loaded, tensor), value.dtype, tensor)
            case Concat(parts=parts):
                return torch.cat([self._value(part, loaded, tensor) for part in parts], value.axis)
            case Grown():
                return self._grown(value)

    def _load(self, extent: Extent) -> torch.Tensor:
        raw = torch.empty(extent.nbytes, dtype=torch.uint8, pin_memory=self._pinned)
        if extent.nbytes:
            self._sources.read_into(raw.numpy().data, extent)
        return raw

    def _grown(self, value: Grown) -> torch.Tensor:
        if value.method is NewRows.ZERO:
            new = torch.zeros(value.shape)
        elif value.method is NewRows.NORMAL:
            new = _noise(value, block=0, width=math.prod(value.shape[value.axis + 1 :])) * value.std
        elif value.method is NewRows.MEAN:
            new = self._around_mean(value)
        else:
            new = self._around_bias_mean(value)
        return new.to(_torch_dtype(value.dtype)).view(value.shape)

    def _around_mean(self, value: Grown) -> torch.Tensor:
        num_rows = value.source.shape[value.axis]
        width = math.prod(value.source.shape[value.axis + 1 :])
        if num_rows == 0:
            return torch.zeros(value.shape)
        device = self._device
        total = torch.zeros(width, dtype=torch.float64, device=device)
        low = torch.full((width,), math.inf, device=device)
        high = torch.full((width,), -math.inf, device=device)
        scatter = torch.zeros((value.shape[value.axis], width), device=device)
        weight = torch.zeros((value.shape[value.axis], 1), device=device)
        for number, rows in enumerate(self._source_rows(value, width)):
            total += rows.sum(0, dtype=torch.float64)
            low, high = torch.minimum(low, rows.amin(0)), torch.maximum(high, rows.amax(0))
            noise = _noise(value, block=number + 1, width=len(rows)).to(self._device)
            scatter += noise @ rows
            weight += noise.sum(1, keepdim=True)
        mean = (total / num_rows).to(torch.float32)
        if num_rows <= width or bool((low == high).any()):
            return mean.expand(value.shape[value.axis], width).cpu()
        spread: torch.Tensor = scatter - weight * mean
        spread *= math.sqrt(COVARIANCE_SCALE / num_rows)
        return spread.add_(mean).cpu()

    def _around_bias_mean(self, value: Grown) -> torch.Tensor:
        rows = torch.cat(list(self._source_rows(value, 1))).flatten().to(torch.float64)
        if rows.numel() == 0:
            return torch.zeros(value.shape)
        std = rows.std() if rows.numel() > 1 else rows.new_zeros(())
        noise = _noise(value, block=0, width=1).flatten().to(rows)
        return noise.mul_(COVARIANCE_SCALE * std).add_(rows.mean()).cpu()

    def _source_rows(self, value: Grown, width: int) -> Iterator[torch.Tensor]:
        num_rows = value.source.shape[value.axis]
        step = max(1, _STATISTICS_BYTES // (4 * max(1, width)))
        for start in range(0, num_rows, step):
            part = expression.rows(
                value.source, start, min(start + step, num_rows), axis=value.axis
            )
            loaded = {extent: self._load(extent) for extent in expression.loads(part)}
            yield self._value(part, loaded, "").reshape(-1, width).to(torch.float32)


def set_threads(count: int) -> None:
    """Use `count` threads for torch's own work on the CPU."""
    torch.set_num_threads(max(1, count))


def choose_device(wanted: str) -> str:
    """Return the device to compute on for a definition's `device`.

    Raises:
        CheckFailed: a CUDA device is asked for and not there.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda"):
        number = int(wanted.partition(":")[2] or 0)
        if number >= torch.cuda.device_count():
            raise CheckFailed(
                f"{wanted} is not there ({torch.cuda.device_count()} CUDA devices)",
                check="device",
                hint="set device: auto, or run where the GPU is visible",
            )
    return wanted


def _noise(value: Grown, *, block: int, width: int) -> torch.Tensor:
    """Standard normal values (new rows, width) that depend on seed, row group and block alone."""
    count = value.shape[value.axis]
    first_group = value.first // GROWN_GROUP_ROWS
    last_group = (value.first + count - 1) // GROWN_GROUP_ROWS
    groups = []
    for group in range(first_group, last_group + 1):
        generator = torch.Generator().manual_seed(_mix(value.seed, group, block))
        groups.append(torch.randn((GROWN_GROUP_ROWS, width), generator=generator))
    start = value.first - first_group * GROWN_GROUP_ROWS
    return torch.cat(groups)[start : start + count]


def _mix(*numbers: int) -> int:
    """A 63-bit seed from small numbers (splitmix64 finalizer, Steele et al. 2014)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1


def _cast(source: torch.Tensor, dtype: Dtype, tensor: str) -> torch.Tensor:
    result = source.to(_torch_dtype(dtype))
    if dtype is Dtype.F16 and source.dtype is not torch.float16:
        lost = int((torch.isinf(result) & torch.isfinite(source)).sum())
        if lost:
            raise CheckFailed(
                f"tensor {tensor!r}: {lost} values are too large for float16",
                check="cast",
                hint="cast to bfloat16, or leave this tensor as it is with `keep`",
            )
    return result


def _torch_dtype(dtype: Dtype) -> torch.dtype:
    name = dtype.torch_name
    assert name is not None, dtype
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def _to_bytes(value: torch.Tensor) -> memoryview:
    flat = value.to("cpu").contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
