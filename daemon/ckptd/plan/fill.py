"""Reading a checkpoint's extents straight into their final memory.

The counterpart of the stream for a model that is loaded: the outputs are tensors that exist already
(a module's parameters), and nothing is written. Extents that lie side by side become runs, which a
few threads read with `preadv`, never through a mapping: a file that is truncated under a mapping
kills the process, one that is rewritten changes the model later. A run goes straight into the
tensors' own memory where dtype and order of elements agree; else through one of the two buffers of
its thread, which a cast or a copy to the device empties while the other one is filled. On CUDA the
buffers are pinned and the copies run on a stream of their own.

Whoever catches an exception from here has tensors with undefined values.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import Extent, FileStamp, StoredTensor, TensorSpec
from ckptd.errors import CheckpointUnsupported
from ckptd.plan.sources import MAX_BUFFERS, Sources

RUN_BYTES = 8 << 20
"""The most that one read takes: two threads share the work evenly, and a pinned buffer this long
keeps a PCIe link busy."""


@dataclass(frozen=True, slots=True)
class Filling:
    """A stored tensor and the tensor that takes its values: of the same shape, on any device.

    The values are cast where the dtypes differ.
    """

    source: StoredTensor
    target: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a filling that fits a buffer."""

    extent: Extent
    dtype: torch.dtype
    target: torch.Tensor

    @property
    def direct(self) -> bool:
        """Whether the bytes of the file are the bytes of the target's memory."""
        on_host = self.target.device.type == "cpu"
        return on_host and self.target.dtype == self.dtype and self.target.is_contiguous()


@dataclass(slots=True)
class _Run:
    """Pieces that lie side by side in one file and are moved alike."""

    extent: Extent
    pieces: list[_Piece]
    direct: bool
    device: torch.device

    def takes(self, piece: _Piece) -> bool:
        """Whether `piece` can become the end of this run."""
        mine, its = self.extent, piece.extent
        return (
            its.path == mine.path
            and its.offset == mine.offset + mine.nbytes
            and mine.nbytes + its.nbytes <= RUN_BYTES
            and len(self.pieces) < MAX_BUFFERS
            and piece.direct == self.direct
            and piece.target.device == self.device
        )

    def append(self, piece: _Piece) -> None:
        """Make `piece` the end of this run."""
        nbytes = self.extent.nbytes + piece.extent.nbytes
        self.extent = Extent(self.extent.path, self.extent.offset, nbytes)
        self.pieces.append(piece)


def fill(
    fillings: Iterable[Filling], *, stamps: Mapping[Path, FileStamp], num_threads: int = 2
) -> None:
    """Read every source into its target; blocks until all values are there.

    `stamps` are those of the files when their headers were read. Host memory beyond the targets is
    at most two buffers of `RUN_BYTES` a thread.

    Raises:
        SourceChanged: a file is not, or no longer, the one with that stamp.
        CheckpointUnsupported: torch has no such dtype.
        ValueError: shapes differ, or a target has no memory.
    """
    runs = _runs(piece for filling in fillings for piece in _pieces(filling))
    with Sources(stamps) as sources:
        _move_all(runs, sources, num_threads)
        sources.check()


def torch_dtype(stored: StoredTensor) -> torch.dtype:
    """Return the dtype of torch that `stored` has.

    Raises:
        CheckpointUnsupported: torch has none (packed types of fewer than 8 bits).
    """
    return as_torch(stored.spec, stored.extent.path)


def as_torch(spec: TensorSpec, path: Path) -> torch.dtype:
    """Return the dtype of torch that a tensor of the checkpoint at `path` has.

    Raises:
        CheckpointUnsupported: torch has none (packed types of fewer than 8 bits).
    """
    name = spec.dtype.torch_name
    dtype = getattr(torch, name, None) if name is not None else None
    if not isinstance(dtype, torch.dtype):
        raise CheckpointUnsupported(
            "torch cannot hold this dtype",
            path=path,
            tensor=spec.name,
            expected=f"one of {', '.join(d for d in Dtype if d.torch_name is not None)}",
            found=str(spec.dtype),
            hint="dequantize the checkpoint first, or update torch",
        )
    return dtype


def _pieces(filling: Filling) -> Iterator[_Piece]:
    source, target = filling.source, filling.target.detach()
    if tuple(target.shape) != source.spec.shape or target.device.type == "meta":
        raise ValueError(
            f"tensor {source.spec.name!r}: {source.spec.shape} cannot be read into a tensor "
            f"{tuple(target.shape)} on {target.device}"
        )
    if source.extent.nbytes:
        yield from _divided(_Piece(source.extent, torch_dtype(source), target))


def _divided(piece: _Piece) -> Iterator[_Piece]:
    """Yield `piece` in parts of at most `RUN_BYTES`, along its first dimension or flat."""
    target = piece.target
    if target.is_contiguous() and target.dim() != 1:
        target = target.view(-1)
    if piece.extent.nbytes <= RUN_BYTES:
        yield _Piece(piece.extent, piece.dtype, target)
        return
    row_bytes = piece.extent.nbytes // len(target)
    step = max(1, RUN_BYTES // row_bytes)
    for start in range(0, len(target), step):
        rows = target[start : start + step]
        offset = piece.extent.offset + start * row_bytes
        extent = Extent(piece.extent.path, offset, len(rows) * row_bytes)
        part = _Piece(extent, piece.dtype, rows if len(rows) > 1 or rows.dim() == 1 else rows[0])
        yield from _divided(part)


def _runs(pieces: Iterable[_Piece]) -> list[_Run]:
    runs: list[_Run] = []
    for piece in sorted(pieces, key=lambda one: (one.extent.path, one.extent.offset)):
        if runs and runs[-1].takes(piece):
            runs[-1].append(piece)
        else:
            runs.append(_Run(piece.extent, [piece], piece.direct, piece.target.device))
    return runs


def _move_all(runs: Sequence[_Run], sources: Sources, num_threads: int) -> None:
    """Move all runs, each by whichever thread is free; the first failure stops all threads."""
    todo = iter(runs)
    lock = threading.Lock()
    stop = threading.Event()
    ready = _ready_events(runs)

    def work() -> None:
        lane = _Lane(sources, ready)
        try:
            while not stop.is_set():
                with lock:
                    run = next(todo, None)
                if run is None:
                    break
                lane.move(run)
        finally:
            stop.set()
            lane.finish()

    if num_threads <= 1 or len(runs) <= 1:
        work()
        return
    with ThreadPoolExecutor(num_threads, thread_name_prefix="fill") as pool:
        try:
            for done in [pool.submit(work) for _ in range(num_threads)]:
                done.result()
        finally:
            stop.set()


def _ready_events(runs: Sequence[_Run]) -> dict[torch.device, torch.cuda.Event]:
    """Record, on the caller's streams, that the memory of CUDA targets may be written."""
    devices = {run.device for run in runs if run.device.type == "cuda"}
    return {device: torch.cuda.current_stream(device).record_event() for device in devices}


class _Lane:
    """What one thread keeps while it moves runs: two slots for each device it writes to."""

    def __init__(self, sources: Sources, ready: Mapping[torch.device, torch.cuda.Event]) -> None:
        self._sources = sources
        self._ready = ready
        self._slots: dict[torch.device, list[_Slot]] = {}

    def move(self, run: _Run) -> None:
        """Read a run into its targets, or into a slot whose copies may still be under way."""
        if run.direct:
            self._sources.scatter([_memory(piece.target) for piece in run.pieces], run.extent)
            return
        if run.device not in self._slots:
            self._slots[run.device] = self._new_slots(run.device)
        slots = self._slots[run.device]
        slot = slots.pop(0)
        slots.append(slot)
        slot.wait()
        self._sources.read_into(_memory(slot.buffer[: run.extent.nbytes]), run.extent)
        slot.send(run)

    def finish(self) -> None:
        """Wait until nothing is under way."""
        for slots in self._slots.values():
            for slot in slots:
                slot.wait()

    def _new_slots(self, device: torch.device) -> list[_Slot]:
        if device.type != "cuda":
            return [_Slot(), _Slot()]
        # torch leaves the constructor of its streams untyped.
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_event(self._ready[device])
        return [_CudaSlot(stream), _CudaSlot(stream)]


class _Slot:
    """A buffer in host memory; copies out of it are over when `send` returns."""

    def __init__(self) -> None:
        self.buffer = torch.empty(RUN_BYTES, dtype=torch.uint8)

    def wait(self) -> None:
        """Return when the buffer may be written again."""

    def send(self, run: _Run) -> None:
        """Put the values of the run, which is in the buffer, into its targets."""
        for piece, raw in self._parts(run):
            piece.target.copy_(_typed(raw, piece))

    def _parts(self, run: _Run) -> Iterator[tuple[_Piece, torch.Tensor]]:
        for piece in run.pieces:
            start = piece.extent.offset - run.extent.offset
            yield piece, self.buffer[start : start + piece.extent.nbytes]


class _CudaSlot(_Slot):
    """A pinned buffer; copies out of it run on a stream and are over when `wait` returns."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.buffer = torch.empty(RUN_BYTES, dtype=torch.uint8, pin_memory=True)
        self._stream = stream
        self._sent: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Return when the device has all that was sent."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self, run: _Run) -> None:
        """Start copies to the device; bytes cross as they are, casts are made there."""
        with torch.cuda.stream(self._stream):
            try:
                for piece, raw in self._parts(run):
                    if piece.target.dtype == piece.dtype and piece.target.is_contiguous():
                        target = piece.target.view(torch.uint8)
                        target.copy_(raw, non_blocking=True)
                    else:
                        there = raw.to(self._stream.device, non_blocking=True)
                        piece.target.copy_(_typed(there, piece))
            finally:
                self._sent = self._stream.record_event()


def _typed(raw: torch.Tensor, piece: _Piece) -> torch.Tensor:
    """Return the bytes `raw` as values in the shape of the piece's target."""
    if raw.data_ptr() % piece.dtype.itemsize or raw.storage_offset() % piece.dtype.itemsize:
        raw = raw.clone()
    return raw.view(piece.dtype).view(piece.target.shape)


def _memory(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the host, as bytes."""
    memory: memoryview = tensor.view(torch.uint8).numpy().data
    return memory
