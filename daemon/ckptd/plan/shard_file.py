"""A file of a plan, read without ever having been written: header, verbatim runs, computed values.

What an upload needs of a file: it can be read from any place, again and again, and gives the same
bytes each time. Verbatim bytes come from the sources, computed ones from the evaluator, block by
block within a budget that all files of a job share, a few blocks ahead of the reader.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ckptd.checkpoint.header import Extent
from ckptd.plan import blocks, transfer
from ckptd.plan.blocks import Block
from ckptd.plan.budget import Closed, ThreadBudget
from ckptd.plan.plan import Run, Segment, ShardPlan
from ckptd.plan.sources import Sources
from ckptd.plan.stream import Evaluator, Meter

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BATCHES_AHEAD = 2
"""Batches of a file that are computed, or wait for it, while the one before them is read."""


class Feed:
    """What all files of a job are made with: sources, evaluator, budget, threads to compute in.

    `close` ends it: every read fails from then on, and none is under way when it returns.
    """

    def __init__(
        self,
        *,
        sources: Sources,
        evaluator: Evaluator | None,
        byte_budget: int,
        threads: int,
        meter: Meter,
    ) -> None:
        self.sources = sources
        self.evaluator = evaluator
        self.budget = ThreadBudget(byte_budget)
        self.meter = meter
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="shard-file")
        self._files: set[ShardFile] = set()
        self._lock = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """End all reading; safe to call again. Blocks until reads that are under way have ended."""
        with self._lock:
            self._closed = True
            files = list(self._files)
        self.budget.close()
        for file in files:
            file.close()
        self.pool.shutdown()

    def opened(self, file: ShardFile) -> None:
        """`file` is to be closed with this.

        Raises:
            Closed: it is closed already.
        """
        with self._lock:
            if self._closed:
                raise Closed("the job is over")
            self._files.add(file)

    def forgotten(self, file: ShardFile) -> None:
        """`file` was closed."""
        with self._lock:
            self._files.discard(file)


class Progress:
    """How far a shard was read, by whichever of its files: bytes read again count once."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._reached = 0
        self._lock = threading.Lock()

    @property
    def has_begun(self) -> bool:
        """Whether anything but the header was read."""
        return self._reached > 0

    def copied(self, start: int, stop: int) -> None:
        """These bytes were read from a source."""
        self._meter.add(read=self._new(start, stop))

    def made(self, start: int, stop: int, source_bytes: int) -> None:
        """These bytes were computed from `source_bytes`."""
        new = self._new(start, stop)
        self._meter.add(read=source_bytes * new // max(1, stop - start), computed=new)

    def _new(self, start: int, stop: int) -> int:
        with self._lock:
            new = max(0, stop - max(start, self._reached))
            self._reached = max(self._reached, stop)
        return new


@dataclass(slots=True, kw_only=True)
class _Held:
    """Bytes in memory: the parts of the file from `start` to `stop`, one after the other."""

    start: int
    stop: int
    parts: Sequence[memoryview]
    drop: Callable[[], None]

    def at(self, position: int) -> memoryview:
        """Return what is here from `position` on, some of it at least."""
        place = self.start
        for part in self.parts:
            if position < place + len(part):
                return part[position - place :]
            place += len(part)
        raise AssertionError(position)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flight:
    """A batch that is being computed."""

    blocks: Sequence[Block]
    share: int
    made: Future[tuple[Any, list[memoryview]]] = field(repr=False)

    @property
    def start(self) -> int:
        return self.blocks[0].offset

    @property
    def stop(self) -> int:
        return _stop(self.blocks)


class ShardFile(io.BufferedIOBase):
    """One output file of a plan, to be read. For one thread at a time; any may close it.

    `failed` is told why a read failed, before the failure is raised.
    """

    def __init__(
        self,
        shard: ShardPlan,
        feed: Feed,
        *,
        progress: Progress,
        failed: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        self._shard = shard
        self._feed = feed
        self._progress = progress
        self._failed = failed
        self._groups = list(blocks.groups(shard.segments))
        self._starts = [segments[0].offset for _, segments in self._groups]
        self._position = 0
        self._buffer: memoryview | None = None
        self._held: _Held | None = None
        self._ahead: deque[_Flight] = deque()
        self._coming: Iterator[list[Block]] = iter(())
        self._next: list[Block] | None = None
        self._lock = threading.RLock()
        self._over = False
        feed.opened(self)

    def readable(self) -> bool:
        """See `io.IOBase`."""
        return True

    def seekable(self) -> bool:
        """See `io.IOBase`."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Change the position and return it; reads nothing."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._shard.nbytes}
        if base[whence] + offset < 0:
            raise ValueError(f"negative position {base[whence] + offset}")
        self._position = base[whence] + offset
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        """Return `size` bytes, fewer only at the end; all that is left without a size.

        Raises:
            Closed: the file is closed, or the job over.
            SourceChanged: a source ended early, or is not the one that was planned with.
            CheckFailed, DeviceFailed: see `Evaluator`.
        """
        left = max(0, self._shard.nbytes - self._position)
        wanted = left if size is None or size < 0 else min(size, left)
        return b"".join(map(bytes, self._pieces(wanted)))

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Fill `buffer`, as far as there are bytes, and return their number; raises as `read`."""
        view = memoryview(buffer).cast("B")
        done = 0
        for piece in self._pieces(len(view)):
            view[done : done + len(piece)] = piece
            done += len(piece)
        return done

    def close(self) -> None:
        """Give back all memory; a read that is under way ends first."""
        with self._lock:
            if not self._over:
                self._over = True
                self._drop_held()
                self._drop_ahead()
                self._buffer = None
                self._feed.forgotten(self)
        super().close()

    def _pieces(self, wanted: int) -> Iterator[memoryview]:
        """Yield the next `wanted` bytes, each piece good until the next is asked for."""
        with self._lock:
            while wanted > 0 and self._position < self._shard.nbytes:
                try:
                    piece = self._piece(self._position)[:wanted]
                except Exception as error:
                    self._failed(error)
                    raise
                self._position += len(piece)
                wanted -= len(piece)
                yield piece

    def _piece(self, position: int) -> memoryview:
        if self._over:
            raise Closed("the file is closed")
        head = self._shard.head
        if position < len(head):
            return memoryview(head)[position:]
        held = self._held
        if held is None or not held.start <= position < held.stop:
            self._drop_held()
            is_computed, segments = self._groups[bisect.bisect_right(self._starts, position) - 1]
            own = self._computed if is_computed else self._copied
            held = self._held = own(segments, position)
        return held.at(position)

    def _copied(self, segments: Sequence[Segment], position: int) -> _Held:
        """Return a buffer full of a verbatim run."""
        self._drop_ahead()
        run = segments[_index(segments, position)]
        assert isinstance(run, Run)
        if self._buffer is None:
            self._buffer = memoryview(bytearray(transfer.BUFFER_BYTES))
        stop = min(run.offset + run.nbytes, position + len(self._buffer))
        part = self._buffer[: stop - position]
        place = Extent(run.source.path, run.source.offset + position - run.offset, len(part))
        self._feed.sources.read_into(part, place)
        self._progress.copied(position, stop)
        return _Held(start=position, stop=stop, parts=[part], drop=lambda: None)

    def _computed(self, segments: Sequence[Segment], position: int) -> _Held:
        """Return the computed batch that `position` lies in, and have the next ones computed."""
        if not (self._ahead and self._ahead[0].start <= position < self._ahead[0].stop):
            batch = self._batch(segments, position)
            self._launch(batch, self._feed.budget.take(_cost(batch)))
        flight = self._ahead.popleft()
        try:
            staged, values = flight.made.result()
        except BaseException:
            self._feed.budget.give(flight.share)
            raise
        self._launch_ahead()
        source_bytes = sum(block.source_bytes for block in flight.blocks)
        self._progress.made(flight.start, flight.stop, source_bytes)
        return _Held(
            start=flight.start,
            stop=flight.stop,
            parts=values,
            drop=lambda: self._give_back(staged, flight.share),
        )

    def _batch(self, segments: Sequence[Segment], position: int) -> list[Block]:
        """Return the batch that `position` lies in; those behind it come next."""
        batch, self._next = self._next, None
        if batch is not None and not self._ahead and batch[0].offset == position:
            return batch
        self._drop_ahead()
        self._coming = _batches(segments, position)
        return next(self._coming)

    def _launch_ahead(self) -> None:
        while len(self._ahead) < BATCHES_AHEAD:
            batch = self._next or next(self._coming, None)
            self._next = None
            if batch is None:
                return
            share = self._feed.budget.try_take(_cost(batch))
            if share is None:
                self._next = batch
                return
            self._launch(batch, share)

    def _launch(self, batch: Sequence[Block], share: int) -> None:
        assert self._feed.evaluator is not None
        try:
            made = self._feed.pool.submit(_make, self._feed.evaluator, batch)
        except RuntimeError:  # the pool is shut down
            self._feed.budget.give(share)
            raise
        self._ahead.append(_Flight(blocks=batch, share=share, made=made))

    def _give_back(self, staged: Any, share: int) -> None:
        assert self._feed.evaluator is not None
        self._feed.evaluator.release(staged)
        self._feed.budget.give(share)

    def _drop_held(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.drop()

    def _drop_ahead(self) -> None:
        """Let go of what was computed ahead for a place that the reader has left."""
        while self._ahead:
            flight = self._ahead.popleft()
            if flight.made.cancel():
                self._feed.budget.give(flight.share)
                continue
            try:
                staged, _ = flight.made.result()
            except Exception:  # noqa: BLE001 (nobody reads what this batch was for)
                self._feed.budget.give(flight.share)
            else:
                self._give_back(staged, flight.share)
        self._coming, self._next = iter(()), None


def _make(evaluator: Evaluator, batch: Sequence[Block]) -> tuple[Any, list[memoryview]]:
    """Return the bytes of a batch, and what has to be released after them."""
    staged = evaluator.read(batch)
    try:
        return staged, evaluator.compute(staged)
    except BaseException:
        with contextlib.suppress(Exception):  # what compute raised is the reason
            evaluator.release(staged)
        raise


def _batches(segments: Sequence[Segment], position: int) -> Iterator[list[Block]]:
    """Yield the batches of a group from the one that `position` lies in."""
    for batch in blocks.batches(segments[_index(segments, position) :]):
        if _stop(batch) > position:
            yield batch


def _index(segments: Sequence[Segment], position: int) -> int:
    """Return which of `segments` the byte at `position` of the file belongs to."""
    return bisect.bisect_right(segments, position, key=lambda segment: segment.offset) - 1


def _stop(batch: Sequence[Block]) -> int:
    return batch[-1].offset + batch[-1].nbytes


def _cost(batch: Sequence[Block]) -> int:
    return sum(block.cost_bytes for block in batch)
