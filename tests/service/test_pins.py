"""Pins of a definition, apart from the daemon."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ckptd.checkpoint import birth, listing
from ckptd.checkpoint.open_files import OpenFiles
from ckptd.errors import CheckpointVanished
from ckptd.service.pins import Pins
from ckptd.watch import scan


def _live_and_die(pins: Pins, root: Path, step: int) -> None:
    source = root / "run" / f"checkpoint-{step}"
    source.mkdir(parents=True)
    (source / "model.safetensors").write_bytes(b"weights")
    live_path = pins.live_path(source, root)
    assert live_path is not None
    pins.refresh_early(live_path, source)
    pins.refresh_fully(live_path, listing.list_files(source))
    if step % 2:
        pins.freeze(live_path, pins.frozen_path(live_path, f"job{step}"))
    else:
        pins.release(live_path)


@pytest.fixture
def pins(tmp_path: Path) -> Pins:
    """The pins of a definition that watches `runs/*/checkpoint-*`."""
    return Pins(
        owner="me",
        pipeline="p",
        place=scan.parse(f"{tmp_path}/runs/*/checkpoint-*"),
        state_path=tmp_path / "state",
        held=OpenFiles(),
    )


def _made(root: Path, content: bytes) -> Path:
    source = root / "run" / "checkpoint-7"
    source.mkdir(parents=True)
    for name in ("model.safetensors", "config.json"):
        (source / name).write_bytes(content)
    return source


def test_a_folder_made_anew_never_gets_into_the_pin_of_the_one_before(
    pins: Pins, tmp_path: Path
) -> None:
    """Its inode number is used again at once, and its names and sizes are the same."""
    root = tmp_path / "runs"
    source = _made(root, b"first")
    live_path = pins.live_path(source, root)
    assert live_path is not None
    pins.refresh_early(live_path, source)
    shutil.rmtree(source)
    assert pins.live_path(source, root) is None
    _made(root, b"again")
    assert pins.live_path(source, root) != live_path
    with pytest.raises(CheckpointVanished):
        pins.refresh_early(live_path, source)
    assert pins.last_intact(live_path) is not None
    assert (live_path / "model.safetensors").read_bytes() == b"first"


def test_without_a_time_of_birth_the_inode_number_must_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A C library that has no statx; and what is not there is an error either way."""
    told = birth.identity(tmp_path)
    assert told.partition("-")[0] == f"{tmp_path.stat().st_ino}"
    with pytest.raises(FileNotFoundError):
        birth.identity(tmp_path / "absent")
    monkeypatch.setattr(birth, "_libc", object())
    assert birth.identity(tmp_path) == f"{tmp_path.stat().st_ino}"
    with pytest.raises(FileNotFoundError):
        birth.identity(tmp_path / "absent")


def test_a_pin_that_holds_something_else_is_not_what_was_seen(pins: Pins, tmp_path: Path) -> None:
    """A file of the pin that is not the one of the last intact look: never a mixture."""
    root = tmp_path / "runs"
    source = _made(root, b"first")
    live_path = pins.live_path(source, root)
    assert live_path is not None
    pins.refresh_early(live_path, source)
    (source / "model.safetensors").write_bytes(b"rewritten in place")
    shutil.rmtree(source)
    assert pins.last_intact(live_path) is None


def test_what_is_done_with_leaves_nothing_in_memory(pins: Pins, tmp_path: Path) -> None:
    """However many checkpoints there were, nothing is kept of those that were taken or let go."""

    def kept() -> int:
        return sum(len(value) for value in vars(pins).values() if isinstance(value, (dict, set)))

    _live_and_die(pins, tmp_path / "runs", 1)
    before = kept()
    for step in range(2, 12):
        _live_and_die(pins, tmp_path / "runs", step)
    assert kept() == before
