"""Files that only look like what says whether a save has ended: told or passed over, and soon."""

from __future__ import annotations

import json
import os
import pickle
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from ckptd.checkpoint import torch_file, whole
from ckptd.checkpoint.listing import ListedFile, list_files
from ckptd.checkpoint.signs import last_file, side_content, template
from ckptd.errors import CheckpointCorrupt, CheckpointRefused, CheckpointUnsupported

OTHER_DISKS = b"PK\x06\x07" + bytes(12) + b"\x01\0\0\0" + b"PK\x05\x06" + bytes(18)
"""The end of a zip archive that says that it goes on elsewhere."""


@pytest.mark.parametrize("name", ["latest", "dlrover_latest.txt"])
def test_a_pipe_beside_a_checkpoint_is_not_waited_for(tmp_path: Path, name: str) -> None:
    """A tracker that is a pipe says nothing, at once."""
    os.mkfifo(tmp_path / name)
    assert last_file.beside(tmp_path, "deepspeed") is None


@pytest.mark.parametrize(
    "content",
    [b"\x0a" + b"\x80" * 3_000_000, b"\x0a\x01x" + b"\x08" + b"\xff" * 3_000_000, b"\x0a" * 3],
    ids=["length", "value", "cut"],
)
def test_a_number_without_an_end_costs_nothing(tmp_path: Path, content: bytes) -> None:
    """What is no protocol buffer is passed over, and one that is cut is told, in no time."""
    (tmp_path / "tokenizer.model").write_bytes(content)
    files = list_files(tmp_path).files
    begin = time.process_time()
    if len(content) == 3:
        with pytest.raises(CheckpointCorrupt, match="is truncated"):
            side_content.check(tmp_path, files)
    else:
        side_content.check(tmp_path, files)
    assert time.process_time() - begin < 1.0


def test_a_huge_file_with_the_name_of_a_tokenizer_is_not_read(tmp_path: Path) -> None:
    """Other people's `.model` files may have any size."""
    with (tmp_path / "x.model").open("wb") as file:
        file.write(b"\x0a")
        file.truncate(1 << 40)
    side_content.check(tmp_path, list_files(tmp_path).files)


def test_a_zip_that_ends_on_another_disk_is_not_whole(tmp_path: Path) -> None:
    """An end that Python's reader has an error for is told as torn."""
    (tmp_path / "optimizer.pt").write_bytes(b"PK\x03\x04" + OTHER_DISKS)
    files = list_files(tmp_path).files
    assert list(side_content.torn_state(tmp_path, files)) == ["optimizer.pt is not whole"]
    assert not side_content.is_zip(tmp_path / "optimizer.pt")


def test_a_long_string_in_a_template_takes_little_memory() -> None:
    """A string of millions of characters is one token, not millions of states."""
    text = "{{ '" + "x\\'" * 1_000_000 + "' }}"
    tracemalloc.start()
    try:
        assert template.is_closed(text)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert not template.is_closed(text[:-4])


@pytest.mark.parametrize(
    "files",
    [
        [["../x", 1, 2]],
        [["/etc/passwd", 1, 2]],
        [["a//b", 1, 2]],
        [["a\0b", 1, 2]],
        [[5, 1, 2]],
        [["a", "1", 2]],
        [["a", 1, None]],
        [["a", 1]],
        "abc",
        None,
    ],
    ids=range(10),
)
def test_a_note_that_no_pin_can_have_is_none(tmp_path: Path, files: Any) -> None:
    """Whatever stands in a pin's note, it names files below the pin, or counts as no note."""
    value = {"settled": True, "certain": True, "path": "/a", "base_path": "/a", "files": files}
    (tmp_path / whole.NOTE_NAME).write_text(json.dumps(value))
    assert whole.noted(tmp_path) is None


def test_a_deeply_nested_note_is_none(tmp_path: Path) -> None:
    """A note that Python cannot read without an end of its stack is no note."""
    (tmp_path / whole.NOTE_NAME).write_text("[" * 200_000)
    assert whole.noted(tmp_path) is None


def test_a_good_note_is_read(tmp_path: Path) -> None:
    """The checks let everything through that was noted."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"x")
    listing = list_files(tmp_path)
    whole.note(tmp_path, listing, settled=True, certain=False)
    found = whole.noted(tmp_path)
    assert found is not None
    (file,) = found.listing.files
    assert isinstance(file, ListedFile)
    assert (file.relpath, file.size) == ("a/b", 1)


def _legacy(version: Any, keys: Any) -> bytes:
    """Return a file of old torch.save without tensors, of this version and with these keys."""
    values = (0x1950A86A20F9469CFC6C, version, {"little_endian": True}, {"a": 1}, keys)
    return b"".join(pickle.dumps(value, 2) for value in values)


def _deep() -> Any:
    made: Any = []
    for _ in range(400):
        made = [made]
    return made


@pytest.mark.parametrize(
    ("version", "keys", "kind"),
    [
        (1001, [10**600], CheckpointCorrupt),
        (1001, _deep(), CheckpointCorrupt),
        (1001, [None], CheckpointCorrupt),
        (1001, {"a": 1}, CheckpointCorrupt),
        (1001, ["a", "a"], CheckpointCorrupt),
        (10**30, [], CheckpointUnsupported),
        (_deep(), [], CheckpointUnsupported),
        ("x" * 100_000, [], CheckpointUnsupported),
    ],
    ids=["long", "deep", "none", "mapping", "twice", "long version", "deep version", "text"],
)
def test_a_legacy_file_of_anything_is_refused(
    tmp_path: Path, version: Any, keys: Any, kind: type[CheckpointRefused]
) -> None:
    """Numbers too long to print and lists too deep to show are refused in a short text."""
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(_legacy(version, keys))
    with pytest.raises(kind) as caught:
        torch_file.read(path)
    assert len(str(caught.value)) < 600
