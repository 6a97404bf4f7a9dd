"""Two tiny model classes of our own with every kind of entry, and folders that hold them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import nn

from ckptd.models.base import PreTrainedModel
from ckptd.models.config.config import PreTrainedConfig


class TinyConfig(PreTrainedConfig):
    """The configuration of `Tiny`."""

    model_type = "tiny"
    size: int = 4
    labels: int = 2
    tie_word_embeddings: bool = True


class TinyBody(PreTrainedModel):
    """A model of every kind of entry: parameters, buffers saved and not, a norm, a part in fp32."""

    config_class = TinyConfig
    base_model_prefix = "body"
    _keep_in_fp32_modules: ClassVar[list[str] | None] = ["wide"]
    _keep_in_fp32_modules_strict: ClassVar[list[str] | None] = ["strict"]

    def __init__(self, config: TinyConfig, scale: float = 1.0) -> None:
        super().__init__(config)
        self.scale = scale
        self.embed = nn.Embedding(7, config.size)
        self.wide = nn.Linear(config.size, config.size)
        self.strict = nn.Linear(config.size, config.size)
        self.LayerNorm = nn.LayerNorm(config.size)
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("computed", torch.arange(5.0) * scale, persistent=False)
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.post_init()


class TinyHead(PreTrainedModel):
    """A head and a second one on `TinyBody`, the first tied to its embedding."""

    config_class = TinyConfig
    base_model_prefix = "body"
    _tied_weights_keys: ClassVar[dict[str, str] | None] = {"head.weight": "body.embed.weight"}

    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        self.body = TinyBody(config)
        self.head = nn.Linear(config.size, 7, bias=False)
        self.label = nn.Linear(config.size, config.labels)
        self.post_init()


def tiny_state(**other: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: t.clone() for name, t in TinyBody(TinyConfig(**other)).state_dict().items()}


def tiny_saved(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    file: str = "model.safetensors",
    **config: Any,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / file)
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny", **config}))
    return folder
