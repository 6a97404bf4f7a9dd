"""Whole jobs on checkpoints in pieces: one a family, with stages after the consolidation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint import FileSystemWriter

from ckptd.checkpoint.checkpoint import open_checkpoint
from ckptd.checkpoint.layouts import FAMILIES
from ckptd.errors import StageRefused
from tests.checkpoint.consolidate import zero_files
from tests.checkpoint.consolidate.test_dcp import write_ranks
from tests.pipeline.stages.conftest import Saved, config_of, planned, run, weights_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
Weights = dict[str, torch.Tensor]
Family = Callable[[str], Saved]


def _deepspeed(path: Path, weights: Weights) -> None:
    names = list(weights)
    groups = [{n: weights[n] for n in names[::2]}, {n: weights[n] for n in names[1::2]}]
    zero_files.write(path / "global_step7", groups, stage=2, num_ranks=3)


def _zero3(path: Path, weights: Weights) -> None:
    zero_files.write(path / "global_step7", [weights], stage=3, num_ranks=3)


def _dcp(path: Path, weights: Weights) -> None:
    grids = {n: (2, 3) if t.dim() == 2 else (2,) for n, t in weights.items()}
    write_ranks(path, weights, grids, 3, FileSystemWriter(path))


def _titan(path: Path, weights: Weights) -> None:
    state = weights | {"optimizer.state.x.exp_avg": torch.ones(5)}
    dcp.save(state, checkpoint_id=path, no_dist=True)


def _lightning(path: Path, weights: Weights) -> None:
    state = {f"model.{name}": tensor for name, tensor in weights.items()}
    torch.save({"state_dict": state, "global_step": 7}, path / "last.ckpt")


def _pickled(path: Path, weights: Weights) -> None:
    torch.save(weights, path / "pytorch_model.bin")


WRITERS = {
    "deepspeed": _deepspeed, "zero 3": _zero3, "dcp": _dcp, "torchtitan": _titan,
    "lightning": _lightning, "pickled": _pickled,
}  # fmt: skip


@pytest.fixture(params=sorted(WRITERS))
def written(request: Any, family: Family, tmp_path: Path) -> tuple[Saved, Path]:
    """A llama as a family's trainer leaves it, with config.json in the run's folder."""
    saved = family("llama")
    path = tmp_path / "run" / "step-7"
    path.mkdir(parents=True)
    (path.parent / "config.json").write_text(json.dumps(saved.config))
    WRITERS[request.param](path, saved.weights)
    return saved, path


def test_the_output_is_what_was_saved(written: tuple[Saved, Path], tmp_path: Path) -> None:
    """Bit for bit, as safetensors that transformers loads without a key missing."""
    saved, path = written
    outcome = run(path, "- reshard: {max_shard_size: 20KB}", tmp_path / "out")
    found = weights_of(tmp_path / "out")
    assert found.keys() == saved.weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in saved.weights.items())
    assert outcome.num_shards is not None
    assert outcome.num_shards > 1
    loaded = saved.load(tmp_path / "out")
    assert torch.equal(saved.logits(loaded), saved.logits(saved.model))


def test_any_stage_may_follow(written: tuple[Saved, Path], tmp_path: Path) -> None:
    """Ties compared, rows added, values cast: on pieces as on whole tensors."""
    saved, path = written
    stages = "- tie\n- resize: {to: 112}\n- cast: {dtype: float16}"
    run(path, stages, tmp_path / "out")
    run(saved.path, stages, tmp_path / "whole")
    found, expected = weights_of(tmp_path / "out"), weights_of(tmp_path / "whole")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert config_of(tmp_path / "out") == config_of(tmp_path / "whole")


def test_row_divided_tensors_are_copied_not_computed(family: Family, tmp_path: Path) -> None:
    """Partitions of ZeRO and rows of FSDP need no torch."""
    saved = family("llama")
    path = tmp_path / "run" / "rows"
    path.mkdir(parents=True)
    (path.parent / "config.json").write_text(json.dumps(saved.config))
    grids = {n: (3, 1) if t.dim() == 2 else (2,) for n, t in saved.weights.items()}
    write_ranks(path, saved.weights, grids, 3, FileSystemWriter(path))
    made = planned(path, "- reshard: {max_shard_size: 5GB}")
    assert not made.needs_torch
    assert made.tensor_bytes == sum(t.nbytes for t in saved.weights.values())


@pytest.mark.parametrize("stage", [2, 3])
def test_master_weights_are_cast_to_the_configs_dtype_or_kept_on_request(
    stage: int, family: Family, tmp_path: Path
) -> None:
    """bfloat16 by config, rounded once; `cast: {dtype: float32}` keeps the masters."""
    saved = family("llama")
    path = tmp_path / "run" / "global_step7"
    path.parent.mkdir()
    (path.parent / "config.json").write_text(json.dumps(saved.config | {"dtype": "bfloat16"}))
    buffers = {"model.steps": torch.arange(3), "model.scale": torch.ones(2)}
    zero_files.write(path, [saved.weights], stage=stage, num_ranks=2, buffers=buffers)
    run(path, "- footprint", tmp_path / "out")
    found = weights_of(tmp_path / "out")
    assert all(torch.equal(found[n], t.bfloat16()) for n, t in saved.weights.items())
    assert all(torch.equal(found[n], t) for n, t in buffers.items())
    assert found["model.scale"].dtype == torch.float32
    run(path, "- cast: {dtype: float32}", tmp_path / "kept")
    kept = weights_of(tmp_path / "kept")
    assert all(torch.equal(kept[n], t) for n, t in saved.weights.items())
    assert config_of(tmp_path / "kept")["dtype"] == "float32"


def test_tied_weights_that_share_a_storage_are_one(tmp_path: Path) -> None:
    """A tied model's .bin has both names: one is published, and it loads."""
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    path = tmp_path / "run"
    path.mkdir()
    config.save_pretrained(path)
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    assert "lm_head.weight" in model.state_dict()
    run(path, "- tie", tmp_path / "out")
    assert "lm_head.weight" not in weights_of(tmp_path / "out")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("writer", ["deepspeed", "zero 3", "dcp", "lightning"])
def test_equal_weights_are_found_equal_however_they_are_divided(
    writer: str, equal: bool, family: Family, tmp_path: Path
) -> None:
    """The head's partitions end elsewhere than the embedding's: content decides what is tied."""
    saved = family("llama")
    weights = dict(saved.weights)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    if not equal:
        weights["lm_head.weight"][-1, -1] += 1
    path = tmp_path / "run" / "step-7"
    path.mkdir(parents=True)
    (path.parent / "config.json").write_text(json.dumps(saved.config))
    WRITERS[writer](path, weights)
    run(path, "- tie", tmp_path / "out")
    assert ("lm_head.weight" in weights_of(tmp_path / "out")) is not equal
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is equal


def test_stages_that_need_whole_files_say_so(family: Family, tmp_path: Path) -> None:
    """Comparing with the source, and quantized weights in pieces."""
    saved = family("llama")
    path = tmp_path / "run" / "step-7"
    path.mkdir(parents=True)
    quantized = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (path.parent / "config.json").write_text(json.dumps(saved.config | quantized))
    _dcp(path, saved.weights)
    with pytest.raises(StageRefused, match="several pieces"):
        planned(path, "- dequantize")
    with pytest.raises(StageRefused, match="no source to compare"):
        planned(path, "- verify: {compare: true}")


def test_every_family_is_a_layout(tmp_path: Path) -> None:
    """A definition may name any of them; those that are refused say so."""
    assert {"deepspeed", "dcp", "dcp-safetensors", "verl", "pickled", "lightning"} <= set(FAMILIES)
    (tmp_path / "config.json").write_text("{}")
    torch.save({"a.w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert open_checkpoint(tmp_path, layout="pickled").layout_reason == "named by the definition"
