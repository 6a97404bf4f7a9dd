"""MLX and transformers' metal: every width, group size and mode against the library's values."""

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
from ckptd.errors import CheckpointCorrupt, CheckpointRefused, CheckpointUnsupported
from ckptd.quant import stored
from ckptd.quant.formats import mlx
from ckptd.quant.formula import Arith
from tests.quant import decoding

DATA = Path(__file__).parents[2] / "data" / "quant"
CASES = ("mlx_affine", "mlx_modes", "metal_affine")
LAYER = "model.layers.0.mlp"
EXACT = {"mlx_modes", "metal_affine"}
"""Cases in which MLX or transformers rounds once, as float32 arithmetic does."""

Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize("case", CASES)
def test_library_arithmetic_is_bit_equal(case: str) -> None:
    """In the library's order of roundings every weight has the library's bits."""
    decoding.assert_bit_equal(decoding.decoded(DATA / case), decoding.reference(DATA / case))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("step", [1, 7])
def test_values_do_not_depend_on_how_rows_are_divided(case: str, step: int) -> None:
    """A weight decoded a few rows at a time is the weight decoded at once."""
    for arith in Arith:
        whole = decoding.decoded(DATA / case, arith=arith)
        decoding.assert_bit_equal(decoding.decoded(DATA / case, arith=arith, step=step), whole)


@pytest.mark.parametrize("case", CASES)
def test_float32_arithmetic_is_close(case: str) -> None:
    """In float32 a tensor differs by 1 % where MLX rounds twice, and not at all elsewhere."""
    found = decoding.decoded(DATA / case, arith=Arith.FLOAT32)
    for name, expected in decoding.reference(DATA / case).items():
        if case in EXACT or expected.dtype is torch.float32:
            assert torch.equal(found[name], expected), name
        error = (found[name].double() - expected.double()).norm() / expected.double().norm()
        assert error <= 1e-2, name


def test_float32_arithmetic_rounds_once() -> None:
    """Asked for in float32, a weight is code times scale plus bias to the last bit."""
    name = f"{LAYER}.b8_g64"
    held = load_file(DATA / "mlx_affine" / "model.safetensors")
    found = decoding.decoded(DATA / "mlx_affine", arith=Arith.FLOAT32, dtype=Dtype.F32)[
        f"{name}.weight"
    ]
    codes = held[f"{name}.weight"].view(torch.uint8).float().unflatten(1, (-1, 64))
    scales, biases = (held[f"{name}.{each}"].float()[:, :, None] for each in ("scales", "biases"))
    assert torch.equal(found, (codes * scales + biases).flatten(1))


def test_what_a_scheme_says() -> None:
    """A group tells bits, mode and grouping, and consumes all its partners."""
    format_, found = decoding.find(DATA / "mlx_modes")
    assert format_.name == "mlx"
    group = next(one for one in found.groups if "down_proj" in one.name)
    base = "model.layers.0.mlp.switch_mlp.down_proj"
    assert group.scheme == "4-bit nvfp4, groups of 16"
    assert group.shape == (3, 20, 96)
    assert set(group.consumed) == {f"{base}.{x}" for x in ("weight", "scales", "global_scale")}


def test_partners_in_other_shards(tmp_path: Path) -> None:
    """Words, scales and biases are found in whichever file they lie."""
    tensors, config = _case("mlx_affine")
    files: list[Tensors] = [{}, {}, {}]
    for place, (name, tensor) in enumerate(sorted(tensors.items())):
        files[place % 3][name] = tensor
    weight_map = {}
    for place, held in enumerate(files):
        file_name = f"model-{place + 1:05}-of-00003.safetensors"
        save_file(held, tmp_path / file_name, {"format": "mlx"})
        weight_map |= dict.fromkeys(held, file_name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    expected = decoding.reference(DATA / "mlx_affine")
    decoding.assert_bit_equal(decoding.decoded(tmp_path), expected)


def test_shapes_tell_what_config_leaves_out(tmp_path: Path) -> None:
    """A module that the config does not name is told by its shapes where they are unambiguous."""
    tensors, _ = _case("mlx_affine", f"{LAYER}.b5_g64")
    tensors |= _case("mlx_modes", "model.layers.0.self_attn")[0]
    _write(tmp_path, tensors, {"quantization": {"bits": 4, "group_size": 64}})
    expected = decoding.reference(DATA / "mlx_affine") | decoding.reference(DATA / "mlx_modes")
    found = decoding.decoded(tmp_path)
    assert len(found) == 4
    decoding.assert_bit_equal(found, {name: expected[name] for name in found})


def test_own_key_before_what_was_left_behind(tmp_path: Path) -> None:
    """MLX's key holds, wherever it stands, beside an older quantization config without a method."""
    tensors, config = _case("mlx_affine", f"{LAYER}.b3_g64")
    own = config["quantization"]
    _write(
        tmp_path,
        tensors,
        {"quantization_config": {"bits": 8}, "text_config": {"quantization": own}},
    )
    expected = decoding.reference(DATA / "mlx_affine")
    found = decoding.decoded(tmp_path)
    decoding.assert_bit_equal(found, {f"{LAYER}.b3_g64.weight": expected[f"{LAYER}.b3_g64.weight"]})


def test_no_rows(tmp_path: Path) -> None:
    """A weight without rows stays one without rows."""
    tensors, config = _case("mlx_affine", "lm_head")
    _write(tmp_path, {name: tensor[:0] for name, tensor in tensors.items()}, config)
    assert decoding.decoded(tmp_path)["lm_head.weight"].shape == (0, 128)


def _without(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


def _changed(
    name: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_without("lm_head.scales"), "lm_head.weight"),
        (_without("lm_head.biases"), "lm_head.weight"),
        (_without("lm_head.weight"), "lm_head.scales"),
        (_changed("lm_head.scales", lambda x: x[:, :1]), "lm_head.weight"),
        (_changed("lm_head.scales", lambda x: x[:-1]), "lm_head.scales"),
        (_changed("lm_head.scales", lambda x: x.view(torch.int16)), "lm_head.scales"),
        (_changed("lm_head.biases", lambda x: x.float()), "lm_head.biases"),
        (_changed("lm_head.biases", lambda x: x[0]), "lm_head.biases"),
        (_changed("lm_head.weight", lambda x: x[:, :-1]), "lm_head.weight"),
        (_changed("lm_head.weight", lambda x: x.flatten()), "lm_head.scales"),
    ],
)
def test_wrong_tensors_are_refused_by_name(
    tmp_path: Path, change: Callable[[Tensors], None], named: str
) -> None:
    """A partner that is missing or of a wrong shape or dtype is refused with its name."""
    tensors, config = _case("mlx_affine", "lm_head")
    change(tensors)
    _write(tmp_path, tensors, config)
    with pytest.raises(CheckpointCorrupt) as refused:
        _find(tmp_path)
    assert refused.value.tensor == named


@pytest.mark.parametrize(
    "said",
    [
        {"bits": 8, "group_size": 64},
        {"bits": 6, "group_size": 32},
        {"bits": 7, "group_size": 64},
        {"bits": "6", "group_size": 64},
        {"bits": 6, "group_size": [64]},
        {"bits": 6, "group_size": 0},
        {"bits": -6, "group_size": -64},
        {"bits": 6, "group_size": 10**40},
        {"bits": True, "group_size": 64},
        {"bits": 6, "group_size": 64, "mode": "mxfp4"},
        {"bits": 6, "group_size": 64, "mode": "spline"},
        {"bits": 6, "group_size": 64, "mode": ["affine"]},
    ],
)
def test_wrong_settings_are_refused_by_name(tmp_path: Path, said: dict[str, Any]) -> None:
    """What config.json says of a module must be MLX's and fit the module's shapes."""
    tensors, _ = _case("mlx_affine", "lm_head")
    _write(tmp_path, tensors, {"quantization": {"bits": 4, "group_size": 64, "lm_head": said}})
    with pytest.raises(CheckpointRefused, match="lm_head"):
        _find(tmp_path)


@pytest.mark.parametrize("config", [{}, {"quantization": {"bits": 8, "group_size": 64}}])
def test_ambiguous_shapes_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    """Shapes of 4 bits by 64 are also those of 2 by 128 and 8 by 32: without a config no guess."""
    tensors, _ = _case("mlx_affine", "model.embed_tokens")
    _write(tmp_path, tensors, config)
    with pytest.raises(CheckpointCorrupt, match="4-bit affine in groups of 64") as refused:
        _find(tmp_path)
    assert refused.value.tensor == "model.embed_tokens.weight"


@pytest.mark.parametrize("said", [{"mode": "mxfp4"}, {"mode": "mxfp4", "bits": 4}])
def test_half_as_many_scales_are_no_other_mode(tmp_path: Path, said: dict[str, Any]) -> None:
    """4-bit words with half their scales would pass for 8-bit ones: the mode said forbids it."""
    words = torch.randint(0, 2**31, (8, 16), dtype=torch.int64).to(torch.uint32)
    scales = torch.full((8, 2), 127, dtype=torch.uint8)
    tensors = {"model.a.weight": words, "model.a.scales": scales}
    _write(tmp_path, tensors, {"quantization": said})
    with pytest.raises(CheckpointCorrupt, match="not packed as config") as refused:
        _find(tmp_path)
    assert refused.value.tensor == "model.a.weight"


def test_convolutions_are_refused(tmp_path: Path) -> None:
    """MLX keeps convolutions channels last, which a name cannot prove: refused before anything."""
    tensors, config = _case("mlx_affine", "lm_head")
    tensors["model.layers.0.conv1d.weight"] = torch.zeros(8, 4, 1)
    _write(tmp_path, tensors, config)
    with pytest.raises(CheckpointUnsupported, match="conv1d"):
        decoding.find(tmp_path)


def test_a_global_scale_must_fit(tmp_path: Path) -> None:
    """There is a global scale for each expert, and for nvfp4 alone."""
    base = "model.layers.0.mlp.switch_mlp.down_proj"
    tensors, config = _case("mlx_modes", base)
    _changed(f"{base}.global_scale", lambda x: x[:2])(tensors)
    _write(tmp_path, tensors, config)
    with pytest.raises(CheckpointCorrupt, match="global_scale"):
        decoding.find(tmp_path)


def _case(case: str, prefix: str = "") -> tuple[Tensors, dict[str, Any]]:
    """Return the tensors below `prefix` and the config of a case."""
    tensors = load_file(DATA / case / "model.safetensors")
    config = json.loads((DATA / case / "config.json").read_text())
    return {name: one for name, one in tensors.items() if name.startswith(prefix)}, config


def _find(folder: Path) -> None:
    """Look for weights as MLX's format does, whether or not it would recognise the folder."""
    mlx.FORMAT.find(stored.of_checkpoint(checkpoint.open_checkpoint(folder)))


def _write(folder: Path, tensors: Tensors, config: dict[str, Any]) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("qwen3_moe", "model.layers.0.mlp.experts.{}.gate_proj.weight"),
        ("mixtral", "model.layers.0.mlp.experts.{}.w1.weight"),
    ],
)
def test_stacked_experts_get_the_names_of_the_architecture(
    model_type: str, name: str, tmp_path: Path
) -> None:
    """Where the names on disk are known, each expert is a weight of its own, with the same bits."""
    shutil.copytree(DATA / "mlx_affine", tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": model_type}))
    stacked = decoding.reference(DATA / "mlx_affine")[f"{LAYER}.switch_mlp.gate_proj.weight"]
    found = decoding.decoded(tmp_path / "source")
    for number, expected in enumerate(stacked):
        assert torch.equal(found[name.format(number)], expected)
    assert not any("switch_mlp" in key for key in found)


@pytest.mark.parametrize(
    ("config", "renamed", "named"),
    [
        ({"model_type": "deepseek_v3"}, f"{LAYER}.self_attn.embed_q", "embed_q"),
        ({"model_type": "kimi_k2"}, f"{LAYER}.self_attn.unembed_out", "unembed_out"),
        ({"model_type": "qwen3_next"}, None, "norm"),
        ({"text_config": {"model_type": "qwen3_5_text"}}, None, "norm"),
        ({"model_type": "gpt2"}, None, "transposes"),
        ({"model_type": "gpt_oss", "num_local_experts": 3}, None, "gate_proj"),
        ({"text_config": {"num_local_experts": 3}}, None, "gate_proj"),
    ],
)
def test_what_mlx_stores_otherwise_is_refused(
    config: dict[str, Any], renamed: str | None, named: str, tmp_path: Path
) -> None:
    """Weights that mlx-lm divides, shifts, transposes or stacks would load nowhere else."""
    tensors, said = _case("mlx_affine", "")
    tensors["model.norm.weight"] = torch.ones(8)
    for name in [name for name in tensors if renamed and "switch_mlp" in name]:
        tensors[f"{renamed}.{name.rpartition('.')[2]}"] = tensors.pop(name)
    _write(tmp_path, tensors, said | config)
    with pytest.raises(CheckpointUnsupported, match=named):
        decoding.find(tmp_path)
