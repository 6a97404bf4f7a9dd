"""Folders as trainers leave them: told apart, read whole, config found, or refused with advice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemWriter, HuggingFaceStorageWriter

from ckptd.checkpoint import pin
from ckptd.checkpoint.checkpoint import Checkpoint, open_checkpoint
from ckptd.checkpoint.completeness import Complete
from ckptd.checkpoint.layouts import family_of
from ckptd.checkpoint.listing import list_files
from ckptd.errors import CheckpointIncomplete, CheckpointRefused, CheckpointUnsupported
from tests.checkpoint.consolidate import zero_files
from tests.checkpoint.consolidate.conftest import judge, same, values
from tests.checkpoint.consolidate.test_dcp import write_ranks
from tests.checkpoint.consolidate.test_native import TITAN, native

Weights = dict[str, torch.Tensor]
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture
def model() -> Any:
    """A tiny llama of random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.fixture
def own(model: Any) -> Weights:
    """Its weights by transformers' names."""
    return dict(model.state_dict())


def _write_config(model: Any, folder: Path) -> None:
    model.config.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")


def _state_files(path: Path, *names: str) -> None:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"step": 1}, path / name)


def _pinned(path: Path, target: Path) -> Path:
    listing = list_files(path)
    pin.refresh(path, listing, target, pin.PinMethod.COPY)
    return target


def _agrees(path: Path, own: Weights, layout: str, tmp_path: Path) -> Checkpoint:
    """Check that the folder and a pin of it are complete, and hold the model's weights."""
    opened = open_checkpoint(path)
    assert opened.layout == layout
    assert same(values(opened), own)
    assert opened.config["model_type"] == "llama"
    assert isinstance(judge(path), Complete)
    again = open_checkpoint(_pinned(path, tmp_path / "pin"), folder=path)
    assert same(values(again), own)
    names = {file.relpath for file in again.side_files}
    assert not any(n.startswith(("optim", "random", "rng", "trainer", "recipe")) for n in names)
    return opened


# accelerate


def test_a_state_of_accelerate(model: Any, own: Weights, tmp_path: Path) -> None:
    """save_state writes no config: it is found in the run's folder, tokenizer and all."""
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    path = tmp_path / "run" / "checkpoints" / "checkpoint_0"
    accelerator.save_state(str(path))
    assert prepared is not None
    assert (path / "random_states_0.pkl").is_file()
    with pytest.raises(CheckpointIncomplete, match="assets"):
        open_checkpoint(path)
    _write_config(model, tmp_path / "run")
    opened = _agrees(path, own, "hf", tmp_path)
    assert [file.relpath for file in opened.side_files] == [
        "generation_config.json",
        "tokenizer.json",
    ] or [file.relpath for file in opened.side_files] == ["tokenizer.json"]


def test_a_state_with_two_models_is_refused(model: Any, tmp_path: Path) -> None:
    """A GAN, or a policy and its critic: the message says how to name one of them."""
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.prepare(model, torch.nn.Linear(3, 3))
    path = tmp_path / "run" / "checkpoint_0"
    accelerator.save_state(str(path))
    _write_config(model, tmp_path / "run")
    with pytest.raises(CheckpointUnsupported, match="several models") as caught:
        open_checkpoint(path)
    assert "model_1" in str(caught.value.hint)


@pytest.mark.parametrize("writer", ["sharded", "full", "per rank"])
def test_fsdp_under_the_trainer(writer: str, model: Any, own: Weights, tmp_path: Path) -> None:
    """DCP in a folder, one full file, or a file a rank, with trainer_state.json last."""
    path = tmp_path / "run" / "checkpoint-8"
    path.mkdir(parents=True)
    _write_config(model, tmp_path / "run")
    if writer == "sharded":
        shards = path / "pytorch_model_fsdp_0"
        state = {f"model.{name}": tensor for name, tensor in own.items()}
        grids = {name: (2, 1)[: tensor.dim()] for name, tensor in state.items()}
        write_ranks(shards, state, grids, 2, FileSystemWriter(shards))
        dcp.save({"x": torch.ones(2)}, checkpoint_id=path / "optimizer_0", no_dist=True)
    elif writer == "full":
        torch.save(own, path / "pytorch_model_fsdp.bin")
        torch.save({}, path / "optimizer.bin")
    else:
        torch.save(own, path / "pytorch_model_fsdp_0_rank0.bin")
    _state_files(path, "scheduler.pt", "rng_state_0.pth")
    (path / "trainer_state.json").write_text('{"global_step": 8}')
    layout = {"sharded": "dcp", "full": "pickled", "per rank": "fsdp-ranks"}[writer]
    assert _agrees(path, own, layout, tmp_path).step == 8


def test_two_models_under_fsdp_are_refused(model: Any, own: Weights, tmp_path: Path) -> None:
    """One of them may be named by its folder."""
    path = tmp_path / "run" / "checkpoint_0"
    _write_config(model, path)
    for number in range(2):
        dcp.save({"model": own}, checkpoint_id=path / f"pytorch_model_fsdp_{number}", no_dist=True)
    with pytest.raises(CheckpointUnsupported, match="several models"):
        open_checkpoint(path)
    assert same(values(open_checkpoint(path / "pytorch_model_fsdp_1")), own)


def test_an_adapters_tensors_alone_are_refused(model: Any, tmp_path: Path) -> None:
    """LoRA under FSDP without save_pretrained: nobody can load it, and the message says so."""
    path = tmp_path / "run" / "checkpoint-8" / "pytorch_model_fsdp_0"
    _write_config(model, tmp_path / "run")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    dcp.save({"model": {name: torch.ones(2, 2)}}, checkpoint_id=path, no_dist=True)
    with pytest.raises(CheckpointUnsupported, match="adapter") as caught:
        open_checkpoint(path.parent)
    assert "save_pretrained" in str(caught.value.hint)


# Lightning


@pytest.mark.parametrize("inside", ["dcp", "deepspeed"])
def test_a_distributed_checkpoint_of_lightning(
    inside: str, model: Any, own: Weights, tmp_path: Path
) -> None:
    """A folder called `.ckpt`, with DCP and meta.pt, or with DeepSpeed's files in it."""
    path = tmp_path / "run" / "epoch=0-step=5.ckpt"
    path.mkdir(parents=True)
    _write_config(model, tmp_path / "run")
    state = {f"model.{name}": tensor for name, tensor in own.items()}
    if inside == "dcp":
        dcp.save({"state_dict": state, "optimizer_0": {"x": torch.ones(2)}}, checkpoint_id=path,
                 no_dist=True)  # fmt: skip
        torch.save({"epoch": 0, "global_step": 5}, path / "meta.pt")
    else:
        wrapped = {f"_forward_module.{name}": tensor for name, tensor in state.items()}
        zero_files.write(path / "checkpoint", [wrapped], stage=2, num_ranks=2)
        (path / "latest").write_text("checkpoint")
        (path / "zero_to_fp32.py").write_text("raise SystemExit")
    opened = _agrees(path, own, {"dcp": "dcp"}.get(inside, "deepspeed"), tmp_path)
    assert opened.step == 5


# torchtune


def _tune(path: Path, own: Weights, stem: str, suffix: str) -> None:
    save_torch_state_dict(
        own, path, filename_pattern=stem + "{suffix}" + suffix, max_shard_size=4000,
        safe_serialization=suffix == ".safetensors",
    )  # fmt: skip
    (index,) = path.glob("*.index.json")
    index.rename(path / f"{'model' if suffix != '.bin' else 'pytorch_model'}{suffix}.index.json")


@pytest.mark.parametrize(
    ("stem", "suffix", "layout"),
    [
        ("ft-model", ".safetensors", "hf"),
        ("model", ".safetensors", "hf"),
        ("ft-model", ".bin", "pickled"),
    ],
)
def test_an_epoch_of_torchtune(
    stem: str, suffix: str, layout: str, model: Any, own: Weights, tmp_path: Path
) -> None:
    """transformers' names in files of other names, by the index; the recipe's state is left out."""
    path = tmp_path / "run" / "epoch_0"
    path.mkdir(parents=True)
    _tune(path, own, stem, suffix)
    _write_config(model, path)
    _state_files(path, "recipe_state.pt", "recipe_state/recipe_state.pt")
    _agrees(path, own, layout, tmp_path)
    assert not pin.wanted("recipe_state.pt", family_of(path.name, list_files(path)))


def test_metas_format(model: Any, own: Weights, tmp_path: Path) -> None:
    """`meta_model_0.pt` and params.json: with the model's config its names are translated."""
    path = tmp_path / "run" / "epoch_0"
    path.mkdir(parents=True)
    torch.save(native(own, TITAN, rotary=(2, 1)), path / "meta_model_0.pt")
    (path / "params.json").write_text('{"dim": 16}')
    _state_files(path, "recipe_state.pt")
    with pytest.raises(CheckpointIncomplete, match="assets"):
        open_checkpoint(path)
    model.save_pretrained(tmp_path / "base")
    assert same(values(open_checkpoint(path, assets=tmp_path / "base")), own)


@pytest.mark.parametrize("names", [("consolidated.00.pth", "consolidated.01.pth"),
                                   ("hf_model_0001_0.pt", "hf_model_0002_0.pt")])  # fmt: skip
def test_parts_that_are_one_model_are_not_taken_for_several(
    names: tuple[str, str], own: Weights, tmp_path: Path
) -> None:
    """Model-parallel parts, and torchtune's old shards: refused by name, not one of them taken."""
    for name in names:
        torch.save(own, tmp_path / name)
    with pytest.raises(CheckpointUnsupported) as caught:
        open_checkpoint(tmp_path)
    assert "name one" not in str(caught.value)


# NeMo Automodel, torchtitan, verl, LeRobot: a model for transformers within


def _shards(path: Path, own: Weights) -> None:
    writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
    write_ranks(path, own, {n: (2, 1)[: t.dim()] for n, t in own.items()}, 2, writer)


def _automodel_state(path: Path) -> None:
    _state_files(path, "step_scheduler.pt", "rng/rng_dp_rank_0.pt",
                 "dataloader/dataloader_dp_rank_0.pt", "optim/__0_0.distcp")  # fmt: skip
    (path / "losses.json").write_text("{}")


@pytest.mark.parametrize("format_", ["consolidated", "sharded", "torch_save"])
def test_nemo_automodel(format_: str, model: Any, own: Weights, tmp_path: Path) -> None:
    """The consolidated copy where there is one, else shards, with config in `.hf_metadata`."""
    path = tmp_path / "run" / "epoch_0_step_20"
    if format_ == "torch_save":
        dcp.save(own, checkpoint_id=path / "model", no_dist=True)
    else:
        _shards(path / "model", own)
    if format_ == "consolidated":
        model.save_pretrained(path / "model" / "consolidated")
        (path / "model" / "consolidated" / "tokenizer.json").write_text("{}")
    else:
        _write_config(model, path / "model" / ".hf_metadata")
    _automodel_state(path)
    layout = {"consolidated": "hf-inner", "sharded": "dcp-safetensors", "torch_save": "dcp"}
    opened = _agrees(path, own, layout[format_], tmp_path)
    assert opened.step == 20
    assert "tokenizer.json" in {file.relpath for file in opened.side_files}


@pytest.mark.parametrize("format_", ["dcp", "shards"])
def test_nemo_rl(format_: str, model: Any, own: Weights, tmp_path: Path) -> None:
    """`policy/weights`, with the tokenizer beside it and the optimizer's state left out."""
    path = tmp_path / "run" / "step_45"
    if format_ == "dcp":
        dcp.save({"model": own}, checkpoint_id=path / "policy" / "weights", no_dist=True)
        _write_config(model, tmp_path / "run")
    else:
        _shards(path / "policy" / "weights" / "model", own)
        _write_config(model, path / "policy" / "weights" / "model" / ".hf_metadata")
    dcp.save({"x": torch.ones(2)}, checkpoint_id=path / "policy" / "optimizer", no_dist=True)
    (path / "policy" / "tokenizer").mkdir()
    (path / "policy" / "tokenizer" / "tokenizer_config.json").write_text("{}")
    (path / "training_info.json").write_text("{}")
    layout = {"dcp": "dcp", "shards": "dcp-safetensors"}[format_]
    opened = _agrees(path, own, layout, tmp_path)
    assert opened.step == 45
    assert "tokenizer_config.json" in {file.relpath for file in opened.side_files}


@pytest.mark.parametrize("folder", ["model", "lora_adapter", "actor/lora_adapter"])
def test_an_adapter_in_a_folder_of_the_checkpoint(
    folder: str, own: Weights, tmp_path: Path
) -> None:
    """Automodel's and verl's adapters: taken as PEFT's are, with what lies beside them."""
    path = tmp_path / "run" / "epoch_0_step_20"
    (path / folder).mkdir(parents=True)
    weights = {"base_model.model.x.lora_A.weight": torch.ones(2, 2)}
    save_file(weights, path / folder / "adapter_model.safetensors")
    (path / folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (path / folder / "tokenizer.json").write_text("{}")
    _automodel_state(path)
    torch.save(own, path / "model_world_size_1_rank_0.pt")
    (path / "README.md").write_text("notes on the run")
    for opened in (open_checkpoint(path),
                   open_checkpoint(_pinned(path, tmp_path / "pin"), folder=path)):  # fmt: skip
        assert (opened.layout, opened.step) == ("peft", 20)
        assert same(values(opened), weights)
        names = [file.relpath for file in opened.side_files]
        assert names == ["adapter_config.json", "tokenizer.json"]
    assert isinstance(judge(path), Complete)


def _titan_hf(path: Path, model: Any) -> None:
    _shards(path / "sharded", dict(model.state_dict()))
    model.save_pretrained(path)


def _verl_hf(path: Path, model: Any) -> None:
    model.save_pretrained(path / "actor" / "huggingface")
    _state_files(path, "data.pt", "actor/extra_state_world_size_1_rank_0.pt",
                 "actor/optim_world_size_1_rank_0.pt")  # fmt: skip
    torch.save(dict(model.state_dict()), path / "actor" / "model_world_size_1_rank_0.pt")


def _lerobot(path: Path, model: Any) -> None:
    model.save_pretrained(path / "pretrained_model")
    (path / "pretrained_model" / "train_config.json").write_text("{}")
    (path / "training_state").mkdir()
    save_file({"x": torch.ones(2)}, path / "training_state" / "optimizer_state.safetensors")


@pytest.mark.parametrize(
    ("write", "layout"), [(_titan_hf, "hf"), (_verl_hf, "hf-inner"), (_lerobot, "hf-inner")]
)
def test_a_model_that_is_there_already_is_taken(
    write: Callable[[Path, Any], None], layout: str, model: Any, own: Weights, tmp_path: Path
) -> None:
    """torchtitan's last save, verl with hf_model, LeRobot: nothing is put together again."""
    write(tmp_path / "run" / "step-7", model)
    opened = _agrees(tmp_path / "run" / "step-7", own, layout, tmp_path)
    assert not any("/" in file.relpath for file in opened.side_files)


# Prefixes


@pytest.mark.parametrize(
    "prefix",
    [
        "module.", "_orig_mod.", "module._orig_mod.", "state_dict.", "_fsdp_wrapped_module.",
        "_forward_module.model.", "actor.", "policy.", "module._checkpoint_wrapped_module.",
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["safetensors", "bin", "dcp", "with base"])
def test_what_wrappers_put_before_names_is_taken_off(
    prefix: str, kind: str, model: Any, own: Weights, tmp_path: Path
) -> None:
    """However the model was wrapped and saved: transformers' names come out."""
    path = tmp_path / "run" / "step-7"
    path.mkdir(parents=True)
    state = {prefix + name: tensor for name, tensor in own.items()}
    if kind == "bin":
        torch.save(state, path / "pytorch_model.bin")
    elif kind == "dcp":
        dcp.save(state, checkpoint_id=path, no_dist=True)
    else:
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    model.save_pretrained(tmp_path / "base")
    shutil.copy(tmp_path / "base" / "config.json", path / "config.json")
    opened = open_checkpoint(path, assets=tmp_path / "base" if kind == "with base" else None)
    assert same(values(opened), own)


def test_wrappers_within_names_are_taken_out(model: Any, own: Weights, tmp_path: Path) -> None:
    """Activation checkpointing and compiled layers leave their marks in the middle."""
    state = {
        name.replace("layers.0.", "layers.0._checkpoint_wrapped_module._orig_mod."): tensor
        for name, tensor in own.items()
    }
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _write_config(model, tmp_path)
    opened = open_checkpoint(tmp_path)
    assert same(values(opened), own)
    assert any("wrappers" in note for note in opened.notes)


def test_names_of_a_plain_model_are_never_touched(model: Any, tmp_path: Path) -> None:
    """A backbone's `layers.0` and a head's `model.` stay as transformers wrote them."""
    for place, kind in (("whole", model), ("backbone", model.model)):
        kind.save_pretrained(tmp_path / place)
        saved = load_file(tmp_path / place / "model.safetensors")
        assert same(values(open_checkpoint(tmp_path / place)), saved)


# Files of former times, and hostile ones


def test_a_file_from_before_torch_1_6(model: Any, own: Weights, tmp_path: Path) -> None:
    """The former format is read as any other, in a folder or named itself."""
    torch.save(own, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    _write_config(model, tmp_path)
    assert same(values(open_checkpoint(tmp_path)), own)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "weights.pt")
    assert same(values(open_checkpoint(tmp_path / "weights.pt")), own)


def test_the_refusal_of_a_missing_config_names_the_option(own: Weights, tmp_path: Path) -> None:
    """Whatever wrote the weights: `assets` is what gives a config."""
    writers: dict[str, Callable[[Path], object]] = {
        "hf": lambda p: save_file(own, p / "model.safetensors"),
        "bin": lambda p: torch.save(own, p / "pytorch_model.bin"),
        "dcp": lambda p: dcp.save(own, checkpoint_id=p, no_dist=True),
        "ckpt": lambda p: torch.save({"state_dict": own}, p / "last.ckpt"),
        "shards": lambda p: _shards(p, own),
    }
    for name, write in writers.items():
        path = tmp_path / "runs" / name / "step-1"
        path.mkdir(parents=True)
        write(path)
        with pytest.raises(CheckpointRefused, match=r"config\.json") as caught:
            open_checkpoint(path)
        assert "--assets" in str(caught.value.hint)
        assert "assets" in json.dumps(str(judge(path)))
