"""Where a finished output ends up, and what may be replaced on the way."""

from __future__ import annotations

import pytest

from ckptd import errors
from ckptd.runner import output
from ckptd.runner.staging import Staging


@pytest.fixture
def staging(tmp_path) -> Staging:
    """A staging folder that holds a finished output of one file."""
    made = Staging(tmp_path / "work")
    made.out_path.mkdir(parents=True)
    (made.out_path / "new").write_text("new")
    return made


def files(path) -> dict[str, str]:
    return {file.name: file.read_text() for file in path.iterdir()}


def test_without_a_folder_it_stays_where_it_is(staging) -> None:
    """The staging folder is the output."""
    assert output.keep(staging, None) == staging.out_path
    assert files(staging.out_path) == {"new": "new"}


def test_a_new_folder_is_made_with_its_parents(staging, tmp_path) -> None:
    """The output is moved, not copied."""
    inode = staging.out_path.stat().st_ino
    path = output.keep(staging, tmp_path / "a" / "b" / "out")
    assert files(path) == {"new": "new"}
    assert path.stat().st_ino == inode
    assert not staging.out_path.exists()


@pytest.mark.parametrize("exchange", [True, False])
def test_an_old_folder_is_replaced_whole(exchange, staging, tmp_path, monkeypatch) -> None:
    """Old files are gone, whether or not the kernel can exchange two folders."""
    if not exchange:
        monkeypatch.setattr(output, "_exchange", lambda one, other: False)
    old = tmp_path / "out"
    old.mkdir()
    (old / "old").write_text("old")
    output.keep(staging, old)
    assert files(old) == {"new": "new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "work"]
    assert not staging.out_path.exists()


def test_a_failed_replacement_leaves_the_old_folder(staging, tmp_path, monkeypatch) -> None:
    """Where the second of two steps fails, the first one is undone."""
    monkeypatch.setattr(output, "_exchange", lambda one, other: False)
    old = tmp_path / "out"
    old.mkdir()
    (old / "old").write_text("old")
    (staging.out_path / "new").unlink()
    staging.out_path.rmdir()
    with pytest.raises(errors.StorageFailed, match="out"):
        output.keep(staging, old)
    assert files(old) == {"old": "old"}


def test_a_file_in_the_way_is_our_error(staging, tmp_path) -> None:
    """The parent of the output is a file: named, and the finished output is kept."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(errors.StorageFailed, match="file"):
        output.keep(staging, tmp_path / "file" / "out")
    assert files(staging.out_path) == {"new": "new"}


def test_only_an_empty_folder_is_free(tmp_path) -> None:
    """A folder that holds something is refused unless it may be replaced; a file always is."""
    folder = tmp_path / "out"
    output.require_free(folder, overwrite=False)
    folder.mkdir()
    output.require_free(folder, overwrite=False)
    (folder / "x").write_text("x")
    with pytest.raises(errors.StorageFailed, match="not empty"):
        output.require_free(folder, overwrite=False)
    output.require_free(folder, overwrite=True)
    with pytest.raises(errors.StorageFailed, match="is a file"):
        output.require_free(folder / "x", overwrite=True)
