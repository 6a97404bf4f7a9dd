"""Copies of checkpoints in tests, with something changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]


def changed(
    source: Path,
    target: Path,
    *,
    tensors: Callable[[Tensors], Any] = lambda _: None,
    config: Callable[[Config], Any] = lambda _: None,
    quantization: Callable[[Config], Any] = lambda _: None,
    split: Callable[[str], bool] = lambda _: False,
) -> Path:
    """Return a copy of the checkpoint at `source`, changed in place by the functions given.

    Tensors of whose names `split` is true go to a second file.
    """
    target.mkdir()
    held = load_file(source / "model.safetensors")
    tensors(held)
    said = json.loads((source / "config.json").read_text())
    quantization(said["quantization_config"])
    config(said)
    (target / "config.json").write_text(json.dumps(said))
    second = {name: tensor for name, tensor in held.items() if split(name)}
    first = {name: tensor for name, tensor in held.items() if name not in second}
    if not second:
        save_file(first, target / "model.safetensors")
        return target
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for name, part in zip(names, (first, second), strict=True):
        save_file(part, target / name)
    where = {name: names[name in second] for name in held}
    index = {"metadata": {}, "weight_map": where}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target
