"""The listing: which files count, and when their fingerprint moves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckptd import errors
from ckptd.checkpoint import listing


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "checkpoint-10"
    (path / "global_step10").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"x" * 10)
    (path / "config.json").write_text("{}")
    (path / "global_step10" / "rank0.pt").write_bytes(b"abc")
    return path


def names(found: listing.Listing) -> list[str]:
    return [file.relpath for file in found.files]


def test_files_are_sorted_with_their_sizes(folder: Path) -> None:
    """A listing names every regular file below the folder, sorted, with its size."""
    found = listing.list_files(folder)
    assert names(found) == ["config.json", "global_step10/rank0.pt", "model.safetensors"]
    assert found.by_name["model.safetensors"].size == 10
    assert found.nbytes == 15
    assert found.path_of(found.files[1]).read_bytes() == b"abc"


def test_single_file(folder: Path) -> None:
    """A single file lists itself, relative to its parent."""
    found = listing.list_files(folder / "model.safetensors")
    assert names(found) == ["model.safetensors"]
    assert found.base_path == folder.resolve()


def test_dot_folders_are_invisible_and_dot_files_are_not(folder: Path) -> None:
    """Markers such as `.metadata` count; `.ckptd` and other dot folders do not."""
    (folder / ".ckptd").mkdir()
    (folder / ".ckptd" / "pin").write_text("x")
    (folder / ".metadata").write_text("x")
    assert names(listing.list_files(folder))[0] == ".metadata"
    assert not any("pin" in name for name in names(listing.list_files(folder)))


def test_link_inside_is_listed_with_its_target(folder: Path) -> None:
    """A link that stays inside the folder carries the target's size and inode."""
    (folder / "alias.safetensors").symlink_to("model.safetensors")
    found = listing.list_files(folder).by_name
    assert found["alias.safetensors"].ino == found["model.safetensors"].ino
    assert found["alias.safetensors"].is_link


@pytest.mark.parametrize(
    "target", ["../../secret", "/etc/hostname", "nowhere", "loop", "global_step10"]
)
def test_links_that_leave_dangle_or_loop_are_ignored_by_name(folder: Path, target: str) -> None:
    """No link leaves the folder: what is left out is named."""
    (folder.parent.parent / "secret").write_text("secret")
    (folder / "loop").symlink_to(target)
    found = listing.list_files(folder)
    assert "loop" not in names(found)
    assert found.ignored == ("loop",)


def test_links_may_reach_as_far_as_within(folder: Path) -> None:
    """A cache whose snapshot links to its blobs is listed when the caller allows it."""
    blob = folder.parent.parent / "blob"
    blob.write_bytes(b"12345")
    (folder / "weights").symlink_to(blob)
    found = listing.list_files(folder, within=folder.parent.parent)
    assert found.by_name["weights"].size == 5


def test_sockets_and_pipes_are_ignored(folder: Path) -> None:
    """Nothing but regular files is listed, so that no reader ever blocks on a pipe."""
    os.mkfifo(folder / "pipe")
    assert listing.list_files(folder).ignored == ("pipe",)


def test_hard_links_leave_the_fingerprint_alone(folder: Path) -> None:
    """Pinning a file by a hard link does not look like a change."""
    before = listing.list_files(folder)
    os.link(folder / "model.safetensors", folder.parent / "pinned")
    after = listing.list_files(folder)
    assert before.fingerprint == after.fingerprint
    assert before.fingerprint_id == after.fingerprint_id


def test_every_kind_of_write_moves_the_fingerprint(folder: Path) -> None:
    """Growing, touching, replacing, adding and deleting a file are all seen."""
    seen = {listing.list_files(folder).fingerprint_id}
    weights = folder / "model.safetensors"
    weights.write_bytes(b"x" * 11)
    seen.add(listing.list_files(folder).fingerprint_id)
    os.utime(weights, ns=(1, 1))
    seen.add(listing.list_files(folder).fingerprint_id)
    (folder / "new").write_bytes(b"x" * 11)
    os.utime(folder / "new", ns=(1, 1))
    seen.add(listing.list_files(folder).fingerprint_id)
    (folder / "new").replace(weights)
    seen.add(listing.list_files(folder).fingerprint_id)
    weights.unlink()
    seen.add(listing.list_files(folder).fingerprint_id)
    assert len(seen) == 6


def test_absent_folder_has_vanished(tmp_path: Path) -> None:
    """A folder that rotation took is reported as vanished, never as an empty one."""
    with pytest.raises(errors.CheckpointVanished):
        listing.list_files(tmp_path / "checkpoint-1")


def test_too_many_files_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A glob that hits a data set is refused instead of stalling the scan."""
    monkeypatch.setattr(listing, "MAX_FILES", 2)
    with pytest.raises(errors.CheckpointUnsupported, match="more than 2 files"):
        listing.list_files(folder)


def test_deep_folders_are_left_out_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk stops at its depth and says where."""
    monkeypatch.setattr(listing, "MAX_DEPTH", 0)
    found = listing.list_files(folder)
    assert found.ignored == ("global_step10",)
