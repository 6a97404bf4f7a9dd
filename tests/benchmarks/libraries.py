"""The libraries' own dequantizers of the layers of `layers`, on the same tensors.

Each entry imports its library and returns a call that dequantizes the whole layer in the dtype that
the library gives. What is prepared outside of the call is what a library keeps of a loaded module.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from tests.benchmarks.layer_files import Layer, Tensors

Call = Callable[[], Any]
BF16 = torch.bfloat16


def call(name: str, layer: Layer) -> Call | None:
    """Return the dequantization of a layer, or None where no library for it is installed."""
    try:
        return LIBRARIES[name](layer.tensors) if name in LIBRARIES else None
    except ImportError:
        return None


def _bitsandbytes_nf4(tensors: Tensors) -> Call:
    functional = importlib.import_module("bitsandbytes.functional")
    told = {
        name.removeprefix("weight."): value for name, value in tensors.items() if name != "weight"
    }
    state = functional.QuantState.from_dict(told, device=torch.device("cpu"))
    return lambda: functional.dequantize_4bit(tensors["weight"], state)


def _bitsandbytes_int8(tensors: Tensors) -> Call:
    functional = importlib.import_module("bitsandbytes.functional")
    codes, scale = tensors["weight"], tensors["SCB"]
    return lambda: functional.int8_vectorwise_dequant(codes, scale).to(BF16)


def _fp8(tensors: Tensors) -> Call:
    module = importlib.import_module("transformers.integrations.finegrained_fp8")
    made = module.Fp8Dequantize(None)
    scale = tensors.get("weight_scale_inv")
    scale = tensors["scale"].float() if scale is None else scale
    return lambda: made._dequantize_one(tensors["weight"], scale, output_dtype=BF16)


def _gpt_oss(tensors: Tensors) -> Call:
    module = importlib.import_module("transformers.integrations.mxfp4")
    codes, scales = tensors["gate_up_proj_blocks"], tensors["gate_up_proj_scales"]
    return lambda: module.convert_moe_packed_tensors(codes, scales)


def _compressed(kind: str, **weights: Any) -> Callable[[Tensors], Call]:
    """Return what decompresses tensors as the library's compressor of that format does."""

    def made(tensors: Tensors) -> Call:
        compressors = importlib.import_module("compressed_tensors.compressors")
        quantization = importlib.import_module("compressed_tensors.quantization")
        args = quantization.QuantizationArgs(**weights)
        scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args, format=kind)
        compressor = compressors.BaseCompressor.get_value_from_registry(kind)
        return lambda: compressor.decompress(dict(tensors), scheme)["weight"]

    return made


def _modelopt_fp8(tensors: Tensors) -> Call:
    kinds = importlib.import_module("modelopt.torch.quantization.qtensor")
    codes, scale = tensors["weight"], tensors["weight_scale"]
    held = kinds.FP8QTensor(codes.shape, BF16, codes)
    return lambda: held.dequantize(BF16, scale=scale)


def _modelopt_nvfp4(tensors: Tensors) -> Call:
    kinds = importlib.import_module("modelopt.torch.quantization.qtensor")
    codes, scale, second = (tensors[f"weight{end}"] for end in ("", "_scale", "_scale_2"))
    shape = torch.Size((len(codes), codes.shape[1] * 2))
    held = kinds.NVFP4QTensor(shape, BF16, codes)
    return lambda: held.dequantize(
        BF16, scale=scale, double_scale=second, block_sizes={-1: 16}, fast=False
    )


def _gptqmodel(bits: int) -> Callable[[Tensors], Call]:
    def made(tensors: Tensors) -> Call:
        linears = importlib.import_module("gptqmodel.nn_modules.qlinear.torch")
        quantization = importlib.import_module("gptqmodel.quantization")
        model = importlib.import_module("gptqmodel.utils.model")
        module = linears.TorchLinear(
            bits=bits, group_size=128, desc_act=True, sym=True, in_features=len(tensors["g_idx"]),
            out_features=tensors["scales"].shape[1], bias=False, pack_dtype=torch.int32,
            register_buffers=True, format=quantization.FORMAT.GPTQ,
        )  # fmt: skip
        module.load_state_dict({name: one.clone() for name, one in tensors.items()}, strict=False)
        model.convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
        module.post_init()
        module.optimized = True
        return lambda: linears.TorchLinear.dequantize_weight(module)

    return made


def _autoawq(tensors: Tensors) -> Call:
    packing = importlib.import_module("awq.utils.packing_utils")
    parts = [tensors[name] for name in ("qweight", "qzeros", "scales")]
    return lambda: packing.dequantize_gemm(*parts, 4, 128)


def _gguf(tensors: Tensors, kind: str) -> Call:
    library = importlib.import_module("gguf")
    blocks = tensors["blocks"].numpy()
    number = library.GGMLQuantizationType[kind]
    return lambda: library.quants.dequantize(blocks, number)


def _mlx(tensors: Tensors) -> Call:
    mx = importlib.import_module("mlx.core")
    weight = mx.array(tensors["weight"].view(torch.int32).numpy()).view(mx.uint32)
    scales, biases = (
        mx.array(tensors[name].float().numpy()).astype(mx.bfloat16) for name in ("scales", "biases")
    )
    mx.set_default_device(mx.cpu)
    return lambda: mx.eval(mx.dequantize(weight, scales, biases, group_size=64, bits=4))


def _hqq(tensors: Tensors) -> Call:
    core = importlib.import_module("hqq.core.quantize")
    said = {
        "nbits": 4, "group_size": 64, "axis": 1, "packing": "4bit_u8", "view_as_float": False,
        "shape": tensors["shape"].tolist(), "compute_dtype": torch.float16,
        "unpack_view_dtype": torch.uint8, "scale": tensors["scale"], "zero": tensors["zero"],
    }  # fmt: skip
    return lambda: core.Quantizer.dequantize(tensors["W_q"], said)


def _quanto_int8(tensors: Tensors) -> Call:
    quanto = importlib.import_module("optimum.quanto")
    codes, scale = tensors["weight._data"], tensors["weight._scale"]
    made = quanto.WeightQBytesTensor(
        qtype=quanto.qint8, axis=0, size=codes.shape, stride=codes.stride(), data=codes,
        scale=scale, activation_qtype=None,
    )  # fmt: skip
    return lambda: made.dequantize()


def _quanto_int4(tensors: Tensors) -> Call:
    quanto = importlib.import_module("optimum.quanto")
    packed = importlib.import_module("optimum.quanto.tensor.packed")
    codes = tensors["weight._data._data"]
    groups = torch.Size((len(codes) * 2, codes.shape[1]))
    held = packed.PackedTensor(codes, 4, size=groups, stride=(groups[1], 1))
    shape = torch.Size((groups.numel() // 4096, 4096))
    made = quanto.WeightQBitsTensor(
        qtype=quanto.qint4, axis=0, group_size=128, size=shape, stride=(shape[1], 1), data=held,
        scale=tensors["weight._scale"], shift=tensors["weight._shift"],
    )  # fmt: skip
    return lambda: made.dequantize()


def _torchao_int8(tensors: Tensors) -> Call:
    kinds = importlib.import_module("torchao.quantization")
    codes, scale, zero = (tensors[f"_weight_{name}"] for name in ("qdata", "scale", "zero_point"))
    size = [1, codes.shape[1]]
    made = kinds.Int8Tensor(codes, scale, size, BF16, zero_point=zero)
    return lambda: made.dequantize()


def _of_gguf(kind: str) -> Callable[[Tensors], Call]:
    return lambda tensors: _gguf(tensors, kind)


_GROUPED = {"strategy": "group", "group_size": 128}

LIBRARIES: dict[str, Callable[[Tensors], Call]] = {
    "fp8_block": _fp8,
    "fp8_ue8m0": _fp8,
    "bnb_nf4": _bitsandbytes_nf4,
    "bnb_int8": _bitsandbytes_int8,
    "ct_w4a16": _compressed("pack-quantized", num_bits=4, type="int", **_GROUPED),
    "ct_int8": _compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
    "ct_fp8": _compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    "ct_nvfp4": _compressed(
        "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16,
        scale_dtype=torch.float8_e4m3fn,
    ),
    "ct_mxfp4": _compressed(
        "mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32,
        scale_dtype=torch.uint8,
    ),
    "gpt_oss": _gpt_oss,
    "modelopt_nvfp4": _modelopt_nvfp4,
    "modelopt_fp8": _modelopt_fp8,
    "gptq4": _gptqmodel(4),
    "gptq8": _gptqmodel(8),
    "gptq3": _gptqmodel(3),
    "gptq_act_order": _gptqmodel(4),
    "awq4": _autoawq,
    "gguf_q4_k": _of_gguf("Q4_K"),
    "gguf_q6_k": _of_gguf("Q6_K"),
    "gguf_q8_0": _of_gguf("Q8_0"),
    "gguf_q4_0": _of_gguf("Q4_0"),
    "gguf_iq4_xs": _of_gguf("IQ4_XS"),
    "mlx4": _mlx,
    "hqq4": _hqq,
    "quanto_int8": _quanto_int8,
    "quanto_int4": _quanto_int4,
    "torchao_int8": _torchao_int8,
}  # fmt: skip
