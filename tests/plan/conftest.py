"""Small real sources for plans: files written by safetensors, opened as drafts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ckptd.checkpoint import checkpoint
from ckptd.checkpoint.checkpoint import Checkpoint

MakeSource = Callable[..., Checkpoint]


@pytest.fixture
def make_source(tmp_path: Path) -> MakeSource:
    """Return a function that saves tensors, divided as named, and opens them."""

    def make(*shards: Mapping[str, torch.Tensor]) -> Checkpoint:
        folder = tmp_path / "source"
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type":   "llama"}')
        weight_map = {}
        for number, tensors in enumerate(shards, start=1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            if len(shards) == 1:
                name = "model.safetensors"
            save_file(dict(tensors), folder / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
        if len(shards) > 1:
            index = json.dumps({"metadata": {}, "weight_map": weight_map})
            (folder / "model.safetensors.index.json").write_text(index)
        return checkpoint.open_checkpoint(folder)

    return make
