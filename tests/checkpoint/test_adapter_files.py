"""Adapters in a folder: told apart from models, whole only when their last file is there."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from ckptd.checkpoint import checkpoint, completeness, layouts
from ckptd.checkpoint.completeness import Broken, Complete, Verdict, Waiting
from ckptd.checkpoint.listing import list_files
from ckptd.errors import CheckpointUnsupported

WEIGHTS, CONFIG, STATE = "adapter_model.safetensors", "adapter_config.json", "trainer_state.json"
PICKLED = "adapter_model.bin"


def _judge(path: Path, quiet_s: float = math.inf) -> Verdict:
    facts = completeness.examine(path, list_files(path))
    return completeness.verdict(facts, quiet_s=quiet_s, settle_s=10.0)


def _write(path: Path, *names: str) -> None:
    """Write files one after the other, each a second newer than the one before."""
    for number, name in enumerate(names):
        if name.endswith(".safetensors"):
            save_file({"w": np.zeros((2, 3), np.float32)}, path / name)
        else:
            said = {CONFIG: {"peft_type": "LORA"}, STATE: {"global_step": 7}}.get(name, {})
            (path / name).write_text(json.dumps(said))
        os.utime(path / name, (1e9 + number, 1e9 + number))


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        ((WEIGHTS,), "peft"),
        ((WEIGHTS, CONFIG), "peft"),
        ((WEIGHTS, CONFIG, "training_args.bin", "optimizer.pt", STATE), "peft"),
        (("adapter_model.bin", CONFIG), "peft"),
        (("model.safetensors", "config.json", WEIGHTS, CONFIG), "hf"),
    ],
)
def test_an_adapter_is_told_by_its_files(
    names: tuple[str, ...], layout: str, tmp_path: Path
) -> None:
    """Also while it grows; a whole model beside it is a model."""
    _write(tmp_path, *names)
    assert layouts.choose(tmp_path, list_files(tmp_path))[0].name == layout


def test_a_plain_save_ends_with_its_configuration(tmp_path: Path) -> None:
    """Weights alone are not whole; no config.json is asked for."""
    _write(tmp_path, WEIGHTS)
    assert isinstance(_judge(tmp_path), Waiting)
    _write(tmp_path, WEIGHTS, CONFIG)
    assert isinstance(_judge(tmp_path), Complete)
    assert isinstance(_judge(tmp_path, quiet_s=9.0), Waiting)


def test_a_trainers_save_ends_with_its_state(tmp_path: Path) -> None:
    """In a step folder the Trainer's own last file counts, and its step must be the folder's."""
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    _write(folder, WEIGHTS, CONFIG, "training_args.bin")
    assert isinstance(_judge(folder), Waiting)
    _write(folder, WEIGHTS, CONFIG, "training_args.bin", STATE)
    assert isinstance(_judge(folder), Complete)
    (folder / CONFIG).unlink()
    assert isinstance(_judge(folder), Waiting)
    folder.rename(tmp_path / "checkpoint-8")
    assert isinstance(_judge(tmp_path / "checkpoint-8"), Waiting)


def test_an_older_configuration_is_of_an_earlier_save(tmp_path: Path) -> None:
    """A re-save in place: new weights beside the old configuration wait for the new one."""
    _write(tmp_path, CONFIG, WEIGHTS)
    assert isinstance(_judge(tmp_path, quiet_s=20.0), Waiting)


@pytest.mark.parametrize("damage", ["cut", "half", "empty", "not json", "no method", "pickled"])
def test_damage_is_found(damage: str, tmp_path: Path) -> None:
    """Cut or empty weights, a configuration that says nothing, pickled weights: none is taken."""
    _write(tmp_path, WEIGHTS, CONFIG)
    raw = (tmp_path / WEIGHTS).read_bytes()
    cuts = {"cut": raw[:-1], "half": raw[: len(raw) // 2], "empty": b""}
    if damage in cuts:
        (tmp_path / WEIGHTS).write_bytes(cuts[damage])
        os.utime(tmp_path / WEIGHTS, (1e9, 1e9))
    elif damage == "pickled":
        (tmp_path / WEIGHTS).rename(tmp_path / PICKLED)
    else:
        (tmp_path / CONFIG).write_text("{" if damage == "not json" else "{}")
    assert isinstance(_judge(tmp_path), Broken | Waiting)


def test_an_adapter_is_opened_without_a_config(tmp_path: Path) -> None:
    """Tensors, side files and step; config is empty, and each file is identified once."""
    _write(tmp_path, WEIGHTS, CONFIG, "tokenizer.json", "optimizer.pt", STATE)
    source = checkpoint.open_checkpoint(tmp_path)
    assert (source.layout, source.step, dict(source.config)) == ("peft", 7, {})
    assert [file.relpath for file in source.side_files] == [CONFIG, "tokenizer.json"]
    named = [name for name, _ in checkpoint.identifying_files(source)]
    assert sorted(named) == [CONFIG, WEIGHTS, "tokenizer.json"]


def test_a_pickled_adapter(tmp_path: Path) -> None:
    """Its tensors are those that were saved; a class in it is refused and never made."""
    _write(tmp_path, CONFIG)
    value = torch.arange(6.0).view(2, 3)
    torch.save({"x.lora_A.weight": value, "x.lora_B.weight": value.T}, tmp_path / PICKLED)
    os.utime(tmp_path / PICKLED, (1e9 - 1, 1e9 - 1))
    source = checkpoint.open_checkpoint(tmp_path)
    assert source.layout == "peft"
    assert source.tensors["x.lora_A.weight"].spec.shape == (2, 3)
    assert source.tensors["x.lora_B.weight"].spec.shape == (3, 2)
    assert isinstance(_judge(tmp_path), Complete)
    named = [name for name, _ in checkpoint.identifying_files(source)]
    assert sorted(named) == [CONFIG, PICKLED]
    (tmp_path / PICKLED).write_bytes((tmp_path / PICKLED).read_bytes()[:-9])
    assert isinstance(_judge(tmp_path), Broken | Waiting)
    torch.save({"x.lora_A.weight": Path("/")}, tmp_path / PICKLED)
    with pytest.raises(CheckpointUnsupported, match=r"adapter_model\.bin"):
        checkpoint.open_checkpoint(tmp_path)


def test_named_adapters_in_folders(tmp_path: Path) -> None:
    """A folder of adapters with names is refused, and says where to point; each of them is one."""
    for name in ("policy", "reference"):
        (tmp_path / name).mkdir()
        _write(tmp_path / name, WEIGHTS, CONFIG)
    _write(tmp_path, STATE)
    with pytest.raises(CheckpointUnsupported, match=r"policy, reference.*\*/policy"):
        checkpoint.open_checkpoint(tmp_path)
    assert checkpoint.open_checkpoint(tmp_path / "policy").layout == "peft"


def test_a_value_head_travels_with_its_adapter(tmp_path: Path) -> None:
    """What a reward trainer saves beside the adapter is published with it, and is part of it."""
    _write(tmp_path, WEIGHTS, CONFIG, "value_head.safetensors")
    source = checkpoint.open_checkpoint(tmp_path)
    assert [file.relpath for file in source.side_files] == [CONFIG, "value_head.safetensors"]
    named = [name for name, _ in checkpoint.identifying_files(source)]
    assert "value_head.safetensors" in named
