"""ModelOpt: real exports against the library's own tensor classes; damage is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptd.checkpoint import checkpoint
from ckptd.checkpoint.dtypes import Dtype
from ckptd.errors import CheckpointCorrupt, CheckpointUnsupported
from ckptd.quant import stored
from ckptd.quant.formats import modelopt
from ckptd.quant.formula import Arith
from tests.quant import copies, decoding

DATA = Path(__file__).parents[2] / "data" / "quant"
EXACT = (
    "modelopt_nvfp4",
    "modelopt_mxfp8",
    "modelopt_mxfp4",
    "modelopt_awq",
)
"""Formats whose library computes in float32."""
ROUNDED = (
    "modelopt_fp8",
    "modelopt_fp8_channel",
    "modelopt_fp8_block",
    "modelopt_int8",
    "modelopt_mixed_moe",
)
"""Formats whose library rounds scales to the result's dtype first."""
MAX_RELATIVE = 5e-3
NVFP4, AWQ, INT8 = "modelopt_nvfp4", "modelopt_awq", "modelopt_int8"
K = "model.layers.0.self_attn.k_proj"
DOWN = "model.layers.0.mlp.down_proj"

Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize("case", [*EXACT, *ROUNDED])
@pytest.mark.parametrize("step", [None, 1, 5])
def test_values_are_the_library_s(case: str, step: int | None) -> None:
    """In the library's order of roundings every bit is its own, however rows are divided."""
    found = decoding.decoded(DATA / case, arith=Arith.LIBRARY, step=step)
    decoding.assert_bit_equal(found, decoding.reference(DATA / case))


@pytest.mark.parametrize("case", EXACT)
def test_float32_is_exact_where_the_library_is(case: str) -> None:
    """Where the library computes in float32, so do both arithmetics."""
    found = decoding.decoded(DATA / case, arith=Arith.FLOAT32)
    decoding.assert_bit_equal(found, decoding.reference(DATA / case))


@pytest.mark.parametrize("case", ROUNDED)
def test_float32_is_near_where_the_library_rounds_scales(case: str) -> None:
    """Scales that are not rounded differ by at most half a bfloat16 step from rounded ones."""
    found = decoding.decoded(DATA / case, arith=Arith.FLOAT32)
    for name, value in decoding.reference(DATA / case).items():
        difference = (found[name].float() - value.float()).norm() / value.float().norm()
        assert difference <= MAX_RELATIVE, name


@pytest.mark.parametrize("case", [*EXACT, *ROUNDED])
def test_nothing_quantized_is_left(case: str) -> None:
    """Every tensor but the norm belongs to a weight, or is a scale of activations."""
    seen = stored.of_checkpoint(checkpoint.open_checkpoint(DATA / case))
    found = decoding.find(DATA / case)[1]
    used = {name for group in found.groups for name in group.consumed} | set(found.dropped)
    assert all("norm" in name for name in seen.tensors.keys() - used)


@pytest.mark.parametrize("case", ["modelopt_fp8", NVFP4])
def test_its_own_config_is_enough(tmp_path: Path, case: str) -> None:
    """A folder with hf_quant_config.json and nothing in config.json is ModelOpt's."""
    path = copies.changed(
        DATA / case, tmp_path / "made", config=lambda said: said.pop("quantization_config")
    )
    shutil.copy(DATA / case / "hf_quant_config.json", path)
    chosen, _ = decoding.find(path)
    assert chosen is modelopt.FORMAT
    assert "hf_quant_config.json" in chosen.side_files
    decoding.assert_bit_equal(decoding.decoded(path), decoding.reference(DATA / case))


def test_scales_of_the_cache_are_dropped(tmp_path: Path) -> None:
    """Scales and biases of the key and value cache go with those of activations."""
    names = {f"{K}.k_scale", f"{K.replace('k_proj', 'v_proj')}.v_scale", f"{K}.k_bias"}
    path = copies.changed(
        DATA / "modelopt_fp8",
        tmp_path / "made",
        tensors=lambda held: held.update({name: torch.ones(1) for name in names}),
    )
    found = decoding.find(path)[1]
    assert names <= set(found.dropped)
    assert f"{K}.input_scale" in found.dropped


def test_experts_in_one_tensor_packed_across_their_inputs(tmp_path: Path) -> None:
    """Llama 4's experts in NVFP4: two inputs a byte, sixteen a scale, a global scale each."""
    torch.manual_seed(0)
    codes = torch.randint(0, 256, (3, 32, 24), dtype=torch.uint8)
    scale = (torch.rand(3, 4, 24) * 10).to(torch.float8_e4m3fn)
    overall = torch.rand(3)
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    pairs = torch.stack([codes & 15, codes >> 4], 2).flatten(1, 2).long()
    scales = (scale.float() * overall[:, None, None]).repeat_interleave(16, 1)
    expected = (table[pairs] * scales).bfloat16()
    name = "model.layers.0.feed_forward.experts.gate_up_proj"

    def change(tensors: Tensors) -> None:
        tensors[name] = codes
        tensors[f"{name}_weight_scale"] = scale
        tensors[f"{name}_weight_scale_2"] = overall
        tensors[f"{name}_input_scale"] = torch.ones(())

    path = copies.changed(DATA / NVFP4, tmp_path / "made", tensors=change)
    for step in (None, 1):
        assert torch.equal(decoding.decoded(path, step=step)[name], expected)


@pytest.mark.parametrize("case", [NVFP4, INT8])
def test_the_scale_of_columns_multiplies(tmp_path: Path, case: str) -> None:
    """What activations were multiplied by multiplies the weight's columns."""
    pre_scale = torch.rand(128) + 0.5
    path = copies.changed(
        DATA / case,
        tmp_path / "made",
        tensors=lambda held: held.update({f"{K}.pre_quant_scale": pre_scale}),
    )
    found = decoding.decoded(path, arith=Arith.FLOAT32, dtype=Dtype.F32)[f"{K}.weight"]
    plain = decoding.decoded(DATA / case, arith=Arith.FLOAT32, dtype=Dtype.F32)[f"{K}.weight"]
    assert torch.equal(found, plain * pre_scale)


def test_two_stages_are_the_first_one(tmp_path: Path) -> None:
    """W4A8_AWQ's second scale says how kernels round on to FP8: the weight is int4's."""
    path = copies.changed(
        DATA / AWQ,
        tmp_path / "made",
        tensors=lambda held: held.update({f"{DOWN}.weight_scale_2": torch.tensor(0.5)}),
    )
    decoding.assert_bit_equal(decoding.decoded(path), decoding.reference(DATA / AWQ))


def test_groups_that_the_config_does_not_say(tmp_path: Path) -> None:
    """Where configs speak of another size or none, the shapes decide."""
    path = copies.changed(
        DATA / AWQ,
        tmp_path / "made",
        quantization=lambda said: said.update(group_size="many", quantized_layers=[1]),
    )
    own = {"quantization": {"group_size": 7, "quantized_layers": {DOWN: {"group_size": -1}}}}
    (path / "hf_quant_config.json").write_text(json.dumps(own))
    decoding.assert_bit_equal(decoding.decoded(path), decoding.reference(DATA / AWQ))


DAMAGE: dict[str, tuple[str, Callable[[Tensors], Any], str]] = {
    "no scale": (NVFP4, lambda t: t.pop(f"{K}.weight_scale"), f"{K}.weight"),
    "no global scale": (NVFP4, lambda t: t.pop(f"{K}.weight_scale_2"), f"{K}.weight_scale"),
    "a global scale of two": (
        NVFP4,
        lambda t: t.update({f"{K}.weight_scale_2": torch.ones(2)}),
        f"{K}.weight_scale_2",
    ),
    "no codes": (NVFP4, lambda t: t.pop(f"{K}.weight"), f"{K}.weight_scale_2"),
    "truncated codes": (
        NVFP4,
        lambda t: t.update({f"{K}.weight": t[f"{K}.weight"][:, :8].contiguous()}),
        f"{K}.weight_scale",
    ),
    "a wrong grid": (
        NVFP4,
        lambda t: t.update({f"{K}.weight_scale": t[f"{K}.weight_scale"][:3].contiguous()}),
        f"{K}.weight_scale",
    ),
    "int4 without its rows": (
        AWQ,
        lambda t: t.update({f"{DOWN}.weight": t[f"{DOWN}.weight"][:-1].contiguous()}),
        f"{DOWN}.weight_scale",
    ),
    "a scale of too few columns": (
        AWQ,
        lambda t: t.update({f"{DOWN}.pre_quant_scale": torch.ones(3)}),
        f"{DOWN}.pre_quant_scale",
    ),
    "int8 with a wrong scale": (
        INT8,
        lambda t: t.update({f"{K}.weight_scale": torch.ones(5)}),
        f"{K}.weight_scale",
    ),
    "int8 with exponents": (
        INT8,
        lambda t: t.update({f"{K}.weight_scale": torch.ones(32, dtype=torch.uint8)}),
        f"{K}.weight_scale",
    ),
    "FP8 with a global scale": (
        "modelopt_fp8",
        lambda t: t.update({f"{K}.weight_scale_2": torch.ones(())}),
        f"{K}.weight_scale_2",
    ),
    "a vector of codes": (
        NVFP4,
        lambda t: t.update({f"{K}.weight": t[f"{K}.weight"].flatten()}),
        f"{K}.weight",
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_wider_scales_of_nvfp4_are_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    """Scales that were saved in a wider float, where E4M3 is exact, give the same bits."""

    def widen(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            tensors[name] = tensors[name].to(dtype)

    path = copies.changed(DATA / NVFP4, tmp_path / "made", tensors=widen)
    decoding.assert_bit_equal(decoding.decoded(path), decoding.reference(DATA / NVFP4))


def test_svdquant_is_refused(tmp_path: Path) -> None:
    """A low-rank part beside the codes cannot become one plain weight silently."""
    name = f"{K}.svdquant_lora_a"
    path = copies.changed(
        DATA / NVFP4,
        tmp_path / "made",
        tensors=lambda held: held.update({name: torch.ones(2, 128)}),
    )
    with pytest.raises(CheckpointUnsupported, match="low-rank") as refused:
        decoding.find(path)
    assert refused.value.tensor == name
