"""Adapters in a folder: told apart from models, whole only when their last file is there."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ckptd.checkpoint import checkpoint, completeness, layouts
from ckptd.checkpoint.completeness import Broken, Complete, Verdict, Waiting
from ckptd.checkpoint.listing import list_files
from ckptd.errors import CheckpointUnsupported

WEIGHTS, CONFIG, STATE = "adapter_model.safetensors", "adapter_config.json", "trainer_state.json"


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
        (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
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


def test_a_pickled_adapter_is_refused_by_name(tmp_path: Path) -> None:
    """Never unpickled, and the text says what to do."""
    _write(tmp_path, "adapter_model.bin", CONFIG)
    with pytest.raises(CheckpointUnsupported, match=r"adapter_model\.bin"):
        checkpoint.open_checkpoint(tmp_path)
