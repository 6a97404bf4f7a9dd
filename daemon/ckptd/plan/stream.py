"""Executing a plan: read, compute and write overlap, in bounded memory, each byte once.

Every output file is one or more lanes of consecutive segments; a few workers take lanes in order.
Verbatim runs are copied by one thread from end to end, computed segments go through three tasks
(read, compute, write) that work on different blocks at the same time under the byte budget. A file
whose lanes are done is synced and renamed while the next ones are written, and handed on at once.

Where a sha256 is wanted, a file is one lane, so that its bytes pass in order; else long files are
divided so that all workers have work.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import anyio
from anyio import from_thread, to_thread
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from ckptd.aio.budget import ByteBudget
from ckptd.checkpoint import writer
from ckptd.checkpoint.writer import Cache, ShardWriter
from ckptd.plan import blocks, transfer
from ckptd.plan.blocks import Block
from ckptd.plan.plan import Computed, Plan, Run, Segment, ShardPlan
from ckptd.plan.sources import Sources
from ckptd.plan.transfer import Hash, Lane

LANE_BYTES = 256 << 20
"""A file without sha256 is divided into lanes of about this size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedShard:
    """A durable output file; `sha256` in hexadecimal, or None where it was not asked for."""

    name: str
    path: Path
    nbytes: int
    sha256: str | None


class Evaluator(Protocol):
    """What computes blocks; `plan.evaluate.Evaluator` is the one with torch."""

    def read(self, blocks: Sequence[Block]) -> Any:
        """Return the blocks with their source bytes in memory; blocks the calling thread."""

    def compute(self, staged: Any) -> list[memoryview]:
        """Return the bytes of each block `read` staged; blocks the calling thread."""

    def release(self, staged: Any) -> None:
        """Take back the memory of what `read` staged and `compute` returned."""


class Meter:
    """Bytes read, computed and written so far; any thread adds, anyone reads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.read_bytes = 0
        self.computed_bytes = 0
        self.written_bytes = 0

    def add(self, *, read: int = 0, computed: int = 0, written: int = 0) -> None:
        """Count more bytes."""
        with self._lock:
            self.read_bytes += read
            self.computed_bytes += computed
            self.written_bytes += written


@dataclass(slots=True, kw_only=True)
class _Shard:
    plan: ShardPlan
    file: ShardWriter
    sha256: Hash | None
    opening: anyio.Lock
    lanes_left: int = 0
    is_open: bool = False


@dataclass(slots=True, kw_only=True)
class _Work:
    shard: _Shard
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class _Batch:
    blocks: list[Block]
    share: int
    staged: Any = field(repr=False)
    values: list[memoryview] = field(default_factory=list, repr=False)


@dataclass(frozen=True, slots=True)
class _Turn:
    """Whose values are sent before these, and that these were."""

    before: anyio.Event
    done: anyio.Event = field(default_factory=anyio.Event)


class Stream:
    """One execution of one plan into one folder."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        *,
        sources: Sources,
        evaluator: Evaluator | None,
        budget: ByteBudget,
        threads: int,
        hashing: bool,
        cache: Cache,
        meter: Meter,
    ) -> None:
        assert evaluator is not None or not plan.needs_torch
        self._plan = plan
        self._folder = folder
        self._sources = sources
        self._evaluator = evaluator
        self._budget = budget
        self._threads = threads
        self._hashing = hashing
        self._cache = cache
        self._meter = meter
        self._limiter = anyio.CapacityLimiter(4 * threads + 2)
        self._computing = anyio.CapacityLimiter(threads)
        self._finishing = anyio.CapacityLimiter(2)

    async def run(
        self,
        *,
        finished: Mapping[str, FinishedShard],
        on_shard: Callable[[FinishedShard], Coroutine[Any, Any, None]],
        on_synced: Callable[[FinishedShard], None] = lambda _: None,
    ) -> tuple[FinishedShard, ...]:
        """Write every file that is not in `finished`; return all of them in the plan's order.

        `on_synced` is called in a thread when a file is durable, before it has its name; `on_shard`
        once for each file, as soon as it is durable under its name. After a
        failure the folder holds whole files only; what was begun is removed.

        Raises:
            ExceptionGroup: of NoSpace, StorageFailed, SourceChanged, CheckFailed, or whatever
                `on_shard` raises.
        """
        done = dict(finished)
        todo = [shard for shard in self._plan.shards if shard.name not in done]
        writer.require_space(self._folder, sum(shard.nbytes for shard in todo))
        shards = [self._begin(plan) for plan in todo]
        queue = deque(work for shard in shards for work in self._lanes(shard))

        async def finish(shard: _Shard) -> None:
            async with self._finishing:
                result = await self._finish(shard, on_synced)
            done[result.name] = result
            await on_shard(result)

        async def work() -> None:
            lane = Lane(self._sources, self._tick)
            while queue:
                item = queue.popleft()
                await self._execute(lane, item)
                item.shard.lanes_left -= 1
                if not item.shard.lanes_left:
                    group.start_soon(finish, item.shard)

        try:
            async with anyio.create_task_group() as group:
                for reused in finished.values():
                    group.start_soon(on_shard, reused)
                for _ in range(self._threads):
                    group.start_soon(work)
        finally:
            for shard in shards:
                shard.file.abandon()
        await self._in_thread(self._sources.check)
        return tuple(done[shard.name] for shard in self._plan.shards)

    def _begin(self, plan: ShardPlan) -> _Shard:
        return _Shard(
            plan=plan,
            file=ShardWriter(self._folder / plan.name, nbytes=plan.nbytes, cache=self._cache),
            sha256=hashlib.sha256() if self._hashing else None,
            opening=anyio.Lock(),
        )

    def _lanes(self, shard: _Shard) -> list[_Work]:
        if self._hashing:
            parts = [shard.plan.segments]
        else:
            parts = list(_divide(shard.plan.segments, LANE_BYTES)) or [()]
        shard.lanes_left = len(parts)
        return [_Work(shard=shard, segments=part) for part in parts]

    async def _execute(self, lane: Lane, work: _Work) -> None:
        shard = work.shard
        async with shard.opening:
            if not shard.is_open:
                await self._in_thread(self._open, shard)
                shard.is_open = True
        for computed, segments in blocks.groups(work.segments):
            if computed:
                await self._compute(shard, segments)
            else:
                await self._in_thread(self._copy, lane, shard, segments)

    def _open(self, shard: _Shard) -> None:
        shard.file.open()
        self._write(shard, shard.plan.head, 0)
        self._meter.add(written=len(shard.plan.head))

    async def _finish(
        self, shard: _Shard, on_synced: Callable[[FinishedShard], None]
    ) -> FinishedShard:
        result = FinishedShard(
            name=shard.plan.name,
            path=shard.file.path,
            nbytes=shard.plan.nbytes,
            sha256=shard.sha256.hexdigest() if shard.sha256 is not None else None,
        )
        await self._in_thread(shard.file.sync)
        await self._in_thread(on_synced, result)
        await self._in_thread(shard.file.finish)
        return result

    def _copy(self, lane: Lane, shard: _Shard, segments: Sequence[Segment]) -> None:
        try:
            for run in segments:
                assert isinstance(run, Run)
                transfer.copy(lane, run.source, shard.file, run.offset, shard.sha256)
        except OSError as error:
            raise writer.translated(error, shard.file.path, shard.plan.nbytes) from error

    async def _compute(self, shard: _Shard, segments: Sequence[Segment]) -> None:
        send_staged, staged = anyio.create_memory_object_stream[_Batch](1)
        send_values, values = anyio.create_memory_object_stream[_Batch](1)
        async with anyio.create_task_group() as group:
            group.start_soon(self._read_batches, segments, send_staged)
            group.start_soon(self._compute_batches, staged, send_values)
            await self._write_batches(shard, values)

    async def _read_batches(
        self, segments: Sequence[Segment], out: MemoryObjectSendStream[_Batch]
    ) -> None:
        assert self._evaluator is not None
        async with out:
            for batch in blocks.batches(segments):
                share = await self._budget.acquire(sum(block.cost_bytes for block in batch))
                staged = await self._in_thread(self._evaluator.read, batch)
                self._meter.add(read=sum(block.source_bytes for block in batch))
                await out.send(_Batch(batch, share, staged))

    async def _compute_batches(
        self, staged: MemoryObjectReceiveStream[_Batch], out: MemoryObjectSendStream[_Batch]
    ) -> None:
        """Compute several batches at once, so that one lane keeps all threads busy; send in order."""
        free = anyio.Semaphore(self._threads)
        before = anyio.Event()
        before.set()
        async with staged, out, anyio.create_task_group() as group:
            async for batch in staged:
                await free.acquire()
                turn = _Turn(before)
                group.start_soon(self._compute_batch, batch, turn, free, out)
                before = turn.done

    async def _compute_batch(
        self,
        batch: _Batch,
        turn: _Turn,
        free: anyio.Semaphore,
        out: MemoryObjectSendStream[_Batch],
    ) -> None:
        assert self._evaluator is not None
        compute = self._evaluator.compute
        values = await to_thread.run_sync(compute, batch.staged, limiter=self._computing)
        self._meter.add(computed=sum(block.nbytes for block in batch.blocks))
        await turn.before.wait()
        await out.send(dataclasses.replace(batch, values=values))
        turn.done.set()
        free.release()

    async def _write_batches(
        self, shard: _Shard, values: MemoryObjectReceiveStream[_Batch]
    ) -> None:
        assert self._evaluator is not None
        async with values:
            async for batch in values:
                await self._in_thread(self._write_blocks, shard, batch)
                self._evaluator.release(batch.staged)
                self._budget.release(batch.share)

    def _write_blocks(self, shard: _Shard, batch: _Batch) -> None:
        for block, value in zip(batch.blocks, batch.values, strict=True):
            assert len(value) == block.nbytes, (block.tensor, len(value), block.nbytes)
            self._write(shard, value, block.offset)
        self._tick(0, sum(block.nbytes for block in batch.blocks))

    def _write(self, shard: _Shard, data: memoryview | bytes, offset: int) -> None:
        try:
            shard.file.write(data, offset)
        except OSError as error:
            raise writer.translated(error, shard.file.path, shard.plan.nbytes) from error
        if shard.sha256 is not None:
            shard.sha256.update(data)

    def _tick(self, read: int, written: int) -> None:
        self._meter.add(read=read, written=written)
        from_thread.check_cancelled()

    async def _in_thread(self, call: Callable[..., Any], *args: Any) -> Any:
        return await to_thread.run_sync(functools.partial(call, *args), limiter=self._limiter)


def _divide(segments: Iterable[Segment], lane_bytes: int) -> Iterator[tuple[Segment, ...]]:
    """Yield the segments in lanes of about `lane_bytes`; long runs are cut at block borders."""
    lane: list[Segment] = []
    size = 0
    for segment in segments:
        for part in _cut(segment, lane_bytes):
            lane.append(part)
            size += part.nbytes
            if size >= lane_bytes:
                yield tuple(lane)
                lane, size = [], 0
    if lane:
        yield tuple(lane)


def _cut(segment: Segment, lane_bytes: int) -> Iterator[Segment]:
    if isinstance(segment, Computed) or segment.nbytes <= 2 * lane_bytes:
        yield segment
        return
    source = segment.source
    for start in range(0, segment.nbytes, lane_bytes):
        size = min(lane_bytes, segment.nbytes - start)
        part = type(source)(source.path, source.offset + start, size)
        yield Run(part, segment.offset + start)
