"""AutoRound: its packings of integers and floats, against its own dequantization."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptd.errors import CheckpointUnsupported
from ckptd.quant.formula import Arith
from tests.quant import copies, decoding

DATA = Path(__file__).parents[2] / "data" / "quant"
CASES = (
    "autoround_auto_gptq",
    "autoround_auto_round",
    "autoround_gptqmodel",
    "autoround_auto_awq",
    "autoround_fp8",
    "autoround_mxfp4",
    "autoround_nvfp4",
)
STORED = DATA / "autoround_auto_round"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arith", Arith)
def test_weights_are_bit_equal(case: str, arith: Arith) -> None:
    """A weight has the library's bits, in its order of roundings and in float32."""
    found = decoding.decoded(DATA / case, arith=arith)
    decoding.assert_bit_equal(found, decoding.reference(DATA / case))


@pytest.mark.parametrize("case", CASES)
def test_values_do_not_depend_on_how_rows_are_divided(case: str) -> None:
    """A weight decoded some granules at a time is the weight decoded at once."""
    found = decoding.decoded(DATA / case, step=1)
    decoding.assert_bit_equal(found, decoding.reference(DATA / case))


def test_widths_and_groups_are_each_modules_own() -> None:
    """Bits come from shapes and groups from extra_config; modules of 16 bits are plain."""
    _, found = decoding.find(STORED)
    said = {group.name: group.scheme for group in found.groups}
    assert said["a.wide.weight"] == "4-bit gptq, groups of 64"
    assert said["a.b7.weight"] == "7-bit gptq, groups of 32"
    assert "a.plain.weight" not in said


@pytest.mark.parametrize("method", ["auto_round", "intel/auto-round", "autoround"])
def test_former_names_of_the_method(method: str, tmp_path: Path) -> None:
    """The method was spelled otherwise before."""
    copy = copies.changed(
        STORED, tmp_path / "old", quantization=lambda one: one.update(quant_method=method)
    )
    decoding.assert_bit_equal(decoding.decoded(copy), decoding.reference(STORED))


def test_only_its_own_file(tmp_path: Path) -> None:
    """A config.json that says nothing is enough beside quantization_config.json."""
    said: dict[str, Any] = {}
    copy = copies.changed(
        STORED, tmp_path / "bare", config=lambda one: said.update(one.pop("quantization_config"))
    )
    (copy / "quantization_config.json").write_text(json.dumps(said))
    assert decoding.find(copy)[0].name == "AutoRound"
    decoding.assert_bit_equal(decoding.decoded(copy), decoding.reference(STORED))


def test_without_a_packing_zeros_are_less_one(tmp_path: Path) -> None:
    """A config without packing_format means the packing of GPTQ."""
    case = DATA / "autoround_auto_gptq"
    copy = copies.changed(
        case, tmp_path / "bare", quantization=lambda one: one.pop("packing_format")
    )
    decoding.assert_bit_equal(decoding.decoded(copy), decoding.reference(case))


def test_scales_of_activations_are_dropped() -> None:
    """What only quantized inference needs goes."""
    _, found = decoding.find(DATA / "autoround_nvfp4")
    assert found.dropped == ("model.layers.0.self_attn.k_proj.input_global_scale",)


@pytest.mark.parametrize(
    "said",
    [
        {"rotation_config": {"hadamard_type": "random_hadamard"}},
        {"data_type": "mx_int4"},
        {"data_type": "nvfp4_v2"},
    ],
)
def test_what_is_not_decoded_is_refused_by_name(said: copies.Config, tmp_path: Path) -> None:
    """Rotations at run time and types of codes that nobody else reads are refused."""
    copy = copies.changed(STORED, tmp_path / "bad", quantization=lambda one: one.update(said))
    with pytest.raises(CheckpointUnsupported):
        decoding.find(copy)


def test_codes_of_other_codes_are_refused(tmp_path: Path) -> None:
    """4-bit codes of FP8 values need two scales that belong to a kernel."""
    extra = {"a.b4.w_bf16_to_fp8_scale": torch.ones(1)}
    copy = copies.changed(STORED, tmp_path / "bad", tensors=lambda one: one.update(extra))
    with pytest.raises(CheckpointUnsupported) as caught:
        decoding.find(copy)
    assert caught.value.tensor == "a.b4.w_bf16_to_fp8_scale"
