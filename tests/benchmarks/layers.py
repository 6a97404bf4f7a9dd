"""One quantized layer of realistic size in each format, with random codes: for benchmarks.

Values do not matter for speed, layouts do: shapes, dtypes and companions are those of the real
writers (compare tests/data/quant). Every builder returns tensors, config and header metadata.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
Layer = tuple[Tensors, dict[str, Any], dict[str, str]]

NAME = "model.layers.{}.mlp.gate_proj"
PT = {"format": "pt"}


def _bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _words(*shape: int) -> torch.Tensor:
    return _bytes(*shape[:-1], shape[-1] * 4).view(torch.int32)


def _fp8_codes(*shape: int) -> torch.Tensor:
    return (torch.randn(shape, dtype=torch.bfloat16)).to(torch.float8_e4m3fn)


def _scales(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.rand(shape) * 0.01 + 0.001).to(dtype)


def fp8_block(n: int, k: int) -> Layer:
    """FP8 in blocks of 128 x 128, as DeepSeek writes it."""
    tensors = {"weight": _fp8_codes(n, k), "weight_scale_inv": _scales(-(-n // 128), -(-k // 128))}
    return tensors, {"quant_method": "fp8", "weight_block_size": [128, 128]}, PT


def bnb_nf4(n: int, k: int) -> Layer:
    """bitsandbytes nf4 with nested scales."""
    blocks = n * k // 64
    state = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [n, k],
        "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.01,
    }  # fmt: skip
    raw = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    tensors = {
        "weight": _bytes(n * k // 2, 1),
        "weight.absmax": _bytes(blocks),
        "weight.quant_map": torch.linspace(-1, 1, 16),
        "weight.nested_absmax": _scales(-(-blocks // 256)),
        "weight.nested_quant_map": torch.linspace(0, 1, 256),
        "weight.quant_state.bitsandbytes__nf4": raw,
    }
    return tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True}, PT


def bnb_int8(n: int, k: int) -> Layer:
    """bitsandbytes int8 with a scale a row."""
    tensors = {
        "weight": _bytes(n, k).view(torch.int8),
        "SCB": _scales(n),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True}, PT


def _compressed(kind: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "format": kind}
    return {
        "quant_method": "compressed-tensors", "format": kind, "ignore": ["lm_head"],
        "quantization_status": "compressed", "config_groups": {"group_0": group},
    }  # fmt: skip


def ct_w4a16(n: int, k: int) -> Layer:
    """compressed-tensors pack-quantized, 4 bit in groups of 128."""
    tensors = {
        "weight_packed": _words(n, k // 8),
        "weight_shape": torch.tensor([n, k]),
        "weight_scale": _scales(n, k // 128, dtype=torch.bfloat16),
    }
    config = _compressed(
        "pack-quantized", num_bits=4, type="int", strategy="group", group_size=128, symmetric=True
    )
    return tensors, config, PT


def ct_nvfp4(n: int, k: int) -> Layer:
    """compressed-tensors NVFP4."""
    tensors = {
        "weight_packed": _bytes(n, k // 2),
        "weight_scale": _fp8_codes(n, k // 16),
        "weight_global_scale": torch.tensor([300.0]),
    }
    config = _compressed(
        "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16,
        symmetric=True,
    )  # fmt: skip
    return tensors, config, PT


def modelopt_nvfp4(n: int, k: int) -> Layer:
    """ModelOpt NVFP4."""
    tensors = {
        "weight": _bytes(n, k // 2),
        "weight_scale": _fp8_codes(n, k // 16),
        "weight_scale_2": torch.tensor(0.003),
    }
    return tensors, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, PT


def gptq4(n: int, k: int) -> Layer:
    """GPTQ v1, 4 bit in groups of 128."""
    tensors = {
        "qweight": _words(k // 8, n),
        "qzeros": torch.full((k // 128, n // 8), 0x77777777, dtype=torch.int32),
        "scales": _scales(k // 128, n, dtype=torch.float16),
        "g_idx": torch.arange(k, dtype=torch.int32) // 128,
    }
    return tensors, {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}, PT


def awq4(n: int, k: int) -> Layer:
    """AWQ GEMM, 4 bit in groups of 128."""
    tensors = {
        "qweight": _words(k, n // 8),
        "qzeros": _words(k // 128, n // 8),
        "scales": _scales(k // 128, n, dtype=torch.float16),
    }
    config = {
        "quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True,
    }  # fmt: skip
    return tensors, config, PT


def mlx4(n: int, k: int) -> Layer:
    """MLX affine, 4 bit in groups of 64."""
    tensors = {
        "weight": _words(n, k // 8).view(torch.uint32),
        "scales": _scales(n, k // 64, dtype=torch.bfloat16),
        "biases": _scales(n, k // 64, dtype=torch.bfloat16),
    }
    return tensors, {"group_size": 64, "bits": 4}, {"format": "mlx"}


def mxfp4_experts(n: int, k: int, count: int = 4) -> Layer:
    """gpt-oss MXFP4: `count` experts that have the elements of one `(n, k)` matrix together."""
    inner = n // count
    tensors = {
        "gate_up_proj_blocks": _bytes(count, inner, k // 32, 16),
        "gate_up_proj_scales": torch.full((count, inner, k // 32), 120, dtype=torch.uint8),
    }
    return tensors, {"quant_method": "mxfp4"}, PT


LAYERS: dict[str, Callable[[int, int], Layer]] = {
    made.__name__: made
    for made in (
        fp8_block, bnb_nf4, bnb_int8, ct_w4a16, ct_nvfp4, modelopt_nvfp4, gptq4, awq4, mlx4,
        mxfp4_experts,
    )
}  # fmt: skip


def write(folder: Path, layer: Layer, *, copies: int = 1, shard_layers: int | None = None) -> None:
    """Write a checkpoint of `copies` equal layers, `shard_layers` a file, one file by default."""
    tensors, quantization, metadata = layer
    folder.mkdir(parents=True)
    key = "quantization_config" if "quant_method" in quantization else "quantization"
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16",
        key: quantization,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    size = shard_layers or copies
    count = -(-copies // size)
    weight_map: dict[str, str] = {}
    for shard in range(count):
        name = f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
        name = "model.safetensors" if count == 1 else name
        held = range(shard * size, min((shard + 1) * size, copies))
        part = {_full(number, own): tensor for number in held for own, tensor in tensors.items()}
        _save(part, folder / name, metadata)
        weight_map |= dict.fromkeys(part, name)
    if count > 1:
        value = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(value))


def _full(number: int, own: str) -> str:
    if own.startswith("gate_up_proj"):
        return f"model.layers.{number}.mlp.experts.{own}"
    return f"{NAME.format(number)}.{own}"


def _save(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Save, although layers share their memory: safetensors wants tensors of their own."""
    owned = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(owned, path, metadata=metadata)
