"""What a watched glob matches."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckptd.watch import scan
from ckptd.watch.tree import Tree


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    for name in ("a/checkpoint-10", "a/checkpoint-9", "b/checkpoint-5", "b/logs"):
        (root / name).mkdir(parents=True)
    (root / "a" / "model.safetensors").write_bytes(b"x")
    return root


def look(pattern: str) -> Tree:
    tree = Tree(scan.parse(pattern), watch=lambda folder: None)
    tree.refresh(now=0.0)
    return tree


def found(pattern: str, root: Path) -> list[str]:
    paths = sorted(look(pattern).candidates, key=scan.natural_key)
    return [str(path.relative_to(root.resolve())) for path in paths]


def test_folders_in_natural_order(runs: Path) -> None:
    """A glob of folders matches folders alone, step 9 before step 10."""
    assert found(f"{runs}/*/checkpoint-*", runs) == [
        "a/checkpoint-9",
        "a/checkpoint-10",
        "b/checkpoint-5",
    ]


def test_single_files(runs: Path) -> None:
    """A glob that ends in a weight suffix matches files alone."""
    (runs / "a" / "folder.safetensors").mkdir()
    assert found(f"{runs}/*/*.safetensors", runs) == ["a/model.safetensors"]


def test_place_without_wildcards(runs: Path) -> None:
    """One folder can be watched by its name; its parent is the root."""
    place = scan.parse(f"{runs}/a/checkpoint-9")
    assert (place.root_path, place.parts) == (runs / "a", ("checkpoint-9",))
    assert found(f"{runs}/a/checkpoint-9", runs) == ["a/checkpoint-9"]


def test_root_is_what_stands_before_the_first_wildcard(runs: Path) -> None:
    """Pins live beside the runs, not in one of them."""
    assert scan.parse(f"{runs}/[ab]/checkpoint-*").root_path == runs
    for candidate in look(f"{runs}/[ab]/checkpoint-*").candidates.values():
        assert candidate.root_path == runs.resolve()


def test_dot_names_do_not_exist(runs: Path) -> None:
    """Our own pins are never taken for checkpoints, whatever the glob says."""
    (runs / ".ckptd" / "checkpoint-9").mkdir(parents=True)
    (runs / "a" / ".checkpoint-8").mkdir()
    assert len(found(f"{runs}/*/*checkpoint-*", runs)) == 3


def test_link_inside_the_root_is_its_target(runs: Path) -> None:
    """A link to a checkpoint inside the root is that checkpoint, once."""
    (runs / "a" / "checkpoint-last").symlink_to("checkpoint-10")
    (runs / "best").symlink_to("a/checkpoint-9")
    assert len(found(f"{runs}/*/checkpoint-*", runs)) == 3
    assert found(f"{runs}/best", runs) == ["a/checkpoint-9"]


@pytest.mark.parametrize("target", ["../outside", "/etc", ".ckptd", "..", "."])
def test_link_that_leaves_the_root_is_left_out(runs: Path, target: str) -> None:
    """No link leads out of the root or into our own folder, and the scan says so."""
    (runs.parent / "outside" / "checkpoint-1").mkdir(parents=True)
    (runs / ".ckptd").mkdir()
    (runs / "c").symlink_to(target)
    result = look(f"{runs}/*/checkpoint-*")
    assert len(result.candidates) == 3
    assert [path.name for path in result.left_out] == ([] if target == "." else ["c"])


def test_dangling_and_looping_links_are_nothing(runs: Path) -> None:
    """A link to nowhere or to itself is passed over."""
    (runs / "c").symlink_to("nowhere")
    (runs / "d").symlink_to("d")
    assert len(found(f"{runs}/*/checkpoint-*", runs)) == 3


def test_linked_root_is_resolved(runs: Path) -> None:
    """A root that is a link is watched at its target."""
    (runs.parent / "link").symlink_to(runs)
    assert len(found(f"{runs.parent}/link/*/checkpoint-*", runs)) == 3


def test_absent_root_is_empty(tmp_path: Path) -> None:
    """A root that is not there yet has no candidates, and is no problem."""
    result = look(f"{tmp_path}/none/*/checkpoint-*")
    assert (result.candidates, result.folders, result.left_out) == ({}, frozenset(), {})


def test_name_that_is_no_text_is_left_out(runs: Path) -> None:
    """A name that cannot be written down is passed over by name instead of breaking a job row."""
    (runs / "a" / os.fsdecode(b"checkpoint-\xff")).mkdir()
    result = look(f"{runs}/*/checkpoint-*")
    assert len(result.candidates) == 3
    assert list(result.left_out.values()) == ["its name is not UTF-8 text"]


def test_scan_never_looks_below_the_glob(runs: Path) -> None:
    """The folders gone through are the root and the levels of the glob, no checkpoint."""
    folders = look(f"{runs}/*/checkpoint-*").folders
    assert sorted(folder.name for folder in folders) == ["a", "b", "runs"]
