"""The kernel's events, as they come."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from ckptd.watch import inotify
from ckptd.watch.inotify import Inotify
from tests.watch.conftest import overflow

MASK = inotify.ENTRIES | inotify.CLOSE_WRITE | inotify.DELETE_SELF | inotify.MOVE_SELF


@pytest.fixture
def events() -> Iterator[Inotify]:
    opened = Inotify()
    yield opened
    opened.close()


def test_names_of_what_happened(events: Inotify, tmp_path: Path) -> None:
    """A file that is made and written is told by the name it has, text or not."""
    number = events.add(tmp_path, MASK)
    assert events.read() == []
    name = "model-\udcff.safetensors"
    (tmp_path / name).write_bytes(b"x")
    told = events.read()
    assert {(happened.watch, happened.name) for happened in told} == {(number, name)}
    assert [happened.mask for happened in told] == [inotify.CREATE, inotify.CLOSE_WRITE]
    assert events.read() == []


def test_folder_that_goes(events: Inotify, tmp_path: Path) -> None:
    """A watched folder that is removed says so, and its watch is over."""
    (tmp_path / "a").mkdir()
    number = events.add(tmp_path / "a", MASK)
    (tmp_path / "a").rmdir()
    assert [happened.mask & inotify.GONE > 0 for happened in events.read()] == [True, True]
    events.remove(number)  # not an error


@pytest.mark.parametrize(("make", "number"), [("touch", errno.ENOTDIR), (None, errno.ENOENT)])
def test_only_folders(events: Inotify, tmp_path: Path, make: str | None, number: int) -> None:
    """What is no folder is refused with the system's own error."""
    if make:
        (tmp_path / "x").touch()
    with pytest.raises(OSError, match=os.strerror(number)):
        events.add(tmp_path / "x", MASK)


def test_links_are_not_followed(events: Inotify, tmp_path: Path) -> None:
    """A link to a folder is not watched: it may lead out of a root."""
    (tmp_path / "link").symlink_to("/")
    with pytest.raises(OSError, match=os.strerror(errno.ENOTDIR)):
        events.add(tmp_path / "link", MASK)


def test_lost_events_are_said_to_be_lost(events: Inotify, tmp_path: Path) -> None:
    """More events than the kernel keeps end in an overflow that can be seen."""
    events.add(tmp_path, MASK)
    overflow(tmp_path)
    last = events.read()[-1]
    assert (last.watch, last.mask) == (-1, inotify.Q_OVERFLOW)


async def test_can_be_waited_for(events: Inotify, tmp_path: Path) -> None:
    """The descriptor becomes readable with the first event, and not before."""
    events.add(tmp_path, MASK)
    ready = anyio.Event()

    async def wait() -> None:
        await anyio.wait_readable(events.fileno())
        ready.set()

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            assert not ready.is_set()
            (tmp_path / "x").touch()
            await ready.wait()
