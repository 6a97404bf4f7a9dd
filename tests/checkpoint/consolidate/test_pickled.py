"""Pickled weights: where trainers put them, under which names, shared, strided, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ckptd.checkpoint.checkpoint import open_checkpoint
from ckptd.checkpoint.completeness import Complete, Waiting
from ckptd.checkpoint.header import StoredTensor
from ckptd.errors import CheckpointIncomplete, CheckpointRefused, CheckpointUnsupported
from tests.checkpoint.consolidate.conftest import LLAMA, judge, same, values

Weights = dict[str, torch.Tensor]


def _wrapped(weights: Weights, prefix: str) -> Weights:
    return {prefix + name: tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("pytorch_model.bin", lambda w: w),
        ("pytorch_model_fsdp.bin", lambda w: w),
        ("pytorch_model.bin", lambda w: _wrapped(w, "module.")),
        ("model.pt", lambda w: {"model": w, "optimizer": {"state": {0: {"x": torch.ones(3)}}}}),
        ("model.pt", lambda w: {"model_state_dict": _wrapped(w, "module._orig_mod.")}),
        ("best.pth", lambda w: {"state_dict": w, "epoch": 3}),
        ("ep1-ba2-rank0.pt", lambda w: {"state": {"model": _wrapped(w, "model.")}, "rng": []}),
        ("last.ckpt", lambda w: {"state_dict": _wrapped(w, "model."), "global_step": 7}),
        ("epoch=0-step=7.ckpt", lambda w: {"state_dict": _wrapped(w, "_forward_module.model.")}),
    ],
)
def test_the_state_dict_is_found_where_trainers_put_it(
    name: str, wrap: Any, weights: Weights, run_path: Path
) -> None:
    """Known files and keys; wrappers' and containers' names are taken off."""
    folder = run_path / "step-7"
    folder.mkdir()
    torch.save(wrap(weights), folder / name)
    (folder / "optimizer.pt").write_bytes(b"never read")
    source = open_checkpoint(folder)
    assert same(values(source), weights)
    assert source.step == 7
    assert isinstance(judge(folder), Complete)


def test_a_sharded_save_of_transformers_is_read_by_its_index(tmp_path: Path) -> None:
    """Names and bytes are those that transformers itself loads; a missing shard is waited for."""
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    config.save_pretrained(tmp_path)
    state = model.state_dict()
    names = list(state)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: state[name] for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    index = tmp_path / "pytorch_model.bin.index.json"
    assert isinstance(judge(tmp_path), Waiting) or not isinstance(judge(tmp_path), Complete)
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert same(values(open_checkpoint(tmp_path)), state)
    assert isinstance(judge(tmp_path), Complete)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointIncomplete, match="00002"):
        open_checkpoint(tmp_path)
    assert isinstance(judge(tmp_path), Waiting)


@pytest.mark.parametrize("tied", [True, False, None])
def test_shared_storages_are_ties_where_the_config_says_so(
    tied: bool | None, weights: Weights, run_path: Path
) -> None:
    """One name stays where they are tied by config, else both, with the same bytes."""
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    config = LLAMA if tied is None else LLAMA | {"tie_word_embeddings": tied}
    (run_path / "config.json").write_text(json.dumps(config))
    torch.save(weights, run_path / "pytorch_model.bin")
    source = open_checkpoint(run_path)
    assert ("lm_head.weight" in source.tensors) is (tied is not True)
    assert bool(source.notes) is (tied is True)
    if tied is not True:
        assert same(values(source), weights)


def test_tensors_with_gaps_are_right_or_refused(weights: Weights, run_path: Path) -> None:
    """Some columns of a matrix and one row for many are pieces; a transposed one is refused."""
    whole = torch.randn(9, 8, 6)
    weights |= {
        "model.columns": whole[0, :, 1:4],
        "model.box": whole[2:5, 1:3, :4],
        "model.expanded": torch.randn(1, 5).expand(4, 5),
        "model.turned": torch.randn(3, 4).T,
        "model.every": torch.arange(10.0)[::3],
    }
    torch.save(weights, run_path / "pytorch_model.bin")
    assert same(values(open_checkpoint(run_path)), weights)
    weights["model.large"] = torch.randn(300, 300).T
    torch.save(weights, run_path / "pytorch_model.bin")
    with pytest.raises(CheckpointUnsupported, match=r"model\.large.*order") as caught:
        open_checkpoint(run_path)
    assert "contiguous" in str(caught.value.hint)


class _Model(torch.nn.Linear):
    """A class that a reader would have to import."""


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (lambda: _Model(2, 2), "not a state dict"),
        (lambda: {"model": _Model(2, 2), "epoch": 3}, "whole"),
        (lambda: {"epoch": 3, "losses": [1.0]}, "no state dict"),
        (lambda: [torch.ones(3)], "not a state dict"),
        (lambda: {"model": {"a.weight": torch.ones(3).to_sparse()}}, "plain tensor"),
    ],
)
def test_what_is_no_state_dict_is_refused(value: Any, words: str, run_path: Path) -> None:
    """A pickled class, a file without tensors, tensors of other kinds: by name, with advice."""
    torch.save(value(), run_path / "model.pt")
    with pytest.raises(CheckpointUnsupported, match=words) as caught:
        open_checkpoint(run_path)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (lambda w: {"model": w, "model_args": {}, "iter_num": 9, "optimizer": {}}, "nanoGPT"),
        (lambda w: {"dims": {"n_mels": 80}, "model_state_dict": w}, "whisper"),
        (lambda w: {"model": w, "optimizer_history": [], "extra_state": {}, "cfg": {}}, "fairseq"),
        (lambda w: {"transformer.h.0.attn.qkv.weight": w["model.norm.weight"]}, "LitGPT"),
        (
            lambda w: {"model": {"transformer.h.0.mlp.fc_1.weight": w["model.norm.weight"]}},
            "LitGPT",
        ),
    ],
)
def test_what_no_name_of_transformers_fits_is_refused(
    value: Any, words: str, weights: Weights, run_path: Path
) -> None:
    """A config beside it would make a model of it that is wrong: the trainer and the way are named."""
    torch.save(value(weights), run_path / "ckpt.pt")
    with pytest.raises(CheckpointUnsupported, match=words) as caught:
        open_checkpoint(run_path)
    assert caught.value.hint


def test_linear_weights_of_gpt2_that_lie_across_are_refused(run_path: Path) -> None:
    """As Linear has them, a square c_proj would be taken as it is; those of Conv1D are read."""
    (run_path / "config.json").write_text(
        json.dumps({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"})
    )
    for shape, is_right in (((16, 48), True), ((48, 16), False)):
        weights = {"transformer.h.0.attn.c_attn.weight": torch.ones(shape)}
        torch.save(weights, run_path / "model.pt")
        if is_right:
            assert same(values(open_checkpoint(run_path)), weights)
        else:
            with pytest.raises(CheckpointUnsupported, match="lies across"):
                open_checkpoint(run_path)


def test_a_link_to_the_newest_file_is_no_second_one(weights: Weights, run_path: Path) -> None:
    """Composer's latest-rank0.pt beside the only save; timm's suffix."""
    torch.save({"state": {"model": weights}}, run_path / "ep1-ba42-rank0.pt")
    (run_path / "latest-rank0.pt").symlink_to("ep1-ba42-rank0.pt")
    assert same(values(open_checkpoint(run_path)), weights)
    (run_path / "latest-rank0.pt").unlink()
    (run_path / "ep1-ba42-rank0.pt").rename(run_path / "last.pth.tar")
    assert same(values(open_checkpoint(run_path)), weights)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("best-model/model.safetensors", "best-model"),
        ("deep/er/pytorch_model.bin.index.json", "deep/er"),
        ("llama_sft.safetensors", "point at the file itself"),
        ("flax_model.msgpack", "save_pretrained"),
        ("tf_model.h5", "save_pretrained"),
    ],
)
def test_weights_that_lie_elsewhere_are_named(name: str, words: str, run_path: Path) -> None:
    """A folder without weights of its own says where there are some, or why they are not read."""
    (run_path / name).parent.mkdir(parents=True, exist_ok=True)
    (run_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointRefused) as caught:
        open_checkpoint(run_path)
    assert words in f"{caught.value} {caught.value.hint}"


def test_several_files_are_a_question(weights: Weights, run_path: Path) -> None:
    """A folder of Lightning's has many: each can be named itself."""
    for name in ("last.ckpt", "epoch=0.ckpt"):
        torch.save({"state_dict": weights}, run_path / name)
    with pytest.raises(CheckpointUnsupported, match="2 files"):
        open_checkpoint(run_path)


@pytest.mark.parametrize(
    ("names", "config", "expected"),
    [
        # a tied Llama, as it is and in one and two containers
        (["model.embed_tokens.weight", "model.layers.0.w"], LLAMA, 0),
        (["model.model.embed_tokens.weight", "model.model.layers.0.w"], LLAMA, 1),
        (["m.x"], LLAMA, 0),
        (["model.model.embed_tokens.weight", "model.lm_head.weight"], LLAMA, 1),
        (["model.embed_tokens.weight", "model.layers.0.w"], {"architectures": ["LlamaModel"]}, 1),
        (["model.transformer.wte.weight", "model.transformer.h.0.w"],
         {"architectures": ["GPT2LMHeadModel"]}, 1),
        (["model.shared.weight", "model.encoder.w", "model.decoder.w"],
         {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, 1),
        (["model.shared.weight", "model.encoder.w", "model.decoder.w"],
         {"architectures": ["BartForConditionalGeneration"], "model_type": "bart"}, 0),
        (["model.language_model.w", "model.vision_tower.w"],
         {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}, 0),
        (["model.language_model.model.w", "model.vision_tower.w"],
         {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}, 1),
        (["model.one.w", "model.two.w"], {"architectures": ["OddForCausalLM"]}, None),
        (["model.one.w", "model.two.w"], {}, None),
        (["model.model.embed_tokens.w", "model.lm_head.w", "metric.total"], LLAMA, None),
    ],
)  # fmt: skip
def test_the_models_own_first_part_stays(
    names: list[str], config: dict[str, Any], expected: int | None, run_path: Path
) -> None:
    """Which `model.` is the trainer's is told by the architecture, or it is refused."""
    torch.save({name: torch.ones(2) + i for i, name in enumerate(names)}, run_path / "a.pt")
    (run_path / "config.json").write_text(json.dumps(config))
    if expected is None:
        with pytest.raises(CheckpointUnsupported, match="not clear") as caught:
            open_checkpoint(run_path)
        assert "--assets" in str(caught.value.hint)
        return
    prefix = "model." * expected
    assert list(open_checkpoint(run_path).tensors) == [name.removeprefix(prefix) for name in names]


def test_a_base_model_decides_names(weights: Weights, run_path: Path, tmp_path: Path) -> None:
    """Its index is what the names must agree with; one that does not agree is refused."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"architectures": ["OddForCausalLM"]}))
    torch.save({"model.one.w": torch.ones(1), "model.two.w": torch.ones(2)}, run_path / "a.pt")
    index = base / "model.safetensors.index.json"
    shard = "model-00001-of-00001.safetensors"
    for names in (["one.w", "two.w", "lm_head.w"], ["model.one.w", "model.two.w"]):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
        found = open_checkpoint(run_path, assets=base).tensors
        assert set(found) <= set(names)
    index.write_text(json.dumps({"weight_map": {"other.w": shard}}))
    with pytest.raises(CheckpointUnsupported, match="do not agree"):
        open_checkpoint(run_path, assets=base)


def test_a_plain_tensor_stays_a_stored_one(weights: Weights, run_path: Path) -> None:
    """So that whatever reads stored tensors (quantized formats) reads pickled ones, too."""
    torch.save(weights, run_path / "pytorch_model.bin")
    assert all(isinstance(t, StoredTensor) for t in open_checkpoint(run_path).tensors.values())


def test_names_that_become_one_are_refused(run_path: Path) -> None:
    """A wrapped and an unwrapped tensor of one name are two models."""
    torch.save({"a._orig_mod.w": torch.ones(1), "a.w": torch.ones(1)}, run_path / "a.pt")
    with pytest.raises(CheckpointRefused, match="one name"):
        open_checkpoint(run_path)
