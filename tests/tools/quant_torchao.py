"""Make tests/data/quant/torchao_* with torchao.

    python tests/tools/quant_torchao.py tests/data/quant

References are the tensor subclasses' own `dequantize()`. The int4 classes have none and are packed
on GPUs alone: here torchao's functions quantize, `_packed_tiles` packs as torch's CUDA kernel does,
and the reference is the formula of the matrix kernel in float32, rounded once as it rounds.
Made with torchao 0.18.0, transformers 5.24.0 and torch 2.13.0; under torchao 0.14 the same script
makes the one case of that version's names, torchao_colon.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torchao
from safetensors.torch import save_file
from torchao import quantization as ao
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import granularity, quant_primitives

State = dict[str, Any]


def main(root: Path) -> None:
    """Write every case below `root`."""
    torch.manual_seed(1)
    if torchao.__version__.startswith("0.14"):
        _colon(root / "torchao_colon")
        return
    _integers(root / "torchao_integers")
    _float8(root / "torchao_float8")
    _blackwell(root / "torchao_blackwell")
    _int4(root / "torchao_int4")
    _sharded(root / "torchao_sharded")


def weight(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return random numbers as weights are, their mean not quite zero."""
    return (torch.randn(shape) * 0.05 + 0.005).to(dtype)


def _integers(folder: Path) -> None:
    state: State = {}
    made = ao.Int8Tensor.from_hp
    row, whole = granularity.PerRow(), granularity.PerTensor()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        state[f"row.{kind}.weight"] = made(weight(24, 86, dtype=dtype), row)
        asymmetric = ao.MappingType.ASYMMETRIC
        state[f"zero.{kind}.weight"] = made(weight(24, 86, dtype=dtype), row, asymmetric)
    state["whole.weight"] = made(weight(24, 86), whole)
    state["groups.weight"] = made(weight(24, 96), granularity.PerGroup(32))
    state["one.weight"] = made(weight(1, 86), row)
    state["experts.gate_up_proj"] = made(weight(3, 20, 64), row)
    intx = ao.IntxUnpackedToInt8Tensor
    for bits in (2, 3, 4, 7):
        state[f"intx{bits}.weight"] = intx.from_hp(
            weight(24, 96), (1, 32), getattr(torch, f"int{bits}"), mapping_type=asymmetric
        )
    held = state["intx4.weight"]
    zero = held.zero_point.to(torch.bfloat16) + 0.3
    state["float_zero.weight"] = intx(
        held.qdata, held.scale, zero, held.target_dtype, held.block_size, held.dtype, None
    )
    _write(folder, state)


def _float8(folder: Path) -> None:
    made = ao.Float8Tensor.from_hp
    block, row = granularity.PerBlock((32, 64)), granularity.PerRow()
    per_column = granularity.PerRow(dim=0)
    e5m2 = torch.float8_e5m2
    _write(
        folder,
        {
            "row.weight": made(weight(24, 86), granularity=row),
            "column.weight": made(weight(24, 86), granularity=per_column),
            "whole.weight": made(weight(24, 86), granularity=granularity.PerTensor()),
            "block.weight": made(weight(64, 192), granularity=block),
            "e5m2.weight": made(weight(24, 86), granularity=row, float8_dtype=e5m2),
            "half.weight": made(weight(24, 86, dtype=torch.float16), granularity=row),
            "experts.gate_up_proj": made(weight(3, 20, 64), granularity=row),
            "experts.down_proj": made(weight(3, 64, 20), granularity=granularity.PerRow(dim=1)),
            "conv.weight": made(weight(8, 4, 3, 3), granularity=granularity.PerTensor()),
        },
    )


def _blackwell(folder: Path) -> None:
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    state: State = {}
    for tiled in (False, True):
        kind = "tiled" if tiled else "rows"
        ragged = weight(136 if tiled else 24, 80)
        largest = per_tensor_amax_to_scale(ragged.abs().max())
        state[f"nvfp4_{kind}.weight"] = NVFP4Tensor.to_nvfp4(
            ragged, per_tensor_scale=largest, is_swizzled_scales=tiled
        )
        for element in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float4_e2m1fn_x2):
            name = f"mx_{str(element).removeprefix('torch.')}_{kind}.weight"
            state[name] = MXTensor.to_mx(weight(40, 96), element, 32, is_swizzled_scales=tiled)
    experts = weight(2, 128, 32)
    each = per_tensor_amax_to_scale(experts.abs().amax((1, 2), keepdim=True))
    state["experts.gate_up_proj"] = NVFP4Tensor.to_nvfp4(
        experts, per_tensor_scale=each, is_swizzled_scales=True
    )
    _write(folder, state)


def _int4(folder: Path) -> None:
    state: State = {}
    reference: dict[str, torch.Tensor] = {}

    def add(name: str, tensor: Any, plain: torch.Tensor) -> None:
        state[name] = tensor
        reference[name] = plain.to(torch.bfloat16).contiguous()

    codes, scale, zero = _tinygemm(weight(24, 128), 32)
    signed, grids = codes - 8, (scale.T.contiguous(), zero.T.contiguous())
    plain = _spread(signed, scale, zero, 32)
    halves = (signed[:, ::2] & 15) | (signed[:, 1::2] & 15) << 4
    halves = halves.to(torch.uint8).view(torch.int8)
    add("rows.weight", ao.Int4Tensor(halves, *grids, [1, 32], torch.Size((24, 128))), plain)
    columns = weight(128) + 1
    scaled = ao.Int4Tensor(halves, *grids, [1, 32], torch.Size((24, 128)), act_pre_scale=columns)
    add("scaled.weight", scaled, plain * columns.float())
    stack = [torch.stack([one, one.flip(0)]) for one in (halves, *grids)]
    upside = _spread(signed.flip(0), scale.flip(1), zero.flip(1), 32)
    experts = ao.Int4Tensor(*stack, [1, 1, 32], torch.Size((2, 24, 128)))
    add("experts.gate_up_proj", experts, torch.stack([plain, upside]))

    padded = torch.nn.functional.pad(weight(20, 200), (0, 1024 - 200, 0, 4))
    codes, scale, zero = _tinygemm(padded, 64)
    pairs = torch.stack([scale, zero], -1).transpose(0, 1).contiguous()
    tiles = ao.Int4TilePackedTo4dTensor(_packed_tiles(codes), pairs, [1, 64], torch.Size((20, 200)))
    add("tiles.weight", tiles, _spread(codes - 8, scale, zero, 64)[:20, :200])

    whole = torch.randint(0, 16, (24, 16), dtype=torch.int8)
    codes = torch.randint(0, 16, (24, 128), dtype=torch.int32)
    words = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8).view(torch.int32)
    zeros = whole[:, :4].T.contiguous()
    scale = weight(24, 4).abs()
    xpu = ao.Int4PlainInt32Tensor(
        words, scale.T.contiguous(), zeros, [1, 32], torch.Size((24, 128))
    )
    shifted = codes.unflatten(1, (4, 32)) - whole[:, :4, None]
    add("words.weight", xpu, (shifted * scale.float()[:, :, None]).flatten(1))
    _write(folder, state, reference)


def _tinygemm(plain: torch.Tensor, group: int) -> tuple[torch.Tensor, ...]:
    """Return codes of 0 to 15, scales and zeros as torchao chooses them for its int4 kernels."""
    block, bounds = (1, group), {"quant_min": 0, "quant_max": 15}
    scale, zero = quant_primitives._choose_qparams_affine_tinygemm(
        plain,
        ao.MappingType.ASYMMETRIC,
        block,
        torch.int32,
        **bounds,
        scale_dtype=plain.dtype,
        zero_point_dtype=plain.dtype,
    )
    codes = quant_primitives._quantize_affine_tinygemm(
        plain, block, scale, zero, torch.int32, **bounds
    )
    return codes, scale.reshape(len(plain), -1), zero.reshape(len(plain), -1)


def _spread(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group: int
) -> torch.Tensor:
    spread = codes.unflatten(1, (-1, group)) * scale.float()[..., None]
    return (spread + zero.float()[..., None]).flatten(1)


def _packed_tiles(codes: torch.Tensor) -> torch.Tensor:
    """Return what `_convert_weight_to_int4pack` returns on CUDA with 8 inner tiles, one by one."""
    rows, columns = codes.shape
    packed = torch.zeros(rows // 8, columns // 128, 32, 4, dtype=torch.int64)
    order = (0, 8, 16, 24, 1, 9, 17, 25)
    for tall in range(rows // 8):
        for wide in range(columns // 128):
            for lane in range(32):
                for word in range(4):
                    first = wide * 128 + word * 32 + lane % 4 * 2
                    for place, offset in enumerate(order):
                        code = int(codes[tall * 8 + lane // 4, first + offset])
                        packed[tall, wide, lane, word] |= code << 4 * place
    return packed.to(torch.int32)


def _sharded(folder: Path) -> None:
    """A whole model as transformers saves it, in shards that part codes from scales."""
    from transformers import LlamaConfig, LlamaForCausalLM, TorchAoConfig

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=88,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=32,
    )
    by_name = ao.FqnToConfig(
        {
            "_default": ao.Int8WeightOnlyConfig(version=2),
            "re:.*q_proj": ao.Float8WeightOnlyConfig(version=2),
            "model.layers.0.mlp.gate_proj": None,
        }
    )
    with tempfile.TemporaryDirectory() as plain:
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(plain)
        model = LlamaForCausalLM.from_pretrained(
            plain, dtype=torch.bfloat16, quantization_config=TorchAoConfig(by_name)
        )
    model.save_pretrained(folder, max_shard_size="12KB")
    (folder / "generation_config.json").unlink()
    reference = {
        name: one.dequantize() for name, one in model.named_parameters() if hasattr(one, "qdata")
    }
    save_file(reference, folder / "reference.safetensors")


def _colon(folder: Path) -> None:
    float8 = ao.Float8WeightOnlyConfig(version=2)
    intx = ao.IntxWeightOnlyConfig(torch.int4, granularity.PerGroup(32), version=2)
    model = torch.nn.Sequential(torch.nn.Linear(86, 24), torch.nn.Linear(64, 40))
    model.to(torch.bfloat16)
    ao.quantize_(model[0], float8)
    ao.quantize_(model[1], intx)
    _write(folder, {name: one.detach().data for name, one in model.state_dict().items()})


def _write(folder: Path, state: State, reference: dict[str, torch.Tensor] | None = None) -> None:
    if "0.bias" not in state:
        state["model.norm.weight"] = torch.ones(64, dtype=torch.bfloat16)
    if reference is None:
        held = {name: one for name, one in state.items() if hasattr(one, "qdata")}
        reference = {name: one.dequantize().contiguous() for name, one in held.items()}
    tensors, metadata = flatten_tensor_state_dict(state)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata)
    save_file(reference, folder / "reference.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "model_type": "llama",
        "quantization_config": {"quant_method": "torchao", "modules_to_not_convert": None},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
