"""AMD Quark: real exports against the library's own dequantizer; damage is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptd.errors import CheckpointCorrupt, CheckpointRefused, CheckpointUnsupported
from ckptd.quant.formats import quark
from ckptd.quant.formula import Arith
from tests.quant import copies, decoding

DATA = Path(__file__).parents[2] / "data" / "quant"
CASES = tuple(sorted(path.name for path in DATA.glob("quark_*")))
INT4, INT8, MXFP4 = "quark_int4", "quark_int8_channel", "quark_mxfp4"
K = "model.layers.0.self_attn.k_proj"

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arith", list(Arith))
@pytest.mark.parametrize("step", [None, 1])
def test_values_are_the_library_s(case: str, arith: Arith, step: int | None) -> None:
    """The library computes in float32: both arithmetics have its bits, however rows are divided."""
    assert decoding.find(DATA / case)[0] is quark.FORMAT
    found = decoding.decoded(DATA / case, arith=arith, step=step)
    decoding.assert_bit_equal(found, decoding.reference(DATA / case))


def test_a_layer_may_have_its_own_kind(tmp_path: Path) -> None:
    """What the config says of a layer by pattern goes before what it says of all."""

    def change(said: Config) -> None:
        own = said["global_quant_config"]
        said["layer_quant_config"] = {"*k_proj": own}
        said["global_quant_config"] = {"weight": {"dtype": "uint4", "group_size": 7}}

    path = copies.changed(DATA / INT4, tmp_path / "made", quantization=change)
    decoding.assert_bit_equal(decoding.decoded(path), decoding.reference(DATA / INT4))


def test_scales_of_activations_are_dropped(tmp_path: Path) -> None:
    """What only quantized inference needs has no place in a plain model."""
    names = {f"{K}.input_scale", f"{K}.output_scale", f"{K}.input_zero_point"}
    path = copies.changed(
        DATA / "quark_fp8",
        tmp_path / "made",
        tensors=lambda held: held.update({name: torch.ones(()) for name in names}),
    )
    assert set(decoding.find(path)[1].dropped) == names


DAMAGE: dict[str, tuple[str, Callable[[Tensors], Any], str]] = {
    "no scale": (INT8, lambda t: t.pop(f"{K}.weight_scale"), f"{K}.weight"),
    "no codes": (INT8, lambda t: t.pop(f"{K}.weight"), f"{K}.weight_scale"),
    "int8 with a wrong scale": (
        INT8,
        lambda t: t.update({f"{K}.weight_scale": torch.ones(5)}),
        f"{K}.weight_scale",
    ),
    "int8 with whole numbers": (
        INT8,
        lambda t: t.update({f"{K}.weight_scale": torch.ones(36, dtype=torch.int32)}),
        f"{K}.weight_scale",
    ),
    "int8 with too few zeros": (
        INT8,
        lambda t: t.update({f"{K}.weight_zero_point": torch.ones(3, dtype=torch.int8)}),
        f"{K}.weight_zero_point",
    ),
    "int4 with a wrong scale": (
        INT4,
        lambda t: t.update({f"{K}.weight_scale": torch.ones(1, 36)}),
        f"{K}.weight_scale",
    ),
    "truncated int4": (
        INT4,
        lambda t: t.update({f"{K}.weight": t[f"{K}.weight"][:, :-1].contiguous()}),
        f"{K}.weight",
    ),
    "int4 with wrong zeros": (
        INT4,
        lambda t: t.update({f"{K}.weight_zero_point": torch.ones(2, 4, dtype=torch.int32)}),
        f"{K}.weight_zero_point",
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


CONFIGS: dict[str, Callable[[Config], Any]] = {
    "no spec": lambda said: said.pop("global_quant_config"),
    "a list of specs": lambda said: said.update(global_quant_config={"weight": [1, 2]}),
    "no dtype": lambda said: said["global_quant_config"]["weight"].pop("dtype"),
    "another dtype": lambda said: said["global_quant_config"]["weight"].update(dtype="int3"),
    "a dtype of no type": lambda said: said["global_quant_config"]["weight"].update(dtype=[4]),
    "no groups": lambda said: said["global_quant_config"]["weight"].update(qscheme="per_channel"),
    "groups of text": lambda said: said["global_quant_config"]["weight"].update(group_size="32"),
    "groups below none": lambda said: said["global_quant_config"]["weight"].update(group_size=-1),
    "another order": lambda said: said["export"].update(pack_method="random"),
    "rotated": lambda said: said.update(algo_config=[{"name": "rotation"}]),
    "patterns of no type": lambda said: said.update(
        layer_quant_config=[1], global_quant_config="all"
    ),
}


@pytest.mark.parametrize("change", CONFIGS)
def test_configs_that_do_not_say_how(tmp_path: Path, change: str) -> None:
    """4-bit integers are decoded only where the config says all that the tensors do not."""
    path = copies.changed(DATA / INT4, tmp_path / "made", quantization=CONFIGS[change])
    with pytest.raises(CheckpointUnsupported):
        decoding.find(path)


def test_wider_fp4_is_refused(tmp_path: Path) -> None:
    """Six bits (three bytes for four codes) are not taken for four."""
    path = copies.changed(
        DATA / MXFP4,
        tmp_path / "made",
        tensors=lambda held: held.update({f"{K}.weight": torch.zeros(36, 48, dtype=torch.uint8)}),
    )
    with pytest.raises(CheckpointRefused):
        decoding.find(path)
