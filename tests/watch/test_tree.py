"""What a scan remembers: which folders are looked into again, and what is never missed by that."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from ckptd.watch import scan, tree
from ckptd.watch.events import Folder
from ckptd.watch.mounts import FileSystem
from ckptd.watch.tree import RELIST_S, TRUST_S, Tree

EXACT = FileSystem(exact_mtimes=True)


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the folders that were listed, as they are."""
    names: list[str] = []
    entries = scan.entries

    def noting(folder: Path, matches: Callable[[str], bool], *, files: bool) -> scan.Entries:
        names.append(folder.name)
        return entries(folder, matches, files=files)

    monkeypatch.setattr(scan, "entries", noting)
    monkeypatch.setattr(tree.mounts, "file_system", lambda path: EXACT)
    return names


def make(pattern: str) -> Tree:
    return Tree(scan.parse(pattern), watch=lambda folder: None)


def believed(pattern: str, listed: list[str]) -> Tree:
    """Return a tree whose folders are believed; nothing has been noted as listed."""
    made = make(pattern)
    made.refresh(now=0.0)
    made.refresh(now=TRUST_S)
    listed.clear()
    return made


def names(found: Tree) -> list[str]:
    return sorted(path.name for path in found.candidates)


def test_unchanged_folders_are_not_listed(runs: Path, listed: list[str]) -> None:
    """Folders that stood still cost one look each; a new name costs its own folder a listing."""
    for run in "bcd":
        (runs / run / "checkpoint-1").mkdir(parents=True)
    found = believed(f"{runs}/*/checkpoint-*", listed)
    assert not found.refresh(now=4.0)
    assert (listed, found.is_steady) == ([], True)
    (runs / "b" / "checkpoint-2").mkdir()
    assert found.refresh(now=5.0)
    assert (listed, found.is_steady) == (["b"], False)
    assert names(found) == ["checkpoint-1", "checkpoint-1", "checkpoint-1", "checkpoint-2"]


def test_time_stamps_have_a_grain(
    runs: Path, listed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that comes in the same grain of time as the listing before is not missed."""
    still = (1, 2, 3, 4, 5)
    monkeypatch.setattr(tree, "signature_of", lambda path: still)
    found = make(f"{runs}/a/checkpoint-*")
    found.refresh(now=0.0)
    (runs / "a" / "checkpoint-1").mkdir()
    assert found.refresh(now=TRUST_S - 0.1)
    assert names(found) == ["checkpoint-1"]
    found.refresh(now=TRUST_S)
    listed.clear()
    found.refresh(now=TRUST_S + 0.1)
    assert listed == []


def test_trust_has_an_end(runs: Path, listed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder whose time stamps lie is listed again at last."""
    monkeypatch.setattr(tree, "signature_of", lambda path: (1, 2, 3, 4, 5))
    found = believed(f"{runs}/a/checkpoint-*", listed)
    (runs / "a" / "checkpoint-1").mkdir()
    assert not found.refresh(now=RELIST_S)
    assert found.refresh(now=RELIST_S + TRUST_S)


def test_folders_with_inexact_times_are_listed_each_time(
    runs: Path, listed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a folder's modification time need not move with its names nothing is believed."""
    monkeypatch.setattr(tree.mounts, "file_system", lambda path: FileSystem(network="fuse.s3fs"))
    monkeypatch.setattr(tree, "signature_of", lambda path: (1, 2, 3, 4, 5))
    found = believed(f"{runs}/a/checkpoint-*", listed)
    (runs / "a" / "checkpoint-1").mkdir()
    assert found.refresh(now=4.0)
    assert found.is_steady
    assert found.network == "fuse.s3fs"


def test_clock_set_back(runs: Path, listed: list[str]) -> None:
    """A new name is found also where the folder's modification time went back in time."""
    found = believed(f"{runs}/*/checkpoint-*", listed)
    (runs / "a" / "checkpoint-1").mkdir()
    os.utime(runs / "a", (0, 0))
    assert found.refresh(now=4.0)
    assert names(found) == ["checkpoint-1"]


def test_idle_pass_touches_folders_above_candidates_alone(
    runs: Path, listed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle pass looks once at each folder above the candidates and at nothing below."""
    for step in range(20):
        (runs / "a" / f"checkpoint-{step}").mkdir()
    found = believed(f"{runs}/*/checkpoint-*", listed)
    looked_at: list[Path] = []
    signature_of = tree.signature_of

    def noting(path: Path) -> tree.Signature | None:
        looked_at.append(path)
        return signature_of(path)

    monkeypatch.setattr(tree, "signature_of", noting)
    assert not found.refresh(now=4.0)
    assert sorted(looked_at) == [runs, runs / "a"]


def test_hints_name_the_folder(runs: Path, listed: list[str]) -> None:
    """Only names that the glob could match are a reason to look, and only into their own folder."""
    (runs / "b").mkdir()
    found = believed(f"{runs}/*/checkpoint-*", listed)
    assert found.concerned({runs: {".ckptd"}, runs / "a": {"train.log", ".checkpoint-1"}}) == set()
    (runs / "a" / "checkpoint-1").mkdir()
    where = found.concerned({runs / "a": {"checkpoint-1"}})
    assert found.refresh(now=4.0, only=where)
    assert listed == ["a"]
    assert names(found) == ["checkpoint-1"]


def test_new_levels_under_a_hint_are_looked_into(runs: Path, listed: list[str]) -> None:
    """Of `mkdir -p` the kernel tells the first folder alone; what lies in it is found with it."""
    found = believed(f"{runs}/*/*/checkpoint-*", listed)
    (runs / "b" / "out" / "checkpoint-1").mkdir(parents=True)
    assert found.refresh(now=4.0, only=found.concerned({runs: {"b"}}))
    assert names(found) == ["checkpoint-1"]


def test_every_folder_is_watched_before_it_is_listed(runs: Path) -> None:
    """What comes between the watch and the listing is listed; nothing falls between."""
    (runs / "b" / "out").mkdir(parents=True)

    def watch(folder: Folder) -> None:
        if folder.path.name == "out":
            (folder.path / "checkpoint-1").mkdir()
        assert folder.ino == folder.path.stat().st_ino

    found = Tree(scan.parse(f"{runs}/*/*/checkpoint-*"), watch=watch)
    found.refresh(now=0.0)
    assert names(found) == ["checkpoint-1"]


def test_network_folders_are_not_watched(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run folder that is mounted from elsewhere makes the place one that is polled."""
    watched = []
    monkeypatch.setattr(
        tree.mounts,
        "file_system",
        lambda path: FileSystem(network="nfs4" if path == runs else None),
    )
    found = Tree(scan.parse(f"{runs}/*/checkpoint-*"), watch=watched.append)
    found.refresh(now=0.0)
    assert (watched, found.network) == ([], "nfs4")


def test_root_that_comes_goes_and_comes_again(tmp_path: Path, listed: list[str]) -> None:
    """A root is followed by its name: absent, there, removed, made anew, renamed away, replaced."""
    root = tmp_path / "runs"
    found = make(f"{root}/*/checkpoint-*")
    assert not found.refresh(now=0.0)
    (root / "a" / "checkpoint-1").mkdir(parents=True)
    assert found.refresh(now=10.0)
    assert names(found) == ["checkpoint-1"]
    shutil.rmtree(root)
    assert found.refresh(now=20.0)
    assert (names(found), found.left_out) == ([], {})
    (root / "a" / "checkpoint-2").mkdir(parents=True)
    assert found.refresh(now=30.0)
    assert not found.refresh(now=40.0)
    root.rename(tmp_path / "old")
    assert found.refresh(now=50.0)
    (root / "a" / "checkpoint-3").mkdir(parents=True)
    assert found.refresh(now=60.0)
    assert names(found) == ["checkpoint-3"]


def test_linked_root_that_is_pointed_elsewhere(tmp_path: Path, listed: list[str]) -> None:
    """A root that is a link is followed to wherever it leads now."""
    for name in ("first", "second"):
        (tmp_path / name / f"checkpoint-{name}").mkdir(parents=True)
    link = tmp_path / "runs"
    link.symlink_to("first")
    found = believed(f"{link}/checkpoint-*", listed)
    assert names(found) == ["checkpoint-first"]
    assert found.folders == {tmp_path / "first"}
    (tmp_path / "new").symlink_to("second")
    (tmp_path / "new").replace(link)
    changes = found.refresh(now=4.0)
    assert changes == tree.Changes(
        added=frozenset({tmp_path / "second" / "checkpoint-second"}),
        removed=frozenset({tmp_path / "first" / "checkpoint-first"}),
        folders_gone=frozenset({tmp_path / "first"}),
    )
    assert names(found) == ["checkpoint-second"]


def test_link_whose_target_comes_and_goes(runs: Path, listed: list[str]) -> None:
    """Where a link leads is looked up in each scan: it changes while its folder does not."""
    (runs / "a" / "checkpoint-last").symlink_to("../store/7")
    (runs / "store").mkdir()
    found = believed(f"{runs}/[a]/checkpoint-*", listed)
    (runs / "store" / "7").mkdir()
    assert found.refresh(now=4.0)
    assert list(found.candidates) == [runs / "store" / "7"]
    (runs / "store" / "7").rmdir()
    assert found.refresh(now=5.0)
    assert (names(found), listed) == ([], [])


def test_candidate_with_two_ways_to_it(runs: Path, listed: list[str]) -> None:
    """A checkpoint that a link leads to as well is there once, until the last way to it is gone."""
    (runs / "a" / "checkpoint-1").mkdir()
    (runs / "b").mkdir()
    (runs / "b" / "checkpoint-best").symlink_to("../a/checkpoint-1")
    found = make(f"{runs}/*/checkpoint-*")
    assert found.refresh(now=0.0).added == {runs / "a" / "checkpoint-1"}
    (runs / "b" / "checkpoint-best").unlink()
    assert not found.refresh(now=10.0)
    (runs / "a" / "checkpoint-1").rmdir()
    assert found.refresh(now=20.0).removed == {runs / "a" / "checkpoint-1"}


@pytest.mark.parametrize("closed", ["runs", "runs/a"])
def test_permission_that_is_taken_and_given_back(
    open_folder: Path, closed: str, plain_user: Callable[[], AbstractContextManager[None]]
) -> None:
    """A folder that may not be read is said by name, and is back as soon as it may."""
    (open_folder / "runs" / "a" / "checkpoint-1").mkdir(parents=True)
    (open_folder / "runs" / "b" / "checkpoint-2").mkdir(parents=True)
    found = make(f"{open_folder}/runs/*/checkpoint-*")
    found.refresh(now=0.0)
    (open_folder / closed).chmod(0)
    with plain_user():
        assert found.refresh(now=10.0)
        assert list(found.left_out) == [open_folder / closed]
        assert "ermission denied" in found.left_out[open_folder / closed]
    (open_folder / closed).chmod(0o755)
    with plain_user():
        assert found.refresh(now=20.0)
    assert (names(found), found.left_out) == (["checkpoint-1", "checkpoint-2"], {})
