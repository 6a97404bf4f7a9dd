"""Writing: a final name is a whole, durable file, or there is none."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptd.checkpoint import writer
from ckptd.checkpoint.writer import Cache, ShardWriter
from ckptd.errors import NoSpace, StorageFailed
from tests.checkpoint.pages import memory, resident_pages


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """Set a umask for one test."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_file_modes_follow_the_umask(umask: int, tmp_path: Path) -> None:
    """0644 under 022: what is published can be read by whoever the user lets read."""
    writer.write_file(tmp_path / "config.json", b"{}")
    shard = ShardWriter(tmp_path / "model.safetensors", nbytes=8)
    shard.open()
    shard.finish()
    for name in ("config.json", "model.safetensors"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask


def test_a_file_has_its_name_only_when_it_is_finished(tmp_path: Path) -> None:
    """Until then a temporary name of full size stands there, with its space reserved."""
    path = tmp_path / "model.safetensors"
    shard = ShardWriter(path, nbytes=100_000)
    shard.open()
    os.pwrite(shard.fd, b"end", 99_997)
    (temporary,) = tmp_path.iterdir()
    assert temporary.name.startswith(writer.TEMPORARY_PREFIX)
    assert temporary.stat().st_blocks * 512 >= 100_000
    shard.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert path.read_bytes() == bytes(99_997) + b"end"


def test_abandoning_leaves_no_trace(tmp_path: Path) -> None:
    """Before opening, after opening, after finishing and twice: only whole files remain."""
    shard = ShardWriter(tmp_path / "a", nbytes=10)
    shard.abandon()
    shard.open()
    shard.abandon()
    shard.abandon()
    assert not list(tmp_path.iterdir())
    shard.open()
    shard.finish()
    shard.abandon()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    """Leftovers go, finished files stay; a new writer is not disturbed by a leftover."""
    ShardWriter(tmp_path / "a", nbytes=10).open()
    again = ShardWriter(tmp_path / "a", nbytes=4)
    again.open()
    again.finish()
    assert (tmp_path / "a").stat().st_size == 4
    ShardWriter(tmp_path / "b", nbytes=10).open()
    writer.sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: Any) -> None:
    """When the disk fails half-way, the old content stands and nothing else is there."""
    path = tmp_path / "index.json"
    writer.write_file(path, b"old")

    def refuse(*args: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    for name in ("pwrite", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, refuse)
            with pytest.raises(StorageFailed, match="Input/output"):
                writer.write_file(path, b"new content")
        assert path.read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir()] == ["index.json"]
    writer.write_file(path, b"new content")
    assert path.read_bytes() == b"new content"


def test_a_write_that_takes_part_is_continued(tmp_path: Path, monkeypatch: Any) -> None:
    """The system may write less than asked for; all of it arrives."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:3], at))
    writer.write_file(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_a_disk_too_small_is_found_before_the_work(tmp_path: Path, monkeypatch: Any) -> None:
    """Both the question and the reservation say how much is needed and free."""
    with pytest.raises(NoSpace) as caught:
        writer.require_space(tmp_path, 1 << 62)
    assert caught.value.needed_bytes == 1 << 62
    assert 0 < caught.value.free_bytes < 1 << 62

    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(NoSpace, match="10 bytes"):
        ShardWriter(tmp_path / "a", nbytes=10).open()
    assert not list(tmp_path.iterdir())


def test_a_file_system_that_cannot_reserve_is_written_all_the_same(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """Some network file systems have no reservation; the file still has its size."""

    def refuse(*args: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    shard = ShardWriter(tmp_path / "a", nbytes=10)
    shard.open()
    shard.finish()
    assert (tmp_path / "a").stat().st_size == 10


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    """A missing folder and a file in place of a folder are errors with the path, not OSError."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageFailed, match="file"):
        writer.make_folder(tmp_path / "file" / "sub")
    with pytest.raises(StorageFailed, match="nowhere"):
        writer.write_file(tmp_path / "nowhere" / "a", b"x")
    with pytest.raises(StorageFailed, match="nowhere"):
        writer.require_space(tmp_path / "nowhere", 1)


def test_a_descriptor_is_closed_once(tmp_path: Path, monkeypatch: Any) -> None:
    """A close that fails is not repeated: the number may be another file's by then."""
    shard = ShardWriter(tmp_path / "a", nbytes=1)
    shard.open()
    fd, closed = shard.fd, []
    real = os.close

    def close(number: int) -> None:
        closed.append(number)
        real(number)
        if number == fd:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "close", close)
    with pytest.raises(StorageFailed):
        shard.finish()
    assert closed.count(fd) == 1
    assert not list(tmp_path.iterdir())


def test_a_synced_file_waits_for_its_name(tmp_path: Path) -> None:
    """`sync` closes it, durable, under the temporary name; only `finish` replaces the old one."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    shard = ShardWriter(path, nbytes=3)
    shard.open()
    os.pwrite(shard.fd, b"new", 0)
    shard.sync()
    shard.sync()
    assert (path.read_bytes(), shard.fd) == (b"old", -1)
    shard.finish()
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


PIECES = [0, 8, 4096, 5000, 400_000, 700_001, 1_048_576, 1_400_000, 1_400_010, 3_000_000]
"""Borders of what is written in turn: within units, on their borders, short and long."""


@pytest.mark.parametrize("cache", list(Cache))
@pytest.mark.parametrize("aligned", [True, False])
def test_whatever_way_bytes_take_the_file_is_the_same(
    cache: Cache, aligned: bool, tmp_path: Path
) -> None:
    """Pieces of any length at any place, in any order, in memory that lies well or does not."""
    content = random.Random(0).randbytes(PIECES[-1])
    shard = ShardWriter(tmp_path / "a", nbytes=len(content), cache=cache)
    shard.open()
    pieces = list(itertools.pairwise(PIECES))
    for begin, end in [*pieces[1::2], *pieces[::2]]:
        phase = begin % writer.DIRECT_UNIT + (0 if aligned else 1)
        shard.write(memory(content[begin:end], phase=phase), begin)
    shard.finish()
    assert (tmp_path / "a").read_bytes() == content


def test_long_aligned_writes_go_past_the_page_cache(tmp_path: Path) -> None:
    """The pages of what was written directly are not in memory: mincore says so."""
    content = os.urandom(4 << 20)
    kept = ShardWriter(tmp_path / "kept", nbytes=len(content), cache=Cache.KEEP)
    direct = ShardWriter(tmp_path / "direct", nbytes=len(content), cache=Cache.DIRECT)
    for shard in (kept, direct):
        shard.open()
        shard.write(memory(content, phase=0), 0)
    resident = [resident_pages(shard.fd, len(content)) for shard in (kept, direct)]
    os.fsync(kept.fd)
    os.posix_fadvise(kept.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if direct._direct_fd < 0 or resident_pages(kept.fd, len(content)):
        pytest.skip("the file system of the tests has no place but memory")
    assert resident == [len(content) // mmap.PAGESIZE, 0]


def test_a_file_system_with_larger_units_is_written_through_the_page_cache(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """Where a direct write is refused as misaligned, the bytes take the other way."""
    real = os.pwrite
    shard = ShardWriter(tmp_path / "a", nbytes=1 << 20, cache=Cache.DIRECT)
    shard.open()
    direct = shard._direct_fd
    refused = []

    def pwrite(fd: int, data: Any, offset: int) -> int:
        if fd == direct:
            refused.append(offset)
            raise OSError(errno.EINVAL, "misaligned")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    content = os.urandom(1 << 20)
    shard.write(memory(content, phase=0), 0)
    monkeypatch.undo()
    shard.finish()
    assert (tmp_path / "a").read_bytes() == content
    assert refused == ([0] if direct >= 0 else [])


def test_a_full_disk_is_found_by_a_direct_write(tmp_path: Path, monkeypatch: Any) -> None:
    """Only a misaligned write takes the other way; any other failure is the caller's."""
    shard = ShardWriter(tmp_path / "a", nbytes=1 << 20, cache=Cache.DIRECT)
    shard.open()

    def pwrite(fd: int, data: Any, offset: int) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="full"):
        shard.write(memory(bytes(1 << 20), phase=0), 0)
    monkeypatch.undo()
    shard.abandon()
    assert not list(tmp_path.iterdir())
