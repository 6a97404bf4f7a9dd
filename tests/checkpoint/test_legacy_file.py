"""Files of torch.save from before torch 1.6: the same values and bytes as torch loads, or a refusal."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptd.checkpoint import torch_file
from ckptd.checkpoint.inert import Inert, TensorRef
from ckptd.errors import CheckpointCorrupt, CheckpointRefused, CheckpointUnsupported

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8,
          torch.bool]  # fmt: skip


def _saved(path: Path, value: Any) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=False)
    return path


def _bytes(file: torch_file.TorchFile, tensor: TensorRef) -> bytes:
    extent = file.extent(tensor)
    with extent.path.open("rb") as opened:
        opened.seek(extent.offset)
        return opened.read(extent.nbytes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bytes_are_where_torch_finds_them(dtype: torch.dtype, tmp_path: Path) -> None:
    """Every dtype, several storages, a view, a scalar, an empty tensor, a shared storage."""
    whole = torch.arange(24).to(dtype).reshape(6, 4)
    tensors = {
        "whole": whole, "rows": whole[2:4], "one": whole[0, 1], "none": whole[:0].clone(),
        "other": torch.arange(7).to(dtype), "half": torch.arange(5).half(), "again": whole,
    }  # fmt: skip
    file = torch_file.read(_saved(tmp_path / "t.pt", tensors))
    loaded = torch.load(tmp_path / "t.pt", weights_only=True)
    for name, tensor in loaded.items():
        found = file.value[name]
        assert found.dtype.torch_name == str(tensor.dtype).removeprefix("torch.")
        assert found.shape == tuple(tensor.shape)
        raw = tensor.contiguous().flatten().view(torch.uint8) if tensor.numel() else tensor
        assert _bytes(file, found) == bytes(raw.tolist() if tensor.numel() else [])


def test_pickles_longer_than_the_first_read(tmp_path: Path) -> None:
    """Thousands of names: what is read at first ends within them."""
    names = {
        f"model.layers.{i}.{'x' * 200}.weight": torch.full((2,), float(i)) for i in range(4000)
    }
    file = torch_file.read(_saved(tmp_path / "t.pt", names))
    last = file.value[list(names)[-1]]
    assert _bytes(file, last) == struct.pack("<2f", 3999.0, 3999.0)


class _Call:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_nothing_in_it_is_executed(tmp_path: Path) -> None:
    """Not in the value, not where its version should be, not in a bare pickle."""
    made = tmp_path / "made"
    file = torch_file.read(_saved(tmp_path / "t.pt", {"w": torch.ones(2), "x": _Call(made)}))
    assert isinstance(file.value["x"], Inert)
    raw = (tmp_path / "t.pt").read_bytes()
    first = io.BytesIO(raw)
    pickle.Unpickler(first).load()
    head = raw[: first.tell()]
    (tmp_path / "v.pt").write_bytes(head + pickle.dumps(_Call(made), 2) * 4)
    (tmp_path / "b.pt").write_bytes(pickle.dumps(_Call(made), 2))
    for name in ("v.pt", "b.pt"):
        with pytest.raises(CheckpointRefused):
            torch_file.read(tmp_path / name)
    assert not made.exists()


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    """Wherever the file ends early: refused, never another exception and never a short tensor."""
    raw = _saved(tmp_path / "t.pt", {"a.w": torch.ones(5), "b": torch.ones(3)}).read_bytes()
    for length in range(1, len(raw)):
        (tmp_path / "cut.pt").write_bytes(raw[:length])
        with pytest.raises(CheckpointRefused):
            torch_file.read(tmp_path / "cut.pt")


def test_a_length_that_lies_is_refused(tmp_path: Path) -> None:
    """A storage of more elements than its tensor says would shift all that follow."""
    raw = bytearray(_saved(tmp_path / "t.pt", {"a": torch.ones(3)}).read_bytes())
    raw[-20:-12] = struct.pack("<q", 1 << 40)
    (tmp_path / "t.pt").write_bytes(raw)
    with pytest.raises(CheckpointCorrupt, match="length"):
        torch_file.read(tmp_path / "t.pt")


def test_a_bare_pickle_is_refused_by_name(tmp_path: Path) -> None:
    """A dict somebody pickled: the refusal says how to get rid of it."""
    (tmp_path / "t.pt").write_bytes(pickle.dumps({"a": 1}, 2))
    with pytest.raises(CheckpointUnsupported, match="bare pickle") as caught:
        torch_file.read(tmp_path / "t.pt")
    assert "save" in str(caught.value.hint)


def test_a_large_file_is_not_read_into_memory(tmp_path: Path) -> None:
    """Its pickles are; half a gigabyte of a storage is not."""
    path = _saved(tmp_path / "t.pt", {"a": torch.ones(3)})
    numel = 1 << 27
    raw = path.read_bytes()
    head = raw[: -(8 + 12)].replace(b"K\x03N", b"J" + struct.pack("<i", numel) + b"N")
    assert len(head) > len(raw) - 20
    with path.open("wb") as file:
        file.write(head + struct.pack("<q", numel))
        file.truncate(file.tell() + 4 * numel)
    tracemalloc.start()
    try:
        found = torch_file.read(path)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert found.storages[found.value["a"].storage.key].nbytes == 4 * numel
