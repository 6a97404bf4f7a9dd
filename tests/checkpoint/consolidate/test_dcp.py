"""DCP: whatever way tensors are divided among ranks, the whole comes out; liars are refused."""

from __future__ import annotations

import copy
import os
import pickle
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter, HuggingFaceStorageWriter
from torch.distributed.checkpoint.default_planner import (
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from ckptd.checkpoint import pickle_machine
from ckptd.checkpoint.checkpoint import open_checkpoint
from ckptd.checkpoint.completeness import Complete, Waiting
from ckptd.checkpoint.consolidate import dcp as ours
from ckptd.checkpoint.pieces import Assembled
from ckptd.errors import CheckpointCorrupt, CheckpointRefused, CheckpointUnsupported
from ckptd.plan import draft
from tests.checkpoint.consolidate.conftest import judge, same, values

Weights = dict[str, torch.Tensor]
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class _Ranks(DefaultSavePlanner):
    """A planner that knows whole tensors and writes the chunks it is asked for."""

    def __init__(self, whole: Weights) -> None:
        super().__init__()
        self.whole = whole

    def resolve_data(self, write_item: WriteItem) -> Any:
        chunk = write_item.tensor_data.chunk
        part = self.whole[write_item.index.fqn]
        for axis, (at, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            part = part.narrow(axis, at, length)
        return part.contiguous().clone()


def _item(name: str, tensor: torch.Tensor, at: Sequence[int], size: Sequence[int]) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(at), torch.Size(size))
    return WriteItem(
        index=MetadataIndex(name, chunk.offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=chunk,
            properties=TensorProperties.create_from_tensor(tensor),
            size=tensor.size(),
        ),
    )


def _chunks(shape: Sequence[int], grid: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return the boxes of a tensor divided into `grid` parts, uneven as torch.chunk makes them."""
    boxes: list[tuple[list[int], list[int]]] = [([], [])]
    for length, parts in zip(shape, grid, strict=True):
        step = -(-length // parts)
        ranges = [(at, min(step, length - at)) for at in range(0, length, max(step, 1))]
        boxes = [([*at, a], [*size, n]) for at, size in boxes for a, n in ranges or [(0, 0)]]
    return boxes


def write_ranks(
    path: Path, whole: Weights, grids: dict[str, Sequence[int]], num_ranks: int, writer: Any
) -> None:
    """Write `whole` with torch's own planner and writer, its parts dealt out to the ranks."""
    items: list[list[WriteItem]] = [[] for _ in range(num_ranks)]
    for number, (name, tensor) in enumerate(whole.items()):
        grid = grids.get(name, [1] * tensor.dim())
        for place, (at, size) in enumerate(_chunks(tensor.shape, grid)):
            items[(number + place) % num_ranks].append(_item(name, tensor, at, size))
    plans, metadata = create_default_global_save_plan([SavePlan(part) for part in items])
    planner = _Ranks(whole)
    path.mkdir(parents=True, exist_ok=True)
    writer.set_up_storage_writer(True)
    plans = writer.prepare_global_plan(plans)
    results = [writer.write_data(plan, planner).wait() or [] for plan in plans]
    writer.finish(metadata, results)


GRIDS: dict[str, dict[str, Sequence[int]]] = {
    "rows": {"model.embed_tokens.weight": (4, 1), "model.layers.0.conv.weight": (3, 1, 1)},
    "columns": {"model.embed_tokens.weight": (1, 4), "lm_head.weight": (1, 2)},
    "both": {
        "model.embed_tokens.weight": (3, 2),
        "model.layers.0.mlp.weight": (2, 3),
        "model.layers.0.conv.weight": (2, 2, 3),
        "model.norm.weight": (5,),
    },
    "whole": {},
}


@pytest.mark.parametrize("grid", sorted(GRIDS))
@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_any_division_makes_the_whole(
    grid: str, num_ranks: int, weights: Weights, run_path: Path
) -> None:
    """Rows, columns, both, uneven and padded parts, whole tensors on one rank: the oracle is torch's
    own consolidation of the same files."""
    path = run_path / "step-4"
    write_ranks(
        path,
        weights,
        GRIDS[grid],
        num_ranks,
        FileSystemWriter(path, single_file_per_rank=num_ranks != 2),
    )
    source = open_checkpoint(path)
    assert same(values(source), weights)
    assert source.step == 4
    assert isinstance(judge(path), Complete)
    draft.from_checkpoint(source)
    oracle = run_path / "oracle.pt"
    dcp_to_torch_save(path, oracle)
    assert same(torch.load(oracle), weights)
    if grid == "both":
        assert isinstance(source.tensors["model.embed_tokens.weight"], Assembled)


@pytest.mark.parametrize(
    ("folder", "state"),
    [
        ("", lambda w: w | {"optimizer.state.model.norm.weight.exp_avg": torch.ones(3),
                            "lr_scheduler.last": torch.ones(1), "train_state": {"step": 3}}),
        ("", lambda w: {"model": w, "optim": {"state": {"model.norm.weight": {"x": torch.ones(2)}}},
                        "dataloader": {"seen": torch.ones(1)}}),
        ("", lambda w: {"state_dict": {f"model.{k}": v for k, v in w.items()}, "epoch": 2}),
        ("", lambda w: {"app": {"model": w, "optimizers": {"a.b": torch.ones(2)}}}),
        ("", lambda w: {"model": {f"_orig_mod.{k}": v for k, v in w.items()}}),
        ("pytorch_model_fsdp_0", lambda w: {"model": w}),
        ("trainer", lambda w: {"app": {"model": w, "progress": {"step": 1}}}),
        ("", lambda w: {"app": {"model": w, "step": torch.tensor(3)}, "epoch": torch.tensor(1)}),
    ],
    ids=["torchtitan", "nested", "Lightning", "prime-rl", "compiled", "accelerate", "trainer",
         "counted"],
)  # fmt: skip
def test_the_model_is_found_beside_the_trainers_state(
    folder: str, state: Any, weights: Weights, run_path: Path
) -> None:
    """Saved by torch itself; the names are the model's, optimizer and data loader are left out."""
    path = run_path / "step-3"
    dcp.save(state(weights), checkpoint_id=path / folder, no_dist=True)
    (path / "optimizer_0").mkdir()
    (path / "optimizer_0" / ".metadata").write_bytes(b"never read")
    source = open_checkpoint(path)
    assert same(values(source), weights)
    assert isinstance(judge(path), Complete)


def test_lightnings_folder_is_whole_with_its_last_file(weights: Weights, run_path: Path) -> None:
    """meta.pt comes after the metadata: without it the folder is not whole."""
    path = run_path / "epoch=0-step=5.ckpt"
    dcp.save({"state_dict": weights}, checkpoint_id=path, no_dist=True)
    verdict = judge(path)
    assert isinstance(verdict, Waiting)
    assert "meta.pt" in verdict.why
    torch.save({"epoch": 1}, path / "meta.pt")
    assert isinstance(judge(path), Complete)
    assert same(values(open_checkpoint(path)), weights)


def test_a_save_over_an_old_one_is_waited_for(weights: Weights, run_path: Path) -> None:
    """The old metadata is older than the new shards; a temporary one is a veto."""
    path = run_path / "ck"
    dcp.save(weights, checkpoint_id=path, no_dist=True)
    shard = next(path.glob("*.distcp"))
    marked_ns = (path / ".metadata").stat().st_mtime_ns
    os.utime(shard, ns=(marked_ns + 10**9, marked_ns + 10**9))
    verdict = judge(path)
    assert isinstance(verdict, Waiting)
    assert "older" in verdict.why
    (path / ".metadata.tmp").write_bytes(b"")
    assert isinstance(judge(path), Waiting)
    (path / ".metadata").unlink()
    (path / ".metadata.tmp").unlink()
    assert isinstance(judge(path), Waiting)


def test_two_models_are_a_question(weights: Weights, run_path: Path) -> None:
    """A critic beside the policy: which is meant is not guessed."""
    dcp.save({"model": weights, "policy": weights}, checkpoint_id=run_path, no_dist=True)
    with pytest.raises(CheckpointUnsupported, match="which state dict"):
        open_checkpoint(run_path)


@pytest.mark.parametrize("missing", [False, True])
def test_safetensors_shards_of_ranks_are_put_together(
    missing: bool, weights: Weights, run_path: Path
) -> None:
    """DCP's Hugging Face writer without consolidation; a missing rank is waited for."""
    path = run_path / "ck"
    del weights["model.layers.0.none"]
    grids = {
        "model.embed_tokens.weight": (3, 1),
        "lm_head.weight": (1, 3),
        "model.layers.0.mlp.weight": (1, 2),
        "model.layers.0.conv.weight": (1, 2, 1),
    }
    writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
    write_ranks(path, weights, grids, 3, writer)
    assert len(list(path.glob("shard-*.safetensors"))) == 3
    if missing:
        next(path.glob("shard-00002*")).unlink()
        assert not isinstance(judge(path), Complete)
        return
    source = open_checkpoint(path)
    assert source.layout == "dcp-safetensors"
    assert same(values(source), weights)
    assert isinstance(judge(path), Complete)


@pytest.fixture
def saved(weights: Weights, run_path: Path) -> Path:
    """A checkpoint of two ranks."""
    path = run_path / "ck"
    write_ranks(path, weights, GRIDS["rows"], 2, FileSystemWriter(path))
    return path


def _metadata(path: Path) -> Metadata:
    with (path / ".metadata").open("rb") as file:
        found = pickle.load(file)
    assert isinstance(found, Metadata)
    return found


def _first(metadata: Metadata) -> tuple[MetadataIndex, Any]:
    return next(
        (index, info) for index, info in metadata.storage_data.items() if "embed" in index.fqn
    )


def _outside(metadata: Metadata) -> None:
    _first(metadata)[1].offset = 1 << 40


def _negative(metadata: Metadata) -> None:
    _first(metadata)[1].offset = -5


def _elsewhere(metadata: Metadata) -> None:
    _first(metadata)[1].relative_path = "../../../etc/passwd"


def _absent(metadata: Metadata) -> None:
    _first(metadata)[1].relative_path = "__9_9.distcp"


def _another(metadata: Metadata) -> None:
    other = next(v for k, v in metadata.storage_data.items() if "norm" in k.fqn)
    metadata.storage_data[_first(metadata)[0]] = copy.copy(other)


def _lost(metadata: Metadata) -> None:
    del metadata.storage_data[_first(metadata)[0]]


def _hole(metadata: Metadata) -> None:
    metadata.state_dict_metadata["model.embed_tokens.weight"].chunks.pop()


def _overlap(metadata: Metadata) -> None:
    chunks = metadata.state_dict_metadata["model.embed_tokens.weight"].chunks
    index = MetadataIndex("model.embed_tokens.weight", chunks[1].offsets)
    metadata.storage_data[MetadataIndex(index.fqn, (1, 0))] = metadata.storage_data[index]
    chunks[1].offsets = torch.Size((1, 0))


def _huge(metadata: Metadata) -> None:
    metadata.state_dict_metadata["model.embed_tokens.weight"].size = torch.Size((1 << 40, 1 << 40))


def _packed(metadata: Metadata) -> None:
    _first(metadata)[1].transform_descriptors = ["zstd"]


def _axes(metadata: Metadata) -> None:
    metadata.state_dict_metadata["model.embed_tokens.weight"].chunks[0].sizes = torch.Size((3,))


@pytest.mark.parametrize(
    "lie",
    [_outside, _negative, _elsewhere, _absent, _another, _lost, _hole, _overlap, _huge, _packed,
     _axes],
)  # fmt: skip
def test_metadata_that_lies_is_refused(lie: Any, saved: Path) -> None:
    """Places outside of files and folders, holes, overlaps, other tensors' chunks: by name."""
    metadata = _metadata(saved)
    lie(metadata)
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointRefused) as caught:
        draft.from_checkpoint(open_checkpoint(saved))
    assert caught.value.tensor == "model.embed_tokens.weight"


@pytest.mark.parametrize(
    "value",
    [[], {}, Metadata({}), Metadata({}, None, {}), Metadata({"a": 1}, None, {1: 2}), "text"],
)
def test_metadata_that_is_none_is_refused(value: Any, saved: Path) -> None:
    """Whatever else the pickle holds."""
    (saved / ".metadata").write_bytes(pickle.dumps(value))
    with pytest.raises(CheckpointRefused, match="metadata"):
        open_checkpoint(saved)


def test_a_million_entries_are_refused_in_little_memory(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects are counted while they are made: the limit bounds time and memory, not the file."""
    monkeypatch.setattr(pickle_machine, "MAX_UNITS", 1_000_000)
    entry = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n)R}(X\x03\x00\x00\x00fqn"
    entry += b"X\x01\x00\x00\x00aX\x06\x00\x00\x00offset(K\x01tub}"
    head = b"\x80\x02cx\nMetadata\n)R}(X\x0c\x00\x00\x00storage_data}("
    (saved / ".metadata").write_bytes(head + entry * 1_000_000 + b"uub.")
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointCorrupt, match="objects"):
            open_checkpoint(saved)
        assert tracemalloc.get_traced_memory()[1] < len(head + entry * 1_000_000) + (40 << 20)
    finally:
        tracemalloc.stop()


def test_metadata_that_is_too_large_is_not_read(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its size is looked at first."""
    monkeypatch.setattr(ours, "MAX_METADATA_BYTES", 100)
    with pytest.raises(CheckpointCorrupt, match="too large"):
        open_checkpoint(saved)
