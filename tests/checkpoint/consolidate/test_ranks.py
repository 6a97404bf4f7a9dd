"""One file a rank, with DTensors: rows, columns, copies; and the layouts that are only recognised."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.testing._internal.distributed.fake_pg import FakeStore

from ckptd.checkpoint.checkpoint import open_checkpoint
from ckptd.checkpoint.completeness import Broken, Complete
from ckptd.errors import CheckpointIncomplete, CheckpointRefused, CheckpointUnsupported
from tests.checkpoint.consolidate.conftest import judge, same, values

Weights = dict[str, torch.Tensor]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def no_group() -> Iterator[None]:
    """Whatever a test opened is closed."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def _write(
    path: Path, whole: Weights, mesh_shape: tuple[int, ...], placed: dict[str, tuple[Any, ...]],
    name: str = "model_world_size_{world}_rank_{rank}.pt",
) -> None:  # fmt: skip
    """Write each rank's part as that rank would: real DTensors, made in one process."""
    path.mkdir(parents=True, exist_ok=True)
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    mesh = init_device_mesh("cpu", (1,) * len(mesh_shape))  # the pickled mesh says nothing we read
    default: tuple[Any, ...] = (*([Replicate()] * (len(mesh_shape) - 1)), Shard(0))
    for rank, place in enumerate(itertools.product(*map(range, mesh_shape))):
        state: dict[str, Any] = {}
        for key, tensor in whole.items():
            placements = placed.get(key, default)
            state[key] = tensor
            if tensor.dim():
                local = _local(tensor, placements, place, mesh_shape)
                meta = TensorMeta(tensor.shape, tensor.stride(), tensor.dtype)
                spec = DTensorSpec(mesh, placements, tensor_meta=meta)
                state[key] = DTensor(local, spec, requires_grad=False)
        torch.save(state, path / name.format(world=math.prod(mesh_shape), rank=rank))
    dist.destroy_process_group()


def _local(
    tensor: torch.Tensor,
    placements: tuple[Any, ...],
    place: tuple[int, ...],
    mesh_shape: tuple[int, ...],
) -> torch.Tensor:
    """Return the part of the rank at `place` of the mesh, as DTensor divides: with torch.chunk."""
    for number, length, placement in zip(place, mesh_shape, placements, strict=True):
        if isinstance(placement, Shard):
            parts = tensor.chunk(length, placement.dim)
            none = tensor.narrow(placement.dim, 0, 0)
            tensor = parts[number] if number < len(parts) else none
    return tensor.contiguous().clone()


@pytest.mark.parametrize("mesh", [(1,), (2,), (3,), (8,), (2, 2)])
@pytest.mark.parametrize("folder", ["", "actor"])
def test_the_parts_of_all_ranks_make_the_whole(
    mesh: tuple[int, ...], folder: str, weights: Weights, run_path: Path
) -> None:
    """verl's files: rows, columns, replicated, uneven, hybrid sharding, fewer rows than ranks."""
    copies = (Replicate(),) * (len(mesh) - 1)
    placed = {
        "lm_head.weight": (*copies, Shard(1)),
        "model.layers.0.conv.weight": (*copies, Shard(2)),
        "model.norm.weight": (*copies, Replicate()),
    }
    path = run_path / "global_step_5"
    _write(path / folder, weights, mesh, placed)
    assets = path / folder / "huggingface"
    assets.mkdir()
    (run_path / "config.json").rename(assets / "config.json")
    (assets / "tokenizer.json").write_text("{}")
    (path / folder / "optim_world_size_2_rank_0.pt").write_bytes(b"never read")
    source = open_checkpoint(path)
    assert same(values(source), weights)
    assert (source.layout, source.step) == ("verl", 5)
    assert "tokenizer.json" in [file.relpath for file in source.side_files]
    assert isinstance(judge(path), Complete)


def test_accelerates_rank_files_are_the_same(weights: Weights, run_path: Path) -> None:
    """`pytorch_model_fsdp_0_rankR.bin`, which no file says the number of."""
    _write(run_path, weights, (2,), {}, name="pytorch_model_fsdp_0_rank{rank}.bin")
    assert same(values(open_checkpoint(run_path)), weights)
    (run_path / "pytorch_model_fsdp_0_rank1.bin").unlink()
    with pytest.raises(CheckpointRefused):
        open_checkpoint(run_path)


def test_a_missing_rank_is_waited_for(weights: Weights, run_path: Path) -> None:
    """The number of ranks is in the names."""
    _write(run_path, weights, (3,), {})
    (run_path / "model_world_size_3_rank_1.pt").unlink()
    with pytest.raises(CheckpointIncomplete, match="rank 1"):
        open_checkpoint(run_path)


@pytest.mark.parametrize(
    "placement", [(Shard(0), Shard(1)), (Shard(0), Replicate()), (Replicate(), Partial())]
)
def test_other_placements_are_refused_by_name(
    placement: tuple[Any, ...], weights: Weights, run_path: Path
) -> None:
    """Tensor parallel parts under FSDP, sums not yet made."""
    _write(run_path, weights, (2, 2), {"lm_head.weight": placement})
    with pytest.raises(CheckpointUnsupported) as caught:
        open_checkpoint(run_path)
    assert caught.value.tensor == "lm_head.weight"


@pytest.mark.parametrize(
    ("files", "layout", "words"),
    [
        (["common.pt", "__0_0.distcp", ".metadata", "metadata.json"], "megatron", "Megatron-Bridge"),
        (["mp_rank_00/model_optim_rng.pt"], "megatron-legacy", "convert"),
        (["_CHECKPOINT_METADATA", "items/manifest.ocdbt"], "orbax", "ckpt_conversion"),
        (["zero/model.norm.weight/fp32.pt", "mp_rank_00_model_states.pt"],
         "deepspeed-universal", "it was made from"),
    ],
)  # fmt: skip
def test_layouts_of_others_are_refused_with_the_tool_that_converts_them(
    files: list[str], layout: str, words: str, run_path: Path
) -> None:
    """Recognised by their files, never half read."""
    for name in files:
        (run_path / name).parent.mkdir(parents=True, exist_ok=True)
        (run_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointUnsupported) as caught:
        open_checkpoint(run_path)
    assert words in str(caught.value.hint)
    verdict = judge(run_path)
    assert isinstance(verdict, Broken)
    assert open_layout(run_path) == layout


def open_layout(path: Path) -> str:
    """Return the layout that is chosen for a folder."""
    from ckptd.checkpoint import layouts
    from ckptd.checkpoint.listing import list_files

    return layouts.choose(path, list_files(path))[0].name
