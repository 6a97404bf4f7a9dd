"""Real and made checkpoints of trainers, and the values that their pieces make."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptd.checkpoint import completeness
from ckptd.checkpoint.checkpoint import Checkpoint
from ckptd.checkpoint.completeness import Verdict
from ckptd.checkpoint.header import Extent, StoredTensor
from ckptd.checkpoint.listing import list_files
from ckptd.checkpoint.pieces import Tensor

DATA = Path(__file__).parents[2] / "data" / "trainers"
REFERENCE: dict[str, dict[str, Any]] = json.loads((DATA / "reference.json").read_text())
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 10,
    "dtype": "float32",
}


def value(tensor: Tensor) -> torch.Tensor:
    """Return what a tensor's pieces make, each read and put in its place."""
    dtype = getattr(torch, str(tensor.spec.dtype.torch_name))
    if isinstance(tensor, StoredTensor):
        return _read(tensor.extent, dtype, tensor.spec.shape)
    whole = torch.zeros(tensor.grid, dtype=dtype)
    for box in tensor.boxes:
        part = whole
        for axis, (at, length) in enumerate(zip(box.at, box.shape, strict=True)):
            part = part.narrow(axis, at, length)
        shape = (box.shape[0] * box.step, *box.shape[1:]) if box.step > 1 else box.shape
        rows = _read(box.extent, dtype, shape)
        part.copy_(rows[box.first :: box.step] if box.step > 1 else rows)
    return whole.reshape(tensor.spec.shape)


def values(source: Checkpoint) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint."""
    return {name: value(tensor) for name, tensor in source.tensors.items()}


def same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    """Return whether both have the same names, dtypes, shapes and bytes."""
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in expected.items()
    )


def judge(path: Path, **options: Any) -> Verdict:
    """Return the verdict on a folder that nobody has touched for ever."""
    facts = completeness.examine(path, list_files(path), **options)
    return completeness.verdict(facts, quiet_s=1e9, settle_s=1.0)


def told(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return what reference.json says of tensors."""
    return {
        name: [
            str(tensor.dtype).removeprefix("torch."),
            list(tensor.shape),
            hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest(),
        ]
        for name, tensor in tensors.items()
    }


def _read(extent: Extent, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    with extent.path.open("rb") as file:
        file.seek(extent.offset)
        data = bytearray(file.read(extent.nbytes))
    assert len(data) == extent.nbytes
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(shape)


def _in_order(path: Path) -> None:
    """Give the files the times of a save: the trainers' last files a second after all others."""
    for file in path.rglob("*"):
        if file.is_file():
            moment = 1_700_000_000 + (file.name in {".metadata", "latest", "trainer_state.json"})
            os.utime(file, (moment, moment))


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real checkpoints, in a folder that no test writes to."""
    path = tmp_path_factory.mktemp("trainers")
    with tarfile.open(DATA / "trainers.tar.xz") as archive:
        archive.extractall(path, filter="data")
    _in_order(path)
    return path


@pytest.fixture
def real(unpacked: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A function that returns a copy of a real checkpoint, with its config in the run's folder."""

    def copied(name: str) -> Path:
        shutil.copytree(unpacked / name, tmp_path / "run" / name)
        shutil.copy(DATA / "config.json", tmp_path / "run" / "config.json")
        return tmp_path / "run" / name

    return copied


@pytest.fixture
def run_path(tmp_path: Path) -> Path:
    """A run's folder that has a config.json."""
    path = tmp_path / "run"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(LLAMA))
    return path


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """The tensors of a tiny model, of odd shapes, an empty one and a scalar among them."""
    torch.manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(10, 6),
        "model.layers.0.mlp.weight": torch.randn(7, 5),
        "model.layers.0.conv.weight": torch.randn(3, 4, 5).bfloat16(),
        "model.layers.0.scale": torch.tensor(3.5),
        "model.layers.0.none": torch.empty(0, 4),
        "model.norm.weight": torch.randn(6),
        "lm_head.weight": torch.randn(10, 6),
    }
