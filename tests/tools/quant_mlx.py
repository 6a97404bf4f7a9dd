"""Make tests/data/quant/mlx_* and metal_affine with MLX and transformers.

    python tests/tools/quant_mlx.py tests/data/quant

MLX quantizes and dequantizes on the CPU; the references are `mlx.core.dequantize` as it is, in its
own dtype. The metal case is made by the functions that transformers' quantizer calls, because the
quantizer itself asks for an Apple GPU. Made with mlx 0.32.4, transformers 5.24.0, torch 2.13.0.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from safetensors.torch import save_file
from transformers.integrations import metal_quantization

BF16, F16, F32 = mx.bfloat16, mx.float16, mx.float32
Module = tuple[tuple[int, ...], str, int, int, Any]
"""Shape, mode, bits, columns of a group, dtype."""


def main(root: Path) -> None:
    """Write every case below `root`."""
    mx.random.seed(1)
    _affine(root / "mlx_affine")
    _modes(root / "mlx_modes")
    _metal(root / "metal_affine")


def _affine(folder: Path) -> None:
    """All widths and group sizes, as mlx-lm writes them for each module, embeddings and experts."""
    default = {"group_size": 64, "bits": 4}
    layer = "model.layers.0"
    modules: dict[str, Module] = {
        "model.embed_tokens": ((40, 128), "affine", 4, 64, BF16),
        "lm_head": ((40, 128), "affine", 6, 64, BF16),
        f"{layer}.mlp.switch_mlp.gate_proj": ((3, 14, 128), "affine", 4, 64, BF16),
        f"{layer}.mlp.one_row": ((1, 128), "affine", 4, 64, BF16),
        f"{layer}.mlp.half": ((24, 192), "affine", 4, 64, F16),
        f"{layer}.mlp.full": ((24, 192), "affine", 4, 64, F32),
    }
    said: dict[str, Any] = {"lm_head": {"group_size": 64, "bits": 6}}
    for bits in (1, 2, 3, 5, 6, 8):
        for group in (32, 64, 128):
            name = f"{layer}.mlp.b{bits}_g{group}"
            modules[name] = ((3, 384), "affine", bits, group, BF16)
            said[name] = {"group_size": group, "bits": bits}
    said[f"{layer}.mlp.plain"] = False
    _write(folder, modules, default | said)


def _modes(folder: Path) -> None:
    """The modes of 8-bit scales, one as the default and the others by module."""
    layer = "model.layers.0"
    modules: dict[str, Module] = {
        f"{layer}.self_attn.q_proj": ((24, 96), "mxfp4", 4, 32, BF16),
        f"{layer}.self_attn.k_proj": ((24, 96), "nvfp4", 4, 16, BF16),
        f"{layer}.self_attn.v_proj": ((24, 96), "mxfp8", 8, 32, BF16),
        f"{layer}.mlp.switch_mlp.up_proj": ((3, 20, 96), "mxfp4", 4, 32, BF16),
    }
    said = {
        f"{layer}.self_attn.k_proj": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
        f"{layer}.self_attn.v_proj": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    }
    experts = mx.random.normal((3, 20, 96)).astype(BF16) * 0.05
    largest = mx.max(mx.abs(experts), axis=(-2, -1)).astype(F32)
    packed = [
        mx.quantize(experts[place], 16, 4, mode="nvfp4", global_scale=largest[place])
        for place in range(3)
    ]
    name = f"{layer}.mlp.switch_mlp.down_proj"
    said[name] = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    extra = {
        f"{name}.weight": mx.stack([codes for codes, _ in packed]),
        f"{name}.scales": mx.stack([scales for _, scales in packed]),
        f"{name}.global_scale": largest,
    }
    plain = [
        mx.dequantize(codes, scales, None, 16, 4, "nvfp4", largest[place])
        for place, (codes, scales) in enumerate(packed)
    ]
    default = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    _write(folder, modules, default | said, extra, {f"{name}.weight": mx.stack(plain)})


def _write(
    folder: Path,
    modules: dict[str, Module],
    quantization: dict[str, Any],
    tensors: dict[str, mx.array] | None = None,
    plain: dict[str, mx.array] | None = None,
) -> None:
    tensors = {"model.norm.weight": mx.ones((128,), dtype=BF16), **(tensors or {})}
    plain = dict(plain or {})
    for name, (shape, mode, bits, group, dtype) in modules.items():
        weight = (mx.random.normal(shape) * 0.05 + 0.01).astype(dtype)
        codes, scales, *biases = mx.quantize(weight, group, bits, mode)
        tensors |= {f"{name}.weight": codes, f"{name}.scales": scales}
        tensors |= {f"{name}.biases": one for one in biases}
        plain[f"{name}.weight"] = mx.dequantize(
            codes, scales, *(biases or [None]), group, bits, mode
        )
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    save_file({name: _torch(one) for name, one in plain.items()}, folder / "reference.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    _config(folder, config | {"quantization": quantization, "quantization_config": quantization})


def _metal(folder: Path) -> None:
    torch.manual_seed(1)
    tensors: dict[str, torch.Tensor] = {"model.norm.weight": torch.ones(128)}
    plain = {}
    for place, dtype in enumerate((torch.bfloat16, torch.float16)):
        name = f"model.layers.{place}.mlp.up_proj"
        weight = (torch.randn(24, 192) * 0.05).to(dtype)
        words, scales, biases = metal_quantization._affine_quantize_tensor(weight, 64, 4)
        scales, biases = scales.to(dtype), biases.to(dtype)
        tensors |= {f"{name}.weight": words, f"{name}.scales": scales, f"{name}.qbiases": biases}
        back = metal_quantization._affine_dequantize_tensor(words, scales, biases, 64, 4)
        plain[f"{name}.weight"] = back.to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    save_file(plain, folder / "reference.safetensors")
    quantization = {"quant_method": "metal", "bits": 4, "group_size": 64}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    _config(folder, config | {"quantization_config": quantization})


def _torch(array: mx.array) -> torch.Tensor:
    if array.dtype == BF16:
        raw = np.array(array.view(mx.uint16)).view(np.int16)
        return torch.from_numpy(raw.copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array).copy())


def _config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
