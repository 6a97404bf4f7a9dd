"""A shard read without being written: the bytes of the file, from any place, within the budget."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from ckptd.aio.budget import ByteBudget
from ckptd.checkpoint.checkpoint import Checkpoint
from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.writer import Cache
from ckptd.errors import SourceChanged
from ckptd.plan import blocks, evaluate, expression, plan, transfer
from ckptd.plan import draft as drafts
from ckptd.plan.blocks import Block
from ckptd.plan.budget import Closed
from ckptd.plan.nodes import Grown, NewRows
from ckptd.plan.plan import Plan
from ckptd.plan.shard_file import Feed, Progress, ShardFile
from ckptd.plan.sources import Sources
from ckptd.plan.stream import FinishedShard, Meter, Stream

BUDGET_BYTES = 200_000
KINDS = ["verbatim", "cast", "grown", "mixed"]


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers and blocks so small that tiny tensors fill many of them."""
    monkeypatch.setattr(transfer, "BUFFER_BYTES", 1000)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(blocks, "STATISTICS_BYTES", 4096)
    monkeypatch.setattr(blocks, "_SMALL_RUN_BYTES", 3000)


@pytest.fixture
def source(make_source: Any) -> Checkpoint:
    """Weights of odd sizes in two files, one of them large, one empty."""
    torch.manual_seed(0)
    tensors = {f"layers.{n}.w": torch.randn(37 + n, 53).to(torch.bfloat16) for n in range(8)}
    tensors |= {f"layers.{n}.norm": torch.randn(53) for n in range(8)}
    tensors |= {"big": torch.randn(300, 101), "empty": torch.zeros(0, 4)}
    names = list(tensors)
    made: Checkpoint = make_source(*({n: tensors[n] for n in names[k::2]} for k in range(2)))
    return made


def _plan(source: Checkpoint, kind: str) -> Plan:
    draft = drafts.from_checkpoint(source)
    tensors = dict(draft.tensors)
    for name, value in draft.tensors.items():
        if kind == "cast" or (kind == "mixed" and ".3." in name):
            tensors[name] = expression.cast(value, Dtype.F16)
        if kind == "grown" and name == "big":
            new = Grown(value, (5, 101), 0, 0, NewRows.MEAN, 0.02, 0)
            tensors[name] = expression.concat([value, new])
    return plan.make(dataclasses.replace(draft, tensors=tensors, max_shard_bytes=60_000))


@contextlib.contextmanager
def _feed(source: Checkpoint, *, meter: Meter | None = None, threads: int = 2) -> Iterator[Feed]:
    with Sources(source.stamps) as sources:
        evaluator = evaluate.Evaluator(device="cpu", sources=sources)
        feed = Feed(
            sources=sources,
            evaluator=evaluator,
            byte_budget=BUDGET_BYTES,
            threads=threads,
            meter=meter or Meter(),
        )
        try:
            yield feed
        finally:
            feed.close()


def _file(feed: Feed, shard: plan.ShardPlan, **more: Any) -> ShardFile:
    return ShardFile(shard, feed, progress=Progress(feed.meter), **more)


def _written(source: Checkpoint, made: Plan, folder: Path) -> dict[str, bytes]:
    """Return the files as the stream writes them."""

    async def ignore(shard: FinishedShard) -> None:
        pass

    folder.mkdir()
    with Sources(source.stamps) as sources:
        stream = Stream(
            made,
            folder,
            sources=sources,
            evaluator=evaluate.Evaluator(device="cpu", sources=sources),
            budget=ByteBudget(1 << 20),
            threads=1,
            hashing=False,
            cache=Cache.KEEP,
            meter=Meter(),
        )
        anyio.run(lambda: stream.run(finished={}, on_shard=ignore))
    return {shard.name: (folder / shard.name).read_bytes() for shard in made.shards}


@pytest.mark.parametrize("kind", KINDS)
def test_it_has_the_bytes_of_the_written_file(kind: str, source: Any, tmp_path: Path) -> None:
    """Read whole, in one piece or in many, it is what the stream would have written."""
    made = _plan(source, kind)
    expected = _written(source, made, tmp_path / "out")
    assert len(expected) > 1
    with _feed(source) as feed:
        for shard in made.shards:
            with _file(feed, shard) as file:
                assert file.read() == expected[shard.name]
                assert file.read(10) == b""
                file.seek(0)
                pieces = []
                while piece := file.read(777):
                    pieces.append(piece)
                assert b"".join(pieces) == expected[shard.name]


@pytest.mark.parametrize("kind", KINDS)
def test_it_can_be_read_from_any_place(kind: str, source: Any, tmp_path: Path) -> None:
    """Jumps to and fro, into the middle of blocks and past the end, give the same bytes."""
    made = _plan(source, kind)
    expected = _written(source, made, tmp_path / "out")
    draw = random.Random(0)
    with _feed(source) as feed:
        for shard in made.shards:
            with _file(feed, shard) as file:
                whole = expected[shard.name]
                assert file.seek(0, io.SEEK_END) == len(whole)
                for _ in range(60):
                    place, size = draw.randrange(len(whole) + 50), draw.randrange(6000)
                    file.seek(place)
                    assert file.read(size) == whole[place : place + size]
                    assert file.tell() == place + len(whole[place : place + size])
                    buffer = bytearray(size)
                    file.seek(-min(size, len(whole)), io.SEEK_END)
                    got = file.readinto(buffer)
                    assert buffer[:got] == whole[len(whole) - got :]


def test_files_side_by_side_stay_within_the_budget(source: Any, tmp_path: Path) -> None:
    """Four readers of one shard each get all of it, and hold no more than is granted together."""
    made = _plan(source, "cast")
    shard = max(made.shards, key=lambda shard: shard.nbytes)
    expected = _written(source, made, tmp_path / "out")[shard.name]
    with _feed(source) as feed:

        def read(size: int) -> bool:
            with _file(feed, shard) as file:
                return b"".join(iter(lambda: file.read(size), b"")) == expected

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(read, (100, 999, 5000, 20_000)))
        assert 0 < feed.budget.peak <= BUDGET_BYTES
        assert feed.budget.try_take(BUDGET_BYTES) == BUDGET_BYTES  # everything was given back


def test_bytes_that_are_read_again_count_once(source: Any) -> None:
    """A digest and two uploads: the meter ends at the plan's own numbers."""
    made = _plan(source, "mixed")
    meter = Meter()
    with _feed(source, meter=meter) as feed:
        for shard in made.shards:
            progress = Progress(meter)
            for _ in range(3):
                with ShardFile(shard, feed, progress=progress) as file:
                    file.read()
    assert meter.computed_bytes == sum(
        part.nbytes
        for shard in made.shards
        for computed, group in blocks.groups(shard.segments)
        if computed
        for part in group
    )
    assert meter.read_bytes == made.read_bytes


def test_a_source_that_shrinks_is_told_and_raised(source: Any) -> None:
    """The reader gets SourceChanged, and so does who asked why the file failed."""
    made = _plan(source, "verbatim")
    told: list[Exception] = []
    with _feed(source) as feed:
        for path in source.stamps:
            feed.sources.fd(path)
            os.truncate(path, 2000)
        shard = max(made.shards, key=lambda shard: shard.nbytes)
        with _file(feed, shard, failed=told.append) as file, pytest.raises(SourceChanged) as caught:
            file.read()
    assert told == [caught.value]


class _Held:
    """An evaluator that is told when it may compute."""

    def __init__(self, inner: Any, failure: Exception | None = None) -> None:
        self.inner = inner
        self.begun = threading.Event()
        self.may = threading.Event()
        self.failure = failure
        self.staged = 0

    def read(self, batch: Sequence[Block]) -> Any:
        self.staged += 1
        return self.inner.read(batch)

    def compute(self, staged: Any) -> list[memoryview]:
        self.begun.set()
        assert self.may.wait(10)
        if self.failure is not None:
            raise self.failure
        values: list[memoryview] = self.inner.compute(staged)
        return values

    def release(self, staged: Any) -> None:
        self.staged -= 1
        self.inner.release(staged)


def _under(feed: Feed, make: Callable[[Any], _Held]) -> _Held:
    held = make(feed.evaluator)
    feed.evaluator = held
    return held


def test_closing_waits_for_what_is_under_way_and_ends_the_rest(source: Any) -> None:
    """No read goes on once `close` has returned: descriptors may be closed then."""
    made = _plan(source, "cast")
    with _feed(source) as feed, ThreadPoolExecutor(2) as pool:
        held = _under(feed, _Held)
        file = _file(feed, made.shards[0])
        reading = pool.submit(file.read)
        assert held.begun.wait(10)
        closing = pool.submit(feed.close)
        assert not closing.done()
        held.may.set()
        closing.result(10)
        with contextlib.suppress(Closed):
            reading.result(10)
        assert held.staged == 0
        with pytest.raises(Closed):
            file.read(1)
        with pytest.raises(Closed):
            _file(feed, made.shards[0])


def test_a_failed_block_leaves_nothing_behind(source: Any) -> None:
    """What an evaluator raises reaches the reader; memory and budget are given back."""
    made = _plan(source, "cast")
    with _feed(source) as feed:
        held = _under(feed, lambda inner: _Held(inner, MemoryError("no more")))
        held.may.set()
        with _file(feed, made.shards[0]) as file, pytest.raises(MemoryError):
            file.read()
        assert held.staged == 0
        assert feed.budget.try_take(BUDGET_BYTES) == BUDGET_BYTES
