"""compressed-tensors: every layout against the library's own values, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptd.checkpoint import checkpoint
from ckptd.checkpoint.dtypes import Dtype
from ckptd.errors import CheckpointCorrupt, CheckpointUnsupported
from ckptd.quant import stored
from ckptd.quant.formats import compressed_tensors
from ckptd.quant.formula import Arith
from tests.quant import decoding

DATA = Path(__file__).parents[2] / "data" / "quant"
CASES = ("ct_packed", "ct_bytes", "ct_floats", "ct_experts", "ct_old")

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors, dict[str, Any]], None]
"""Changes the tensors and the quantization config of a checkpoint in place."""


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arith", list(Arith))
def test_both_arithmetics_have_the_librarys_bits(case: str, arith: Arith) -> None:
    """One product and one rounding: in the library's dtype the two arithmetics are the same."""
    found = decoding.decoded(DATA / case, arith=arith)
    decoding.assert_bit_equal(found, decoding.reference(DATA / case))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("step", [1, 5])
def test_values_do_not_depend_on_how_rows_are_divided(case: str, step: int) -> None:
    """A weight decoded a few rows at a time is the weight decoded at once."""
    found = decoding.decoded(DATA / case, step=step)
    decoding.assert_bit_equal(found, decoding.reference(DATA / case))


@pytest.mark.parametrize("case", CASES)
def test_another_dtype_is_rounded_once(case: str) -> None:
    """In bfloat16 a value is within half a unit in the last place of the library's wider one."""
    found = decoding.decoded(DATA / case, arith=Arith.FLOAT32, dtype=Dtype.BF16)
    for name, value in decoding.reference(DATA / case).items():
        torch.testing.assert_close(found[name].float(), value.float(), rtol=2**-8, atol=0)


def test_what_only_inference_needs_is_dropped() -> None:
    """Scales of activations and of the cache go, plain tensors are not touched."""
    _, found = decoding.find(DATA / "ct_experts")
    prefix = "model.layers.0.self_attn.k_proj"
    assert set(found.dropped) == {
        f"{prefix}.input_scale",
        f"{prefix}.output_scale",
        f"{prefix}.k_scale",
    }


def test_every_stored_tensor_is_accounted_for() -> None:
    """Consumed and dropped are all tensors but the plain ones, in files of any number."""
    for case in CASES:
        opened = checkpoint.open_checkpoint(DATA / case)
        _, found = decoding.find(DATA / case)
        consumed = [name for group in found.groups for name in group.consumed]
        assert len(consumed) == len(set(consumed))
        assert opened.tensors.keys() - set(consumed) - set(found.dropped) == {"model.norm.weight"}


def test_a_frozen_checkpoint_keeps_its_plain_weights(tmp_path: Path) -> None:
    """Saved before it was compressed: the weight is plain already, its scales go."""

    def freeze(tensors: Tensors, config: dict[str, Any]) -> None:
        config.update(quantization_status="frozen", format="dense")
        for name in [name for name in tensors if not name.endswith("norm.weight")]:
            del tensors[name]
        tensors["model.nv.weight"] = torch.ones(4, 32, dtype=torch.bfloat16)
        tensors["model.nv.weight_scale"] = torch.ones(4, 2, dtype=torch.bfloat16)
        tensors["model.nv.weight_zero_point"] = torch.zeros(4, 2, dtype=torch.int8)

    _, found = decoding.find(changed(tmp_path, "ct_floats", freeze))
    assert found.groups == ()
    assert set(found.dropped) == {"model.nv.weight_scale", "model.nv.weight_zero_point"}


def test_a_checkpoint_is_recognised_without_a_method(tmp_path: Path) -> None:
    """Config groups, or packed codes with a scale, say what a checkpoint is."""
    for key in ("quant_method", "config_groups"):

        def without(tensors: Tensors, config: dict[str, Any], key: str = key) -> None:
            del config[key]

        path = changed(tmp_path / key, "ct_packed", without)
        seen = stored.of_checkpoint(checkpoint.open_checkpoint(path))
        assert compressed_tensors.FORMAT.recognise(seen) is not None


def rewrite_old(tensors: Tensors, config: dict[str, Any]) -> None:
    """What older writers did: shapes of 32 bits, zeros that are not packed, g_idx of -1."""
    for bits in (3, 6):
        tensors[f"model.{bits}.even.weight_shape"] = tensors[
            f"model.{bits}.even.weight_shape"
        ].int()
        zero = torch.full((37, 3), -1, dtype=torch.int8)
        tensors[f"model.{bits}.even.weight_zero_point"] = zero
        tensors[f"model.{bits}.even.weight_g_idx"] = torch.full((96,), -1, dtype=torch.int32)
    config.pop("version")


def test_older_ways_to_store_the_same_are_read(tmp_path: Path) -> None:
    """A zero of -1 everywhere adds one scale to each value; g_idx of -1 says nothing."""
    path = changed(tmp_path, "ct_old", rewrite_old)
    expected = decoding.reference(DATA / "ct_old")
    found = decoding.decoded(path, arith=Arith.FLOAT32, dtype=Dtype.F32)
    scales = load_file(DATA / "ct_old" / "model.safetensors")
    for bits in (3, 6):
        scale = scales[f"model.{bits}.even.weight_scale"].float().repeat_interleave(32, dim=1)
        # The reference was rounded to bfloat16, so that codes come out of it by rounding.
        codes = (expected[f"model.{bits}.even.weight"].float() / scale).round()
        assert torch.equal(found[f"model.{bits}.even.weight"], (codes + 1) * scale)


def test_a_class_is_the_last_resort_and_shapes_decide_without_any(tmp_path: Path) -> None:
    """Where no target means a module, the only group that its tensors fit is taken."""

    def retarget(tensors: Tensors, config: dict[str, Any]) -> None:
        for group in config["config_groups"].values():
            group["targets"] = ["LlamaMLP"]

    path = changed(tmp_path, "ct_floats", retarget)
    with pytest.raises(CheckpointCorrupt, match="not one group alone fits"):
        decoding.find(path)

    def keep_one(tensors: Tensors, config: dict[str, Any]) -> None:
        retarget(tensors, config)
        for name in [name for name in tensors if ".mx4." not in name and "norm" not in name]:
            del tensors[name]

    path = changed(tmp_path / "one", "ct_floats", keep_one)
    found = decoding.decoded(path)
    assert torch.equal(
        found["model.mx4.weight"], decoding.reference(DATA / "ct_floats")["model.mx4.weight"]
    )


def test_empty_weights_are_decoded(tmp_path: Path) -> None:
    """A weight of no rows, or of no columns, is empty."""

    def empty(tensors: Tensors, config: dict[str, Any]) -> None:
        prefix = "model.layers.3.mlp.even"
        tensors[f"{prefix}.weight_packed"] = torch.empty(0, 5, dtype=torch.int32)
        tensors[f"{prefix}.weight_scale"] = torch.empty(0, 1, dtype=torch.bfloat16)
        tensors[f"{prefix}.weight_shape"] = torch.tensor([0, 43])
        prefix = "model.layers.2.mlp.even"
        tensors[f"{prefix}.weight_packed"] = torch.empty(37, 0, dtype=torch.int32)
        tensors[f"{prefix}.weight_scale"] = torch.empty(37, 0, dtype=torch.bfloat16)
        tensors[f"{prefix}.weight_shape"] = torch.tensor([37, 0])

    found = decoding.decoded(changed(tmp_path, "ct_packed", empty))
    assert found["model.layers.3.mlp.even.weight"].shape == (0, 43)
    assert found["model.layers.2.mlp.even.weight"].shape == (37, 0)


EVEN, UNEVEN = "model.layers.4.mlp.even", "model.layers.4.mlp.uneven"


def replaced(name: str, value: torch.Tensor) -> Change:
    """Return the change that stores `value` as `name`."""
    return lambda tensors, _: tensors.update({name: value})


def removed(*names: str) -> Change:
    """Return the change that removes tensors."""

    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        for name in names:
            del tensors[name]

    return change


def configured(**values: Any) -> Change:
    """Return the change of the quantization config."""
    return lambda _, config: config.update(values)


def weights(**values: Any) -> Change:
    """Return the change of the arguments of the group that `EVEN` is in."""

    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        for group in config["config_groups"].values():
            if EVEN in group["targets"]:
                group["weights"].update(values)

    return change


def shortened(name: str, columns: int) -> Change:
    """Return the change that cuts columns of a tensor off."""

    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors[name] = tensors[name][..., :-columns].contiguous()

    return change


CORRUPT: dict[str, tuple[Change, str]] = {
    "no scale": (removed(f"{EVEN}.weight_scale"), f"{EVEN}.weight_scale"),
    "no shape": (removed(f"{EVEN}.weight_shape"), f"{EVEN}.weight_shape"),
    "no zero point": (removed(f"{UNEVEN}.weight_zero_point"), f"{UNEVEN}.weight_zero_point"),
    "no codes": (removed(f"{EVEN}.weight_packed"), "a weight that is not there"),
    "codes too narrow": (shortened(f"{EVEN}.weight_packed", 1), "does not hold 64 codes"),
    "scale too narrow": (shortened(f"{EVEN}.weight_scale", 1), r"\[37, 2\] \(groups of 32\)"),
    "zeros too narrow": (
        replaced(f"{UNEVEN}.weight_zero_point", torch.zeros(4, 1, dtype=torch.int32)),
        r"I32 \[5, 1\]",
    ),
    "scale of integers": (
        replaced(f"{EVEN}.weight_scale", torch.ones(37, 2, dtype=torch.int32)),
        "dtype that scales do not have",
    ),
    "codes of floats": (
        replaced(f"{EVEN}.weight_packed", torch.ones(37, 8)),
        "is not packed codes",
    ),
    "another shape": (
        replaced(f"{EVEN}.weight_shape", torch.tensor([36, 64])),
        "and the codes disagree",
    ),
    "negative shape": (
        replaced(f"{EVEN}.weight_shape", torch.tensor([37, -64])),
        "and the codes disagree",
    ),
    "shape of three": (
        replaced(f"{EVEN}.weight_shape", torch.tensor([1, 37, 64])),
        "is not the shape of a weight",
    ),
    "g_idx too short": (
        replaced(f"{EVEN}.weight_g_idx", torch.zeros(63, dtype=torch.int32)),
        "is not the group of each column",
    ),
    "plain beside packed": (
        replaced(f"{EVEN}.weight", torch.zeros(37, 64)),
        "stands beside the weight",
    ),
    "plain and compressed": (
        lambda tensors, _: tensors.update(
            {"x.weight": torch.ones(2, 2), "x.weight_scale": torch.ones(1)}
        ),
        "said to be compressed",
    ),
    "int8 without a scale": (
        replaced("x.weight", torch.zeros(2, 2, dtype=torch.int8)),
        "a partner is missing",
    ),
    "wrong bits": (weights(num_bits=3), "does not hold 64 codes of 3 bits"),
    "wrong type": (weights(type="float"), "disagree on its type"),
    "wrong group size": (weights(group_size=16), r"\[37, 4\] \(groups of 16\)"),
    "no group size": (weights(group_size=None), "has no group_size"),
    "no groups": (configured(config_groups={}), "no group with weights"),
}
"""What is changed in ct_packed, and what the refusal says."""


@pytest.mark.parametrize("fault", CORRUPT)
def test_what_does_not_fit_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    """Partners that are missing or of the wrong size, and a config that they contradict."""
    change, text = CORRUPT[fault]
    with pytest.raises(CheckpointCorrupt, match=text):
        decoding.find(changed(tmp_path, "ct_packed", change))


UNSUPPORTED: dict[str, tuple[Change, str]] = {
    "sparse": (configured(sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
    "marlin": (configured(format="marlin-24"), "marlin-24"),
    "bitmask": (replaced("x.weight.bitmask", torch.zeros(2)), "by their tensors"),
    "rotated": (
        configured(
            transform_config={
                "config_groups": {"R3": {"type": "hadamard", "apply": [{"location": "q_attn"}]}}
            }
        ),
        "q_attn",
    ),
    "rotated unreadably": (configured(transform_config={"config_groups": 5}), "unreadable"),
    "preset": (configured(config_groups={"W4A16": ["Linear"]}), "preset"),
    "strategy": (weights(strategy="attn_head"), "attn_head"),
    "integers of 16 bits": (
        lambda tensors, _: tensors.update(
            {
                "x.weight": torch.zeros(2, 2, dtype=torch.int16),
                "x.weight_scale": torch.ones(2, 1),
            }
        ),
        "dtype that is not decoded",
    ),
}


@pytest.mark.parametrize("variant", UNSUPPORTED)
def test_variants_that_are_not_decoded_are_refused_by_name(variant: str, tmp_path: Path) -> None:
    """Sparse layouts, rotations at run time, presets and what no writer makes."""
    change, text = UNSUPPORTED[variant]

    def matched(tensors: Tensors, config: dict[str, Any]) -> None:
        change(tensors, config)
        if "x.weight" in tensors:
            config["config_groups"]["group_0"]["targets"].append("x")

    with pytest.raises(CheckpointUnsupported, match=text):
        decoding.find(changed(tmp_path, "ct_packed", matched))


def test_rotations_that_are_in_the_weights_need_nothing(tmp_path: Path) -> None:
    """A transform of weights was applied when they were stored: nothing is left to be done."""
    merged = {
        "config_groups": {
            "R1": {
                "type": "hadamard",
                "apply": [{"targets": ["Linear"], "location": "weight_output"}],
            }
        }
    }
    path = changed(tmp_path, "ct_floats", configured(transform_config=merged))
    decoding.assert_bit_equal(decoding.decoded(path), decoding.reference(DATA / "ct_floats"))


@pytest.mark.parametrize("value", [None, [], {}, "x", -5, 10**30, 1.5, True, float("nan")])
@pytest.mark.parametrize(
    "key", ["num_bits", "type", "strategy", "group_size", "block_structure", "symmetric"]
)
def test_odd_values_in_the_config_never_surprise(key: str, value: Any, tmp_path: Path) -> None:
    """Whatever stands in a group is believed where it fits, or refused as the checkpoint's fault."""
    path = changed(tmp_path, "ct_packed", weights(**{key: value}))
    try:
        decoding.find(path)
    except (CheckpointCorrupt, CheckpointUnsupported) as error:
        assert str(path) in str(error)  # noqa: PT017 - either outcome is right, no other is


@pytest.mark.parametrize("groups", [5, [], "x", {"g": 5}, {"g": {}}, {"g": {"targets": [5]}}])
def test_odd_groups_are_refused(groups: Any, tmp_path: Path) -> None:
    """Groups that are none are the checkpoint's fault, with its path."""
    with pytest.raises((CheckpointCorrupt, CheckpointUnsupported)):
        decoding.find(changed(tmp_path, "ct_packed", configured(config_groups=groups)))


def test_a_pattern_that_is_none_is_refused(tmp_path: Path) -> None:
    """A target that is not a regular expression is named."""
    groups = {"g": {"targets": ["re:(("], "weights": {"num_bits": 4}}}
    with pytest.raises(CheckpointCorrupt, match="regular expression"):
        decoding.find(changed(tmp_path, "ct_packed", configured(config_groups=groups)))


def test_a_group_that_has_no_scale_is_refused_when_it_is_read(tmp_path: Path) -> None:
    """g_idx is only known when it is decoded; it may not reach outside of the scales."""
    name = "model.reordered.weight_g_idx"
    path = changed(tmp_path, "ct_old", replaced(name, torch.full((96,), 3, dtype=torch.int32)))
    with pytest.raises(CheckpointCorrupt, match="names a group that has no scale"):
        decoding.decoded(path)


def changed(folder: Path, case: str, change: Change) -> Path:
    """Return a copy of a case of one file below `folder` in which `change` was made."""
    path = folder / case
    shutil.copytree(DATA / case, path)
    tensors = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    key = "quantization_config" if "quantization_config" in config else "compression_config"
    change(tensors, config[key])
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors")
    return path
