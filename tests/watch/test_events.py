"""Events as hints: what is watched, what is said where nothing more can be, what is let go."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from ckptd.watch import events as events_module
from ckptd.watch.events import RETRY_S, Events, Folder
from ckptd.watch.inotify import Inotify
from tests.watch.conftest import Clock, overflow


@pytest.fixture
def events(clock: Clock) -> Iterator[Events]:
    made = Events(place="/runs/*", clock=clock)
    yield made
    made.close()


def folder(path: Path) -> Folder:
    path.mkdir(parents=True, exist_ok=True)
    status = path.stat()
    return Folder(path=path, dev=status.st_dev, ino=status.st_ino)


def test_hints_say_where(events: Events, tmp_path: Path) -> None:
    """A hint names the folder and what happened in it; nothing happens twice."""
    assert events.watch(folder(tmp_path / "a"))
    assert events.watch(folder(tmp_path / "b"), with_files=True)
    assert not events.watch(folder(tmp_path / "a"))
    (tmp_path / "a" / "checkpoint-1").mkdir()
    (tmp_path / "b" / "x").write_text("x")
    hints = events.drain()
    assert hints.names == {
        tmp_path / "a": frozenset({"checkpoint-1"}),
        tmp_path / "b": frozenset({"x"}),
    }
    assert (hints.written, hints.lost) == (frozenset({tmp_path / "b" / "x"}), False)
    assert events.drain().names == {}


def test_writes_are_told_where_they_are_asked_for(events: Events, tmp_path: Path) -> None:
    """A log that is written in a run folder is no event; the same folder as a checkpoint has it."""
    (tmp_path / "train.log").touch()
    events.watch(folder(tmp_path))
    (tmp_path / "train.log").write_text("loss")
    assert events.drain().names == {}
    assert events.watch(folder(tmp_path), with_files=True)
    (tmp_path / "train.log").write_text("loss")
    assert events.drain().names == {tmp_path: frozenset({"train.log"})}


def test_remade_folder_is_watched_anew(events: Events, tmp_path: Path) -> None:
    """A folder that was removed and made again is another one, and its events are told."""
    path = tmp_path / "runs"
    events.watch(folder(path))
    path.rename(tmp_path / "old")
    assert path in events.drain().names
    again = folder(path)
    assert not events.is_watched(again)
    assert events.watch(again)
    (tmp_path / "old" / "x").touch()
    assert events.drain().names == {}
    (path / "x").touch()
    assert events.drain().names == {path: frozenset({"x"})}


def test_what_is_forgotten_is_not_watched(events: Events, tmp_path: Path) -> None:
    """Folders that nobody follows any more give no hints."""
    kept, other = folder(tmp_path / "a"), folder(tmp_path / "b")
    events.watch(kept)
    events.watch(other)
    events.forget(other.path)
    events.forget(tmp_path / "unknown")
    (other.path / "x").touch()
    (kept.path / "x").touch()
    assert events.drain().names.keys() == {kept.path}


def test_quiet_folders_make_room(
    events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where room is short the folder that has been quiet for longest is let go, never a busy one."""
    monkeypatch.setattr(events_module, "MAX_FOLDERS", 3)
    folders = [folder(tmp_path / name) for name in "abcde"]
    for each in folders[:3]:
        events.watch(each)
    assert not events.watch(folders[3])
    events.rest(folders[1].path)
    events.rest(folders[0].path)
    assert not events.watch(folders[3], make_room=False)
    assert events.watch(folders[3])
    assert [events.is_watched(each) for each in folders] == [True, False, True, True, False]
    events.watch(folders[0])  # busy again
    assert not events.watch(folders[4])
    assert events.mode == "events"


def test_a_quarter_of_the_users_watches_at_most(
    events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's other programs keep their watches, however many folders there are."""
    monkeypatch.setattr(events_module, "SYSCTL_PATH", tmp_path / "sys")
    limit = tmp_path / "sys" / "fs" / "inotify" / "max_user_watches"
    limit.parent.mkdir(parents=True)
    limit.write_text("8\n")
    watched = [events.watch(folder(tmp_path / str(number))) for number in range(9)]
    assert watched.count(True) == 3


def test_overflow_is_told(events: Events, tmp_path: Path) -> None:
    """Where the kernel could not keep up a hint says so, and the log does once."""
    events.watch(folder(tmp_path))
    with capture_logs() as logs:
        for _ in range(2):
            overflow(tmp_path)
            assert events.drain().lost
    assert [entry["event"] for entry in logs] == ["events were lost"]
    assert not events.drain().lost


def test_limit_is_tried_again_later(
    events: Events, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a limit no watch is tried for a while, then one is, and events are back by themselves."""
    tried = []

    def refuse(self: Inotify, path: Path, mask: int) -> int:
        tried.append(path)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched, capture_logs() as logs:
        patched.setattr(Inotify, "add", refuse)
        for _ in range(3):
            assert not events.watch(folder(tmp_path))
    assert len(tried) == 1
    assert "fs.inotify.max_user_watches" in events.mode or "user.max_inotify" in events.mode
    clock.now += RETRY_S - 1
    assert not events.watch(folder(tmp_path))
    clock.now += 1
    assert events.watch(folder(tmp_path))
    assert events.mode == "events"
    assert len(logs) == 1


def test_folder_that_may_not_be_watched_is_no_limit(events: Events, tmp_path: Path) -> None:
    """A folder that went meanwhile is not watched, and says nothing about the others."""
    gone = folder(tmp_path / "gone")
    gone.path.rmdir()
    assert not events.watch(gone)
    assert events.mode == "events"
    assert events.watch(folder(tmp_path / "there"))


def test_no_descriptor_left_is_not_the_users_limit(events: Events, tmp_path: Path) -> None:
    """A process without descriptors is told apart from a user without inotify instances."""
    here = folder(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with capture_logs():
            assert not events.watch(here)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "LimitNOFILE" in events.mode


def test_polling_is_undone(events: Events, tmp_path: Path) -> None:
    """A place that moves to a network file system and back has events again."""
    events.watch(folder(tmp_path))
    with capture_logs() as logs:
        events.poll_only("nfs4 is a network file system")
        events.poll_only("nfs4 is a network file system")
    assert (events.fileno(), events.mode) == (None, "polling (nfs4 is a network file system)")
    assert not events.watch(folder(tmp_path))
    assert len(logs) == 1
    events.poll_only(None)
    assert events.watch(folder(tmp_path))
    assert events.mode == "events"


_WATCH_TEN = """
import sys
from pathlib import Path
from structlog.testing import capture_logs
from ckptd.watch import inotify
from ckptd.watch.watcher import Watcher
runs = Path(sys.argv[1])
other = inotify.Inotify()  # another program of the same user
for number in range(7):
    other.add(runs / f"run-{number}", inotify.CREATE)
watcher = Watcher(key="k", pattern=f"{runs}/*/checkpoint-*", settle_s=0.0)
with capture_logs() as logs:
    watcher.look()
    watcher.poke()
    (runs / "run-9" / "checkpoint-1").mkdir()
    found = watcher.look()
print(len(found), [entry["event"] for entry in logs], watcher.status.mode)
"""


@pytest.mark.parametrize(
    ("limit", "value"), [("max_inotify_watches", 8), ("max_inotify_instances", 1)]
)
def test_real_limits_are_survived(tmp_path: Path, limit: str, value: int) -> None:
    """Without watches or instances left the place is polled: said once, by the limit's name."""
    sysctl = f"/proc/sys/user/{limit}"
    inside = ["unshare", "--user", "--map-root-user", "sh", "-c"]
    if subprocess.run([*inside, f"echo {value} >{sysctl}"], check=False).returncode != 0:
        pytest.skip("no user namespace may be made here")
    for number in range(10):
        (tmp_path / f"run-{number}").mkdir()
    done = subprocess.run(
        [*inside, f'echo {value} >{sysctl}; exec "$@"', "sh", sys.executable, "-c", _WATCH_TEN,
         str(tmp_path)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.startswith("2 ['watching by polling'] polling (")  # Seen and Settled
    assert f"user.{limit} ({value}) is used up: raise it with `sysctl" in done.stdout
