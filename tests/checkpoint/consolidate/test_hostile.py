"""Files made to do harm, opened as any other: refused or harmless, nothing run, little memory."""

from __future__ import annotations

import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from ckptd.checkpoint import torch_file
from ckptd.checkpoint.checkpoint import open_checkpoint
from ckptd.checkpoint.completeness import Complete
from ckptd.errors import CheckpointRefused
from tests.checkpoint.consolidate import zero_files
from tests.checkpoint.consolidate.conftest import LLAMA, judge

Weights = dict[str, torch.Tensor]
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class _Payload:
    """What unpickling would run: a command that makes a file."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.made}",)


def _bin(path: Path, weights: Weights, payload: _Payload) -> None:
    torch.save(weights | {"x.y": payload}, path / "pytorch_model.bin")


def _legacy(path: Path, weights: Weights, payload: _Payload) -> None:
    torch.save(weights | {"x.y": payload}, path / "pytorch_model.bin",
               _use_new_zipfile_serialization=False)  # fmt: skip


def _lightning(path: Path, weights: Weights, payload: _Payload) -> None:
    torch.save({"state_dict": weights, "callbacks": payload, "loops": [payload]}, path / "a.ckpt")


def _metadata(path: Path, weights: Weights, payload: _Payload) -> None:
    dcp.save(weights, checkpoint_id=path, no_dist=True)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.storage_meta = payload
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def _only_payload(path: Path, weights: Weights, payload: _Payload) -> None:
    dcp.save(weights, checkpoint_id=path, no_dist=True)
    (path / ".metadata").write_bytes(pickle.dumps(payload))


def _zero(path: Path, weights: Weights, payload: _Payload) -> None:
    zero_files.write(path / "global_step7", [weights], stage=2, num_ranks=2)
    file = path / "global_step7" / "mp_rank_00_model_states.pt"
    state = torch.load(file, weights_only=False)
    torch.save(state | {"lr_scheduler": payload}, file)


def _verl(path: Path, weights: Weights, payload: _Payload) -> None:
    torch.save(weights | {"x_extra_state": payload}, path / "model_world_size_1_rank_0.pt")


WRITERS: dict[str, Callable[[Path, Weights, _Payload], None]] = {
    "bin": _bin, "legacy": _legacy, "lightning": _lightning, "metadata": _metadata,
    "nothing else": _only_payload, "zero": _zero, "verl": _verl,
}  # fmt: skip


@contextmanager
def _at_most(nbytes: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < nbytes
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("writer", sorted(WRITERS))
def test_a_command_in_a_pickle_is_not_run(
    writer: str, weights: Weights, run_path: Path, tmp_path: Path
) -> None:
    """Wherever it stands: the checkpoint is refused, or read without what is not its weights."""
    payload = _Payload(tmp_path / "made")
    path = run_path / "step-7"
    path.mkdir()
    WRITERS[writer](path, weights, payload)
    (tmp_path / "made").unlink(missing_ok=True)
    try:
        opened = open_checkpoint(path)
    except CheckpointRefused:
        assert writer in {"bin", "legacy", "nothing else"}
        assert not isinstance(judge(path), Complete)
    else:
        assert opened.tensors.keys() == weights.keys()
    assert not (tmp_path / "made").exists()


def _bomb(path: Path, member: str, nbytes: int) -> None:
    """Write a zip archive with a member of zeros that inflates to `nbytes`."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        if member != "archive/data.pkl":
            archive.writestr("archive/data.pkl", b"\x80\x02}.", zipfile.ZIP_STORED)
        with archive.open(member, "w") as file:
            for _ in range(nbytes >> 20):
                file.write(b"\0" * (1 << 20))


@pytest.mark.parametrize("member", ["archive/data.pkl", "archive/data/0", "archive/byteorder"])
def test_a_zip_bomb_is_not_inflated(member: str, run_path: Path) -> None:
    """128 MB in 128 KB: refused by what its directory says, whichever member it is."""
    path = run_path / "step-7"
    path.mkdir()
    _bomb(path / "pytorch_model.bin", member, 128 << 20)
    assert (path / "pytorch_model.bin").stat().st_size < 1 << 20
    with _at_most(4 << 20), pytest.raises(CheckpointRefused, match="compressed"):
        open_checkpoint(path)


def test_a_zip_of_many_members_takes_what_its_directory_may(
    run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory that is too long is refused before it is read."""
    monkeypatch.setattr(torch_file, "MAX_DIRECTORY_BYTES", 1 << 20)
    path = run_path / "pytorch_model.bin"
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\x01\x02", 20, 0, 20, *[0] * 6, 0, 0, 3, *[0] * 6)
    entry += b"a/b"
    count = 50_000
    with path.open("wb") as file:
        file.write(b"PK\x03\x04" + bytes(26))
        begin = file.tell()
        file.write(entry * count)
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count,
                               len(entry) * count, begin, 0))  # fmt: skip
    with _at_most(4 << 20), pytest.raises(CheckpointRefused):
        open_checkpoint(run_path)


def test_a_pickle_said_to_be_huge_is_not_read(run_path: Path) -> None:
    """A sparse file whose member claims gigabytes: its size is looked at first."""
    path = run_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive, archive.open("a/data.pkl", "w") as member:
        for _ in range(200):
            member.write(bytes(1 << 20))
    with _at_most(4 << 20), pytest.raises(CheckpointRefused, match="too large"):
        open_checkpoint(run_path)


@pytest.mark.parametrize("shape", [[1 << 40, 1 << 40], [-1, 4], [1 << 70]])
def test_shapes_that_cannot_be_are_refused(shape: list[int], run_path: Path) -> None:
    """In a flat file's header: more elements than any file has, or fewer than none."""
    head = {"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}
    raw = json.dumps(head).encode()
    (run_path / "config.json").unlink()
    path = run_path / "cats.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(4))
    with pytest.raises(CheckpointRefused):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 1 << 30},
        {"num_attention_heads": True},
        {"num_attention_heads": 0},
        {"num_attention_heads": -4},
        {"num_key_value_heads": "2"},
        {"head_dim": 0},
    ],
)
def test_a_config_that_lies_about_heads_takes_no_memory(
    change: dict[str, Any], run_path: Path
) -> None:
    """A sparse file with a billion rows and a config to match: no box is made for each of them."""
    rows = 1 << 31
    names = {
        "tok_embeddings.weight": (8, 4), "layers.0.attention.wq.weight": (rows, 4),
        "layers.0.attention.wk.weight": (8, 4), "layers.0.attention.wo.weight": (4, 8),
    }  # fmt: skip
    head: dict[str, Any] = {}
    offset = 0
    for name, shape in names.items():
        size = 2 * shape[0] * shape[1]
        head[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(head).encode()
    with (run_path / "shard-00001-model-00001-of-00001.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + offset)
    config = LLAMA | {"hidden_size": 4, "num_hidden_layers": 1, "head_dim": 2,
                      "num_attention_heads": 1 << 30, "num_key_value_heads": 4}  # fmt: skip
    (run_path / "config.json").write_text(json.dumps(config | change))
    with _at_most(4 << 20), pytest.raises(CheckpointRefused):
        open_checkpoint(run_path)


def test_experts_without_number_take_no_memory(run_path: Path) -> None:
    """A config that speaks of a billion experts: not as many names are made."""
    state = {
        "tok_embeddings.weight": torch.ones(8, 4), "layers.0.attention.wo.weight": torch.ones(4, 4),
        "layers.0.moe.experts.w1": torch.ones(2, 4, 4),
    }  # fmt: skip
    path = run_path / "step-1"
    dcp.save(state, checkpoint_id=path, no_dist=True)
    config = LLAMA | {"model_type": "qwen3_moe", "hidden_size": 4, "num_hidden_layers": 1,
                      "num_experts": 1 << 30}  # fmt: skip
    (run_path / "config.json").write_text(json.dumps(config))
    with _at_most(16 << 20), pytest.raises(CheckpointRefused, match="experts"):
        open_checkpoint(path)
