"""One quantized layer of realistic size in each format, with random codes: for benchmarks.

Values do not matter for speed, layouts do: shapes, dtypes and companions are those of the real
writers (compare tests/data/quant). Every builder takes outputs `n` and inputs `k`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from tests.benchmarks.layer_files import Layer, Tensors


def octets(*shape: int) -> torch.Tensor:
    """Return random bytes."""
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def words(*shape: int) -> torch.Tensor:
    """Return random words of 32 bits."""
    return octets(*shape[:-1], shape[-1] * 4).view(torch.int32)


def float8(*shape: int) -> torch.Tensor:
    """Return E4M3 codes of normally distributed values."""
    return torch.randn(shape, dtype=torch.bfloat16).to(torch.float8_e4m3fn)


def scales(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return positive values of the size of scales."""
    return (torch.rand(shape) * 0.01 + 0.001).to(dtype)


def fp8_block(n: int, k: int) -> Layer:
    """FP8 in blocks of 128 x 128, as DeepSeek writes it."""
    tensors = {"weight": float8(n, k), "weight_scale_inv": scales(-(-n // 128), -(-k // 128))}
    said = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return Layer(tensors=tensors, quantization=said)


def fp8_ue8m0(n: int, k: int) -> Layer:
    """FP8 in blocks of 128 x 128 with scales that are powers of two, in a byte each."""
    exponents = torch.full((-(-n // 128), -(-k // 128)), 119, dtype=torch.uint8)
    tensors = {"weight": float8(n, k), "scale": exponents.view(torch.float8_e8m0fnu)}
    said = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    return Layer(tensors=tensors, quantization=said)


def fp8_tensor(n: int, k: int) -> Layer:
    """FP8 with one scale."""
    tensors = {"weight": float8(n, k), "weight_scale_inv": torch.tensor(0.003)}
    said = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    return Layer(tensors=tensors, quantization=said)


def bnb_nf4(n: int, k: int) -> Layer:
    """bitsandbytes nf4 with nested scales."""
    blocks = n * k // 64
    state = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [n, k],
        "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.01,
    }  # fmt: skip
    tensors = {
        "weight": octets(n * k // 2, 1),
        "weight.absmax": octets(blocks),
        "weight.quant_map": torch.linspace(-1, 1, 16),
        "weight.nested_absmax": scales(-(-blocks // 256)),
        "weight.nested_quant_map": torch.linspace(0, 1, 256),
        "weight.quant_state.bitsandbytes__nf4": _text(json.dumps(state)),
    }
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    return Layer(tensors=tensors, quantization=said)


def bnb_int8(n: int, k: int) -> Layer:
    """bitsandbytes int8 with a scale a row."""
    tensors = {
        "weight": octets(n, k).view(torch.int8),
        "SCB": scales(n),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    said = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return Layer(tensors=tensors, quantization=said)


def ct_w4a16(n: int, k: int) -> Layer:
    """compressed-tensors pack-quantized, 4 bit in groups of 128."""
    tensors = {
        "weight_packed": words(n, k // 8),
        "weight_shape": torch.tensor([n, k]),
        "weight_scale": scales(n, k // 128, dtype=torch.bfloat16),
    }
    said = _compressed("pack-quantized", 4, "int", strategy="group", group_size=128)
    return Layer(tensors=tensors, quantization=said)


def ct_int8(n: int, k: int) -> Layer:
    """compressed-tensors int8 with a scale a row."""
    tensors = {
        "weight": octets(n, k).view(torch.int8),
        "weight_scale": scales(n, 1, dtype=torch.bfloat16),
    }
    said = _compressed("int-quantized", 8, "int", strategy="channel")
    return Layer(tensors=tensors, quantization=said)


def ct_fp8(n: int, k: int) -> Layer:
    """compressed-tensors FP8 with a scale a row."""
    tensors = {"weight": float8(n, k), "weight_scale": scales(n, 1, dtype=torch.bfloat16)}
    said = _compressed("float-quantized", 8, "float", strategy="channel")
    return Layer(tensors=tensors, quantization=said)


def ct_nvfp4(n: int, k: int) -> Layer:
    """compressed-tensors NVFP4."""
    tensors = {
        "weight_packed": octets(n, k // 2),
        "weight_scale": float8(n, k // 16).abs(),
        "weight_global_scale": torch.tensor([300.0]),
    }
    said = _compressed("nvfp4-pack-quantized", 4, "float", strategy="tensor_group", group_size=16)
    return Layer(tensors=tensors, quantization=said)


def ct_mxfp4(n: int, k: int) -> Layer:
    """compressed-tensors MXFP4."""
    tensors = {
        "weight_packed": octets(n, k // 2),
        "weight_scale": torch.full((n, k // 32), 120, dtype=torch.uint8),
    }
    said = _compressed("mxfp4-pack-quantized", 4, "float", strategy="group", group_size=32)
    return Layer(tensors=tensors, quantization=said)


def modelopt_nvfp4(n: int, k: int) -> Layer:
    """ModelOpt NVFP4."""
    tensors = {
        "weight": octets(n, k // 2),
        "weight_scale": float8(n, k // 16).abs(),
        "weight_scale_2": torch.tensor(0.003),
    }
    return Layer(tensors=tensors, quantization=_modelopt("NVFP4"))


def modelopt_fp8(n: int, k: int) -> Layer:
    """ModelOpt FP8 with one scale."""
    tensors = {
        "weight": float8(n, k),
        "weight_scale": torch.tensor(0.003),
        "input_scale": torch.tensor(0.01),
    }
    return Layer(tensors=tensors, quantization=_modelopt("FP8"))


def modelopt_w4a16(n: int, k: int) -> Layer:
    """ModelOpt int4 of AWQ, two rows a byte, with scales of activations."""
    tensors = {
        "weight": octets(n // 2, k),
        "weight_scale": scales(n, k // 128),
        "pre_quant_scale": scales(k, dtype=torch.bfloat16),
    }
    return Layer(tensors=tensors, quantization=_modelopt("W4A16_AWQ"))


def gptq4(n: int, k: int) -> Layer:
    """GPTQ v1, 4 bit in groups of 128."""
    return _gptq(n, k, 4)


def gptq8(n: int, k: int) -> Layer:
    """GPTQ v1, 8 bit in groups of 128."""
    return _gptq(n, k, 8)


def gptq3(n: int, k: int) -> Layer:
    """GPTQ v1, 3 bit in groups of 128."""
    return _gptq(n, k, 3)


def gptq_act_order(n: int, k: int) -> Layer:
    """GPTQ v1, 4 bit, with inputs in the order of their activations."""
    made = _gptq(n, k, 4)
    made.tensors["g_idx"] = made.tensors["g_idx"][torch.randperm(k)]
    return made


def awq4(n: int, k: int) -> Layer:
    """AWQ GEMM, 4 bit in groups of 128."""
    tensors = {
        "qweight": words(k, n // 8),
        "qzeros": words(k // 128, n // 8),
        "scales": scales(k // 128, n, dtype=torch.float16),
    }
    return Layer(tensors=tensors, quantization=_awq("gemm"))


def awq_gemv(n: int, k: int) -> Layer:
    """AWQ GEMV, 4 bit in groups of 128."""
    tensors = {
        "qweight": words(n, k // 8),
        "qzeros": words(n, k // 1024),
        "scales": scales(n, k // 128, dtype=torch.float16),
    }
    return Layer(tensors=tensors, quantization=_awq("gemv"))


def hqq4(n: int, k: int) -> Layer:
    """HQQ, 4 bit in groups of 64 along the inputs, two halves of the groups in a byte."""
    groups = n * k // 64
    tensors = {
        "W_q": octets(groups // 2, 64),
        "scale": scales(groups, 1, dtype=torch.float16),
        "zero": scales(groups, 1, dtype=torch.float16),
        "shape": torch.tensor([n, k]),
    }
    numbers = {"axis": 1, "group_size": 64, "nbits": 4}
    flags = {
        "channel_wise": 1, "encoded_state_dict": 1, "offload_meta": 0, "optimize": 1,
        "quant_scale": 0, "quant_zero": 0, "round_zero": 1, "stores_quant_config": 1,
        "view_as_float": 0,
    }  # fmt: skip
    texts = {
        "compute_dtype": "torch.float16", "packing": "4bit_u8", "unpack_view_dtype": "torch.uint8",
    }  # fmt: skip
    tensors |= {name: torch.tensor(value, dtype=torch.int32) for name, value in numbers.items()}
    tensors |= {name: torch.tensor(value, dtype=torch.uint8) for name, value in flags.items()}
    tensors |= {name: _text(value) for name, value in texts.items()}
    return Layer(tensors=tensors, quantization={"quant_method": "hqq"})


def quanto_int8(n: int, k: int) -> Layer:
    """quanto qint8 with a scale a row."""
    tensors = {
        "weight._data": octets(n, k).view(torch.int8),
        "weight._scale": scales(n, 1, dtype=torch.bfloat16),
    }
    said = {"quant_method": "quanto", "weights": "int8"}
    return Layer(tensors=tensors, quantization=said)


def quanto_int4(n: int, k: int) -> Layer:
    """quanto qint4 in groups of 128, two halves of the groups in a byte."""
    groups = n * k // 128
    tensors = {
        "weight._data._data": octets(groups // 2, 128),
        "weight._scale": scales(groups, 1, dtype=torch.bfloat16),
        "weight._shift": scales(groups, 1, dtype=torch.bfloat16),
    }
    said = {"quant_method": "quanto", "weights": "int4"}
    return Layer(tensors=tensors, quantization=said)


def torchao_int8(n: int, k: int) -> Layer:
    """torchao int8 with a scale a row."""
    tensors = {
        "_weight_qdata": octets(n, k).view(torch.int8),
        "_weight_scale": scales(n, 1),
        "_weight_zero_point": torch.zeros((n, 1), dtype=torch.int8),
    }
    more = {"act_quant_kwargs": None, "reduce_range": False, "dtype": _torch("bfloat16")}
    return _torchao("Int8Tensor", tensors, block_size=[1, k], **more)


def torchao_int4(n: int, k: int) -> Layer:
    """torchao int4 in groups of 128."""
    tensors = {
        "_weight_qdata": octets(n, k // 2).view(torch.int8),
        "_weight_scale": scales(k // 128, n, dtype=torch.bfloat16),
        "_weight_zero_point": scales(k // 128, n, dtype=torch.bfloat16),
    }
    more = {"activation_dtype": _torch("bfloat16"), "shape": [n, k]}
    return _torchao("Int4Tensor", tensors, block_size=[1, 128], **more)


def mlx4(n: int, k: int) -> Layer:
    """MLX affine, 4 bit in groups of 64."""
    tensors = {
        "weight": words(n, k // 8).view(torch.uint32),
        "scales": scales(n, k // 64, dtype=torch.bfloat16),
        "biases": scales(n, k // 64, dtype=torch.bfloat16),
    }
    said = {"group_size": 64, "bits": 4}
    return Layer(tensors=tensors, quantization=said, metadata={"format": "mlx"})


def gpt_oss(n: int, k: int, count: int = 4) -> Layer:
    """gpt-oss MXFP4: `count` experts that have the elements of one `(n, k)` matrix together."""
    inner = n // count
    tensors = {
        "gate_up_proj_blocks": octets(count, inner, k // 32, 16),
        "gate_up_proj_scales": torch.full((count, inner, k // 32), 120, dtype=torch.uint8),
    }
    return Layer(tensors=tensors, quantization={"quant_method": "mxfp4"})


def gguf_q4_k(n: int, k: int) -> Layer:
    """GGUF Q4_K: of 144 bytes two scales in front, for 256 elements."""
    return _gguf(n, k, 12, elements=256, nbytes=144, halves=(0, 2))


def gguf_q6_k(n: int, k: int) -> Layer:
    """GGUF Q6_K."""
    return _gguf(n, k, 14, elements=256, nbytes=210, halves=(208,))


def gguf_q8_0(n: int, k: int) -> Layer:
    """GGUF Q8_0."""
    return _gguf(n, k, 8, elements=32, nbytes=34, halves=(0,))


def gguf_q4_0(n: int, k: int) -> Layer:
    """GGUF Q4_0."""
    return _gguf(n, k, 2, elements=32, nbytes=18, halves=(0,))


def gguf_iq4_xs(n: int, k: int) -> Layer:
    """GGUF IQ4_XS."""
    return _gguf(n, k, 23, elements=256, nbytes=136, halves=(0,))


LAYERS: dict[str, Callable[[int, int], Layer]] = {
    made.__name__: made
    for made in (
        fp8_block, fp8_ue8m0, fp8_tensor, bnb_nf4, bnb_int8, ct_w4a16, ct_int8, ct_fp8, ct_nvfp4,
        ct_mxfp4, gpt_oss, modelopt_nvfp4, modelopt_fp8, modelopt_w4a16, gptq4, gptq8, gptq3,
        gptq_act_order, awq4, awq_gemv, gguf_q4_k, gguf_q6_k, gguf_q8_0, gguf_q4_0, gguf_iq4_xs,
        mlx4, hqq4, quanto_int8, quanto_int4, torchao_int8, torchao_int4,
    )
}  # fmt: skip


def _gptq(n: int, k: int, bits: int) -> Layer:
    tensors = {
        "qweight": words(k * bits // 32, n),
        "qzeros": torch.full((k // 128, n * bits // 32), 0x77777777, dtype=torch.int32),
        "scales": scales(k // 128, n, dtype=torch.float16),
        "g_idx": torch.arange(k, dtype=torch.int32) // 128,
    }
    said = {"quant_method": "gptq", "bits": bits, "group_size": 128, "sym": True}
    return Layer(tensors=tensors, quantization=said)


def _awq(version: str) -> dict[str, Any]:
    return {
        "quant_method": "awq", "bits": 4, "group_size": 128, "version": version, "zero_point": True,
    }  # fmt: skip


def _modelopt(algorithm: str) -> dict[str, Any]:
    said = {"quant_method": "modelopt", "quant_algo": algorithm}
    return said | {"producer": {"name": "modelopt", "version": "0.47.0"}}


def _compressed(kind: str, bits: int, number: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": number, "symmetric": True, **more}
    group = {"targets": ["Linear"], "weights": weights, "format": kind}
    return {
        "quant_method": "compressed-tensors", "format": kind, "ignore": ["lm_head"],
        "quantization_status": "compressed", "config_groups": {"group_0": group},
    }  # fmt: skip


def _torch(name: str) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": name}


def _torchao(kind: str, tensors: Tensors, **data: Any) -> Layer:
    names = [name.removeprefix("_weight_") for name in tensors]
    described = {"_type": kind, "_data": data, "_tensor_data_names": names}
    metadata = {"{}.weight": json.dumps(described)}
    return Layer(tensors=tensors, quantization={"quant_method": "torchao"}, metadata=metadata)


def _gguf(
    n: int, k: int, ggml: int, *, elements: int, nbytes: int, halves: tuple[int, ...]
) -> Layer:
    """Return random blocks with scales at the bytes `halves`, which must be finite."""
    blocks = octets(n * k // elements, nbytes)
    for at in halves:
        blocks[:, at : at + 2] = scales(len(blocks), 1, dtype=torch.float16).view(torch.uint8)
    return Layer(tensors={"blocks": blocks.view(n, -1)}, metadata={}, ggml=ggml)


def _text(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
