"""Candidates that go faster than they are looked at: they are told of, and never mixed up."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ckptd.watch.watcher import Watcher, WatchEvent
from tests.watch.conftest import Clock, save


@pytest.fixture
def watching(runs: Path, clock: Clock) -> Watcher:
    return make(f"{runs}/*/checkpoint-*", clock)


def make(pattern: str, clock: Clock) -> Watcher:
    found = Watcher(
        key="publish", pattern=pattern, settle_s=10.0, scan_interval_s=600.0, clock=clock
    )
    assert found.look() == []
    return found


def told(found: list[WatchEvent]) -> list[tuple[str, str]]:
    return [(type(event).__name__, event.candidate.path.name) for event in found]


def test_one_that_went_before_a_look_is_told_of_once(watching: Watcher, runs: Path) -> None:
    """It came and went between two looks: whoever listens can say that it vanished."""
    shutil.rmtree(save(runs / "a" / "checkpoint-1"))
    assert told(watching.look()) == [("Vanished", "checkpoint-1")]
    assert watching.look() == []


def test_only_folders_that_the_glob_wants_are_told_of(watching: Watcher, runs: Path) -> None:
    """A file of such a name, another folder, one that was renamed into place: nothing vanished."""
    (runs / "a" / "checkpoint-1.lock").touch()
    (runs / "a" / "checkpoint-1.lock").unlink()
    shutil.rmtree(save(runs / "a" / "runs-1"))
    save(runs / "a" / "checkpoint-2.tmp").rename(runs / "a" / "checkpoint-2")
    assert told(watching.look()) == [("Seen", "checkpoint-2")]


def test_one_that_was_made_anew_is_another_one(watching: Watcher, runs: Path) -> None:
    """Deleted and written again between two looks, maybe with the same inode number: both are told."""
    folder = save(runs / "a" / "checkpoint-1")
    assert told(watching.look()) == [("Seen", "checkpoint-1")]
    shutil.rmtree(folder)
    save(folder, b"other")
    assert told(watching.look()) == [("Vanished", "checkpoint-1"), ("Seen", "checkpoint-1")]
    assert watching.look() == []


def test_a_single_file_that_is_replaced_is_another_one(runs: Path, clock: Clock) -> None:
    """Deleted and written again; where it is only renamed over, it has changed."""
    watching = make(f"{runs}/*/*.safetensors", clock)
    path = runs / "a" / "last.safetensors"
    path.write_bytes(b"one")
    assert told(watching.look()) == [("Seen", path.name)]
    path.unlink()
    path.write_bytes(b"two")
    assert told(watching.look()) == [("Vanished", path.name), ("Seen", path.name)]
    new = path.with_suffix(".new")
    new.write_bytes(b"three")
    new.replace(path)
    assert told(watching.look()) == [("Changed", path.name)]
