"""Layouts: a folder is told by what its trainer leaves in it, and the answer says why."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ckptd.checkpoint import layouts
from ckptd.checkpoint.consolidate.refused import Refused
from ckptd.checkpoint.listing import list_files
from ckptd.errors import CheckpointUnsupported


def _marker(folder: Path, name: str) -> layouts.Marker | None:
    return layouts.LAYOUTS["hf-trainer"].marker(folder, list_files(folder), name)


@pytest.mark.parametrize(
    ("name", "files", "layout"),
    [
        ("checkpoint-2", ["trainer_state.json"], "hf-trainer"),
        ("anything", ["trainer_state.json"], "hf-trainer"),
        ("checkpoint-2", ["training_args.bin"], "hf-trainer"),
        ("anything", ["training_args.bin"], "hf"),
        ("anything", ["optimizer.pt"], "hf-trainer"),
        ("anything", ["rng_state_1.pth"], "hf-trainer"),
        ("checkpoint-2", ["model.safetensors", "config.json"], "hf"),
        ("empty", [], "hf"),
    ],
)
def test_the_layout_is_told_by_its_files(
    name: str, files: list[str], layout: str, tmp_path: Path
) -> None:
    """A trainer's own files make a trainer's checkpoint; `save_model` into the run does not."""
    for file in files:
        (tmp_path / file).write_text("{}")
    chosen, reason = layouts.choose(Path(name), list_files(tmp_path))
    assert chosen.name == layout
    assert reason


LEFT: dict[str, tuple[str, str, list[str]]] = {
    "trainer": ("hf-trainer", "checkpoint-5", ["config.json", "model.safetensors", "optimizer.pt",
                "trainer_state.json"]),
    "trainer with zero, gathered": ("hf-trainer", "checkpoint-5", ["config.json",
        "model.safetensors", "global_step5/mp_rank_00_model_states.pt", "trainer_state.json"]),
    "trainer with zero": ("deepspeed", "checkpoint-5", ["config.json", "latest",
        "global_step5/zero_pp_rank_0_mp_rank_00_optim_states.pt", "trainer_state.json"]),
    "trainer with fsdp": ("dcp", "checkpoint-5", ["pytorch_model_fsdp_0/.metadata",
        "pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/.metadata", "trainer_state.json"]),
    "full fsdp": ("pickled", "checkpoint-5", ["pytorch_model_fsdp.bin", "optimizer.bin"]),
    "fsdp by rank": ("fsdp-ranks", "c", ["pytorch_model_fsdp_0_rank0.bin"]),
    "lora of a trainer": ("peft", "checkpoint-5", ["adapter_model.safetensors",
        "adapter_config.json", "optimizer.pt", "trainer_state.json"]),
    "lora of automodel": ("peft", "epoch_0_step_5", ["model/adapter_model.safetensors",
        "model/adapter_config.json", "optim/__0_0.distcp"]),
    "accelerate": ("hf", "checkpoint_0", ["model.safetensors", "optimizer.bin",
        "random_states_0.pkl"]),
    "two models of accelerate": ("accelerate-models", "checkpoint_0", ["model.safetensors",
        "model_1.safetensors", "random_states_0.pkl"]),
    "torchtitan": ("dcp", "step-5", [".metadata", "__0_0.distcp"]),
    "torchtitan, last": ("hf", "step-5", ["sharded/shard-00001-model-00001-of-00001.safetensors",
        "model-00001-of-00001.safetensors", "model.safetensors.index.json"]),
    "prime-rl": ("dcp", "step_5", ["trainer/.metadata", "trainer/__0_0.distcp"]),
    "automodel": ("hf-inner", "epoch_0_step_5", ["model/consolidated/model.safetensors.index.json",
        "model/shard-00001-model-00001-of-00001.safetensors", "optim/__0_0.distcp"]),
    "automodel, sharded": ("dcp-safetensors", "epoch_0_step_5", [
        "model/shard-00001-model-00001-of-00001.safetensors", "optim/__0_0.distcp"]),
    "torchtune": ("hf", "epoch_0", ["ft-model-00001-of-00001.safetensors",
        "model.safetensors.index.json", "config.json", "recipe_state.pt"]),
    "torchtune, meta": ("pickled", "epoch_0", ["meta_model_0.pt", "params.json",
        "recipe_state.pt"]),
    "meta, parallel": ("meta-parallel", "70b", ["consolidated.00.pth", "consolidated.01.pth"]),
    "diffusers": ("diffusers", "final", ["model_index.json", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]),
    "diffusion training": ("diffusers", "checkpoint-5", [
        "unet/diffusion_pytorch_model.safetensors", "optimizer.bin", "random_states_0.pkl"]),
    "diffusion lora": ("flat", "checkpoint-5", ["pytorch_lora_weights.safetensors",
        "optimizer.bin", "random_states_0.pkl"]),
    "kohya": ("flat", "cats-000004.safetensors", ["cats-000004.safetensors"]),
    "lightning": ("lightning", "checkpoints", ["last.ckpt"]),
    "lightning, distributed": ("dcp", "epoch=0-step=5.ckpt", [".metadata", "__0_0.distcp",
        "meta.pt"]),
    "lightning with zero": ("deepspeed", "epoch=0-step=5.ckpt", ["latest", "zero_to_fp32.py",
        "checkpoint/zero_pp_rank_0_mp_rank_00_optim_states.pt"]),
    "verl": ("verl", "global_step_5", ["actor/model_world_size_1_rank_0.pt",
        "actor/huggingface/config.json", "data.pt"]),
    "skyrl": ("verl", "global_step_5", ["policy/model_world_size_1_rank_0.pt"]),
    "nemo-rl": ("dcp", "step_5", ["policy/weights/.metadata", "policy/weights/__0_0.distcp",
        "policy/optimizer/__0_0.distcp", "training_info.json"]),
    "olmo-core": ("olmo-core", "step5", ["model_and_optim/.metadata", "config.json"]),
    "lerobot": ("hf-inner", "000005", ["pretrained_model/config.json",
        "pretrained_model/model.safetensors", "training_state/optimizer_state.safetensors"]),
    "megatron": ("megatron", "iter_0000005", ["common.pt", "metadata.json", "__0_0.distcp",
        ".metadata"]),
    "orbax": ("orbax", "5", ["_CHECKPOINT_METADATA", "params/manifest.ocdbt"]),
    "gguf": ("gguf", "model", ["model-q4.gguf"]),
    "two pickled models of accelerate": ("accelerate-models", "checkpoint_0", ["pytorch_model.bin",
        "pytorch_model_1.bin", "random_states_0.pkl"]),
    "megatron under verl": ("megatron", "global_step_5", ["actor/dist_ckpt/common.pt",
        "actor/dist_ckpt/__0_0.distcp", "actor/dist_ckpt/.metadata",
        "actor/huggingface/config.json"]),
    "nemo 2": ("megatron", "epoch=0-step=5", ["weights/common.pt", "weights/metadata.json",
        "weights/.metadata", "context/model.yaml"]),
    "nemo 1": ("nemo", "checkpoints", ["megatron_gpt.nemo"]),
    "colossalai": ("hf-inner", "epoch-0_step-5", ["modeling/model.safetensors.index.json",
        "modeling/model-00001.safetensors", "optimizer/optim.bin", "running_states.json"]),
    "composer": ("pickled", "run", ["ep1-ba42-rank0.pt"]),
    "timm": ("pickled", "run", ["model_best.pth.tar", "args.yaml", "summary.csv"]),
    "mlx": ("mlx-adapter", "adapters", ["adapters.safetensors", "adapter_config.json",
        "0000100_adapters.safetensors"]),
    "sentence-transformers": ("hf", "checkpoint-5", ["model.safetensors", "modules.json",
        "1_Pooling/config.json", "2_Dense/model.safetensors"]),
    "sentence-transformers of old": ("sentence-transformers-parts", "checkpoint-5", [
        "0_Transformer/model.safetensors", "0_Transformer/config.json", "modules.json"]),
}  # fmt: skip
"""What trainers leave in a folder of a name, and the layout that it is."""


@pytest.mark.parametrize("trainer", sorted(LEFT))
def test_auto_tells_all_apart(trainer: str, tmp_path: Path) -> None:
    """Names alone decide, whatever wrote the folder; the reason names a file that is there."""
    layout, name, files = LEFT[trainer]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    chosen, reason = layouts.choose(Path(name), list_files(tmp_path))
    assert chosen.name == layout
    assert any(file in reason for file in files)
    refused = isinstance(layouts.FAMILIES.get(layout), Refused)
    assert (layout in layouts.TITLES) is not refused


def test_a_definition_may_name_the_layout(tmp_path: Path) -> None:
    """A name is taken as it is, an unknown one is refused with the known ones."""
    listing = list_files(tmp_path)
    assert layouts.choose(tmp_path, listing, "hf-trainer")[0].name == "hf-trainer"
    with pytest.raises(CheckpointUnsupported, match="hf-trainer"):
        layouts.choose(tmp_path, listing, "unheard-of")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "not written"),
        ('{"global_step": 2', "JSON"),
        ("[]", "JSON"),
        ("\udcff", "JSON"),
        ('{"global_step": 1}', "earlier"),
        ("{}", "earlier"),
        ('{"global_step": 2}', None),
    ],
)
def test_the_marker_must_be_whole_and_of_this_step(
    content: str | None, problem: str | None, tmp_path: Path
) -> None:
    """An absent, torn or older trainer_state.json does not end a save."""
    if content is not None:
        raw = content.encode("utf-8", "surrogateescape")
        (tmp_path / "trainer_state.json").write_bytes(raw)
    marker = _marker(tmp_path, "checkpoint-2")
    assert marker is not None
    assert marker.problem is None if problem is None else problem in (marker.problem or "")


@pytest.mark.parametrize(
    ("name", "state", "step"),
    [
        ("checkpoint-12", {"global_step": 7}, 7),
        ("checkpoint-12", {"global_step": "7"}, 12),
        ("checkpoint-12", {"global_step": True}, 12),
        ("checkpoint-12", None, 12),
        ("run-step_300", None, 300),
        ("step3000", None, 3000),
        ("final", None, None),
    ],
)
def test_the_step_is_the_trainers_or_the_folders(
    name: str, state: Any, step: int | None, tmp_path: Path
) -> None:
    """trainer_state.json knows best, then the folder's name; else there is none."""
    if state is not None:
        (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert layouts.step_of(tmp_path, name) == step


def test_a_trainer_state_that_is_a_link_or_a_pipe_gives_no_step(tmp_path: Path) -> None:
    """A link may lead out of the folder, and a pipe would be read for ever: the name decides."""
    (tmp_path / "elsewhere.json").write_text('{"global_step": 77}')
    linked, piped = tmp_path / "linked", tmp_path / "piped"
    linked.mkdir()
    piped.mkdir()
    (linked / "trainer_state.json").symlink_to(tmp_path / "elsewhere.json")
    os.mkfifo(piped / "trainer_state.json")
    assert layouts.step_of(linked, "checkpoint-3") == 3
    assert layouts.step_of(piped, "checkpoint-3") == 3


def test_a_trainer_state_larger_than_any_is_not_read(tmp_path: Path) -> None:
    """A file of a terabyte that claims to be the state is told by its size alone."""
    with (tmp_path / "trainer_state.json").open("wb") as file:
        file.truncate(1 << 40)
    assert layouts.step_of(tmp_path, "checkpoint-3") == 3
    marker = _marker(tmp_path, "checkpoint-3")
    assert marker is not None
    assert marker.problem == "not whole JSON yet"
