"""Computing expressions with torch: read blocks, evaluate them on a device, give bytes back.

The only module of the plan that imports torch; it is loaded when a plan computes something. Blocks
are self-contained expressions, so that any number of them can be in flight; the bytes of a batch
lie in two buffers of a pool, sources in one and results in the other, until the batch is released.
Values never depend on how a tensor was divided into blocks; those of new rows are `plan.grown`'s.
"""

from __future__ import annotations

import itertools
import math
import mmap
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.writer import DIRECT_UNIT, MIN_DIRECT_BYTES
from ckptd.errors import CheckFailed
from ckptd.plan import changed, decoded, expression, grown
from ckptd.plan.blocks import Block
from ckptd.plan.buffers import BufferPool
from ckptd.plan.nodes import (
    Cast,
    Changed,
    Columns,
    Concat,
    Decode,
    Expression,
    Grown,
    Load,
    LowRank,
    NewRows,
    Reading,
    Tiles,
    View,
)
from ckptd.plan.sources import Sources
from ckptd.quant.parts import Window

_ALIGNMENT_BYTES = 64
"""Where a block begins in a buffer: wide enough for every dtype and for vector loads."""


@dataclass(frozen=True, slots=True)
class Staged:
    """Blocks with the bytes they need, as flat uint8 tensors, and room for their results.

    The tensors are views of `buffers`, which belong to the batch until it is released.
    """

    blocks: Sequence[Block]
    loaded: dict[Reading, torch.Tensor]
    results: list[torch.Tensor]
    buffers: list[torch.Tensor]


class Evaluator:
    """Reads and evaluates blocks on one device; its methods block and may run in any threads."""

    def __init__(self, *, device: str, sources: Sources) -> None:
        self._device = torch.device(device)
        self._sources = sources
        self._pinned = self._device.type == "cuda"
        self._pool = BufferPool(_pinned_memory if self._pinned else _private_memory)
        self._norms: dict[LowRank, torch.Tensor] = {}
        self._norms_lock = threading.Lock()

    def read(self, blocks: Sequence[Block], *, results: bool = True) -> Staged:
        """Return `blocks` with everything they load read into host memory.

        `results` says whether there is to be room for what they evaluate to, as `compute` needs.

        Raises:
            SourceChanged: a source ended early.
        """
        sources, loaded = self._load(
            reading for block in blocks for reading in expression.loads(block.value)
        )
        if not results:
            return Staged(blocks, loaded, [], [sources])
        made = [0 if isinstance(block.value, Load) else block.nbytes for block in blocks]
        values, places = self._room(made, [_phase(block) for block in blocks])
        return Staged(blocks, loaded, places, [sources, values])

    def compute(self, staged: Staged) -> list[memoryview]:
        """Return the bytes of each staged block, in order; they live until `release`.

        Raises:
            CheckFailed: a finite value does not fit the dtype it is cast to.
        """
        with torch.inference_mode():
            return [
                self._bytes_of(block, staged.loaded, result)
                for block, result in zip(staged.blocks, staged.results, strict=True)
            ]

    def compute_into(self, staged: Staged, targets: Sequence[torch.Tensor]) -> None:
        """Write each staged block into its target: of its shape and dtype, contiguous, anywhere.

        Work on a CUDA device may still be under way on the current stream.

        Raises:
            CheckpointCorrupt: a scale is infinite or not a number.
            CheckFailed: a finite value does not fit the dtype it is cast to.
        """
        for block, target in zip(staged.blocks, targets, strict=True):
            if block.nbytes:
                self._put(target, block.value, staged.loaded, block.tensor)

    def release(self, staged: Staged) -> None:
        """Take back the memory of a batch whose bytes nobody needs any more."""
        for buffer in staged.buffers:
            self._pool.give(buffer, len(buffer))

    def _load(
        self, readings: Iterable[Reading]
    ) -> tuple[torch.Tensor, dict[Reading, torch.Tensor]]:
        """Return a buffer with the bytes of `readings`, and a view of it for each of them."""
        wanted = dict.fromkeys(readings)
        buffer, places = self._room([reading.nbytes for reading in wanted], [None] * len(wanted))
        loaded = dict(zip(wanted, places, strict=True))
        for reading, place in loaded.items():
            if not reading.nbytes:
                continue
            if isinstance(reading, Window):
                self._sources.gather(place.numpy().data, reading)
            else:
                self._sources.read_into(place.numpy().data, reading)
        return buffer, loaded

    def _room(
        self, sizes: Sequence[int], phases: Sequence[int | None]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return a buffer and a view of it for each of `sizes`, none on a shared cache line.

        Each begins its phase after a multiple of `DIRECT_UNIT`, or anywhere without one.
        """
        places, end = [], 0
        for size, phase in zip(sizes, phases, strict=True):
            if phase is not None:
                end += (phase - end) % DIRECT_UNIT
            places.append((end, size))
            end += -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        buffer = self._pool.take(end)
        return buffer, [buffer[start : start + size] for start, size in places]

    def _bytes_of(
        self, block: Block, loaded: dict[Reading, torch.Tensor], result: torch.Tensor
    ) -> memoryview:
        if isinstance(block.value, Load):
            result = loaded[block.value.extent]
        elif block.nbytes:
            out = result.view(_torch_dtype(block.value.dtype)).view(block.value.shape)
            try:
                self._put(out, block.value, loaded, block.tensor)
            except CheckFailed:
                self._refuse(block, out, loaded)
                raise
        return result.numpy().data if block.nbytes else memoryview(b"")

    def _refuse(self, block: Block, out: torch.Tensor, loaded: dict[Reading, torch.Tensor]) -> None:
        """Raise what a block of several tensors failed of as the first at fault would have failed."""
        sizes = [expression.numel(cast.value) for cast in block.joined]
        if sizes and isinstance(block.value, Cast):
            source = self._value(block.value.source, loaded, block.tensor)
            halves = (torch.split(out, sizes), torch.split(source, sizes))
            for cast, own, part in zip(block.joined, *halves, strict=True):
                _cast_into(own, part.to(own.device), block.value.dtype, cast.tensor)

    def _put(
        self, out: torch.Tensor, value: Expression, loaded: dict[Reading, torch.Tensor], tensor: str
    ) -> None:
        """Write `value` into `out`; directly, part by part, where that is on the device."""
        if out.device != self._device:
            out.copy_(self._value(value, loaded, tensor))
            return
        match value:
            case Cast(source=inner):
                _cast_into(out, self._value(inner, loaded, tensor), value.dtype, tensor)
            case Decode() if out.is_contiguous():
                decoded.into(out, value, loaded, tensor)
            case View(source=inner) if out.is_contiguous():
                self._put(out.view(inner.shape), inner, loaded, tensor)
            case Concat(parts=parts, axis=axis):
                ends = itertools.accumulate(part.shape[axis] for part in parts)
                for part, end in zip(parts, ends, strict=True):
                    place = out.narrow(axis, end - part.shape[axis], part.shape[axis])
                    self._put(place, part, loaded, tensor)
            case Tiles(parts=tiles):
                for tile in tiles:
                    box = zip(tile.at, tile.source.shape, strict=True)
                    place = out[tuple(slice(at, at + length) for at, length in box)]
                    self._put(place, tile.source, loaded, tensor)
            case _:
                out.copy_(self._value(value, loaded, tensor))

    def _value(
        self, value: Expression, loaded: dict[Reading, torch.Tensor], tensor: str
    ) -> torch.Tensor:
        match value:
            case Load(extent=extent):
                raw = loaded[extent].to(self._device)
                return raw.view(_torch_dtype(value.dtype)).view(value.shape)
            case Cast(source=inner):
                source = self._value(inner, loaded, tensor)
                out = torch.empty_like(source, dtype=_torch_dtype(value.dtype))
                _cast_into(out, source, value.dtype, tensor)
                return out
            case Decode() | Concat() | Tiles():
                out = torch.empty(value.shape, dtype=_torch_dtype(value.dtype), device=self._device)
                self._put(out, value, loaded, tensor)
                return out
            case View(source=inner):
                return self._value(inner, loaded, tensor).view(value.shape)
            case Columns(source=inner, first=first, step=step, count=count):
                stop = first + step * (count - 1) + 1 if count else first
                picked = self._value(inner, loaded, tensor)[:, first:stop:step]
                return picked.T if value.turned else picked
            case LowRank():
                return self._merged(value, loaded, tensor)
            case Changed():
                return self._changed(value, loaded, tensor)
            case Grown():
                new = self._grown(value, tensor)
                return new.to(_torch_dtype(value.dtype)).view(value.shape)

    def _merged(
        self, value: LowRank, loaded: dict[Reading, torch.Tensor], tensor: str
    ) -> torch.Tensor:
        """Return base and adapter together, computed in float32."""
        base, rows = self._summed(value, loaded, tensor)
        if value.magnitude is not None:
            length = self._value(value.magnitude, loaded, tensor).to(torch.float32).flatten()
            if value.whole is None:
                rows.mul_((length / rows.norm(dim=1)).unsqueeze(1))
            else:
                rows.mul_(length / self._column_norms(value.whole, tensor))
        out = torch.empty_like(base, dtype=_torch_dtype(value.dtype))
        _cast_into(out, base, value.dtype, tensor)
        return out

    def _changed(
        self, value: Changed, loaded: dict[Reading, torch.Tensor], tensor: str
    ) -> torch.Tensor:
        """Return a weight changed in float32."""
        base = self._value(value.base, loaded, tensor).to(torch.float32, copy=True)
        by_row = [self._value(one, loaded, tensor).to(torch.float32) for one in value.by_row]
        whole = [self._value(one, loaded, tensor).to(torch.float32) for one in value.whole]
        rows = base.view(-1, value.width)
        changed.apply(
            rows, value.change, by_row, whole,
            scale=value.scale, first=value.first, numbers=value.numbers,
        )  # fmt: skip
        out = torch.empty_like(base, dtype=_torch_dtype(value.dtype))
        _cast_into(out, base, value.dtype, tensor)
        return out

    def _summed(
        self, value: LowRank, loaded: dict[Reading, torch.Tensor], tensor: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return base plus adapter in float32, and a view of it as a matrix."""
        up = self._value(value.up, loaded, tensor).to(torch.float32)
        base = self._value(value.base, loaded, tensor).to(torch.float32, copy=True)
        rows = base.view(len(up), -1)
        if value.down is None:
            rows.add_(up.reshape(rows.shape), alpha=value.scale)
            return base, rows
        down = self._value(value.down, loaded, tensor).to(torch.float32)
        rows.addmm_(up, down.reshape(down.shape[0], -1), alpha=value.scale)
        return base, rows

    def _column_norms(self, whole: LowRank, tensor: str) -> torch.Tensor:
        """Return the length of each column of the sum, in float32: one pass over it, once."""
        with self._norms_lock:
            if whole not in self._norms:
                num_rows, width = whole.up.shape[0], expression.numel(whole) // whole.up.shape[0]
                squares = torch.zeros(width, dtype=torch.float64, device=self._device)
                step = grown.step_rows(width)
                for start in range(0, num_rows, step):
                    stop = min(start + step, num_rows)
                    part = expression.rows(whole, start, stop, axis=whole.axis)
                    assert isinstance(part, LowRank)
                    buffer, loaded = self._load(expression.loads(part))
                    rows = self._summed(part, loaded, tensor)[1]
                    squares += rows.square().sum(0, dtype=torch.float64)
                    self._pool.give(buffer, len(buffer))
                self._norms[whole] = squares.sqrt().to(torch.float32)
            return self._norms[whole]

    def _grown(self, value: Grown, tensor: str) -> torch.Tensor:
        """Return the new rows in host memory and in float32 or wider, of any shape."""
        num_rows, num_new = value.source.shape[value.axis], value.shape[value.axis]
        width = math.prod(value.shape[value.axis + 1 :])
        if value.method is NewRows.NORMAL:
            made = grown.normal(
                first=value.first, num_new=num_new, width=width, seed=value.seed
            ).mul_(value.std)
        elif value.method is NewRows.ZERO or num_rows == 0:
            made = torch.zeros(value.shape)
        elif value.method is NewRows.MEAN:
            made = grown.around_mean(
                self._source_rows(value, width, tensor),
                num_rows=num_rows,
                first=value.first,
                num_new=num_new,
                seed=value.seed,
                device=self._device,
            )
        else:
            old = torch.cat(list(self._source_rows(value, 1, tensor)))
            made = grown.around_bias_mean(old, first=value.first, num_new=num_new, seed=value.seed)
        return made.cpu()

    def _source_rows(self, value: Grown, width: int, tensor: str) -> Iterator[torch.Tensor]:
        """Yield the source's rows in float32 on the device, a step at a time."""
        num_rows = value.source.shape[value.axis]
        step = grown.step_rows(width)
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            part = expression.rows(value.source, start, stop, axis=value.axis)
            buffer, loaded = self._load(expression.loads(part))
            rows = self._value(part, loaded, tensor).reshape(-1, width).to(torch.float32, copy=True)
            self._pool.give(buffer, len(buffer))
            yield rows


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


def _cast_into(out: torch.Tensor, source: torch.Tensor, dtype: Dtype, tensor: str) -> None:
    """Write `source` into `out`, each value rounded once to its `dtype`.

    Raises:
        CheckFailed: a finite value is beyond the largest of `dtype`.
    """
    out.copy_(source)
    if not (dtype.is_plain_float and source.is_floating_point() and out.numel()):
        return
    if torch.finfo(out.dtype).max >= torch.finfo(source.dtype).max:
        return
    low, high = torch.aminmax(out)
    if bool(torch.isfinite(low) & torch.isfinite(high)):
        return
    lost = int((torch.isinf(out) & torch.isfinite(source)).sum())
    if lost:
        raise CheckFailed(
            f"tensor {tensor!r}: {lost} values are too large for {dtype.torch_name}",
            check="cast",
            hint="cast to a wider dtype, or leave this tensor as it is with `keep`",
        )


def _phase(block: Block) -> int | None:
    """Return where in a unit the result should lie, so that it is written past the page cache."""
    phase = block.offset % DIRECT_UNIT
    aligned = phase * 8 % max(8, block.value.dtype.bits) == 0
    return phase if aligned and block.nbytes >= MIN_DIRECT_BYTES else None


def _torch_dtype(dtype: Dtype) -> torch.dtype:
    name = dtype.torch_name
    assert name is not None, dtype
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def _private_memory(capacity: int) -> torch.Tensor:
    """Memory of its own mapping: dropping it gives it back to the system, whatever thread did."""
    memory = mmap.mmap(-1, capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _pinned_memory(capacity: int) -> torch.Tensor:
    return torch.empty(capacity, dtype=torch.uint8, pin_memory=True)
