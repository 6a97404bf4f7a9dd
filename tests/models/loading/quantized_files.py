"""Tiny quantized folders of a Llama, and the plain values in them computed here and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 160,
    "intermediate_size": 144,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FP8: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
INT8: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": 8,
                "type": "int",
                "strategy": "channel",
                "symmetric": True,
                "dynamic": False,
                "group_size": None,
            },
        }
    },
}


def llama_config(**changes: Any) -> Any:
    values = SMALL | {"tie_word_embeddings": False} | changes
    return transformers.LlamaConfig(**values)


def weights(config: Any, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Return a random state with the names of the file; a tied head is not in it."""
    torch.manual_seed(0)
    state = transformers.LlamaForCausalLM(config).to(dtype).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return {name: value.clone() for name, value in state.items()}


def fp8(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a state with FP8 layers, 128 x 128 values a scale, and its values in float32."""
    stored, plain = dict(state), {name: value.float() for name, value in state.items()}
    for name in [name for name in state if name.endswith("_proj.weight")]:
        rows, columns = state[name].shape
        scale = torch.rand(-(-rows // 128), -(-columns // 128)) * 1e-3 + 1e-4
        spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
        codes = (state[name].float() / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        stored[name], stored[f"{name}_scale_inv"] = codes, scale
        plain[name] = codes.float() * spread
    return stored, plain


def int8(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a state with int8 layers, one scale a row, and its values in float32."""
    stored, plain = dict(state), {name: value.float() for name, value in state.items()}
    for name in [name for name in state if name.endswith("_proj.weight")]:
        scale = (state[name].float().abs().amax(1, keepdim=True) / 127).to(torch.bfloat16)
        codes = (state[name].float() / scale.float()).round().clamp(-128, 127).to(torch.int8)
        stored[name], stored[f"{name}_scale"] = codes, scale
        plain[name] = codes.float() * scale.float()
    return stored, plain


def written(
    folder: Path,
    stored: Mapping[str, Tensor],
    config: Any,
    quantization: Mapping[str, Any] | None,
    *,
    file: str = "model.safetensors",
    **changes: Any,
) -> Path:
    """Write a state and a config.json as transformers has them; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(stored), folder / file, metadata={"format": "pt"})
    content = config.to_diff_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    if quantization is not None:
        content["quantization_config"] = dict(quantization)
    (folder / "config.json").write_text(json.dumps(content | changes))
    return folder


def in_shards(folder: Path, stored: Mapping[str, Tensor]) -> Path:
    """Put the tensors of a folder alternately into two files, so that partners are apart."""
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in (0, 1):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        part = dict(list(stored.items())[number::2])
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
