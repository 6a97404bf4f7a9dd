"""Files of torch.save: every storage is found where torch put it, and nothing else is believed."""

from __future__ import annotations

import io
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptd.checkpoint import torch_file
from ckptd.checkpoint.inert import TensorRef
from ckptd.errors import CheckpointCorrupt, CheckpointRefused, CheckpointUnsupported

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


def _bytes(file: torch_file.TorchFile, tensor: TensorRef) -> bytes:
    extent = file.extent(tensor)
    with extent.path.open("rb") as opened:
        opened.seek(extent.offset)
        return opened.read(extent.nbytes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bytes_are_where_the_extent_says(dtype: torch.dtype, tmp_path: Path) -> None:
    """Every dtype, a view into a storage, a scalar and an empty tensor."""
    whole = torch.arange(24).to(dtype).reshape(6, 4)
    tensors = {"whole": whole, "rows": whole[2:4], "one": whole[0, 1], "none": whole[:0]}
    torch.save(tensors, tmp_path / "t.pt")
    file = torch_file.read(tmp_path / "t.pt")
    for name, tensor in tensors.items():
        found = file.value[name]
        assert found.dtype.torch_name == str(dtype).removeprefix("torch.")
        assert found.shape == tuple(tensor.shape)
        expected = tensor.contiguous().flatten().view(torch.uint8) if tensor.numel() else tensor
        assert _bytes(file, found) == bytes(expected.tolist() if tensor.numel() else [])


def test_parameters_and_modules_state_are_tensors(tmp_path: Path) -> None:
    """A state dict of a module, with its versions and its parameters, is names and places."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    state = {"plain": module.state_dict(), "kept": dict(module.named_parameters())}
    torch.save(state, tmp_path / "t.pt")
    value = torch_file.read(tmp_path / "t.pt").value
    assert value["plain"].keys() == module.state_dict().keys()
    assert all(isinstance(v, TensorRef) for group in value.values() for v in group.values())


def test_archives_one_after_the_other_are_read_by_their_places(tmp_path: Path) -> None:
    """Distributed checkpoints put archives in a row: each counts from its own begin."""
    parts = []
    for number in range(3):
        buffer = io.BytesIO()
        torch.save(torch.full((5,), float(number)), buffer)
        parts.append(buffer.getvalue())
    path = tmp_path / "__0_0.distcp"
    path.write_bytes(b"".join(parts))
    offset = 0
    for number, part in enumerate(parts):
        file = torch_file.read(path, offset=offset, nbytes=len(part))
        assert _bytes(file, file.value) == torch.full((5,), float(number)).numpy().tobytes()
        offset += len(part)
    with pytest.raises(CheckpointCorrupt, match="truncated"):
        torch_file.read(path, offset=offset - 10, nbytes=100)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A file with two storages."""
    path = tmp_path / "t.pt"
    torch.save({"a.weight": torch.arange(50.0), "b.weight": torch.ones(7)}, path)
    return path


def test_no_cut_is_accepted(saved: Path) -> None:
    """Without its last byte, half of it, or all of it, a file is refused and named."""
    data = saved.read_bytes()
    for size in sorted({0, 1, 3, 4, 100, len(data) // 2, *range(len(data) - 80, len(data))}):
        saved.write_bytes(data[:size])
        with pytest.raises(CheckpointCorrupt, match=r"t\.pt"):
            torch_file.read(saved)


def test_no_change_of_a_byte_escapes_as_another_error(saved: Path) -> None:
    """Any byte outside of the storages, changed: a value or a refusal, and extents stay inside."""
    data = saved.read_bytes()
    for place in range(0, len(data), 3):
        changed = bytearray(data)
        changed[place] ^= 0xFF
        saved.write_bytes(changed)
        try:
            file = torch_file.read(saved)
            values = file.value.values() if isinstance(file.value, dict) else ()
            extents = [file.extent(v) for v in values if isinstance(v, TensorRef)]
        except CheckpointRefused:
            continue
        assert all(e.offset >= 0 and e.offset + e.nbytes <= len(data) for e in extents)


def _rewritten(path: Path, change: Callable[[zipfile.ZipFile, str, bytes], None]) -> None:
    source = path.with_suffix(".old")
    shutil.move(path, source)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            change(new, name, old.read(name))


def test_a_compressed_member_is_refused(saved: Path) -> None:
    """A zip bomb is one: nothing is ever inflated."""

    def compress(new: zipfile.ZipFile, name: str, data: bytes) -> None:
        packed = "data/" in name
        new.writestr(name, b"\0" * (50 << 20) if packed else data,
                     zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED)  # fmt: skip

    _rewritten(saved, compress)
    with pytest.raises(CheckpointUnsupported, match="compressed"):
        torch_file.read(saved)


@pytest.mark.parametrize(
    ("drop", "error"),
    [("data/0", CheckpointCorrupt), ("data.pkl", CheckpointUnsupported)],
)
def test_a_missing_member_is_refused(drop: str, error: Any, saved: Path) -> None:
    """A storage that a tensor needs, or the pickle itself."""
    _rewritten(
        saved, lambda new, name, data: None if name.endswith(drop) else new.writestr(name, data)
    )

    def read() -> None:
        file = torch_file.read(saved)
        file.extent(file.value["a.weight"])

    with pytest.raises(error):
        read()


def test_a_short_storage_is_refused(saved: Path) -> None:
    """A tensor longer than its storage would show what lies behind it."""
    _rewritten(
        saved, lambda new, name, data: new.writestr(name, data[:40] if "data/" in name else data)
    )
    file = torch_file.read(saved)
    with pytest.raises(CheckpointCorrupt, match="too short"):
        file.extent(file.value["a.weight"])


def test_big_endian_files_and_scripts_are_refused(saved: Path) -> None:
    """Their bytes would be read as other numbers; scripts are programs."""
    _rewritten(
        saved, lambda new, name, data: new.writestr(name, b"big" if "byteorder" in name else data)
    )
    with pytest.raises(CheckpointUnsupported, match="big-endian"):
        torch_file.read(saved)

    def script(new: zipfile.ZipFile, name: str, data: bytes) -> None:
        new.writestr(name, b"little" if "byteorder" in name else data)
        if name.endswith("data.pkl"):
            new.writestr(name.replace("data.pkl", "constants.pkl"), b"")

    _rewritten(saved, script)
    with pytest.raises(CheckpointUnsupported, match="TorchScript"):
        torch_file.read(saved)


def test_a_directory_that_lies_is_refused(saved: Path) -> None:
    """Members that begin outside of the archive, or a list of members larger than any real one."""
    data = bytearray(saved.read_bytes())
    entry = data.rfind(b"PK\x01\x02")
    data[entry + 42 : entry + 46] = b"\xff\xff\xff\x7f"
    saved.write_bytes(data)
    with pytest.raises(CheckpointCorrupt):
        torch_file.read(saved)
    end = data.rfind(b"PK\x05\x06")
    data[end + 12 : end + 16] = (60 << 20).to_bytes(4, "little")
    saved.write_bytes(data)
    os.truncate(saved, len(data))
    with pytest.raises(CheckpointCorrupt):
        torch_file.read(saved)


@pytest.mark.parametrize("place", [1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_a_member_at_a_place_beyond_any_file_is_refused(saved: Path, place: int) -> None:
    """Zip64 has room for places that no system call takes."""
    data = saved.read_bytes()
    entry = data.find(b"PK\x01\x02")
    name_length = int.from_bytes(data[entry + 28 : entry + 30], "little")
    extra = struct.pack("<HHQ", 1, 8, place)
    head = bytearray(data[entry : entry + 46])
    head[30:32] = len(extra).to_bytes(2, "little")
    head[42:46] = b"\xff\xff\xff\xff"
    listed = bytes(head) + data[entry + 46 : entry + 46 + name_length] + extra
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(listed), entry, 0)
    saved.write_bytes(data[:entry] + listed + end)
    with pytest.raises(CheckpointRefused, match=saved.name):
        torch_file.read(saved)


def test_a_name_that_stands_twice_is_refused(saved: Path) -> None:
    """Which of two storages of one name is meant nobody can tell."""
    with zipfile.ZipFile(saved, "a") as archive:
        name = next(n for n in archive.namelist() if n.endswith("/data/0"))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(name, b"other")
    with pytest.raises(CheckpointCorrupt, match="stands twice"):
        torch_file.read(saved)
