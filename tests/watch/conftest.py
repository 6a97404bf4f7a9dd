"""A clock that tests move, and the ways in which events get lost."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.watch.inotify import Inotify

NOBODY = 65534


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _instances(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give back what tests leave open: a user has few inotify instances."""
    opened: list[Inotify] = []
    init = Inotify.__init__

    def noting(self: Inotify) -> None:
        init(self)
        opened.append(self)

    monkeypatch.setattr(Inotify, "__init__", noting)
    yield
    for instance in opened:
        instance.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    path = tmp_path / "runs"
    (path / "a").mkdir(parents=True)
    return path


@pytest.fixture
def no_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every watch is reported as set and none is: what the kernel does for writes of other hosts."""
    numbers = itertools.count(1)
    monkeypatch.setattr(Inotify, "add", lambda self, path, mask: next(numbers))
    monkeypatch.setattr(Inotify, "remove", lambda self, number: None)


@pytest.fixture
def plain_user() -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """What makes this process a user whom permissions bind, where the tests run as root."""

    @contextlib.contextmanager
    def become() -> Iterator[None]:
        if os.geteuid() != 0:
            yield
            return
        os.seteuid(NOBODY)
        try:
            yield
        finally:
            os.seteuid(0)

    return become


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach, unlike pytest's own."""
    path = Path(tempfile.mkdtemp(prefix="ckptd-tests-"))
    path.chmod(0o755)
    yield path.resolve()
    shutil.rmtree(path)


def overflow(folder: Path) -> None:
    """Make more events in `folder` than the kernel keeps for one instance."""
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    here, there = folder / "here.log", folder / "there.log"
    here.touch()
    for _ in range(most // 4 + 1):  # each renaming makes two
        here.rename(there)
        there.rename(here)


def save(folder: Path, content: bytes = b"x") -> Path:
    """Write a checkpoint of one file."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    return folder
