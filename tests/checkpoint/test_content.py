"""Content: what is the same has the same digest, what differs anywhere has another one."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.checkpoint import content
from ckptd.checkpoint.header import Extent
from ckptd.errors import CheckpointCorrupt


def _files(folder: Path, files: dict[str, bytes]) -> list[tuple[str, Path]]:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [(name, folder / name) for name in files]


def test_the_digest_is_of_names_and_bytes_alone(tmp_path: Path) -> None:
    """A copy elsewhere, listed in another order and of another age, has the same digest."""
    files = {"b": b"two", "a": b"one"}
    first, second = _files(tmp_path / "x", files), _files(tmp_path / "y", files)
    os.utime(second[0][1], (1, 1))
    assert content.digest(first) == content.digest(reversed(second))


def test_the_digest_is_as_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sha256 over sorted lines of name, size, and the sha256 of the blocks' sha256 values."""
    monkeypatch.setattr(content, "BLOCK_BYTES", 4)
    files = _files(tmp_path / "x", {"a": b"123456789"})
    blocks = b"".join(hashlib.sha256(part).digest() for part in (b"1234", b"5678", b"9"))
    line = f"a 9 {hashlib.sha256(blocks).hexdigest()}\n"
    assert content.digest(files) == "sha256:" + hashlib.sha256(line.encode()).hexdigest()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_change_the_digest(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any number of threads gives the digest of one."""
    monkeypatch.setattr(content, "BLOCK_BYTES", 1000)
    files = _files(tmp_path / "x", {"a": os.urandom(12_345), "empty": b""})
    assert content.digest(files, threads=threads) == content.digest(files, threads=1)


@pytest.mark.parametrize(
    "other", [{"a": b"onf", "b": b"two"}, {"a": b"one", "c": b"two"}, {"a": b"one"}]
)
def test_any_difference_changes_the_digest(other: dict[str, bytes], tmp_path: Path) -> None:
    """A byte, a name or a file less: another checkpoint."""
    first = _files(tmp_path / "x", {"a": b"one", "b": b"two"})
    assert content.digest(first) != content.digest(_files(tmp_path / "y", other))


def test_a_name_that_is_no_text_has_a_digest(tmp_path: Path) -> None:
    """File names are bytes to the system, and so they are to the digest."""
    path = tmp_path / "x"
    path.write_bytes(b"x")
    assert content.digest([("\udcff", path)]) != content.digest([("\udcfe", path)])


@settings(deadline=None)
@given(
    data=st.binary(min_size=1, max_size=40),
    other=st.binary(min_size=1, max_size=40),
    gap=st.just(3),
)
def test_extents_are_compared_byte_for_byte(data: bytes, other: bytes, gap: int) -> None:
    """Equal if and only if the bytes are, wherever in their files they lie."""
    folder = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path("/tmp")
    path = folder / f"ckptd-test-{os.getpid()}"
    try:
        path.write_bytes(bytes(gap) + data + other)
        left = Extent(path, gap, len(data))
        right = Extent(path, gap + len(data), len(other))
        assert content.same_bytes(left, right) is (data == other)
        assert content.same_bytes(left, left)
    finally:
        path.unlink()


def test_a_difference_in_the_last_byte_is_seen(tmp_path: Path) -> None:
    """Comparison goes on past its first buffer, to the end."""
    size = 2 * (1 << 20) + 7
    (tmp_path / "a").write_bytes(bytes(size))
    (tmp_path / "b").write_bytes(bytes(size - 1) + b"x")
    left, right = Extent(tmp_path / "a", 0, size), Extent(tmp_path / "b", 0, size)
    assert not content.same_bytes(left, right)
    assert content.same_bytes(
        Extent(tmp_path / "a", 0, size - 1), Extent(tmp_path / "b", 0, size - 1)
    )


def test_a_file_that_ends_early_is_refused(tmp_path: Path) -> None:
    """Comparing beyond the end of a file names the file."""
    (tmp_path / "a").write_bytes(b"1234")
    long, short = Extent(tmp_path / "a", 0, 8), Extent(tmp_path / "a", 0, 8)
    with pytest.raises(CheckpointCorrupt, match="ended"):
        content.same_bytes(long, short)


def test_comparing_and_hashing_can_be_stopped(tmp_path: Path) -> None:
    """What `check` raises ends the work and reaches the caller."""
    files = _files(tmp_path / "x", {"a": b"1234"})
    extent = Extent(files[0][1], 0, 4)

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        content.same_bytes(extent, extent, check=stop)
    with pytest.raises(InterruptedError):
        content.digest(files, check=stop)
