"""Small real checkpoints, written by safetensors itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

Arrays = Mapping[str, NDArray[Any]]
MakeFolder = Callable[..., Path]


@pytest.fixture
def arrays() -> dict[str, NDArray[Any]]:
    """Four tensors with distinct content."""
    return {
        "model.embed_tokens.weight": np.arange(40, dtype=np.float32).reshape(10, 4),
        "model.layers.0.weight": np.arange(16, dtype=np.float32).reshape(4, 4),
        "model.norm.weight": np.ones(4, dtype=np.float32),
        "lm_head.weight": np.arange(40, dtype=np.float32).reshape(10, 4) + 1,
    }


@pytest.fixture
def make_folder(tmp_path: Path, arrays: dict[str, NDArray[Any]]) -> MakeFolder:
    """Return a function that writes a checkpoint folder, single or sharded."""

    def make(
        name: str = "ck", *, shards: int = 1, config: Any = None, step: int | None = None
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        value = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 10}
        (folder / "config.json").write_text(json.dumps(value if config is None else config))
        if shards == 1:
            save_file(dict(arrays), folder / "model.safetensors", metadata={"format": "pt"})
        else:
            weight_map = {}
            for number in range(shards):
                file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
                part = dict(list(arrays.items())[number::shards])
                save_file(part, folder / file, metadata={"format": "pt"})
                weight_map |= dict.fromkeys(part, file)
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        if step is not None:
            (folder / "optimizer.pt").write_bytes(b"state")
            (folder / "training_args.bin").write_bytes(b"args")
            (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        return folder

    return make
