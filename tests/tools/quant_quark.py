"""Make the AMD Quark checkpoints of tests/data/quant: a tiny model, the real library's export.

Run by hand in an environment with amd-quark 0.13, transformers 5.24 and torch 2.13:
`python quant_quark.py OUT [CASE...]`. A model of random weights is quantized on the CPU, exported
with `export_safetensors` and cut down to a weight or two; `reference.safetensors` is what the
library's own `StaticScaledRealQuantizer` makes of these, in the model's dtype.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from quark.torch import ModelQuantizer, export_safetensors
from quark.torch.export.nn.modules.realquantizer import StaticScaledRealQuantizer
from quark.torch.quantization.config import config as quark_config
from quark.torch.quantization.config.config import QConfig, QLayerConfig
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

_FLOAT: dict[str, Any] = {"is_dynamic": False}
_ROWS: dict[str, Any] = {
    "is_dynamic": False,
    "ch_axis": 0,
    "scale_type": "float",
    "round_method": "half_even",
}
_GROUPS: dict[str, Any] = {"is_dynamic": False, "ch_axis": -1, "group_size": 32}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "quark_fp8": ("FP8E4M3PerTensorSpec", _FLOAT | {"observer_method": "min_max"}),
    "quark_fp8_channel": ("FP8E4M3PerChannelSpec", _FLOAT | {"ch_axis": 0}),
    "quark_mxfp4": ("OCP_MXFP4Spec", _FLOAT | {"ch_axis": -1}),
    "quark_fp4_groups": ("FP4PerGroupSpec", _GROUPS),
    "quark_int4": ("Int4PerGroupSpec", _GROUPS),
    "quark_int4_order": ("Int4PerGroupSpec", _GROUPS),
    "quark_uint4": ("Uint4PerGroupSpec", _GROUPS),
    "quark_int8": (
        "Int8PerTensorSpec",
        {
            "observer_method": "min_max",
            "is_dynamic": False,
            "symmetric": True,
            "scale_type": "float",
            "round_method": "half_even",
        },
    ),
    "quark_int8_channel": ("Int8PerChannelSpec", _ROWS | {"symmetric": True}),
    "quark_uint8_channel": ("Uint8PerChannelSpec", _ROWS | {"symmetric": False}),
    "quark_int8_groups": (
        "Int8PerGroupSpec",
        _GROUPS | {"symmetric": True, "scale_type": "float", "round_method": "half_even"},
    ),
}
"""A specification of the library and its arguments; `order` leaves packed integers in order."""
_KEPT = "self_attn.k_proj"
"""36 x 64: its outputs do not fill whole words."""


def main(out: Path, names: list[str]) -> None:
    """Write the cases `names`, or all, below `out`."""
    torch.set_num_threads(1)
    for name in names or CASES:
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        kind, arguments = CASES[name]
        spec = getattr(quark_config, kind)(**arguments).to_quantization_spec()
        method = "order" if name.endswith("_order") else "reorder"
        export(folder, spec, pack_method=method)
        cut(folder)
        tensors = load_file(folder / "model.safetensors")
        reference = dequantized(tensors, spec, reorder=method == "reorder")
        save_file(reference, folder / "reference.safetensors")
        print(name, sum(file.stat().st_size for file in folder.iterdir()))


def export(
    folder: Path, spec: Any, *, pack_method: str, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Quantize a model of random weights with `spec` and export it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=36,
        vocab_size=32,
    )
    model = LlamaForCausalLM(config).to(dtype)
    quantizer = ModelQuantizer(
        QConfig(global_quant_config=QLayerConfig(weight=spec), exclude=["lm_head"])
    )
    samples = [torch.randint(0, 32, (16,)) for _ in range(2)]
    loader = torch.utils.data.DataLoader(samples, batch_size=1)
    frozen = quantizer.freeze(quantizer.quantize_model(model, loader))
    export_safetensors(frozen, str(folder), pack_method=pack_method)


def cut(folder: Path) -> None:
    """Leave one module and a norm, and of files the config's and the weights'."""
    tensors = load_file(folder / "model.safetensors")
    few = {
        name: tensor
        for name, tensor in tensors.items()
        if f"{_KEPT}." in name or "input_layernorm" in name
    }
    save_file(few, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def dequantized(
    tensors: dict[str, torch.Tensor],
    spec: Any,
    *,
    reorder: bool,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, torch.Tensor]:
    """Return what the library makes of every quantized weight."""
    made = {}
    for name, codes in tensors.items():
        scale = tensors.get(f"{name}_scale")
        if scale is None:
            continue
        zero = tensors.get(f"{name}_zero_point")
        quantizer = StaticScaledRealQuantizer(
            spec, None, reorder, True, dtype, torch.device("cpu"), scale.shape
        )
        quantizer.scale = scale
        if zero is not None:
            quantizer.zero_point = zero
        made[name] = quantizer(codes).to(dtype).contiguous()
    return made


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
