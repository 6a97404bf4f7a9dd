"""Gemma's 2, 4 and 8 bits against transformers' values; bits come from config.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptd.errors import CheckpointCorrupt
from ckptd.quant.formula import Arith
from tests.quant import decoding

CASE = Path(__file__).parents[2] / "data" / "quant" / "gemma_mobile"
LAYER = "model.layers.0"
Q = f"{LAYER}.self_attn.q_proj"
EMBED = "model.embed_tokens"

Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize("step", [None, 1, 7])
def test_library_arithmetic_is_bit_equal(step: int | None) -> None:
    """With scales rounded first, as the modules do it, every weight has transformers' bits."""
    decoding.assert_bit_equal(decoding.decoded(CASE, step=step), decoding.reference(CASE))


def test_float32_arithmetic_is_close() -> None:
    """Scales stay in float32: a tensor differs by the rounding of scales to bfloat16, 0.5 %."""
    found = decoding.decoded(CASE, arith=Arith.FLOAT32)
    for name, expected in decoding.reference(CASE).items():
        error = (found[name].double() - expected.double()).norm() / expected.double().norm()
        assert error <= 5e-3, name


def test_scales_of_activations_and_caches_are_dropped() -> None:
    """Nothing is left beside the weights."""
    _, found = decoding.find(CASE)
    gone = {name for group in found.groups for name in group.consumed} | set(found.dropped)
    assert load_file(CASE / "model.safetensors").keys() == gone


def test_the_first_match_in_a_name_tells_the_bits() -> None:
    """Of several patterns the one that matches furthest left counts, as in transformers."""
    schemes = {group.name: group.scheme for group in decoding.find(CASE)[1].groups}
    assert schemes[f"{LAYER}.self_attn.o_proj.weight"].startswith("8-bit")
    assert schemes[f"{LAYER}.self_attn.q_proj.weight"].startswith("4-bit")
    assert schemes[f"{LAYER}.mlp.up_proj.weight"].startswith("2-bit")


@pytest.mark.parametrize(
    "settings",
    [
        {"num_bits": 3},
        {"num_bits": "4"},
        {"num_bits": [4]},
        {"num_bits": True},
        {"num_bits": None},
        {"module_quant_configs": ["mlp"]},
        {"module_quant_configs": {"mlp": 2}},
        {"module_quant_configs": {"mlp": {"num_bits": 10**30}}},
        {"module_quant_configs": {"mlp(": {"num_bits": 2}}},
    ],
)
def test_settings_of_another_kind_are_refused(tmp_path: Path, settings: dict[str, object]) -> None:
    """Bits that are no bits and patterns that are no patterns name the config."""
    _write(tmp_path, lambda tensors: None, settings)
    with pytest.raises(CheckpointCorrupt, match="not one of Gemma's"):
        decoding.find(tmp_path)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "bf16"])
def test_a_dtype_that_cannot_be_computed_in_is_refused(tmp_path: Path, dtype: str) -> None:
    """config.json tells the dtype of the model's weights."""
    _write(tmp_path, lambda tensors: None, {}, dtype=dtype)
    with pytest.raises(CheckpointCorrupt, match="dtype to compute in"):
        decoding.find(tmp_path)


def _drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def _set(name: str, value: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(name, value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_drop(f"{Q}.weight"), f"{Q}.weight"),
        (_drop(f"{Q}.weight_scale"), f"{Q}.weight_scale"),
        (_drop(f"{EMBED}.embedding_scale"), f"{EMBED}.embedding_scale"),
        (_drop(f"{EMBED}.embedding_quantized"), f"{EMBED}.embedding_quantized"),
        (_set(f"{Q}.weight_scale", torch.ones(47, 1)), "48 x 1"),
        (_set(f"{Q}.weight_scale", torch.ones(48)), "48 x 1"),
        (_set(f"{Q}.weight_scale", torch.ones(48, 3)), "whole blocks of 64"),
        (_set(f"{Q}.weight_scale", torch.ones(48, 0)), "48 x 1"),
        (_set(f"{Q}.weight_scale", torch.ones(48, 1, dtype=torch.int8)), "a float"),
        (_set(f"{Q}.weight", torch.ones(48, 64, dtype=torch.int8)), "U8 for 4 bits"),
        (_set(f"{Q}.weight", torch.ones(48, 16, dtype=torch.uint8)), "32 columns for 4 bits"),
        (_set(f"{Q}.weight", torch.ones(48, dtype=torch.uint8)), "two axes"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, change: Callable[[Tensors], None], text: str
) -> None:
    """Each missing or contradicting part is refused by name."""
    _write(tmp_path, change, {})
    with pytest.raises(CheckpointCorrupt, match=text):
        decoding.find(tmp_path)


def _write(
    folder: Path,
    change: Callable[[Tensors], None],
    settings: dict[str, object],
    dtype: str = "bfloat16",
) -> None:
    tensors = load_file(CASE / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((CASE / "config.json").read_text())
    config["quantization_config"] |= settings
    config["dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config))
