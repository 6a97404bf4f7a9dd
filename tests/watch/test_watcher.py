"""The watcher on real folders, with a clock that tests move."""

from __future__ import annotations

import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
import watchfiles
from anyio.streams.memory import MemoryObjectReceiveStream
from structlog.testing import capture_logs

from ckptd.watch import events, watcher
from ckptd.watch.watcher import Changed, Seen, Settled, Vanished, Watcher, WatchEvent


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    path = tmp_path / "runs"
    (path / "a").mkdir(parents=True)
    return path


@pytest.fixture
def watching(runs: Path, clock: Clock) -> Watcher:
    return make(runs, clock)


def make(runs: Path, clock: Callable[[], float], *, settle_s: float = 10.0) -> Watcher:
    return Watcher(
        key="publish",
        pattern=f"{runs}/*/checkpoint-*",
        settle_s=settle_s,
        scan_interval_s=600.0,
        clock=clock,
        wall_clock=lambda: 5.0,
    )


def save(folder: Path, content: bytes = b"x") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    return folder


def told(found: list[WatchEvent]) -> list[tuple[str, str]]:
    return [(type(event).__name__, event.candidate.path.name) for event in found]


def test_life_of_a_checkpoint(watching: Watcher, runs: Path, clock: Clock) -> None:
    """Seen at once, settled after the quiet period, changed by a resume, settled again, gone."""
    assert watching.look() == []
    folder = save(runs / "a" / "checkpoint-1")
    assert told(watching.look()) == [("Seen", "checkpoint-1")]
    clock.now += 10
    [settled] = watching.look()
    assert isinstance(settled, Settled)
    assert settled.listing.by_name["model.safetensors"].size == 1
    assert settled.candidate.root_path == runs.resolve()
    assert watching.look() == []
    save(folder, b"rewritten")
    assert told(watching.look()) == [("Changed", "checkpoint-1")]
    clock.now += 10
    assert told(watching.look()) == [("Settled", "checkpoint-1")]
    shutil.rmtree(folder)
    assert told(watching.look()) == [("Vanished", "checkpoint-1")]


def test_several_come_in_their_order(watching: Watcher, runs: Path, clock: Clock) -> None:
    """What stood there before the daemon came is told in the order of the steps."""
    for step in (10, 9, 8):
        save(runs / "a" / f"checkpoint-{step}")
    assert [name for _, name in told(watching.look())] == [
        "checkpoint-8",
        "checkpoint-9",
        "checkpoint-10",
    ]
    clock.now += 10
    assert {kind for kind, _ in told(watching.look())} == {"Settled"}


def test_remade_root_is_followed(watching: Watcher, runs: Path) -> None:
    """A root that is removed and made again is watched as before."""
    save(runs / "a" / "checkpoint-1")
    watching.look()
    shutil.rmtree(runs)
    assert told(watching.look()) == [("Vanished", "checkpoint-1")]
    (runs / "a").mkdir(parents=True)
    save(runs / "a" / "checkpoint-1")
    assert told(watching.look()) == [("Seen", "checkpoint-1")]


def test_unreadable_is_told_once_and_is_not_gone(
    watching: Watcher, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A candidate that may not be read is a warning, said once; it has not vanished."""
    save(runs / "a" / "checkpoint-1")
    watching.look()
    list_files = watcher.listing.list_files

    def refuse(path: Path) -> object:
        raise watcher.errors.CheckpointRefused("may not be read by this user", path=path)

    monkeypatch.setattr(watcher.listing, "list_files", refuse)
    with capture_logs() as logs:
        assert watching.look() == []
        assert watching.look() == []
    assert [entry["event"] for entry in logs] == ["not watched"]
    assert "may not be read" in (watching.status.problem or "")
    monkeypatch.setattr(watcher.listing, "list_files", list_files)
    assert watching.look() == []
    assert watching.status.problem is None


def test_rearmed_candidate_is_told_again(watching: Watcher, runs: Path, clock: Clock) -> None:
    """A settled candidate that could not be used settles once more when it is asked for."""
    folder = save(runs / "a" / "checkpoint-1")
    watching.look()
    clock.now += 10
    watching.look()
    watching.rearm(folder.resolve())
    assert watching.look() == []
    clock.now += 10
    assert told(watching.look()) == [("Settled", "checkpoint-1")]


def test_status_counts(watching: Watcher, runs: Path, clock: Clock) -> None:
    """The status says how many candidates there are, and how many still change."""
    save(runs / "a" / "checkpoint-1")
    watching.look()
    clock.now += 10
    save(runs / "a" / "checkpoint-2")
    watching.look()
    found = watching.status
    assert (found.num_candidates, found.num_settling, found.last_scan_at) == (2, 1, 5.0)
    assert (found.pipeline, found.mode, found.problem) == ("publish", "events", None)


@asynccontextmanager
async def running(
    watching: Watcher,
) -> AsyncIterator[MemoryObjectReceiveStream[WatchEvent]]:
    """The events of `watching` while it runs; its interval never comes within a test."""
    send, receive = anyio.create_memory_object_stream[WatchEvent](4)
    with receive, anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            await tasks.start(watching.run, send)
            yield receive
            tasks.cancel_scope.cancel()


async def test_events_wake_the_scan(runs: Path) -> None:
    """A checkpoint is told long before the interval, from its first file to its removal."""
    async with running(make(runs, time.monotonic, settle_s=0.0)) as received:
        folder = save(runs / "a" / "checkpoint-1")
        event: WatchEvent = await received.receive()
        assert isinstance(event, Seen)
        while not isinstance(event, Settled):
            event = await received.receive()
        shutil.rmtree(folder)
        while not isinstance(event, Vanished):
            event = await received.receive()


async def test_new_run_folder_is_followed(runs: Path) -> None:
    """A folder on the way to the candidates that is new is watched without a restart."""
    async with running(make(runs, time.monotonic)) as received:
        (runs / "b").mkdir()
        save(runs / "b" / "checkpoint-1")
        assert (await received.receive()).candidate.path.parent.name == "b"


async def test_files_of_a_growing_checkpoint_are_told(runs: Path) -> None:
    """While a checkpoint changes, its own folder is watched: new files make it `Changed`."""
    async with running(make(runs, time.monotonic)) as received:
        folder = runs / "a" / "checkpoint-1"
        folder.mkdir()
        assert isinstance(await received.receive(), Seen)
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_text("x")
        event = await received.receive()
        while not (isinstance(event, Changed) and len(event.listing.files) == 2):
            event = await received.receive()


async def test_falls_back_to_polling(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without inotify watches left the watcher polls, says so once, and still finds everything."""

    def no_watches(*paths: Path, **options: object) -> object:
        raise OSError("OS file watch limit reached.")

    monkeypatch.setattr(watchfiles, "awatch", no_watches)
    save(runs / "a" / "checkpoint-1")
    watching = make(runs, time.monotonic, settle_s=0.0)
    with capture_logs() as logs:
        async with running(watching) as stream:
            assert isinstance(await stream.receive(), Seen)
            assert isinstance(await stream.receive(), Settled)
            save(runs / "a" / "checkpoint-2")
            watching.poke()
            assert (await stream.receive()).candidate.path.name == "checkpoint-2"
    assert [entry["why"] for entry in logs] == ["OS file watch limit reached."]
    assert watching.status.mode == "polling (OS file watch limit reached.)"


async def test_network_file_systems_are_polled(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network file system no event is waited for."""
    monkeypatch.setattr(watcher.mounts, "network_type", lambda path: "nfs4")
    watching = make(runs, time.monotonic)
    with capture_logs():
        async with running(watching):
            await anyio.wait_all_tasks_blocked()
            assert watching.status.mode == "polling (nfs4 is a network file system)"


async def test_watch_comes_before_the_scan(runs: Path) -> None:
    """After a watch is set up a scan is asked for, so that nothing falls between the two."""
    poked = anyio.Event()
    following = events.Events(poked.set, place="p")
    status = runs.stat()
    async with anyio.create_task_group() as tasks:
        await tasks.start(following.run)
        following.follow([events.Folder(path=runs, dev=status.st_dev, ino=status.st_ino)])
        with anyio.fail_after(20):
            await poked.wait()
        tasks.cancel_scope.cancel()


async def test_folder_that_went_meanwhile_is_looked_for(tmp_path: Path) -> None:
    """A folder that is gone before its watch is set up makes the next scan come, nothing worse."""
    poked = anyio.Event()
    following = events.Events(poked.set, place="p")
    async with anyio.create_task_group() as tasks:
        await tasks.start(following.run)
        following.follow([events.Folder(path=tmp_path / "gone", dev=1, ino=1)])
        with anyio.fail_after(20):
            await poked.wait()
        tasks.cancel_scope.cancel()
    assert following.mode == "events"
