"""The doctor's checks of folders and disks."""

from __future__ import annotations

from typing import Any

import pytest

from ckptd.cli.doctor import places
from ckptd.cli.doctor.finding import Grade
from ckptd.cli.doctor.places import Root, State


def _root(**changes: Any) -> Root:
    given: dict[str, Any] = {
        "path": "/runs",
        "is_there": True,
        "can_list": True,
        "file_system": "xfs",
        "network": None,
        "pin_method": "reflink",
    }
    return Root(**(given | changes))


def _state(**changes: Any) -> State:
    given: dict[str, Any] = {
        "path": "/state",
        "can_write": True,
        "mode": 0o700,
        "file_system": "ext4",
        "network": None,
        "free_bytes": 5_000_000_000,
    }
    return State(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "grade", "text"),
    [
        ({}, Grade.OK, "reflinks: safe"),
        ({"pin_method": "hard link"}, Grade.OK, "rewrites weights in place voids"),
        ({"is_there": False}, Grade.WARNING, "not there"),
        ({"can_list": False}, Grade.FAILED, "may not list"),
        ({"pin_method": None, "why_not_written": "Read-only file system"}, Grade.FAILED,
         "Read-only file system"),
        ({"pin_method": "copy"}, Grade.WARNING, "pins are copies"),
        ({"other_mount": "/runs/a"}, Grade.WARNING, "/runs/a is another mount"),
        ({"pin_method": "hard link", "foreign_files": "/runs/a/x"}, Grade.WARNING,
         "belongs to another user"),
        ({"unreadable": "/runs/a/x"}, Grade.FAILED, "/runs/a/x may not be read"),
    ],
)  # fmt: skip
def test_root(changes: dict[str, Any], grade: Grade, text: str) -> None:
    """Each way in which a root hinders pinning or reading is told as what it is."""
    found = places.root(_root(**changes))
    assert found[0].grade is grade
    assert text in found[0].what
    assert (found[0].hint is None) is (grade is Grade.OK)


def test_network_root() -> None:
    """A root on a network is polled, besides all else."""
    *_, last = places.root(_root(network="nfs4"))
    assert (last.grade, "nfs4" in last.what) == (Grade.WARNING, True)


def test_foreign_files_do_not_hinder_reflinks() -> None:
    """The kernel guards hard links alone."""
    assert places.root(_root(foreign_files="/runs/a/x"))[0].grade is Grade.OK


@pytest.mark.parametrize(
    ("changes", "grade"),
    [
        ({}, Grade.OK),
        ({"mode": None}, Grade.OK),
        ({"mode": 0o755}, Grade.WARNING),
        ({"can_write": False}, Grade.FAILED),
        ({"network": "nfs"}, Grade.FAILED),
    ],
)
def test_state(changes: dict[str, Any], grade: Grade) -> None:
    """The state folder is private, writable, and on a disk that locks."""
    assert places.state(_state(**changes))[0].grade is grade


@pytest.mark.parametrize(
    ("free", "mark", "largest", "grade"),
    [
        (10, 10, 10, Grade.OK),
        (9, 10, 0, Grade.FAILED),
        (9, 0, 10, Grade.FAILED),
        (None, 0, 0, Grade.FAILED),
    ],
)
def test_disk(free: int | None, mark: int, largest: int, grade: Grade) -> None:
    """There is room above the mark, and for the largest checkpoint."""
    found = places.disk(_state(free_bytes=free), min_free_bytes=mark, largest_bytes=largest)
    assert found.grade is grade


def test_cloning() -> None:
    """Reflinks between two file systems do not exist; without any there is nothing to say."""
    (found,) = places.cloning([_root(device=1)], _state(device=2))
    assert (found.grade, found.check) == (Grade.WARNING, "reflink")
    assert places.cloning([_root(device=1)], _state(device=1)) == []
    assert places.cloning([_root(device=1, pin_method="hard link")], _state(device=2)) == []


def test_definitions() -> None:
    """Broken files fail one by one beside the good ones; none at all is no failure."""
    found = places.definitions("/d", 1, {"/d/a.yaml": "1 problems"})
    assert [finding.grade for finding in found] == [Grade.FAILED, Grade.OK]
    assert places.definitions("/d", 0, {})[0].grade is Grade.SKIPPED
