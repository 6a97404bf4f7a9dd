"""Make tests/data/quant/{hqq,quanto,bitnet,gemma}_* with the real libraries.

    python tests/tools/quant_slabs.py tests/data/quant

HQQ and quanto quantize and dequantize on the CPU, and the references are their own dequantized
tensors. BitNet and Gemma are published packed: random codes go into transformers' own modules, and
the references are the weights that those compute with. quanto folders hold what quanto itself saves
(`model.safetensors`, quanto_qmap.json). Made with hqq 0.2.8.post1, optimum-quanto 0.2.7,
transformers 5.24.0, torch 2.13.0.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from optimum import quanto
from optimum.quanto.tensor.weights.qbits import WeightQBitsTensor
from safetensors.torch import save_file
from transformers.integrations import bitnet, gemma_quant

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
LAYER = "model.layers.0"
HQQ_MODULES: dict[str, tuple[float, int | None, int, bool, torch.dtype, tuple[int, int]]] = {
    "self_attn.q_proj": (4, 64, 1, False, F16, (96, 64)),
    "self_attn.k_proj": (4, 64, 0, False, F16, (100, 48)),
    "self_attn.v_proj": (3, 64, 1, False, BF16, (96, 64)),
    "self_attn.o_proj": (3, 48, 0, False, BF16, (66, 56)),
    "mlp.gate_proj": (8, None, 1, False, F32, (31, 56)),
    "mlp.up_proj": (2, 16, 1, True, F16, (48, 80)),
    "mlp.down_proj": (2, None, 0, False, BF16, (64, 40)),
    "mlp.shared_expert": (1, 8, 1, False, F16, (64, 24)),
    "mlp.gate": (1.58, 32, 0, True, BF16, (24, 64)),
    "mlp.one_row": (4, 64, 1, False, F16, (1, 128)),
    "mlp.fused": (5, 16, 1, False, F16, (24, 24)),
}
"""Bits, group size, axis, view_as_float, compute dtype and shape of each module."""


def main(root: Path) -> None:
    """Write every case below `root`."""
    torch.manual_seed(4)
    torch.set_num_threads(1)
    _hqq(root / "hqq_all")
    _quanto_text(root / "quanto_text", dtype=BF16)
    _quanto_biased(root / "quanto_biased")
    _quanto_vision(root / "quanto_vision")
    _bitnet(root / "bitnet_divide", "bitlinear")
    _bitnet(root / "bitnet_multiply", "autobitlinear")
    _gemma(root / "gemma_mobile")


def _hqq(folder: Path) -> None:
    """Every packing, both axes, groups that are not parts of rows, and one with a bias."""
    tensors: dict[str, torch.Tensor] = {"model.norm.weight": torch.ones(8, dtype=F16)}
    reference = {}
    for name, (bits, group, axis, as_float, dtype, shape) in HQQ_MODULES.items():
        linear = torch.nn.Linear(shape[1], shape[0], bias=name == "self_attn.q_proj")
        linear.weight.data = torch.randn(shape) * 0.05 + 0.01
        settings = BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis)
        settings["weight_quant_params"]["view_as_float"] = as_float
        layer = HQQLinear(linear, settings, compute_dtype=dtype, device="cpu")
        reference[f"{LAYER}.{name}.weight"] = layer.dequantize()
        tensors |= {f"{LAYER}.{name}.{key}": value for key, value in layer.state_dict().items()}
    settings = {"quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64, "axis": 1}}}
    config = {"model_type": "llama", "dtype": "float16"}
    _write(folder, tensors, reference, config, settings | {"quant_method": "hqq"})


def _quanto_text(folder: Path, dtype: torch.dtype) -> None:
    """A Llama of all types: shapes are told by config.json alone."""
    config = transformers.LlamaConfig(
        hidden_size=160,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=33,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    quanto.quantize(model, weights=quanto.qint4, include=["*self_attn*", "*gate_proj"])
    quanto.quantize(model, weights=quanto.qint2, include=["*up_proj", "*down_proj"])
    quanto.quantize(model, weights=quanto.qfloat8, include=["lm_head"])
    _save_quanto(folder, model)


def _quanto_biased(folder: Path) -> None:
    """Layers with biases, in float16; one with integer shifts, as quanto's optimizer can make."""
    config = transformers.OPTConfig(
        hidden_size=64,
        ffn_dim=192,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=20,
        max_position_embeddings=8,
        word_embed_proj_dim=64,
    )
    model = transformers.OPTForCausalLM(config).to(F16)
    quanto.quantize(model, weights=quanto.qint4, include=["*self_attn*"])
    quanto.quantize(model, weights=quanto.qint2, include=["*fc*"])
    quanto.freeze(model)
    layer = model.get_submodule("model.decoder.layers.0.fc2")
    plain = torch.randn(64, 192, dtype=F16) * 0.05
    scale, shift = quanto.MaxOptimizer()(
        plain, qtype=quanto.qint2, axis=0, group_size=96, zeropoint=True
    )
    made = quanto.quantize_weight(
        plain, qtype=quanto.qint2, axis=0, group_size=96, scale=scale, shift=shift
    )
    assert type(made) is WeightQBitsTensor
    layer.weight = torch.nn.Parameter(made, requires_grad=False)
    _save_quanto(folder, model)


def _quanto_vision(folder: Path) -> None:
    """A tower whose patches are a convolution, in float32, with quantized activations."""
    config = transformers.SiglipVisionConfig(
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        vision_use_head=False,
    )
    model = transformers.SiglipVisionModel(config)
    act = quanto.qint8
    quanto.quantize(model, weights=quanto.qint8, activations=act, include=["*patch*", "*norm*"])
    quanto.quantize(model, weights=quanto.qfloat8_e5m2, include=["*_proj"])
    quanto.quantize(model, weights=quanto.qint4, include=["*fc1"])
    quanto.quantize(model, weights=quanto.qfloat8_e4m3fnuz, include=["*fc2"])
    _save_quanto(folder, model)


def _save_quanto(folder: Path, model: torch.nn.Module) -> None:
    quanto.freeze(model)
    tensors = {name: value.detach() for name, value in model.state_dict().items()}
    reference = {
        f"{name}.weight": module.weight.dequantize().detach()
        for name, module in model.named_modules()
        if isinstance(module, quanto.nn.QModuleMixin) and module.weight_qtype is not None
    }
    _write(folder, tensors, reference, model.config.to_dict(), None)
    (folder / "quanto_qmap.json").write_text(json.dumps(quanto.quantization_map(model), indent=1))


def _bitnet(folder: Path, kind: str) -> None:
    """Packed ternary weights; the multiplying kind also as transformers saves them once loaded."""
    tensors: dict[str, torch.Tensor] = {"model.norm.weight": torch.ones(8, dtype=BF16)}
    reference = {}
    for name, shape, dtype in (
        ("self_attn.q_proj", (64, 96), BF16),
        ("mlp.up_proj", (100, 33), F16),
        ("mlp.down_proj", (4, 17), F32),
    ):
        codes = torch.randint(-1, 2, shape).to(dtype)
        scale = (torch.rand(1) * 3 + 0.01).to(dtype)
        tensors[f"{LAYER}.{name}.weight"] = bitnet.pack_weights(codes.clone())
        tensors[f"{LAYER}.{name}.weight_scale"] = scale
        unpacked = bitnet.unpack_weights(tensors[f"{LAYER}.{name}.weight"], dtype)
        assert torch.equal(unpacked, codes)
        multiplies = kind == "autobitlinear"
        reference[f"{LAYER}.{name}.weight"] = unpacked * scale if multiplies else unpacked / scale
        if name == "mlp.up_proj" and multiplies:
            tensors[f"{LAYER}.{name}.weight"] = unpacked
    settings = {"quant_method": "bitnet", "linear_class": kind, "quantization_mode": "offline"}
    _write(folder, tensors, reference, {"model_type": "bitnet", "dtype": "bfloat16"}, settings)


def _gemma(folder: Path) -> None:
    """Linear layers and embeddings of 2, 4 and 8 bits, with scales of activations and caches."""
    tensors: dict[str, torch.Tensor] = {f"{LAYER}.self_attn.k_cache_scale": torch.ones(1)}
    reference = {}
    for name, bits, shape in (
        ("self_attn.q_proj", 4, (48, 64)),
        ("self_attn.o_proj", 8, (30, 52)),
        ("mlp.up_proj", 2, (33, 64)),
    ):
        linear = gemma_quant.QuantizedLinear(shape[1], shape[0], num_bits=bits)
        linear.weight.data = _random_bytes(linear.weight)
        linear.weight_scale.data = torch.rand(shape[0], 1) * 0.1 + 1e-3
        tensors |= {f"{LAYER}.{name}.{key}": value for key, value in linear.state_dict().items()}
        reference[f"{LAYER}.{name}.weight"] = linear._dequantize_weights(BF16)
    for name, bits, blocks in (("embed_tokens", 4, 1), ("embed_per_layer", 2, 4)):
        table = gemma_quant.QuantizedEmbedding(40, 64, BF16, num_bits=bits)
        table.embedding_quantized.data = _random_bytes(table.embedding_quantized)
        table.embedding_scale.data = torch.rand(40, blocks) * 0.1 + 1e-3
        tensors |= {f"model.{name}.{key}": value for key, value in table.state_dict().items()}
        reference[f"model.{name}.weight"] = table.weight
    settings = {
        "quant_method": "gemma",
        "num_bits": 4,
        "quantize_embeddings": True,
        "module_quant_configs": {
            r"mlp\.": {"num_bits": 2},
            r"layers\.\d+\.self_attn\.o_proj$": {"num_bits": 8},
            r"embed_per": {"num_bits": 2},
            r"self_attn": {},
        },
    }
    _write(folder, tensors, reference, {"dtype": "bfloat16", "hidden_size": 64}, settings)


def _random_bytes(like: torch.Tensor) -> torch.Tensor:
    return torch.randint(0, 256, like.shape, dtype=torch.uint8).view(like.dtype)


def _write(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    settings: Mapping[str, Any] | None,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    said = dict(config) if settings is None else {**config, "quantization_config": dict(settings)}
    (folder / "config.json").write_text(json.dumps(said, indent=1))
    for name, held in (("model", tensors), ("reference", reference)):
        copied = {key: value.detach().clone().contiguous() for key, value in held.items()}
        save_file(copied, folder / f"{name}.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
