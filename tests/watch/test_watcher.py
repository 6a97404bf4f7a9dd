"""The watcher on real folders, with a clock that tests move."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path

import anyio
import pytest
from anyio.streams.memory import MemoryObjectReceiveStream
from structlog.testing import capture_logs

from ckptd import errors
from ckptd.checkpoint import listing
from ckptd.settings import Settings
from ckptd.watch import mounts, roster, watcher
from ckptd.watch.inotify import Inotify
from ckptd.watch.mounts import FileSystem
from ckptd.watch.tree import TRUST_S
from ckptd.watch.watcher import Changed, Seen, Settled, Vanished, Watcher, WatchEvent
from tests.watch.conftest import Clock, overflow, save

INTERVAL_S = 600.0
"""Of every watcher here: what a test finds sooner it has not found by the interval."""


@pytest.fixture
def watching(runs: Path, clock: Clock) -> Watcher:
    return make(runs, clock)


def make(runs: Path, clock: Callable[[], float], *, settle_s: float = 10.0) -> Watcher:
    return Watcher(
        key="publish",
        pattern=f"{runs}/*/checkpoint-*",
        settle_s=settle_s,
        scan_interval_s=INTERVAL_S,
        clock=clock,
        wall_clock=lambda: 5.0,
    )


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


def test_remade_root_is_followed(watching: Watcher, runs: Path, clock: Clock) -> None:
    """A root that is removed and made again is watched as before."""
    save(runs / "a" / "checkpoint-1")
    watching.look()
    shutil.rmtree(runs)
    assert told(watching.look()) == [("Vanished", "checkpoint-1")]
    (runs / "a").mkdir(parents=True)
    save(runs / "a" / "checkpoint-1")
    clock.now += INTERVAL_S  # nobody watches a root that is not there
    assert told(watching.look()) == [("Seen", "checkpoint-1")]
    save(runs / "a" / "checkpoint-2")
    assert told(watching.look()) == [("Seen", "checkpoint-2")]


def test_unreadable_is_told_once_and_is_not_gone(
    watching: Watcher, runs: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A candidate that may not be read is a warning, said once; it has not vanished."""
    save(runs / "a" / "checkpoint-1")
    watching.look()

    def refuse(path: Path) -> object:
        raise errors.CheckpointRefused("may not be read by this user", path=path)

    with monkeypatch.context() as patched, capture_logs() as logs:
        patched.setattr(listing, "list_files", refuse)
        for _ in range(2):
            clock.now += INTERVAL_S
            assert watching.look() == []
    assert [entry["event"] for entry in logs] == ["not watched"]
    assert "may not be read" in (watching.status.problem or "")
    clock.now += INTERVAL_S
    assert told(watching.look()) == [("Settled", "checkpoint-1")]
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

    def no_watches(self: Inotify, path: Path, mask: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Inotify, "add", no_watches)
    save(runs / "a" / "checkpoint-1")
    watching = make(runs, time.monotonic, settle_s=0.0)
    with capture_logs() as logs:
        async with running(watching) as stream:
            watching.poke()
            save(runs / "a" / "checkpoint-2")
            seen = set()
            while len(seen) < 2:
                seen.add((await stream.receive()).candidate.path.name)
    assert [entry["event"] for entry in logs] == ["watching by polling"]
    assert watching.status.mode.startswith("polling (")
    assert "max_user_watches" in watching.status.mode


async def test_network_file_systems_are_polled(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network file system no event is waited for, and the log says so."""
    monkeypatch.setattr(mounts, "file_system", lambda path: FileSystem(network="nfs4"))
    watching = make(runs, time.monotonic)
    with capture_logs() as logs:
        async with running(watching):
            assert watching.status.mode == "polling (nfs4 is a network file system)"
            assert watching._events.fileno() is None
    assert [entry["event"] for entry in logs] == ["watching by polling"]


def test_network_interval(runs: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place on a network file system is scanned at that interval, not at the local one."""
    monkeypatch.setattr(mounts, "file_system", lambda path: FileSystem(network="nfs4"))
    watching = Watcher(
        key="k", pattern=f"{runs}/*/checkpoint-*", settle_s=10.0, scan_interval_s=1.0,
        network_scan_interval_s=15.0, clock=clock,
    )  # fmt: skip
    watching.look()
    save(runs / "a" / "checkpoint-1")
    clock.now += 14
    assert watching.look() == []
    clock.now += 1
    assert told(watching.look()) == [("Seen", "checkpoint-1")]


def test_network_quiet_period(
    watching: Watcher, runs: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where sizes and times are cached a checkpoint is quiet only after they were asked for anew."""
    monkeypatch.setattr(mounts, "file_system", lambda path: FileSystem(network="nfs4"))
    save(runs / "a" / "checkpoint-1")
    watching.look()
    clock.now += watcher.NETWORK_SETTLE_S - 1
    assert watching.look() == []
    clock.now += 1
    assert told(watching.look()) == [("Settled", "checkpoint-1")]


@pytest.mark.usefixtures("no_events")
def test_lost_events_cost_an_interval(watching: Watcher, runs: Path, clock: Clock) -> None:
    """What no event tells is found by the next full pass: new, grown, removed."""
    watching.look()
    folder = save(runs / "a" / "checkpoint-1")
    (runs / "new" / "checkpoint-2").mkdir(parents=True)
    assert watching.look() == []
    clock.now += INTERVAL_S
    assert told(watching.look()) == [("Seen", "checkpoint-1"), ("Seen", "checkpoint-2")]
    (folder / "late").mkdir()
    (folder / "late" / "optimizer.bin").touch()
    clock.now += INTERVAL_S
    assert ("Changed", "checkpoint-1") in told(watching.look())
    shutil.rmtree(folder)
    clock.now += INTERVAL_S
    assert ("Vanished", "checkpoint-1") in told(watching.look())


def test_default_interval_is_below_two_seconds(runs: Path, clock: Clock) -> None:
    """As it is set up by default, a checkpoint that no event tells is seen within two seconds."""
    watching = Watcher(key="k", pattern=f"{runs}/*/checkpoint-*", settle_s=10.0, clock=clock)
    watching.look()
    watching._events.close()  # whatever happens is lost
    save(runs / "a" / "checkpoint-1")
    clock.now += 2
    assert told(watching.look()) == [("Seen", "checkpoint-1")]
    assert Settings.model_fields["scan_interval"].default < 2


def test_overflow_is_a_full_look(watching: Watcher, runs: Path) -> None:
    """When the kernel's queue runs over, what came after that is found at once, not at the interval."""
    watching.look()
    folder = save(runs / "a" / "checkpoint-1")
    assert told(watching.look()) == [("Seen", "checkpoint-1")]
    with capture_logs() as logs:
        overflow(runs / "a")
        (runs / "b" / "checkpoint-2").mkdir(parents=True)
        (folder / "config.json").touch()
        assert set(told(watching.look())) == {("Seen", "checkpoint-2"), ("Changed", "checkpoint-1")}
    assert [entry["event"] for entry in logs] == ["events were lost"]


def test_root_that_does_not_exist_yet(tmp_path: Path, clock: Clock) -> None:
    """A place may be watched before there is anything, and its root may be removed and come back."""
    runs = tmp_path / "not" / "there" / "yet"
    watching = make(runs, clock)
    assert watching.look() == []
    assert watching.status.problem is None
    (runs / "a").mkdir(parents=True)
    save(runs / "a" / "checkpoint-1")
    clock.now += INTERVAL_S
    assert told(watching.look()) == [("Seen", "checkpoint-1")]


def test_root_renamed_away(watching: Watcher, runs: Path, clock: Clock) -> None:
    """A root that is moved is gone, and what is written there is nobody's business."""
    save(runs / "a" / "checkpoint-1")
    watching.look()
    elsewhere = runs.rename(runs.with_name("archive"))
    clock.now += INTERVAL_S
    assert told(watching.look()) == [("Vanished", "checkpoint-1")]
    save(elsewhere / "a" / "checkpoint-2")
    clock.now += INTERVAL_S
    assert watching.look() == []
    assert watching.status.num_candidates == 0


def test_permission_taken_and_given_back(
    open_folder: Path, clock: Clock, plain_user: Callable[[], AbstractContextManager[None]]
) -> None:
    """A root that may not be read for a while is a warning; its checkpoints have not vanished."""
    (open_folder / "runs" / "a").mkdir(parents=True)
    save(open_folder / "runs" / "a" / "checkpoint-1")
    watching = make(open_folder / "runs", clock)
    with plain_user():
        watching.look()
    (open_folder / "runs").chmod(0)
    with plain_user(), capture_logs() as logs:
        for _ in range(2):
            clock.now += INTERVAL_S
            assert watching.look() == []
    assert [entry["event"] for entry in logs] == ["not watched"]
    assert "ermission denied" in (watching.status.problem or "")
    (open_folder / "runs").chmod(0o755)
    with plain_user():
        clock.now += INTERVAL_S
        assert told(watching.look()) == [("Settled", "checkpoint-1")]
    assert (watching.status.problem, watching.status.num_candidates) == (None, 1)


def test_wall_clock_set_back(runs: Path, clock: Clock) -> None:
    """Quiet is measured by a clock that only goes forward, whatever the files' times say."""
    wall = iter([5e9, 1.0, 1.0, 1.0])
    watching = Watcher(
        key="k", pattern=f"{runs}/*/checkpoint-*", settle_s=10.0, scan_interval_s=INTERVAL_S,
        clock=clock, wall_clock=lambda: next(wall),
    )  # fmt: skip
    folder = save(runs / "a" / "checkpoint-1")
    os.utime(folder / "model.safetensors", (4e9, 4e9))
    assert told(watching.look()) == [("Seen", "checkpoint-1")]
    os.utime(folder / "model.safetensors", (1e9, 1e9))
    (folder / "config.json").touch()
    assert told(watching.look()) == [("Changed", "checkpoint-1")]
    clock.now += 9
    assert watching.look() == []
    clock.now += 1
    assert told(watching.look()) == [("Settled", "checkpoint-1")]


def test_mapped_file_that_is_closed(watching: Watcher, runs: Path, clock: Clock) -> None:
    """Stores into a mapping leave no trace but the closing of the file: it begins the quiet anew."""
    folder = save(runs / "a" / "checkpoint-1", b"x" * 8192)
    watching.look()
    file = folder / "model.safetensors"
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
        mapped[0] = 1  # the first store moves the times
        clock.now += 10
        assert told(watching.look()) == [("Changed", "checkpoint-1")]
        clock.now += 9
        before = file.stat()
        mapped[1] = 1
        assert file.stat() == before
    assert watching.look() == []
    clock.now += 9
    assert watching.look() == []
    clock.now += 1
    assert told(watching.look()) == [("Settled", "checkpoint-1")]


def test_state_folder_is_invisible(runs: Path, clock: Clock) -> None:
    """What ckptd does in its own folder gives no candidate, no event and no look, whatever the glob."""
    watching = Watcher(
        key="k", pattern=f"{runs}/*/*", settle_s=10.0, scan_interval_s=INTERVAL_S, clock=clock
    )
    source = save(runs / "a" / "checkpoint-1")
    assert told(watching.look()) == [("Seen", "checkpoint-1")]
    pin = runs / ".ckptd" / "checkpoint-1"
    pin.mkdir(parents=True)
    (pin / "model.safetensors").hardlink_to(source / "model.safetensors")
    assert watching._tree.concerned(watching._events.drain().names) == set()
    clock.now += INTERVAL_S
    assert told(watching.look()) == [("Settled", "checkpoint-1")]


def test_thousands_at_once_are_told_in_steps(
    watching: Watcher, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look lists for a while and hands over what it has; the next one goes on, in order."""
    for step in (10, 9, 8):
        save(runs / "a" / f"checkpoint-{step}")
    clock_steps = iter(range(100))
    monkeypatch.setattr(roster.time, "monotonic", lambda: next(clock_steps) / 2)
    monkeypatch.setattr(watcher, "STEP_S", 1.0)
    steps = []
    while not steps or watching._roster.has_pending:
        steps.append([name for _, name in told(watching.look())])
    assert steps == [["checkpoint-8"], ["checkpoint-9"], ["checkpoint-10"]]


@pytest.mark.usefixtures("no_events")
def test_passes_keep_to_their_share(
    watching: Watcher, runs: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one idle pass costs more than its share of the interval, the next comes later."""
    for _ in range(3):  # until the folders are believed
        watching.poke()
        watching.look()
        clock.now += TRUST_S
    costs = itertools.chain([0.0], itertools.repeat(10.0))
    with monkeypatch.context() as patched:
        patched.setattr(watcher.time, "thread_time", lambda: next(costs))
        watching.poke()
        watching.look()
    save(runs / "a" / "checkpoint-1")
    clock.now += 10.0 / watcher.SCAN_SHARE - 1
    assert watching.look() == []
    clock.now += 1
    assert told(watching.look()) == [("Seen", "checkpoint-1")]


async def test_start_waits_for_no_receiver(runs: Path) -> None:
    """However many checkpoints are there at the start, whoever starts the watcher is not held up."""
    for step in range(100):
        save(runs / "a" / f"checkpoint-{step}")
    async with running(make(runs, time.monotonic)) as received:
        names = [(await received.receive()).candidate.path.name for _ in range(100)]
    assert names == [f"checkpoint-{step}" for step in range(100)]


async def test_burst_of_folders(runs: Path) -> None:
    """Of runs made as `mkdir -p` every checkpoint is told, with the files deep inside it."""
    async with running(make(runs, time.monotonic)) as received:
        for number in range(20):
            folder = runs / f"run-{number}" / f"checkpoint-{number}" / "p" / "q" / "r"
            folder.mkdir(parents=True)
            (folder / "model.safetensors").touch()
        whole = set()
        while len(whole) < 20:
            event = await received.receive()
            assert isinstance(event, (Seen, Changed))
            if event.listing.files:
                whole.add(event.candidate.path.name)


async def test_files_in_new_folders_of_a_checkpoint(runs: Path) -> None:
    """Folders that come in a growing checkpoint are watched as well: their files make it `Changed`."""
    async with running(make(runs, time.monotonic)) as received:
        folder = save(runs / "a" / "checkpoint-1") / "pytorch_model_fsdp_0"
        assert isinstance(await received.receive(), Seen)
        folder.mkdir()
        (folder / ".metadata.tmp").touch()
        event: WatchEvent = await received.receive()
        while not (isinstance(event, Changed) and len(event.listing.files) == 2):
            event = await received.receive()
        (folder / ".metadata.tmp").rename(folder / ".metadata")
        while f"{folder.name}/.metadata" not in event.listing.by_name:
            event = await received.receive()
            assert isinstance(event, Changed)


async def test_rewritten_in_place_long_after(runs: Path) -> None:
    """A quiet checkpoint whose file is written anew is told at once, by its event."""
    folder = save(runs / "a" / "checkpoint-1")
    async with running(make(runs, time.monotonic, settle_s=0.0)) as received:
        assert isinstance(await received.receive(), Seen)
        assert isinstance(await received.receive(), Settled)
        (folder / "model.safetensors").write_bytes(b"resumed")
        assert isinstance(await received.receive(), Changed)


async def test_single_files(runs: Path) -> None:
    """Weight files in a folder of their own are followed as folders are: made, written, removed."""
    watching = Watcher(
        key="k", pattern=f"{runs}/*/*.safetensors", settle_s=0.0, scan_interval_s=INTERVAL_S
    )
    file = runs / "a" / "lora-000010.safetensors"
    async with running(watching) as received:
        file.write_bytes(b"x")
        assert isinstance(await received.receive(), Seen)
        event: WatchEvent = await received.receive()
        file.write_bytes(b"longer")
        while not (isinstance(event, (Changed, Settled)) and event.listing.nbytes == 6):
            event = await received.receive()
        file.unlink()
        while not isinstance(event, Vanished):
            event = await received.receive()
