"""The doctor's checks of the machine."""

from __future__ import annotations

import pytest

from ckptd.cli.doctor import node
from ckptd.cli.doctor.finding import Grade
from ckptd.cli.doctor.node import Inotify, Unit

GB = 1_000_000_000


def _limits(watches: int = 1000, instances: int = 128, used: int = 10) -> Inotify:
    return Inotify(max_watches=watches, max_instances=instances, used_instances=used)


def test_inotify_with_room() -> None:
    """Limits above what is watched are well."""
    (found,) = node.inotify(_limits(), {"/runs/*": 30})
    assert (found.grade, found.what) == (Grade.OK, "30 folders of 1000 watches, 118 instances free")


@pytest.mark.parametrize(
    ("limits", "folders", "grade", "hint"),
    [
        (_limits(watches=40), {"/a/*": 30, "/b/*": 11}, Grade.FAILED, "max_user_watches=524288"),
        (_limits(used=127), {"/a/*": 1, "/b/*": 1}, Grade.FAILED, "max_user_instances=1024"),
        (_limits(watches=1 << 20), {"/a/*": 16_385}, Grade.WARNING, "several patterns"),
    ],
)
def test_inotify_without(limits: Inotify, folders: dict[str, int], grade: Grade, hint: str) -> None:
    """Too few watches or instances, or more folders than are asked for, is said with the remedy."""
    (found,) = node.inotify(limits, folders)
    assert found.grade is grade
    assert hint in (found.hint or "")


def test_inotify_with_nothing_to_watch() -> None:
    """Polled places need no inotify."""
    assert node.inotify(_limits(watches=0), {})[0].grade is Grade.SKIPPED


@pytest.mark.parametrize(("limit", "grade"), [(1023, Grade.FAILED), (1024, Grade.OK)])
def test_open_files(limit: int, grade: Grade) -> None:
    """A daemon needs more open files than a shell's old default of 256."""
    assert node.open_files(limit).grade is grade


@pytest.mark.parametrize(
    ("slots", "runner", "needed", "grade"),
    [
        (2, 5 * GB, GB, Grade.OK),
        (3, 5 * GB, GB, Grade.WARNING),
        (11, GB, GB, Grade.FAILED),
    ],
)
def test_memory(slots: int, runner: int, needed: int, grade: Grade) -> None:
    """Runners that need more than there is fail; that may take more are warned of."""
    found = node.memory(10 * GB, slots=slots, runner_bytes=runner, needed_bytes=needed)
    assert found.grade is grade


def test_bytecode() -> None:
    """Uncached packages are named; the variable that forbids caching is found."""
    found = node.bytecode({}, {"torch": False, "ckptd": True})
    assert (found.grade, "torch: no cached" in found.what) == (Grade.WARNING, True)
    variable = {"PYTHONDONTWRITEBYTECODE": "1"}
    assert node.bytecode(variable, {"torch": True}).grade is Grade.WARNING
    assert node.bytecode({}, {"torch": True}).grade is Grade.OK


def test_user() -> None:
    """Root sees other things than the daemon will."""
    assert (node.user(0).grade, node.user(1000).grade) == (Grade.WARNING, Grade.OK)


def test_unit() -> None:
    """What systemd did not give is told; outside of a unit there is nothing to check."""
    whole = Unit(
        notify_socket="/run/n", watchdog_usec="1", state_directory="/s", memory_max_bytes=10 * GB
    )
    assert node.unit(whole, runner_bytes=GB, slots=2)[0].grade is Grade.OK
    bare = Unit(notify_socket="/run/n", watchdog_usec=None, state_directory=None,
                memory_max_bytes=GB)  # fmt: skip
    hints = [found.hint or "" for found in node.unit(bare, runner_bytes=GB, slots=2)]
    assert [hint.split()[0] for hint in hints] == ["WatchdogSec=120", "use", "lower"]
    none = Unit(notify_socket=None, watchdog_usec=None, state_directory=None, memory_max_bytes=None)
    assert node.unit(none, runner_bytes=GB, slots=1)[0].grade is Grade.SKIPPED
