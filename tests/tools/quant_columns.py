"""Make the checkpoints of GPTQ, AWQ and AutoRound in tests/data/quant with the real libraries.

Run by hand, in an environment with gptqmodel 7.7.0, autoawq 0.2.9 and auto-round 0.16.1:

    python tests/tools/quant_columns.py tests/data/quant
    python tests/tools/quant_columns.py tests/data/quant --cut NAME FOLDER
    python tests/tools/quant_columns.py /tmp/sweep --sweep 150

Each folder gets a few modules, packed by the library's own linear classes, as `model.safetensors`
with `config.json` as the library writes it, and `reference.safetensors` with what the library's own
dequantization of the file gives (GPTQModel's after its conversion of v1 zeros). Where a library has
only a CUDA kernel for a layout (AWQ GEMV and GEMV-fast), the reference is what its packing began
with: rounded codes, scales and zeros, multiplied out in float32 and rounded to fp16.

The second call cuts one module out of a folder that AutoRound wrote with a scheme of floats
(FP8_STATIC, MXFP4, NVFP4; `AutoRound(model, tokenizer, scheme=..., iters=0)` on a tiny Llama), and
multiplies it out in float32. The third makes random variants, which are not committed.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from auto_round.export.export_to_awq.utils import WQLinear_GEMM as RoundedAwq
from auto_round.export.export_to_awq.utils import dequantize_gemm as rounded_dequantize
from auto_round_extension.torch.qlinear_torch import QuantLinear as RoundedStored
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear as RoundedLess
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.modules.linear.gemv import WQLinear_GEMV
from awq.modules.linear.gemv_fast import WQLinear_GEMVFast
from awq.utils.packing_utils import dequantize_gemm
from gptqmodel.nn_modules.qlinear.torch import TorchLinear, TorchQuantEmbeddings
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization import FORMAT, METHOD, QuantizeConfig
from gptqmodel.quantization.awq.utils.packing_utils import (
    dequantize_gemm as gptqmodel_dequantize_gemm,
)
from gptqmodel.utils.model import (
    convert_gptq_v1_to_v2_format_module,
    convert_gptq_v2_to_v1_format_module,
)
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
_E2M1 = torch.tensor([sign * m for sign in (1, -1) for m in (0.0, 0.5, 1, 1.5, 2, 3, 4, 6)])


@dataclass(kw_only=True)
class Case:
    """A checkpoint in the making."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)
    reference: Tensors = field(default_factory=dict)

    def add(self, module: str, buffers: Tensors, weight: torch.Tensor) -> None:
        """Add a module's tensors and what its weight is."""
        for name, tensor in buffers.items():
            self.tensors[f"{module}.{name}"] = tensor.detach().contiguous().clone()
        self.reference[f"{module}.weight"] = weight.detach().contiguous().clone()

    def save(self, root: Path) -> None:
        """Write the folder."""
        folder = root / self.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=1, default=str) + "\n")
        save_file(self.tensors, folder / "model.safetensors", metadata={"format": "pt"})
        save_file(self.reference, folder / "reference.safetensors", metadata={"format": "pt"})


def grid(
    weight: torch.Tensor, bits: int, group: int, *, sym: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales and zeros of `(outputs, groups)`, rounded to nearest, of `(outputs, inputs)`."""
    size = weight.shape[1] if group == -1 else group
    scales, zeros = [], []
    top = 2**bits - 1
    for part in weight.float().split(size, dim=1):
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if sym:
            scale = 2 * torch.maximum(high, -low) / top
            scale = scale.half().float()
            zero = torch.full_like(scale, (top + 1) / 2)
        else:
            scale = (high - low) / top * 1.05  # no code beyond the top, which writers do not clamp
            scale = scale.half().float()
            zero = (-low / scale).round().clamp(0, top)
        scales.append(scale)
        zeros.append(zero)
    return torch.stack(scales, 1), torch.stack(zeros, 1)


def linear(outputs: int, inputs: int, *, bias: bool = False, shifted: bool = False) -> Any:
    """Return a module of random weights; `shifted` ones have groups with zeros at the edges."""
    module = torch.nn.Linear(inputs, outputs, bias=bias)
    torch.nn.init.normal_(module.weight, std=0.05)
    if shifted:
        module.weight.data.add_(0.1 * torch.randint(-1, 2, (outputs, 1)))
    module.weight.data = module.weight.data.half().float()
    return module


def gptq(
    module: Any,
    *,
    bits: int,
    group: int,
    sym: bool = True,
    act_order: bool = False,
    kind: FORMAT = FORMAT.GPTQ,
    pack_dtype: torch.dtype = torch.int32,
) -> tuple[Tensors, torch.Tensor]:
    """Return the tensors that GPTQModel saves for a linear or embedding, and its dequantization."""
    embedding = isinstance(module, torch.nn.Embedding)
    weight = module.weight.data.T if embedding else module.weight.data
    outputs, inputs = weight.shape
    scales, zeros = grid(weight, bits, group, sym=sym)
    size = inputs if group == -1 else group
    g_idx = torch.arange(inputs, dtype=torch.int32) // size
    if act_order:
        g_idx = g_idx[torch.randperm(inputs)]

    def made() -> Any:
        classes = TorchQuantEmbeddings if embedding else TorchLinear
        return classes(
            bits=bits,
            group_size=group,
            desc_act=act_order,
            sym=sym,
            in_features=inputs,
            out_features=outputs,
            bias=getattr(module, "bias", None) is not None,
            pack_dtype=pack_dtype,
            register_buffers=True,
            format=kind,
        )

    packed = made()
    packed.pack_original(module, scales, zeros, g_idx)
    if kind == FORMAT.GPTQ:
        said = QuantizeConfig(bits=bits, group_size=group, format=kind)
        convert_gptq_v2_to_v1_format_module(packed, said)
    saved = {name: one for name, one in packed.state_dict().items() if not name.startswith("wf")}
    loaded = made()
    loaded.load_state_dict({name: one.clone() for name, one in saved.items()}, strict=False)
    if kind == FORMAT.GPTQ:
        convert_gptq_v1_to_v2_format_module(loaded, bits, pack_dtype)
    loaded.post_init()
    loaded.optimized = True
    with torch.inference_mode():
        dense = type(loaded).dequantize_weight(loaded)
    return saved, dense if embedding else dense.T


def gptq_config(
    *, bits: int, group: int, sym: bool, kind: FORMAT = FORMAT.GPTQ, **more: Any
) -> dict[str, Any]:
    """Return the config of a tiny model with GPTQModel's quantization config."""
    said = QuantizeConfig(bits=bits, group_size=group, sym=sym, format=kind, **more).to_dict()
    said["meta"].pop("offload_to_disk_path", None)
    return {"model_type": "llama", "vocab_size": 80, "quantization_config": said}


def awq(
    module: Any, layer: Any, *, group: int, bits: int = 4, sym: bool = False
) -> tuple[Tensors, torch.Tensor]:
    """Return the tensors that AutoAWQ's `layer` saves, and what they are worth."""
    scales, zeros = grid(module.weight.data, bits, group, sym=sym)
    size = module.in_features if group == -1 else group
    turned = layer is WQLinear_GEMM
    packed = layer.from_linear(
        module,
        bits,
        size,
        scales=scales.T.contiguous() if turned else scales.half(),
        zeros=zeros.T.contiguous() if turned else zeros,
    )
    saved = dict(packed.state_dict())
    if turned:
        dense = dequantize_gemm(saved["qweight"], saved["qzeros"], saved["scales"], bits, size)
        return saved, dense.T
    spread = [one.repeat_interleave(size, 1) for one in (scales, zeros)]
    codes = torch.round((module.weight.data + spread[0] * spread[1]) / spread[0]).int()
    if layer is WQLinear_GEMVFast:
        less = (-(scales * zeros)).half().float().repeat_interleave(size, 1)
        return saved, (codes * spread[0] + less).half()
    return saved, ((codes - spread[1].int()) * spread[0]).half()


def awq_config(group: int, version: str, *, bits: int = 4, **more: Any) -> dict[str, Any]:
    """Return the config of a tiny model with AutoAWQ's quantization config."""
    said = {
        "quant_method": "awq",
        "bits": bits,
        "group_size": group,
        "zero_point": True,
        "version": version,
        "modules_to_not_convert": None,
    }
    return {"model_type": "llama", "vocab_size": 80, "quantization_config": {**said, **more}}


def gptqmodel_awq(module: Any, *, bits: int, group: int) -> tuple[Tensors, torch.Tensor]:
    """Return the tensors that GPTQModel saves as AWQ, and its dequantization."""
    scales, zeros = grid(module.weight.data, bits, group, sym=False)
    packed = AwqTorchLinear(
        bits=bits,
        group_size=group,
        sym=False,
        desc_act=False,
        in_features=module.in_features,
        out_features=module.out_features,
        bias=module.bias is not None,
        register_buffers=True,
    )
    packed.pack(module, scales.half(), zeros)
    saved = packed.state_dict()
    size = module.in_features if group == -1 else group
    kept = (saved["qweight"], saved["qzeros"], saved["scales"])
    return saved, gptqmodel_dequantize_gemm(*kept, bits, size).T


def rounded(
    module: Any, *, bits: int, group: int, sym: bool, packing: str
) -> tuple[Tensors, torch.Tensor]:
    """Return the tensors that AutoRound saves in a packing, and its own dequantization."""
    scales, zeros = grid(module.weight.data, bits, group, sym=sym)
    if "awq" in packing:
        packed = RoundedAwq.from_linear(
            module, bits, group, scales=scales.T.contiguous(), zeros=zeros.T.contiguous()
        )
        saved = packed.state_dict()
        size = module.in_features if group == -1 else group
        kept = (saved["qweight"], saved["qzeros"], saved["scales"])
        return saved, rounded_dequantize(*kept, bits, size).T
    layer = RoundedLess if packing == "auto_round:auto_gptq" else RoundedStored
    keeps = packing == "auto_round:gptqmodel"
    packed = layer(bits, group, module.in_features, module.out_features, False, g_idx=keeps)
    packed.device = "cpu"
    packed.pack(module, scales, int(zeros[0, 0]) if sym else zeros, None, device="cpu")
    saved = packed.state_dict()
    packed.bias = None
    dense = packed(torch.eye(module.in_features).half())
    return saved, dense.T


def rounded_config(
    *, bits: int, group: int, sym: bool, packing: str, **more: Any
) -> dict[str, Any]:
    """Return the config of a tiny model with AutoRound's quantization config."""
    said = {
        "quant_method": "auto-round",
        "packing_format": packing,
        "bits": bits,
        "group_size": group,
        "sym": sym,
        "data_type": "int",
        "autoround_version": "0.16.1",
        "block_name_to_quantize": "model.layers",
    }
    return {"model_type": "llama", "vocab_size": 80, "quantization_config": {**said, **more}}


def _gptq_cases() -> list[Case]:
    cases = []
    said = gptq_config(bits=4, group=32, sym=False, dynamic={r"+:.*up.*": {"bits": 8}})
    mixed = Case(name="gptq_v1_asym_mixed", config=said)
    mixed.add(
        "a.down", *gptq(linear(80, 176, shifted=True, bias=True), bits=4, group=32, sym=False)
    )
    mixed.add("a.up", *gptq(linear(72, 64, shifted=True), bits=8, group=32, sym=False))
    mixed.tensors["a.norm.weight"] = torch.ones(64)
    cases.append(mixed)
    ordered = Case(
        name="gptq_act_order", config=gptq_config(bits=4, group=64, sym=True, desc_act=True)
    )
    ordered.add("a.q", *gptq(linear(64, 160), bits=4, group=64, act_order=True))
    ordered.add(
        "a.k", *gptq(linear(32, 128, shifted=True), bits=2, group=32, sym=False, act_order=True)
    )
    cases.append(ordered)
    three = Case(name="gptq_v1_3bit", config=gptq_config(bits=3, group=-1, sym=False))
    three.add("a.q", *gptq(linear(64, 96, shifted=True), bits=3, group=-1, sym=False))
    cases.append(three)
    for kind in (FORMAT.GPTQ, FORMAT.GPTQ_V2, FORMAT.GPTQ_P):
        said = gptq_config(bits=4, group=32, sym=False, kind=kind)
        planes = Case(name=f"{kind.value}_widths", config=said)
        for bits in (2, 3, 5, 6, 7, 8):
            module = linear(32, 64, shifted=True)
            planes.add(f"a.b{bits}", *gptq(module, bits=bits, group=32, sym=False, kind=kind))
        cases.append(planes)
    said = gptq_config(bits=4, group=32, sym=False, kind=FORMAT.GPTQ_V2)
    words = Case(name="gptq_v2_words", config=said)
    for dtype in (torch.int8, torch.int16):
        module = linear(32, 64, shifted=True)
        name = f"a.{str(dtype).removeprefix('torch.')}"
        kind = FORMAT.GPTQ_V2
        words.add(name, *gptq(module, bits=4, group=32, sym=False, kind=kind, pack_dtype=dtype))
    cases.append(words)
    upright = Case(name="gptq_embedding", config=gptq_config(bits=4, group=32, sym=True))
    embedding = torch.nn.Embedding(80, 64)
    upright.add("model.embed_tokens", *gptq(embedding, bits=4, group=32))
    upright.add("lm_head", *gptq(linear(80, 64), bits=4, group=32))
    cases.append(upright)
    conv = Case(name="gptq_gpt2", config=gptq_config(bits=4, group=32, sym=True))
    conv.config["model_type"] = "gpt2"
    module = linear(96, 64)
    saved, dense = gptq(module, bits=4, group=32)
    conv.add("h.0.attn.c_attn", saved, dense.T)
    cases.append(conv)
    return cases


def _awq_cases() -> list[Case]:
    cases = []
    gemm = Case(name="awq_gemm", config=awq_config(32, "gemm"))
    gemm.add("a.q", *awq(linear(96, 96, bias=True, shifted=True), WQLinear_GEMM, group=32))
    gemm.add("a.k", *awq(linear(32, 160, shifted=True), WQLinear_GEMM, group=32))
    cases.append(gemm)
    whole = Case(name="awq_gemm_whole", config=awq_config(-1, "gemm"))
    whole.add("a.q", *awq(linear(64, 88), WQLinear_GEMM, group=-1))
    cases.append(whole)
    for name, layer in (("gemv", WQLinear_GEMV), ("gemv_fast", WQLinear_GEMVFast)):
        for group in (32, 64, 128):
            case = Case(name=f"awq_{name}_g{group}", config=awq_config(group, name))
            case.add("a.q", *awq(linear(24, 256, shifted=True), layer, group=group))
            cases.append(case)
    widths = Case(name="awq_gptqmodel_widths")
    widths.config = gptq_config(bits=8, group=32, sym=False, kind=FORMAT.GEMM, method=METHOD.AWQ)
    for bits in (2, 3, 4, 5, 6, 7, 8):
        widths.add(f"a.b{bits}", *gptqmodel_awq(linear(40, 64, shifted=True), bits=bits, group=32))
    cases.append(widths)
    return cases


def _rounded_cases() -> list[Case]:
    cases = []
    for packing, widths in (
        ("auto_round:auto_gptq", (2, 3, 4, 5, 6, 7, 8)),
        ("auto_round", (2, 3, 4, 5, 6, 7, 8)),
        ("auto_round:gptqmodel", (4, 7)),
        ("auto_round:auto_awq", (4, 5, 6, 7)),
    ):
        name = "autoround_" + packing.rpartition(":")[2]
        extra = {f"a.b{bits}": {"bits": bits} for bits in widths if bits != 4}
        extra |= {"a.wide": {"group_size": 64}, "a.plain": {"bits": 16}}
        said = rounded_config(bits=4, group=32, sym=False, packing=packing, extra_config=extra)
        case = Case(name=name, config=said)
        for bits in widths:
            # zeros of 0 less one wrap for the writer, but not for the reader, in 5 to 7 bits
            module = linear(32, 96, shifted="gptq" not in packing)
            made = rounded(module, bits=bits, group=32, sym=False, packing=packing)
            case.add(f"a.b{bits}", *made)
        case.add("a.wide", *rounded(linear(64, 128), bits=4, group=64, sym=True, packing=packing))
        case.tensors["a.plain.weight"] = torch.randn(32, 96).half()
        cases.append(case)
    return cases


def _sweep(count: int) -> list[Case]:
    cases = []
    choose = random.Random(5)
    for number in range(count):
        outputs, inputs = choose.choice((32, 64, 96, 160)), choose.choice((64, 128, 256, 352))
        group, sym = choose.choice((-1, 16, 32, 64, 128)), choose.random() < 0.4
        bits = choose.choice((2, 3, 4, 4, 4, 5, 6, 7, 8))
        module = linear(outputs, inputs, bias=choose.random() < 0.3, shifted=not sym)
        family = choose.choice(("gptq", "gptq", "awq", "gptqmodel_awq", "rounded"))
        if family == "gptq":
            kind = choose.choice((FORMAT.GPTQ, FORMAT.GPTQ_V2, FORMAT.GPTQ_P))
            said = gptq_config(bits=bits, group=group, sym=sym, kind=kind)
            made = gptq(
                module,
                bits=bits,
                group=group,
                sym=sym,
                kind=FORMAT(said["quantization_config"]["format"]),
                act_order=choose.random() < 0.4,
            )
        else:
            whole = group != -1 and inputs % group
            group = 32 if whole else group
            if family == "awq":
                module = linear(outputs, inputs - inputs % 32)
                made = awq(module, WQLinear_GEMM, group=group)
                said = awq_config(group, "gemm")
            elif family == "gptqmodel_awq":
                made = gptqmodel_awq(module, bits=bits, group=group)
                said = gptq_config(
                    bits=bits, group=group, sym=False, kind=FORMAT.GEMM, method=METHOD.AWQ
                )
            else:
                packing = choose.choice(
                    ("auto_round:auto_gptq", "auto_round", "auto_round:auto_awq")
                )
                bits = choose.choice((4, 5, 6, 7)) if "awq" in packing else bits
                made = rounded(module, bits=bits, group=group, sym=sym, packing=packing)
                said = rounded_config(bits=bits, group=group, sym=sym, packing=packing)
        case = Case(name=f"{number:03}_{family}_{bits}_{group}", config=said)
        case.add("a.q", *made)
        cases.append(case)
    return cases


def _cut(name: str, folder: Path) -> Case:
    config = json.loads((folder / "config.json").read_text())
    kept = ("model_type", "dtype", "torch_dtype", "vocab_size", "quantization_config")
    case = Case(name=name, config={key: config[key] for key in kept if key in config})
    prefix = "model.layers.0.self_attn.k_proj."
    held = load_file(folder / "model.safetensors")
    module = {key.removeprefix(prefix): one for key, one in held.items() if prefix in key}
    codes, scale = module.get("weight_packed"), module["weight_scale"]
    if codes is None:
        values = module["weight"].float()
    else:
        values = torch.stack([_E2M1[(codes & 15).int()], _E2M1[(codes >> 4).int()]], -1).flatten(1)
    scale = torch.exp2(scale.float() - 127) if scale.dtype is torch.uint8 else scale.float()
    if "weight_global_scale" in module:
        scale = scale / module["weight_global_scale"]
    scale = scale.view(len(values), -1).repeat_interleave(values.shape[1] // scale[0].numel(), 1)
    case.add(prefix[:-1], module, (values * scale).bfloat16())
    return case


def main() -> None:
    """Make the committed cases, or a sweep."""
    torch.manual_seed(11)
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    if "--cut" in sys.argv:
        cases = [_cut(sys.argv[3], Path(sys.argv[4]))]
    elif "--sweep" in sys.argv:
        cases = _sweep(int(sys.argv[-1]))
    else:
        cases = [*_gptq_cases(), *_awq_cases(), *_rounded_cases()]
    for case in cases:
        case.save(root)


if __name__ == "__main__":
    main()
