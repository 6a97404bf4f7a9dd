"""What is no transformers model: pipelines of diffusers, kohya's flat files; whole jobs on them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ckptd.checkpoint import completeness, content, pin
from ckptd.checkpoint.checkpoint import identifying_files, open_checkpoint
from ckptd.checkpoint.completeness import Complete, Verdict
from ckptd.checkpoint.listing import list_files
from ckptd.errors import (
    CheckpointCorrupt,
    CheckpointIncomplete,
    CheckpointRefused,
    CheckpointUnsupported,
    StageRefused,
)
from ckptd.plan.stream import FinishedShard
from ckptd.runner.staging import Staging
from tests.pipeline.stages.conftest import planned, run

Weights = dict[str, torch.Tensor]


def _weights(seed: int) -> Weights:
    torch.manual_seed(seed)
    return {
        "conv_in.weight": torch.randn(4, 3, 3, 3),
        "conv_in.bias": torch.randn(4),
        "blocks.0.proj.weight": torch.randn(40, 16).half(),
        "blocks.0.none": torch.empty(0, 3),
    }


def _component(folder: Path, weights: Weights, kind: str, limit: int = 10**9) -> None:
    """Save a model as diffusers' ModelMixin does: with the Hub's own function, under its stem."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": kind, "sample_size": 8}))
    save_torch_state_dict(
        weights, folder, filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
        max_shard_size=limit,
    )  # fmt: skip


def _pipeline(path: Path) -> dict[str, Weights]:
    """Write a pipeline folder: two components of diffusers, one of transformers, a scheduler."""
    made = {"unet": _weights(1), "vae": _weights(2)}
    _component(path / "unet", made["unet"], "UNet2DConditionModel", limit=600)
    _component(path / "vae", made["vae"], "AutoencoderKL")
    config = transformers.CLIPTextConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=8,
    )  # fmt: skip
    transformers.CLIPTextModel(config).save_pretrained(path / "text_encoder")
    made["text_encoder"] = load_file(path / "text_encoder" / "model.safetensors")
    for name in ("scheduler/scheduler_config.json", "tokenizer/vocab.json", "model_index.json"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(json.dumps({"_class_name": name}))
    return made


def _read(folder: Path) -> Weights:
    found: Weights = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def _same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in expected.items()
    )


def _judge(path: Path) -> Verdict:
    facts = completeness.examine(path, list_files(path))
    return completeness.verdict(facts, quiet_s=1e9, settle_s=1.0)


def test_a_pipeline_is_published_as_the_tree_it_is(tmp_path: Path) -> None:
    """Each component in its folder, under diffusers' names, with its own index and config."""
    made = _pipeline(tmp_path / "run" / "final")
    opened = open_checkpoint(tmp_path / "run" / "final")
    assert (opened.layout, opened.config) == ("diffusers", {})
    assert isinstance(_judge(tmp_path / "run" / "final"), Complete)
    run(tmp_path / "run" / "final", "- footprint", tmp_path / "out")
    source, out = ({f.relpath for f in list_files(p).files} for p in
                   (tmp_path / "run" / "final", tmp_path / "out"))  # fmt: skip
    assert out == source | {"ckptd.json"}
    for name, weights in made.items():
        assert _same(_read(tmp_path / "out" / name), weights)
        before, after = ((p / name / "config.json").read_bytes() for p in
                         (tmp_path / "run" / "final", tmp_path / "out"))  # fmt: skip
        assert before == after


def test_components_are_divided_and_cast_each_for_itself(tmp_path: Path) -> None:
    """Tensors of one name in two components stay two; an index names the files beside it."""
    made = _pipeline(tmp_path / "pipeline")
    stages = "- cast: {dtype: bfloat16}\n- reshard: {max_shard_size: 800}"
    run(tmp_path / "pipeline", stages, tmp_path / "out")
    for name, weights in made.items():
        expected = {n: t.bfloat16() if t.is_floating_point() else t for n, t in weights.items()}
        assert _same(_read(tmp_path / "out" / name), expected)
    (index,) = (tmp_path / "out" / "unet").glob("*.index.json")
    assert index.name == "diffusion_pytorch_model.safetensors.index.json"
    weight_map = json.loads(index.read_bytes())["weight_map"]
    assert weight_map.keys() == made["unet"].keys()
    assert all((tmp_path / "out" / "unet" / shard).is_file() for shard in weight_map.values())
    loaded = transformers.CLIPTextModel.from_pretrained(tmp_path / "out" / "text_encoder")
    expected = {n: t.bfloat16() for n, t in made["text_encoder"].items() if t.is_floating_point()}
    found = loaded.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_accelerate_saves_of_a_diffusion_training(tmp_path: Path) -> None:
    """`checkpoint-N/unet` and its moving average: published without optimizer and random states."""
    path = tmp_path / "run" / "checkpoint-500"
    _component(path / "unet", _weights(1), "UNet2DConditionModel")
    _component(path / "unet_ema", _weights(2), "UNet2DConditionModel")
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        torch.save({}, path / name)
    opened = open_checkpoint(path)
    assert (opened.layout, opened.step) == ("diffusers", 500)
    run(path, "- footprint", tmp_path / "out")
    assert _same(_read(tmp_path / "out" / "unet"), _weights(1))
    assert _same(_read(tmp_path / "out" / "unet_ema"), _weights(2))
    names = {file.relpath for file in list_files(tmp_path / "out").files}
    assert not any(n.startswith(("optimizer", "scheduler", "random")) for n in names)


def test_a_single_component_stays_one(tmp_path: Path) -> None:
    """A ControlNet, say: config.json of diffusers travels, and no config is made up for it."""
    _component(tmp_path / "controlnet", _weights(1), "ControlNetModel")
    run(tmp_path / "controlnet", "- reshard", tmp_path / "out")
    assert _same(load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors"), _weights(1))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["_class_name"]


def test_one_variant_keeps_its_name_and_others_are_left_out(tmp_path: Path) -> None:
    """fp16 weights alone are published as such; beside plain ones they are named and left."""
    path = tmp_path / "pipeline"
    _component(path / "unet", _weights(1), "UNet2DConditionModel")
    plain = path / "unet" / "diffusion_pytorch_model.safetensors"
    fp16 = path / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    save_file(_weights(3), fp16)
    assert any("fp16" in note for note in open_checkpoint(path).notes)
    plain.unlink()
    run(path, "- reshard: {max_shard_size: 600}", tmp_path / "out")
    assert _same(_read(tmp_path / "out" / "unet"), _weights(3))
    assert (
        tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json"
    ).is_file()


@pytest.mark.parametrize("stage", ["tie", "resize: {pad_to_multiple_of: 8}", "dequantize"])
def test_stages_for_language_models_are_refused(stage: str, tmp_path: Path) -> None:
    """There is no embedding and no head: the stage is named, and those that work."""
    _pipeline(tmp_path / "pipeline")
    with pytest.raises(StageRefused, match="components of diffusers"):
        planned(tmp_path / "pipeline", f"- {stage}")


def test_a_missing_shard_is_waited_for_and_a_cut_one_refused(tmp_path: Path) -> None:
    """Structure is checked in each component; pickled ones are refused by name."""
    path = tmp_path / "pipeline"
    _pipeline(path)
    (shard, *_) = sorted((path / "unet").glob("*-of-*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(CheckpointCorrupt):
        open_checkpoint(path)
    shard.unlink()
    with pytest.raises(CheckpointIncomplete, match="unet"):
        open_checkpoint(path)
    assert not isinstance(_judge(path), Complete)
    shard.write_bytes(whole)
    (path / "image_encoder").mkdir()
    torch.save(_weights(4), path / "image_encoder" / "pytorch_model.bin")
    with pytest.raises(CheckpointUnsupported, match="pickled"):
        open_checkpoint(path)


def test_a_killed_job_reuses_finished_components(tmp_path: Path) -> None:
    """Files in folders are found again by the ledger, and what does not belong there goes."""
    _pipeline(tmp_path / "pipeline")
    plan = planned(tmp_path / "pipeline", "- footprint")
    staging = Staging(tmp_path / "work")
    assert staging.resume(plan, hashed=False) == {}
    out = staging.out_path
    (shard,) = (one for one in plan.shards if one.name.startswith("vae/"))
    source = tmp_path / "pipeline" / shard.name
    (out / shard.name).write_bytes(source.read_bytes())
    (out / "vae" / "leftover").write_text("x")
    staging.record(
        FinishedShard(name=shard.name, path=out / shard.name, nbytes=shard.nbytes, sha256=None)
    )
    found = staging.resume(plan, hashed=False)
    assert list(found) == [shard.name]
    assert (out / shard.name).is_file()
    assert not (out / "vae" / "leftover").exists()
    assert (out / "unet").is_dir()


METADATA = {
    "ss_network_module": "networks.lora", "ss_steps": "1200", "ss_network_dim": "16",
    "sshs_model_hash": "abc", "modelspec.title": "cats", "modelspec.hash_sha256": "0x12",
}  # fmt: skip


def _flat(path: Path, metadata: dict[str, str] | None = None) -> Weights:
    weights = {
        "lora_unet_down.lora_up.weight": torch.randn(8, 4),
        "lora_unet_down.lora_down.weight": torch.randn(4, 8),
        "lora_unet_down.alpha": torch.tensor(4.0),
    }
    path.parent.mkdir(exist_ok=True)
    save_file(weights, path, metadata=METADATA if metadata is None else metadata)
    return weights


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("cats-000004.safetensors", 1200),
        ("cats-step00000500.safetensors", 500),
        ("cats.safetensors", 1200),
    ],
)
def test_a_flat_file_is_a_checkpoint_of_its_own(name: str, step: int, tmp_path: Path) -> None:
    """It keeps its name and what kohya wrote into its header; others beside it are not its own."""
    weights = _flat(tmp_path / "run" / name)
    _flat(tmp_path / "run" / "dogs.safetensors")
    path = tmp_path / "run" / name
    opened = open_checkpoint(path)
    assert (opened.layout, opened.step) == ("flat", step)
    assert opened.name == path.stem
    assert isinstance(_judge(path), Complete)
    assert [found for _, found in identifying_files(opened)] == [path]
    run(path, "- reshard: {max_shard_size: 10}", tmp_path / "out")
    assert _same(load_file(tmp_path / "out" / name), weights)
    with safe_open(tmp_path / "out" / name, "pt") as file:
        assert file.metadata() == METADATA
    out = {f.relpath for f in list_files(tmp_path / "out").files}
    assert out == {name, "ckptd.json"}


def test_hashes_of_the_bytes_go_when_the_bytes_change(tmp_path: Path) -> None:
    """A cast keeps kohya's facts, but not what no longer holds."""
    weights = _flat(tmp_path / "run" / "cats.safetensors")
    run(tmp_path / "run" / "cats.safetensors", "- cast: {dtype: float16}", tmp_path / "out")
    found = load_file(tmp_path / "out" / "cats.safetensors")
    assert _same(found, {n: t.half() for n, t in weights.items()})
    with safe_open(tmp_path / "out" / "cats.safetensors", "pt") as file:
        gone = METADATA.keys() - file.metadata().keys()
    assert gone == {"sshs_model_hash", "modelspec.hash_sha256"}


def test_a_pin_of_a_flat_file_is_told_as_the_file(tmp_path: Path) -> None:
    """A pin is a folder with the one file: same layout, name, step and digest; it is complete."""
    path = tmp_path / "run" / "cats-step00000500.safetensors"
    _flat(path, {})
    _flat(path.with_name("dogs.safetensors"))
    seen, pinned = list_files(path), tmp_path / "pin"
    pin.refresh(seen.base_path, seen, pinned, pin.PinMethod.COPY)
    facts = completeness.examine(pinned, list_files(pinned), folder=path, seen=seen)
    assert isinstance(completeness.verdict(facts, quiet_s=1e9, settle_s=1.0), Complete)
    ours, theirs = open_checkpoint(pinned, folder=path), open_checkpoint(path)
    for opened in (ours, theirs):
        assert (opened.layout, opened.name, opened.step) == ("flat", "cats-step00000500", 500)
    digests = [content.digest(identifying_files(one)) for one in (ours, theirs)]
    assert digests[0] == digests[1]


def test_a_lora_of_diffusers_in_a_state_of_accelerate(tmp_path: Path) -> None:
    """`checkpoint-N/pytorch_lora_weights.safetensors` beside the optimizer: the weights alone."""
    path = tmp_path / "checkpoint-20"
    weights = _flat(path / "pytorch_lora_weights.safetensors", {})
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        torch.save({}, path / name)
    opened = open_checkpoint(path)
    assert (opened.layout, opened.step) == ("flat", 20)
    run(path, "- reshard", tmp_path / "out")
    assert _same(load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors"), weights)


def test_a_folder_of_flat_files_is_refused_with_what_to_watch(tmp_path: Path) -> None:
    """Which of them is meant nobody can say; the message names the glob."""
    _flat(tmp_path / "run" / "a-000001.safetensors")
    _flat(tmp_path / "run" / "a-000002.safetensors")
    with pytest.raises(CheckpointUnsupported, match=r"\*\.safetensors"):
        open_checkpoint(tmp_path / "run")


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "model-00001-of-00002.safetensors", "adapter_model.safetensors"],
)
def test_a_file_of_a_folder_is_not_taken_alone(name: str, tmp_path: Path) -> None:
    """Files of transformers' and PEFT's names belong to a folder: that is to be named."""
    _flat(tmp_path / "run" / name)
    with pytest.raises(CheckpointRefused, match="point at the folder"):
        open_checkpoint(tmp_path / "run" / name)


def test_one_of_several_models_is_chosen_by_its_file(tmp_path: Path) -> None:
    """accelerate's `model_1.safetensors`: with the model's config in `assets` it is a model."""
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "assets")
    path = tmp_path / "checkpoint_0"
    path.mkdir()
    weights = load_file(tmp_path / "assets" / "model.safetensors")
    save_file(weights, path / "model_1.safetensors", metadata={"format": "pt"})
    save_file(_weights(1), path / "model.safetensors", metadata={"format": "pt"})
    torch.save({}, path / "random_states_0.pkl")
    with pytest.raises(CheckpointUnsupported, match="several models"):
        open_checkpoint(path, assets=tmp_path / "assets")
    opened = open_checkpoint(path / "model_1.safetensors", assets=tmp_path / "assets")
    assert opened.config["model_type"] == "llama"
    assert opened.tensors.keys() == weights.keys()
    assert not opened.parts
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    first = open_checkpoint(path / "model.safetensors", assets=tmp_path / "assets")
    assert first.tensors.keys() == weights.keys()
    assert isinstance(_judge(path / "model.safetensors"), Complete)
