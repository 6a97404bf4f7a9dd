"""FP8 and FBGEMM: every kind of scale against the libraries' values; damage is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ckptd.checkpoint import checkpoint
from ckptd.checkpoint.dtypes import Dtype
from ckptd.errors import CheckpointCorrupt, CheckpointRefused
from ckptd.quant import registry, stored
from ckptd.quant.formats import fbgemm, fp8
from ckptd.quant.formula import Arith
from tests.quant import copies, decoding

DATA = Path(__file__).parents[2] / "data" / "quant"
FP8 = ("fp8_block_ragged", "fp8_scales", "fp8_deepseek_v4", "fp8_mxfp8", "fp8_mistral")
SCALES, V4, EXPERTS = "fp8_scales", "fp8_deepseek_v4", "fbgemm"
Q = "model.layers.0.q.weight"
K = "model.layers.0.k.weight"
W1 = "layers.0.ffn.experts.0.w1.weight"

Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize("case", [*FP8, "fbgemm"])
@pytest.mark.parametrize("arith", list(Arith))
@pytest.mark.parametrize("step", [None, 1, 3])
def test_values_are_the_library_s(case: str, arith: Arith, step: int | None) -> None:
    """Libraries compute in float32: both arithmetics have their bits, however rows are divided."""
    found = decoding.decoded(DATA / case, arith=arith, step=step)
    decoding.assert_bit_equal(found, decoding.reference(DATA / case))


@pytest.mark.parametrize("dtype", [Dtype.F32, Dtype.F16, Dtype.BF16])
def test_other_dtypes_are_rounded_once(dtype: Dtype) -> None:
    """In another dtype a value is the float32 one, rounded once."""
    exact = decoding.decoded(DATA / SCALES, arith=Arith.FLOAT32, dtype=Dtype.F32)
    found = decoding.decoded(DATA / SCALES, arith=Arith.FLOAT32, dtype=dtype)
    kind = getattr(torch, str(dtype.torch_name))
    decoding.assert_bit_equal(found, {name: value.to(kind) for name, value in exact.items()})


@pytest.mark.parametrize("case", [*FP8, "fbgemm"])
def test_nothing_quantized_is_left(case: str) -> None:
    """Every tensor but the norm belongs to a weight, or is a scale of activations."""
    seen = stored.of_checkpoint(checkpoint.open_checkpoint(DATA / case))
    found = decoding.find(DATA / case)[1]
    used = {name for group in found.groups for name in group.consumed} | set(found.dropped)
    assert seen.tensors.keys() - used == {"model.norm.weight"}


def test_scales_of_activations_are_dropped() -> None:
    """What only quantized inference needs has no place in a plain model."""
    found = decoding.find(DATA / SCALES)[1]
    assert set(found.dropped) == {
        "model.layers.0.k.activation_scale",
        "model.layers.0.v.input_scale",
    }


@pytest.mark.parametrize("case", ["fp8_mistral", "fp8_block_ragged"])
def test_tensors_tell_where_no_config_does(tmp_path: Path, case: str) -> None:
    """Without a quantization config, 8-bit floats with scales beside them are FP8."""
    assert decoding.find(DATA / "fp8_mistral")[0] is fp8.FORMAT
    seen = stored.of_checkpoint(checkpoint.open_checkpoint(DATA / case))
    assert fp8.FORMAT.recognise(seen) is not None


def test_methods() -> None:
    """The formats answer to the names that config.json gives them."""
    by_method = {method: one for one in registry.FORMATS for method in one.methods}
    assert by_method["fp8"] is by_method["mxfp8"] is fp8.FORMAT
    assert by_method["fbgemm_fp8"] is fbgemm.FORMAT


@pytest.mark.parametrize("rows", [129, 192, 256, 300])
@pytest.mark.parametrize("columns", [1, 100, 128, 272])
@pytest.mark.parametrize("declared", [[128, 128], None, [64, 64]])
def test_the_block_is_not_the_weight_divided_by_its_grid(
    tmp_path: Path, rows: int, columns: int, declared: list[int] | None
) -> None:
    """A grid covers a weight with whole blocks, of which the last are partial."""
    size = 64 if declared == [64, 64] else 128
    scale = torch.rand(-(-rows // size), -(-columns // size)) + 0.5
    codes = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    expected = (
        scale.repeat_interleave(size, 0)[:rows].repeat_interleave(size, 1)[:, :columns]
        * codes.float()
    ).bfloat16()

    def change(tensors: Tensors) -> None:
        tensors.clear()
        tensors |= {"a.weight": codes, "a.weight_scale_inv": scale}

    path = copies.changed(
        DATA / SCALES,
        tmp_path / "made",
        tensors=change,
        quantization=lambda said: said.update(weight_block_size=declared),
    )
    assert torch.equal(decoding.decoded(path)["a.weight"], expected)


def test_halves_of_gate_and_up_with_grids_of_their_own(tmp_path: Path) -> None:
    """Experts fused after they were quantized have a grid for gate and another for up."""
    codes = torch.randn(2, 192, 64).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 2, 1) + 0.5
    scale4 = torch.rand(2, 4, 1) + 0.5  # 96 rows are one block, 192 are two: four of 160
    long = torch.randn(2, 320, 64).to(torch.float8_e4m3fn)

    def change(tensors: Tensors) -> None:
        tensors.clear()
        tensors |= {
            "short.gate_up_proj": codes[:, :96].contiguous(),
            "short.gate_up_proj_scale_inv": scale,
            "long.gate_up_proj": long,
            "long.gate_up_proj_scale_inv": scale4,
        }

    path = copies.changed(DATA / SCALES, tmp_path / "made", tensors=change)
    found = decoding.decoded(path)
    expected = codes[:, :96].float() * scale.repeat_interleave(48, 1)
    assert torch.equal(found["short.gate_up_proj"], expected.bfloat16())
    by_row = torch.cat(
        [
            scale4[:, place : place + 1].expand(2, rows, 1)
            for place, rows in enumerate((128, 32) * 2)
        ],
        1,
    )
    assert torch.equal(found["long.gate_up_proj"], (long.float() * by_row).bfloat16())


def test_nan_codes_stay_nan(tmp_path: Path) -> None:
    """A NaN among the codes is one in the weight, and nothing else changes."""
    reference = decoding.reference(DATA / SCALES)[Q]

    def change(tensors: Tensors) -> None:
        raw = tensors[Q].view(torch.uint8)
        raw[5, 7], raw[9, 3] = 0x7F, 0xFF

    path = copies.changed(DATA / SCALES, tmp_path / "made", tensors=change)
    found = decoding.decoded(path)[Q]
    changed = found.isnan()
    assert changed.nonzero().tolist() == [[5, 7], [9, 3]]
    assert torch.equal(found[~changed], reference[~changed])


@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (1, 1)])
def test_empty_and_tiny_weights(tmp_path: Path, shape: tuple[int, int]) -> None:
    """A weight without elements, or with one, decodes to as much."""

    def change(tensors: Tensors) -> None:
        tensors.clear()
        grid = [-(-size // 128) for size in shape]
        tensors["a.weight"] = torch.ones(shape).to(torch.float8_e4m3fn)
        tensors["a.weight_scale_inv"] = torch.full(grid, 2.0)

    path = copies.changed(DATA / SCALES, tmp_path / "made", tensors=change)
    found = decoding.decoded(path)["a.weight"]
    assert torch.equal(found, torch.full(shape, 2.0, dtype=torch.bfloat16))


def test_no_experts(tmp_path: Path) -> None:
    """Fused experts of which there are none decode to none."""
    name = "model.layers.0.mlp.experts.gate_up_proj"

    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name][:0].clone()
        tensors[f"{name}_scale_inv"] = tensors[f"{name}_scale_inv"][:0].clone()

    path = copies.changed(DATA / SCALES, tmp_path / "made", tensors=change)
    assert decoding.decoded(path)[name].shape == (0, 128, 16)


DAMAGE: dict[str, tuple[str, Callable[[Tensors], Any], str]] = {
    "no scale": (SCALES, lambda t: t.pop(f"{Q}_scale_inv"), Q),
    "a scale alone": (SCALES, lambda t: t.pop(Q), f"{Q}_scale_inv"),
    "a plain weight": (
        SCALES,
        lambda t: t.update({Q: t[Q].bfloat16()}),
        f"{Q}_scale_inv",
    ),
    "a wrong grid": (
        SCALES,
        lambda t: t.update({f"{Q}_scale_inv": torch.ones(3, 2)}),
        f"{Q}_scale_inv",
    ),
    "a vector of odd length": (
        SCALES,
        lambda t: t.update({f"{Q}_scale_inv": torch.ones(7)}),
        f"{Q}_scale_inv",
    ),
    "no codes under many scales": (
        SCALES,
        lambda t: t.update({f"{Q}_scale_inv": torch.ones(2, 2), Q: t[Q][:0].clone()}),
        f"{Q}_scale_inv",
    ),
    "whole numbers": (
        SCALES,
        lambda t: t.update({f"{Q}_scale_inv": torch.ones(1, 1, dtype=torch.int32)}),
        f"{Q}_scale_inv",
    ),
    "FP4 with floats": (
        V4,
        lambda t: t.update({W1.replace("weight", "scale"): torch.ones(48, 2)}),
        W1.replace("weight", "scale"),
    ),
    "FP4 with blocks": (
        V4,
        lambda t: t.update({W1.replace("weight", "scale"): torch.ones(1, 1, dtype=torch.uint8)}),
        W1.replace("weight", "scale"),
    ),
    "truncated FP4": (
        V4,
        lambda t: t.update({W1: t[W1][:, :16].contiguous()}),
        W1.replace("weight", "scale"),
    ),
    "fbgemm without scales": (
        EXPERTS,
        lambda t: t.pop("layers.0.feed_forward.experts.down_proj_scale"),
        "layers.0.feed_forward.experts.down_proj",
    ),
    "fbgemm scales alone": (
        EXPERTS,
        lambda t: t.pop("layers.0.mlp.up.weight"),
        "layers.0.mlp.up.weight_scale",
    ),
    "fbgemm scales of rows": (
        EXPERTS,
        lambda t: t.update({"layers.0.mlp.up.weight_scale": torch.ones(80, 1)}),
        "layers.0.mlp.up.weight_scale",
    ),
    "fbgemm scales of experts": (
        EXPERTS,
        lambda t: t.update({"layers.0.feed_forward.experts.gate_up_proj_scale": torch.ones(3, 32)}),
        "layers.0.feed_forward.experts.gate_up_proj_scale",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    """What is missing or does not fit is refused with the tensor's name."""
    case, change, tensor = DAMAGE[damage]
    path = copies.changed(DATA / case, tmp_path / "made", tensors=change)
    with pytest.raises(CheckpointCorrupt) as refused:
        decoding.find(path)
    assert refused.value.tensor == tensor
    assert refused.value.expected is not None
    assert refused.value.hint is not None


@pytest.mark.parametrize(
    "value", ["128", [128], [128, 128, 1], [0, 128], [-1, 2], [1e3, 2], [True, 2], {}, 1 << 80]
)
def test_block_sizes_that_are_none(tmp_path: Path, value: object) -> None:
    """A block size of any other type or number is refused, never followed."""
    path = copies.changed(
        DATA / SCALES,
        tmp_path / "made",
        quantization=lambda said: said.update(weight_block_size=value),
    )
    with pytest.raises(CheckpointRefused, match="weight_block_size"):
        decoding.find(path)


@pytest.mark.parametrize("value", ["int8", 7, None, ["bfloat16"], "nonsense"])
def test_compute_dtypes_that_are_none(tmp_path: Path, value: object) -> None:
    """Where config.json has no usable dtype, the library's result is bfloat16."""
    path = copies.changed(
        DATA / SCALES, tmp_path / "made", config=lambda said: said.update(dtype=value)
    )
    assert {group.dtype for group in decoding.find(path)[1].groups} == {Dtype.BF16}


def test_int_buffers_beside_scales_are_no_weights(tmp_path: Path) -> None:
    """A byte tensor without a scale is not taken for codes."""

    def change(tensors: Tensors) -> None:
        tensors["model.layers.0.buffer"] = torch.zeros(4, dtype=torch.uint8)

    path = copies.changed(DATA / SCALES, tmp_path / "made", tensors=change)
    names = {group.name for group in decoding.find(path)[1].groups}
    assert "model.layers.0.buffer" not in names


def test_llama_4_scales_may_lie_either_way(tmp_path: Path) -> None:
    """Scales of down_proj, written (E, H, 1), count as the (E, 1, H) that they mean."""
    name = "layers.0.feed_forward.experts.down_proj_scale"

    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].transpose(1, 2).contiguous()

    path = copies.changed(DATA / EXPERTS, tmp_path / "made", tensors=change)
    decoding.assert_bit_equal(decoding.decoded(path), decoding.reference(DATA / EXPERTS))


def test_partners_in_another_shard() -> None:
    """The ragged case keeps all scales in a file of their own, and is decoded from both."""
    scales = load_file(DATA / "fp8_block_ragged" / "model-00002-of-00002.safetensors")
    assert set(scales) == {
        name
        for group in decoding.find(DATA / "fp8_block_ragged")[1].groups
        for name in group.consumed
        if "scale" in name
    }
