"""Make the ModelOpt checkpoints of tests/data/quant: tiny models, the real library's export.

Run by hand in an environment with nvidia-modelopt 0.47, transformers 5.14 and torch 2.13:
`python quant_modelopt.py OUT [CASE...]`. A model of random weights is quantized on the CPU with one
of the library's configs, exported with `export_hf_checkpoint`, and cut down to a few weights.
`reference.safetensors` is what the library's own tensor classes dequantize these to. For int4, which
it only packs, it is the formula, and the script checks that the library packs it to the same bytes.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint, quant_utils
from modelopt.torch.quantization.qtensor import (
    FP8QTensor,
    MXFP4QTensor,
    MXFP8QTensor,
    NVFP4QTensor,
)
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

_ATTENTION = ("self_attn.k_proj", "self_attn.v_proj")
_DOWN = ("self_attn.k_proj", "mlp.down_proj")
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "modelopt_fp8": ("FP8_DEFAULT_CFG", _ATTENTION),
    "modelopt_fp8_channel": ("FP8_PER_CHANNEL_PER_TOKEN_CFG", _ATTENTION),
    "modelopt_fp8_block": ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", _DOWN),
    "modelopt_nvfp4": ("NVFP4_DEFAULT_CFG", _ATTENTION),
    "modelopt_mxfp8": ("MXFP8_DEFAULT_CFG", _ATTENTION),
    "modelopt_mxfp4": ("MXFP4_DEFAULT_CFG", _ATTENTION),
    "modelopt_int8": ("INT8_WEIGHT_ONLY_CFG", _ATTENTION),
    "modelopt_awq": ("INT4_AWQ_CFG", _DOWN),
    "modelopt_mixed_moe": ("MIXED", ("self_attn.k_proj", "experts.0.down_proj")),
}
"""A config of the library and the modules that are kept. `MIXED` is FP8 attention, NVFP4 rest."""
_INT4_GROUP = 128


def main(out: Path, names: list[str]) -> None:
    """Write the cases `names`, or all, below `out`."""
    torch.set_num_threads(1)
    for name in names or CASES:
        config, kept = CASES[name]
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        export(folder, config, moe=name.endswith("moe"))
        cut(folder, kept)
        reference = dequantized(load_file(folder / "model.safetensors"))
        save_file(reference, folder / "reference.safetensors")
        print(name, sorted(reference), sum(f.stat().st_size for f in folder.iterdir()))


def export(
    folder: Path, config: str, *, moe: bool = False, dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    """Quantize a model and export it; return it as it was before."""
    model = tiny(moe=moe).to(dtype)
    model.config.architectures = [type(model).__name__]
    original = copy.deepcopy(model)
    quantized = mtq.quantize(model, _config(config), _calibrate)
    export_hf_checkpoint(quantized, export_dir=folder)
    return original


def tiny(*, moe: bool) -> PreTrainedModel:
    """Return a model of one layer, with head counts that leave k_proj 32 x 128."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "vocab_size": 32,
        "max_position_embeddings": 64,
    }
    if moe:
        config = Qwen3MoeConfig(
            num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, **sizes
        )
        return Qwen3MoeForCausalLM(config)
    return LlamaForCausalLM(LlamaConfig(**sizes))


def cut(folder: Path, kept: tuple[str, ...]) -> None:
    """Leave the modules `kept`, a norm, and of files the config's and the weights'."""
    tensors = load_file(folder / "model.safetensors")
    wanted = (*(f"{module}." for module in kept), "input_layernorm")
    few = {name: one for name, one in tensors.items() if any(part in name for part in wanted)}
    save_file(few, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def dequantized(
    tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """Return what the library makes of every quantized weight."""
    made = {}
    for name, codes in tensors.items():
        module, _, field = name.rpartition(".")
        scale = tensors.get(f"{module}.weight_scale")
        if field == "weight" and scale is not None:
            partners = (
                tensors.get(f"{module}.weight_scale_2"),
                tensors.get(f"{module}.pre_quant_scale"),
            )
            made[name] = _weight(codes, scale, *partners, dtype=dtype)
    return made


def _weight(
    codes: torch.Tensor,
    scale: torch.Tensor,
    second: torch.Tensor | None,
    pre_scale: torch.Tensor | None,
    *,
    dtype: torch.dtype,
) -> torch.Tensor:
    if codes.dtype is torch.float8_e4m3fn and scale.dtype is torch.uint8:
        return MXFP8QTensor(codes.shape, dtype, codes).dequantize(dtype, scale=scale)
    if codes.dtype is torch.float8_e4m3fn:
        held = FP8QTensor(codes.shape, dtype, codes)
        if scale.ndim == 4:
            scale = scale.reshape(scale.shape[0], scale.shape[2])
            return held.dequantize(dtype, scale=scale, block_sizes={-1: 128, -2: 128})
        return held.dequantize(dtype, scale=scale[:, None] if scale.ndim == 1 else scale)
    if codes.dtype is torch.int8:
        kind = quant_utils.QUANTIZATION_INT8_WO
        return quant_utils.from_quantized_weight(codes, scale, kind, dtype)
    shape = torch.Size((*codes.shape[:-1], codes.shape[-1] * 2))
    if scale.dtype is torch.float8_e4m3fn:
        held = NVFP4QTensor(shape, dtype, codes)
        size = {-1: shape[-1] // scale.shape[-1]}
        return held.dequantize(dtype, scale=scale, double_scale=second, block_sizes=size)
    if scale.dtype is torch.uint8:
        held = MXFP4QTensor(shape, dtype, codes)
        return held.dequantize(dtype, scale=scale, block_sizes={-1: 32})
    return _int4(codes, scale, pre_scale, dtype)


def _int4(
    packed: torch.Tensor, scale: torch.Tensor, pre_scale: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    nibbles = torch.stack([packed & 15, packed >> 4], dim=1).flatten(0, 1).to(torch.int8)
    codes = torch.where(nibbles > 7, nibbles - 16, nibbles).float()
    weight = codes * scale.repeat_interleave(_INT4_GROUP, 1)[:, : codes.shape[1]]
    assert torch.equal(quant_utils.pack_int4_in_uint8(weight, scale, _INT4_GROUP), packed)
    return (weight if pre_scale is None else weight * pre_scale.float()).to(dtype)


def _config(name: str) -> dict[str, Any]:
    if name != "MIXED":
        return copy.deepcopy(getattr(mtq, name))
    config = copy.deepcopy(mtq.NVFP4_DEFAULT_CFG)
    eight: dict[str, Any] = {"num_bits": (4, 3), "axis": None}
    for quantizer in ("weight_quantizer", "input_quantizer"):
        config["quant_cfg"].append(
            {"quantizer_name": f"*self_attn*{quantizer}", "cfg": eight, "enable": True}
        )
    return config


def _calibrate(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        model(torch.randint(0, 32, (2, 16), generator=generator))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
