"""Looks at a folder: was anything removed from it before we came?"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from ckptd.checkpoint import pin, whole
from ckptd.checkpoint.listing import list_files
from ckptd.checkpoint.pin import PinMethod


def _tick_after(folder: Path) -> None:
    """Give the folder a time of change some ticks later than its files', as a deletion does."""
    stat = folder.stat()
    os.utime(folder, ns=(stat.st_atime_ns, stat.st_mtime_ns + 50_000_000))


def test_a_folder_that_only_grew_is_intact(make_folder: Any) -> None:
    """Its last change is a file that came, and the file is as young as that."""
    found = whole.look(make_folder(shards=2, step=3))
    assert found.intact
    assert whole.confirm(found)


def test_a_folder_that_lost_a_name_is_not(make_folder: Any) -> None:
    """Rotation has begun: the folder is younger than every file that is left in it."""
    folder = make_folder(shards=2, step=3)
    (folder / "config.json").unlink()
    _tick_after(folder)
    assert not whole.look(folder).intact


def test_a_name_lost_in_a_folder_below_counts(make_folder: Any) -> None:
    """Each folder of the checkpoint is asked."""
    folder = make_folder(step=3)
    (folder / "sub").mkdir()
    (folder / "sub" / "a").write_text("a")
    (folder / "sub" / "b").write_text("b")
    (folder / "z").write_text("z")
    assert whole.look(folder).intact
    (folder / "sub" / "a").unlink()
    _tick_after(folder / "sub")
    assert not whole.look(folder).intact


def test_a_rename_into_place_is_no_loss(make_folder: Any) -> None:
    """A file written under another name is as young as its name (safetensors, DCP's .metadata)."""
    folder = make_folder(step=3)
    written = folder / ".tmpAbCdEf"
    written.write_text("x")
    os.utime(written, ns=(0, 0))
    written.rename(folder / "added_tokens.json")
    assert whole.look(folder).intact


def test_our_own_hard_links_hide_no_loss(make_folder: Any, tmp_path: Path) -> None:
    """A link of ours moves a file's time of change, and must not make up for a name that went."""
    folder = make_folder(shards=2, step=3)
    past = time.time_ns() - 3_600_000_000_000
    for path in folder.iterdir():
        os.utime(path, ns=(past, past))
    (folder / "config.json").unlink()
    for path in folder.iterdir():
        os.link(path, tmp_path / path.name)
    assert not whole.look(folder).intact


def test_what_goes_after_the_look_is_not_confirmed(make_folder: Any) -> None:
    """An intact look at a folder that is being deleted a moment later does not count."""
    folder = make_folder(step=3)
    found = whole.look(folder)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    shutil.rmtree(folder)
    assert found.intact
    assert not whole.confirm(found)


def test_a_single_file_is_whole_by_itself(make_folder: Any) -> None:
    """Files come and go beside it; they are not its own."""
    folder = make_folder()
    found = whole.look(folder / "model.safetensors")
    (folder / "config.json").unlink()
    assert whole.confirm(found)


def test_the_last_intact_look_is_kept_in_the_pin(make_folder: Any, tmp_path: Path) -> None:
    """With every name, also of files that are not pinned; a damaged note is none."""
    folder, target = make_folder(step=3), tmp_path / "pin"
    (folder / "optimizer.pt").write_bytes(b"state")
    listing = list_files(folder)
    pin.refresh(folder, listing, target, PinMethod.COPY)
    assert whole.noted(target) is None
    whole.note(target, listing, settled=False, certain=True)
    noted = whole.noted(target)
    assert noted is not None
    assert noted.listing.by_name.keys() == listing.by_name.keys()
    assert pin.lacking(target, noted.listing) == ()
    (target / "config.json").unlink()
    assert pin.lacking(target, noted.listing) == ("config.json",)
    (target / whole.NOTE_NAME).write_text("{")
    assert whole.noted(target) is None


@pytest.mark.parametrize("settled", [False, True])
def test_a_note_says_whether_it_was_quiet(settled: bool, make_folder: Any, tmp_path: Path) -> None:
    """What was quiet when it was noted needs no last file to be believed."""
    folder = make_folder()
    (tmp_path / "pin").mkdir()
    whole.note(tmp_path / "pin", list_files(folder), settled=settled, certain=False)
    noted = whole.noted(tmp_path / "pin")
    assert noted is not None
    assert (noted.settled, noted.certain) == (settled, False)


def test_a_loss_in_the_tick_of_the_last_name_leaves_a_look_uncertain(make_folder: Any) -> None:
    """The folder is exactly as young as its youngest file: something may have gone just then."""
    folder = make_folder(step=3)
    now_ns = time.time_ns()
    for path in folder.iterdir():
        os.utime(path, ns=(now_ns, now_ns + 10**12))  # ahead of any change time
    os.utime(folder, ns=(now_ns, now_ns + 10**12))
    found = whole.look(folder)
    assert (found.intact, found.certain) == (True, False)
    os.utime(folder, ns=(now_ns, now_ns + 10**12 - 1))
    assert whole.look(folder).certain
