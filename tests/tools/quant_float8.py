"""Make the FP8 and FBGEMM checkpoints of tests/data/quant, with two libraries' own answers.

Run by hand in an environment with transformers 5.24, compressed-tensors 0.20 and torch 2.13:
`python quant_float8.py OUT [CASE...]`. Weights are random; quantizing is dividing by the largest
value of a block. `reference.safetensors` is what `Fp8Dequantize` of transformers makes of them, or,
for blocks that do not divide the weight (which it refuses or gets wrong), `FP8BlockDequantizer` of
compressed-tensors. FBGEMM's own kernels need a GPU: there the reference is its formula in float32.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.entrypoints.convert import FP8BlockDequantizer
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

Tensors = dict[str, torch.Tensor]
_E4M3 = torch.float8_e4m3fn
_USUAL = (128, 128)
_FP8: dict[str, Any] = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
}


class Case:
    """A checkpoint in the making: its tensors, its reference, its config."""

    def __init__(self, seed: int, quantization: dict[str, Any] | None) -> None:
        self.tensors: Tensors = {}
        self.reference: Tensors = {}
        self.config: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
        }
        if quantization is not None:
            self.config["quantization_config"] = quantization
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors["model.norm.weight"] = torch.ones(16, dtype=torch.bfloat16)

    def random(self, *shape: int) -> torch.Tensor:
        """Return weights as of a model, with rows of different size."""
        size = torch.rand(*shape[:-1], 1, generator=self.generator) * 0.05
        return torch.randn(*shape, generator=self.generator) * size

    def add(
        self, name: str, scale_name: str, codes: torch.Tensor, scale: torch.Tensor, by: Any = None
    ) -> None:
        """Add codes and scales, and what a library makes of them (`by`, or transformers)."""
        self.tensors[name] = codes
        self.tensors[scale_name] = scale
        made = _by_transformers(codes, scale) if by is None else by(codes, scale)
        self.reference[name] = made.contiguous()

    def write(self, folder: Path, *, shards: int = 1) -> None:
        """Write it; of two shards, one has all scales."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=1))
        save_file(self.reference, folder / "reference.safetensors")
        if shards == 1:
            save_file(self.tensors, folder / "model.safetensors", metadata={"format": "pt"})
            return
        halves: list[Tensors] = [{}, {}]
        for name, tensor in self.tensors.items():
            halves["scale" in name][name] = tensor
        weight_map = {}
        for place, half in enumerate(halves, 1):
            file = f"model-{place:05}-of-00002.safetensors"
            save_file(half, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(half, file)
        total = sum(tensor.nbytes for tensor in self.tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def quantized(
    weight: torch.Tensor, block: tuple[int, int], dtype: torch.dtype = _E4M3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and float32 scales of the last two axes, on a ceil-divided grid."""
    rows, columns = weight.shape[-2:]
    down, along = -(-rows // block[0]), -(-columns // block[1])
    padded = weight.new_zeros(*weight.shape[:-2], down * block[0], along * block[1])
    padded[..., :rows, :columns] = weight
    tiles = padded.unflatten(-1, (along, block[1])).unflatten(-3, (down, block[0]))
    scale = tiles.abs().amax((-3, -1)).clamp(min=1e-12) / torch.finfo(dtype).max
    codes = (tiles / scale[..., :, None, :, None]).to(dtype)
    flat = codes.flatten(-4, -3).flatten(-2, -1)
    return flat[..., :rows, :columns].contiguous(), scale


def power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """Return scales rounded up to exponents (UE8M0), as bytes."""
    return (torch.ceil(torch.log2(scale)) + 127).to(torch.uint8)


def block_ragged() -> tuple[Case, int]:
    """DeepSeek: blocks that do not divide the weight, one row, partners in another shard."""
    case = Case(0, _FP8)
    for name, shape in {
        "model.layers.0.self_attn.kv_a_proj_with_mqa": (192, 136),
        "model.layers.0.mlp.gate_proj": (40, 200),
        "model.layers.61.eh_proj": (1, 300),
        "model.layers.61.shared_head.head": (129, 16),
    }.items():
        codes, scale = quantized(case.random(*shape), _USUAL)
        _by_block(case, name, codes, scale)
    return case, 2


def scales() -> tuple[Case, int]:
    """Every kind of scale beside each other: what the grid says wins over the config."""
    case = Case(1, _FP8 | {"activation_scheme": "static"})
    layer = "model.layers.0"
    codes, scale = quantized(case.random(128, 128), _USUAL)
    case.add(f"{layer}.q.weight", f"{layer}.q.weight_scale_inv", codes, scale.bfloat16())
    codes, scale = quantized(case.random(24, 48), (24, 48))
    case.add(f"{layer}.k.weight", f"{layer}.k.weight_scale_inv", codes, scale.bfloat16()[0, 0])
    case.tensors[f"{layer}.k.activation_scale"] = torch.tensor(1.5).bfloat16()
    codes, scale = quantized(case.random(24, 48), (1, 48))
    case.add(f"{layer}.v.weight", f"{layer}.v.weight_scale", codes, scale)
    case.tensors[f"{layer}.v.input_scale"] = torch.tensor([2.0])
    codes, scale = quantized(case.random(24, 64), (1, 32))
    case.add(f"{layer}.o.weight", f"{layer}.o.weight_scale_inv", codes, power_of_two(scale))
    for place, dtype in enumerate(
        (torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
    ):
        codes, scale = quantized(case.random(8, 128), _USUAL, dtype)
        name = f"{layer}.other.{place}"
        case.add(f"{name}.weight", f"{name}.weight_scale_inv", codes, scale)
    _experts(case, f"{layer}.mlp.experts")
    return case, 1


def deepseek_v4() -> tuple[Case, int]:
    """DeepSeek-V4: exponents called `scale`, FP8 in blocks, experts in FP4."""
    case = Case(2, _FP8 | {"scale_fmt": "ue8m0", "expert_dtype": "fp4"})
    codes, scale = quantized(case.random(128, 128), _USUAL)
    exponents = power_of_two(scale).view(torch.float8_e8m0fnu)
    case.add("layers.0.attn.wq_a.weight", "layers.0.attn.wq_a.scale", codes, exponents)
    for place in range(2):
        packed = torch.randint(0, 256, (48, 32), dtype=torch.uint8, generator=case.generator)
        scale = torch.randint(110, 130, (48, 2), dtype=torch.uint8, generator=case.generator)
        name = f"layers.0.ffn.experts.{place}.w1"
        exponents = scale.view(torch.float8_e8m0fnu)
        case.add(f"{name}.weight", f"{name}.scale", packed.view(torch.int8), exponents)
    return case, 1


def mxfp8() -> tuple[Case, int]:
    """MXFP8: a group of 32 an exponent, also of fused experts."""
    case = Case(3, {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"})
    for name, shape in {"attn.q": (40, 96), "attn.o": (96, 32)}.items():
        codes, scale = quantized(case.random(*shape), (1, 32))
        case.add(f"{name}.weight", f"{name}.weight_scale_inv", codes, power_of_two(scale))
    codes, scale = quantized(case.random(2, 24, 64), (1, 32))
    case.add("experts.down_proj", "experts.down_proj_scale_inv", codes, power_of_two(scale))
    return case, 1


def mistral() -> tuple[Case, int]:
    """Mistral's native names, and no quantization config at all."""
    case = Case(4, None)
    codes, scale = quantized(case.random(32, 64), (32, 64))
    name = "layers.0.attention.wq"
    case.add(f"{name}.weight", f"{name}.qscale_weight", codes, scale.bfloat16()[0, 0])
    case.tensors[f"{name}.qscale_act"] = torch.tensor(0.5).bfloat16()
    codes, scale = quantized(case.random(130, 40), _USUAL)
    _by_block(case, "model.layers.0.mlp.up_proj", codes, scale)
    return case, 1


def fbgemm() -> tuple[Case, int]:
    """FBGEMM: a scale a row; Llama 4's experts with a scale a column."""
    case = Case(5, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0})
    codes, scale = quantized(case.random(48, 80), (1, 80))
    case.add("layers.0.mlp.up.weight", "layers.0.mlp.up.weight_scale", codes, scale, _formula)
    experts = "layers.0.feed_forward.experts"
    codes, scale = quantized(case.random(3, 32, 48), (32, 1))
    case.add(f"{experts}.gate_up_proj", f"{experts}.gate_up_proj_scale", codes, scale, _formula)
    codes, scale = quantized(case.random(3, 32, 32), (32, 1))
    case.add(
        f"{experts}.down_proj",
        f"{experts}.down_proj_scale",
        codes,
        scale.transpose(1, 2).contiguous(),
        lambda codes, scale: _formula(codes, scale.transpose(1, 2)),
    )
    return case, 1


CASES: dict[str, Callable[[], tuple[Case, int]]] = {
    "fp8_block_ragged": block_ragged,
    "fp8_scales": scales,
    "fp8_deepseek_v4": deepseek_v4,
    "fp8_mxfp8": mxfp8,
    "fp8_mistral": mistral,
    "fbgemm": fbgemm,
}


def main(out: Path, names: list[str]) -> None:
    """Write the cases `names`, or all, below `out`."""
    torch.set_num_threads(1)
    for name in names or CASES:
        case, shards = CASES[name]()
        case.write(out / name, shards=shards)
        print(name, sum(file.stat().st_size for file in (out / name).iterdir()))


def _experts(case: Case, name: str) -> None:
    codes, scale = quantized(case.random(2, 128, 16), _USUAL)
    case.add(f"{name}.gate_up_proj", f"{name}.gate_up_proj_scale_inv", codes, scale)
    codes, scale = quantized(case.random(2, 16, 24), (16, 24))
    case.add(f"{name}.down_proj", f"{name}.down_proj_scale_inv", codes, scale)
    codes, scale = quantized(case.random(2, 32, 24), (16, 24))
    halves = name.replace("layers.0", "layers.1")
    case.add(f"{halves}.gate_up_proj", f"{halves}.gate_up_proj_scale_inv", codes, scale)


def _by_transformers(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    library = Fp8Dequantize(None)
    return library._dequantize_one(codes, scale, output_dtype=torch.bfloat16)


def _by_block(case: Case, module: str, codes: torch.Tensor, scale: torch.Tensor) -> None:
    tensors = {f"{module}.weight": codes, f"{module}.weight_scale_inv": scale}
    case.tensors |= tensors
    library = FP8BlockDequantizer(targets=[module], weight_block_size=_USUAL)
    made = library.process(dict(tensors))[f"{module}.weight"]
    case.reference[f"{module}.weight"] = made.contiguous()


def _formula(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (codes.float() * scale).bfloat16()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
