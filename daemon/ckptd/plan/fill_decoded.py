"""Decoding quantized weights straight into their final memory.

The counterpart of `plan.fill` for weights that are computed: the outputs are tensors that exist
already (a module's parameters), on any device. Blocks of rows are read and decoded by a few
threads, each block into its rows of the target, by the evaluator and the kernels that the pipeline
uses: what a model gets is what the stage `dequantize` writes.

Whoever catches an exception from here has tensors with undefined values.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ckptd.checkpoint import dtypes
from ckptd.checkpoint.header import FileStamp
from ckptd.plan import blocks, dequantize, expression, plan
from ckptd.plan.blocks import Block
from ckptd.plan.evaluate import Evaluator
from ckptd.plan.sources import Sources
from ckptd.quant.formula import Arith
from ckptd.quant.group import Group

_GPU_THREADS = 2
"""One reads while the other copies."""
_MOST_THREADS = 8
"""The file system gives no more, and each holds its own block."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """A quantized weight and the floating tensor that takes its values, contiguous, of its shape.

    It is computed in float32 and rounded once, to the dtype of the target.
    """

    group: Group
    target: torch.Tensor


def fill(
    decodings: Iterable[Decoding],
    *,
    stamps: Mapping[Path, FileStamp],
    num_threads: int | None = None,
) -> None:
    """Decode every group into its target; blocks until all values are there.

    `stamps` are those of the files when their headers were read. `num_threads` is by default what
    torch computes with, from 2 to 8; on a GPU two keep it busy. Memory beyond the targets is what as
    many batches take, each of `blocks.BLOCK_BYTES` to twice that and a kernel's workspace. Meanwhile
    torch computes with one thread in all threads of this process.

    Raises:
        SourceChanged: a file is not, or no longer, the one with that stamp.
        CheckpointCorrupt: a scale is infinite or not a number.
        CheckFailed: a value is too large for float16, which is what the target has.
        ValueError: shapes differ, a target has no memory or is not contiguous.
    """
    by_device: dict[torch.device, list[Decoding]] = {}
    for decoding in decodings:
        _require_fitting(decoding)
        by_device.setdefault(decoding.target.device, []).append(decoding)
    if not by_device:
        return
    with Sources(stamps) as sources, _ONE_THREAD_EACH as most:
        for device, its in by_device.items():
            count = num_threads or (_GPU_THREADS if device.type == "cuda" else most)
            _decode_all(its, Evaluator(device=str(device), sources=sources), device, count)
        sources.check()


class _OneThreadEach:
    """While it is entered, by any number of threads, torch computes with one thread.

    A kernel's steps are too small to be divided: with two cores, one of them busy elsewhere, a
    second thread of torch's own made decoding 50 times slower. The setting is the process's.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entered = 0
        self._before = 1

    def __enter__(self) -> int:
        """Return how many threads decode well: as many as torch had, within limits."""
        with self._lock:
            if not self._entered:
                self._before = torch.get_num_threads()
                torch.set_num_threads(1)
            self._entered += 1
            return min(max(2, self._before), _MOST_THREADS)

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._entered -= 1
            if not self._entered:
                torch.set_num_threads(self._before)


_ONE_THREAD_EACH = _OneThreadEach()


def _require_fitting(decoding: Decoding) -> None:
    group, target = decoding.group, decoding.target
    fits = tuple(target.shape) == group.shape and target.is_contiguous()
    if not fits or target.device.type == "meta":
        raise ValueError(
            f"weight {group.name!r}: {group.shape} cannot be decoded into a tensor "
            f"{tuple(target.shape)} on {target.device}"
        )


def _segments(decodings: Iterable[Decoding]) -> Iterator[plan.Segment]:
    for decoding in decodings:
        dtype = dtypes.from_torch_name(str(decoding.target.dtype))
        value = dequantize.weight(decoding.group, dtype=dtype, arith=Arith.FLOAT32)
        yield from plan.segments_of([(decoding.group.name, value)])


def _decode_all(
    decodings: Sequence[Decoding], evaluator: Evaluator, device: torch.device, num_threads: int
) -> None:
    """Decode by batches, each by whichever thread is free; the first failure stops all threads."""
    batches = list(blocks.batches(_segments(decodings)))
    targets = {one.group.name: one.target.detach().view(-1) for one in decodings}
    todo = iter(batches)
    lock = threading.Lock()
    stop = threading.Event()
    cuda = device.type == "cuda"
    ready = torch.cuda.current_stream(device).record_event() if cuda else None

    def work() -> None:
        if ready is not None:
            torch.cuda.current_stream(device).wait_event(ready)
        try:
            while not stop.is_set():
                with lock:
                    batch = next(todo, None)
                if batch is None:
                    break
                _decode(batch, targets, evaluator)
        finally:
            stop.set()
            if cuda:
                torch.cuda.current_stream(device).synchronize()

    if num_threads <= 1 or len(batches) <= 1:
        work()
        return
    with ThreadPoolExecutor(num_threads, thread_name_prefix="decode") as pool:
        try:
            for done in [pool.submit(work) for _ in range(num_threads)]:
                done.result()
        finally:
            stop.set()


@torch.no_grad()
def _decode(
    batch: Sequence[Block], targets: Mapping[str, torch.Tensor], evaluator: Evaluator
) -> None:
    staged = evaluator.read(batch, results=False)
    try:
        evaluator.compute_into(staged, [_rows(targets[block.tensor], block) for block in batch])
    finally:
        evaluator.release(staged)


def _rows(flat: torch.Tensor, block: Block) -> torch.Tensor:
    """Return the elements of a flat target that a block is, in the block's shape."""
    start = block.offset // flat.itemsize
    return flat[start : start + expression.numel(block.value)].view(block.value.shape)
