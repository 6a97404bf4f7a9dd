"""The stream: every byte where the plan says, whole files or none, within the budget."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from safetensors.torch import load_file

from ckptd.aio.budget import ByteBudget
from ckptd.checkpoint.checkpoint import Checkpoint
from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.writer import Cache, ShardWriter
from ckptd.errors import NoSpace, SourceChanged, StorageFailed
from ckptd.plan import blocks, evaluate, expression, plan, stream, transfer
from ckptd.plan import draft as drafts
from ckptd.plan.plan import Plan
from ckptd.plan.sources import Sources
from ckptd.plan.stream import FinishedShard, Meter, Stream

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def tensors() -> Tensors:
    """Weights of odd sizes and several dtypes, some larger than a copy buffer in these tests."""
    torch.manual_seed(0)
    made = {f"layers.{n}.w": torch.randn(37 + n, 53).to(torch.bfloat16) for n in range(12)}
    made |= {f"layers.{n}.norm": torch.randn(53) for n in range(12)}
    made |= {"big": torch.randn(700, 301).to(torch.bfloat16), "scalar": torch.tensor(3)}
    return made | {"empty": torch.zeros(0, 4)}


@pytest.fixture
def source(make_source: Any, tensors: Tensors) -> Checkpoint:
    """The tensors in three files."""
    names = list(tensors)
    made: Checkpoint = make_source(*({n: tensors[n] for n in names[k::3]} for k in range(3)))
    return made


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers, blocks and lanes so small that tiny tensors fill many of them."""
    monkeypatch.setattr(transfer, "BUFFER_BYTES", 1000)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(stream, "LANE_BYTES", 20_000)
    monkeypatch.setattr(blocks, "_SMALL_RUN_BYTES", 3000)


def _plan(source: Checkpoint, *, limit: int | None = 60_000, cast: Dtype | None = None) -> Plan:
    draft = drafts.from_checkpoint(source)
    if cast is not None:
        values = {
            name: expression.cast(value, cast) if value.dtype is Dtype.BF16 else value
            for name, value in draft.tensors.items()
        }
        draft = dataclasses.replace(draft, tensors=values)
    return plan.make(dataclasses.replace(draft, max_shard_bytes=limit))


async def _run(
    source: Checkpoint,
    made: Plan,
    folder: Path,
    *,
    hashing: bool = False,
    threads: int = 3,
    budget: ByteBudget | None = None,
    meter: Meter | None = None,
    finished: Mapping[str, FinishedShard] | None = None,
    on_shard: Callable[[FinishedShard], None] = lambda shard: None,
    cache: Cache = Cache.DIRECT,
) -> tuple[FinishedShard, ...]:
    async def report(shard: FinishedShard) -> None:
        on_shard(shard)

    folder.mkdir(exist_ok=True)
    with Sources(source.stamps) as sources:
        one = Stream(
            made,
            folder,
            sources=sources,
            evaluator=evaluate.Evaluator(device="cpu", sources=sources),
            budget=budget or ByteBudget(1 << 20),
            threads=threads,
            hashing=hashing,
            cache=cache,
            meter=meter or Meter(),
        )
        return await one.run(finished=finished or {}, on_shard=report)


@contextlib.contextmanager
def _written(path: Path, nbytes: int) -> Iterator[ShardWriter]:
    """Yield an open writer; the file stands at `path` afterwards."""
    file = ShardWriter(path, nbytes=nbytes)
    file.open()
    yield file
    file.finish()


def _loaded(folder: Path) -> Tensors:
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def _same(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(
        found[n].dtype is expected[n].dtype and torch.equal(found[n], expected[n]) for n in expected
    )


def _first(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


@pytest.mark.parametrize("hashing", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("limit", [None, 5_000, 60_000, 10**9])
async def test_verbatim_tensors_are_bit_identical(
    hashing: bool, threads: int, limit: int | None, source: Any, tensors: Tensors, tmp_path: Path
) -> None:
    """Whatever the division, the threads and the lanes, safetensors loads what was saved."""
    made = _plan(source, limit=limit)
    shards = await _run(source, made, tmp_path / "out", hashing=hashing, threads=threads)
    assert _same(_loaded(tmp_path / "out"), tensors)
    assert [shard.name for shard in shards] == [shard.name for shard in made.shards]


@pytest.mark.parametrize("hashing", [False, True])
@pytest.mark.parametrize("cast", [None, Dtype.F32])
async def test_the_hash_is_the_files(
    hashing: bool, cast: Dtype | None, source: Any, tmp_path: Path
) -> None:
    """sha256 of every file, copied or computed, where it is asked for, and None where not."""
    for shard in await _run(source, _plan(source, cast=cast), tmp_path / "out", hashing=hashing):
        assert shard.nbytes == shard.path.stat().st_size
        expected = hashlib.sha256(shard.path.read_bytes()).hexdigest()
        assert shard.sha256 == (expected if hashing else None)


@pytest.mark.parametrize("hashing", [False, True])
@pytest.mark.parametrize("limit", [5_000, 60_000, 10**9])
async def test_computed_and_copied_tensors_mix(
    hashing: bool, limit: int, source: Any, tensors: Tensors, tmp_path: Path
) -> None:
    """Cast tensors equal torch's cast, the others between them their own bytes."""
    made = _plan(source, limit=limit, cast=Dtype.F16)
    await _run(source, made, tmp_path / "out", hashing=hashing)
    expected = {n: t.half() if t.dtype is torch.bfloat16 else t for n, t in tensors.items()}
    assert _same(_loaded(tmp_path / "out"), expected)


@pytest.mark.parametrize("total", [1, 5_000, 40_000, 10**7])
async def test_the_budget_is_never_exceeded(
    total: int, source: Any, tensors: Tensors, tmp_path: Path
) -> None:
    """With any budget, even one smaller than a block, the work ends and stays within it."""
    budget = ByteBudget(total)
    await _run(source, _plan(source, cast=Dtype.F32), tmp_path / "out", budget=budget)
    assert 0 < budget.peak <= total
    assert budget.used == 0
    assert len(_loaded(tmp_path / "out")) == len(tensors)


async def test_the_meter_counts_every_byte_once(source: Any, tmp_path: Path) -> None:
    """Read, computed and written bytes end at what the plan foretells."""
    made, meter = _plan(source, cast=Dtype.F32), Meter()
    await _run(source, made, tmp_path / "out", meter=meter)
    assert meter.read_bytes == made.read_bytes
    assert meter.written_bytes == made.output_bytes
    small = meter.computed_bytes - made.computed_bytes
    assert 0 <= small < made.output_bytes - made.computed_bytes


async def test_a_shard_is_reported_when_it_is_durable(source: Any, tmp_path: Path) -> None:
    """`on_shard` comes once for each file, when it has its final name and size."""
    made, seen = _plan(source), []

    def on_shard(shard: FinishedShard) -> None:
        assert shard.path.stat().st_size == shard.nbytes
        seen.append(shard.name)

    await _run(source, made, tmp_path / "out", on_shard=on_shard)
    assert sorted(seen) == sorted(shard.name for shard in made.shards)


async def test_finished_shards_are_reused(source: Any, tensors: Tensors, tmp_path: Path) -> None:
    """What an earlier attempt finished is neither read nor written again, but reported."""
    made, meter, seen = _plan(source), Meter(), []
    shards = await _run(source, made, tmp_path / "out")
    kept = {shard.name: shard for shard in shards[1:]}
    before = {name: shard.path.stat().st_mtime_ns for name, shard in kept.items()}
    shards[0].path.unlink()
    again = await _run(
        source, made, tmp_path / "out", finished=kept, meter=meter, on_shard=seen.append
    )
    assert again == shards
    assert sorted(shard.name for shard in seen) == sorted(shard.name for shard in shards)
    assert {name: shard.path.stat().st_mtime_ns for name, shard in kept.items()} == before
    assert meter.written_bytes == made.shards[0].nbytes
    assert _same(_loaded(tmp_path / "out"), tensors)


async def test_file_modes_follow_the_umask(source: Any, tmp_path: Path) -> None:
    """0644 under 022, never the 0600 of a temporary file."""
    before = os.umask(0o022)
    try:
        shards = await _run(source, _plan(source), tmp_path / "out")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(shard.path.stat().st_mode) for shard in shards} == {0o644}


@pytest.mark.parametrize("cast", [None, Dtype.F32])
@pytest.mark.parametrize("change", ["truncate", "rewrite", "replace", "delete"])
async def test_a_source_that_changed_since_planning_voids_the_job(
    change: str, cast: Dtype | None, source: Any, tmp_path: Path
) -> None:
    """Shorter, rewritten in place, replaced or gone: SourceChanged names the file."""
    made = _plan(source, cast=cast)
    path = sorted(source.stamps)[1]
    match change:
        case "truncate":
            os.truncate(path, path.stat().st_size - 100)
        case "rewrite":
            path.write_bytes(path.read_bytes()[:-1] + b"!")
        case "replace":
            shutil.copy2(path, path.with_suffix(".new"))
            path.with_suffix(".new").rename(path)
        case "delete":
            path.unlink()
    with pytest.raises((SourceChanged, ExceptionGroup)) as caught:
        await _run(source, made, tmp_path / "out")
    error = _first(caught.value)
    assert isinstance(error, SourceChanged)
    assert error.path == path


@pytest.mark.parametrize("cast", [None, Dtype.F32])
async def test_a_source_rewritten_while_it_is_read_voids_the_job(
    cast: Dtype | None, source: Any, tmp_path: Path
) -> None:
    """A change after the last byte was read from that file is seen at the end."""
    path = min(source.stamps)

    def rewrite(shard: FinishedShard) -> None:
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"!")

    with pytest.raises((SourceChanged, ExceptionGroup)) as caught:
        await _run(source, _plan(source, cast=cast), tmp_path / "out", on_shard=rewrite)
    assert isinstance(_first(caught.value), SourceChanged)


def _failing(after: int, number: int) -> Callable[..., int]:
    """A pwrite that fails after some calls."""
    real, calls = os.pwrite, 0

    def pwrite(fd: int, data: Any, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(number, os.strerror(number))
        return real(fd, data, offset)

    return pwrite


@pytest.mark.parametrize("cast", [None, Dtype.F32])
@pytest.mark.parametrize("after", [0, 1, 40])
@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, NoSpace), (errno.EIO, StorageFailed)])
async def test_a_failing_disk_leaves_whole_files_only(
    cast: Dtype | None, after: int, number: int, error: type, source: Any, tmp_path: Path,
    monkeypatch: Any,
) -> None:  # fmt: skip
    """Wherever writing fails: our error, no temporary file, and finished files are whole."""
    made, done = _plan(source, cast=cast), []
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", _failing(after, number))
        with pytest.raises(ExceptionGroup) as caught:
            await _run(source, made, tmp_path / "out", on_shard=done.append)
    assert isinstance(_first(caught.value), error)
    sizes = {shard.name: shard.nbytes for shard in made.shards}
    found = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert found == {name: sizes[name] for name in found}


async def test_too_small_a_disk_is_found_before_the_work(
    source: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """With the bytes needed in the message, before anything is made."""
    made = _plan(source)
    usage = shutil._ntuple_diskusage(10**6, 10**6 - 10, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(NoSpace) as caught:
        await _run(source, made, tmp_path / "out")
    assert caught.value.needed_bytes == made.output_bytes
    assert not list((tmp_path / "out").iterdir())


async def test_a_read_only_folder_is_our_error(
    source: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """The failure names the file that cannot be made, and says why."""
    real = os.open

    def refuse(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ExceptionGroup) as caught:
        await _run(source, _plan(source), tmp_path / "out")
    assert isinstance(_first(caught.value), StorageFailed)
    assert "read-only" in str(_first(caught.value))


@pytest.mark.parametrize("cast", [None, Dtype.F32])
async def test_cancellation_leaves_no_temporary_file(
    cast: Dtype | None, source: Any, tmp_path: Path
) -> None:
    """Stopped after the first finished file, the folder holds whole files only."""
    made = _plan(source, limit=20_000, cast=cast)
    with anyio.CancelScope() as scope:
        await _run(source, made, tmp_path / "out", on_shard=lambda shard: scope.cancel())
    assert scope.cancelled_caught
    sizes = {shard.name: shard.nbytes for shard in made.shards}
    found = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert 0 < len(found) < len(sizes)
    assert found == {name: sizes[name] for name in found}


async def test_what_on_shard_raises_ends_the_stream(source: Any, tmp_path: Path) -> None:
    """A failure downstream is not swallowed, and nothing half-made stays."""

    def fail(shard: FinishedShard) -> None:
        raise LookupError(shard.name)

    with pytest.raises(ExceptionGroup) as caught:
        await _run(source, _plan(source), tmp_path / "out", on_shard=fail)
    assert isinstance(_first(caught.value), LookupError)
    assert not [p for p in (tmp_path / "out").iterdir() if not p.name.startswith("model-")]


def test_lanes_divide_a_file_without_loss(source: Any) -> None:
    """Lanes of any size hold the file's segments in order, cut only within runs."""
    (shard,) = _plan(source, limit=10**9).shards
    for size in (1000, 20_000, 10**9):
        lanes = list(stream._divide(shard.segments, size))
        cursor = len(shard.head)
        for part in (part for lane in lanes for part in lane):
            assert part.offset == cursor
            cursor += part.nbytes
        assert cursor == shard.nbytes
        assert all(sum(part.nbytes for part in lane) <= 3 * size for lane in lanes)


def test_cloning_that_is_refused_falls_back_to_copying(
    source: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """Where the ioctl fails the bytes are copied, and it is not tried again on that lane."""
    monkeypatch.setattr(transfer, "_MIN_CLONE_BYTES", 1)
    extent = max((t.extent for t in source.tensors.values()), key=lambda e: e.nbytes)
    target = tmp_path / "out"
    place = extent.offset % 4096
    with Sources(source.stamps) as sources, _written(target, place + extent.nbytes) as file:
        lane = transfer.Lane(sources, lambda read, written: None)
        transfer.copy(lane, extent, file, place, None)
    raw = extent.path.read_bytes()[extent.offset : extent.offset + extent.nbytes]
    assert target.read_bytes()[extent.offset % 4096 :] == raw


@pytest.mark.parametrize("hashing", [False, True])
def test_cloned_blocks_are_not_written_and_still_hashed(
    hashing: bool, source: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """The clone takes whole blocks; edges are copied; the hash covers all bytes in order.

    The file system of the tests may not clone, so the ioctl is played by a copy of that range.
    """
    import fcntl
    import struct

    monkeypatch.setattr(transfer, "_MIN_CLONE_BYTES", 1)
    cloned = []

    def ioctl(target_fd: int, request: int, argument: bytes) -> None:
        fd, start, nbytes, to = struct.unpack("qQQQ", argument)
        assert start % 4096 == nbytes % 4096 == to % 4096 == 0
        os.pwrite(target_fd, os.pread(fd, nbytes, start), to)
        cloned.append(nbytes)

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    extent = max((t.extent for t in source.tensors.values()), key=lambda e: e.nbytes)
    raw = extent.path.read_bytes()[extent.offset : extent.offset + extent.nbytes]
    target, sha256 = tmp_path / "out", hashlib.sha256()
    moved = [0, 0]

    def tick(read: int, written: int) -> None:
        moved[0] += read
        moved[1] += written

    place = extent.offset % 4096 + 4096
    with Sources(source.stamps) as sources, _written(target, place + extent.nbytes) as file:
        lane = transfer.Lane(sources, tick)
        transfer.copy(lane, extent, file, place, sha256 if hashing else None)
    assert target.read_bytes()[place:] == raw
    assert sum(cloned) > len(raw) - 2 * 4096
    assert moved == [len(raw), len(raw)]
    if hashing:
        assert sha256.digest() == hashlib.sha256(raw).digest()
