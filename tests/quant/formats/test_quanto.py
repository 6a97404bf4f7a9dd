"""quanto: every type against the library's values; shapes that nothing tells are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptd.errors import CheckpointIncomplete, CheckpointRefused, CheckpointUnsupported
from ckptd.quant.formats import quanto, quanto_shapes
from ckptd.quant.formula import Arith
from tests.quant import decoding

DATA = Path(__file__).parents[2] / "data" / "quant"
CASES = ("quanto_text", "quanto_biased", "quanto_vision")
GATE = "model.layers.0.mlp.gate_proj"
OUT = "model.decoder.layers.0.self_attn.out_proj"
HEAD = "lm_head"

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
    """In float32 a tensor differs by at most 1 %: quanto rounds twice where there is a shift."""
    found = decoding.decoded(DATA / case, arith=Arith.FLOAT32)
    for name, expected in decoding.reference(DATA / case).items():
        error = (found[name].double() - expected.double()).norm() / expected.double().norm()
        assert error <= 1e-2, name


@pytest.mark.parametrize("case", CASES)
def test_nothing_of_quanto_is_left(case: str) -> None:
    """Parts go with their weight, scales of activations are dropped, biases and norms stay."""
    _, found = decoding.find(DATA / case)
    gone = {name for group in found.groups for name in group.consumed} | set(found.dropped)
    left = load_file(DATA / case / "model.safetensors").keys() - gone
    assert left
    assert all(name.endswith((".weight", ".bias")) for name in left)
    assert not [name for name in left if load_file(DATA / case / "model.safetensors")[name].dtype
                in (torch.uint8, torch.int8)]  # fmt: skip


def test_no_config_is_needed_to_recognise_it(tmp_path: Path) -> None:
    """The parts of a weight are enough: quanto_qmap.json may be missing."""
    _write(tmp_path, "quanto_biased", qmap=None)
    assert decoding.find(tmp_path)[0].name == "quanto"
    decoding.assert_bit_equal(
        decoding.decoded(tmp_path), decoding.reference(DATA / "quanto_biased")
    )


def test_transformers_names_the_types(tmp_path: Path) -> None:
    """quant_method quanto and its `weights` stand for the map of types."""
    declared = {"quantization_config": {"quant_method": "quanto", "weights": "int4"}}
    _write(tmp_path, "quanto_text", qmap=None, config=declared)
    with pytest.raises(CheckpointRefused, match=r"disagrees with its type.*qint4"):
        decoding.find(tmp_path)  # up_proj is of 2 bits


@pytest.mark.parametrize(
    ("columns", "size"),
    [(64, 64), (100, 100), (128, 128), (160, 32), (256, 128), (288, 96), (688, 688), (320, 64)],
)
def test_size_of_groups_follows_from_columns(columns: int, size: int) -> None:
    """As QModuleMixin chooses it: the largest of 128, 96, 64 and 32 that divides."""
    assert quanto_shapes.group_size(columns) == size


LLAMA = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 96,
    "vocab_size": 1000,
}


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        ("model.layers.3.self_attn.q_proj", (384, 256)),
        ("model.layers.3.self_attn.k_proj", (192, 256)),
        ("model.layers.3.self_attn.o_proj", (256, 384)),
        ("model.layers.3.self_attn.qkv_proj", (768, 256)),
        ("model.layers.3.mlp.down_proj", (256, 1024)),
        ("model.layers.3.mlp.gate_up_proj", (2048, 256)),
        ("lm_head", (1000, 256)),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_shape_from_name_and_config(module: str, shape: tuple[int, int], nested: bool) -> None:
    """One axis is the hidden state, the other must be a number that the config knows."""
    config: dict[str, Any] = {"text_config": LLAMA, "hidden_size": 7} if nested else LLAMA
    found = quanto_shapes.linear_shape(
        module, numel=shape[0] * shape[1], group=128, bias_rows=None, config=config
    )
    assert found == shape


@pytest.mark.parametrize(
    ("module", "numel", "group", "bias_rows", "config"),
    [
        ("model.layers.0.mlp.down_proj", 256 * 1024, 128, None, {}),
        ("model.layers.0.mlp.down_proj", 256 * 1024, 96, None, LLAMA),
        ("model.layers.0.mlp.down_proj", 256 * 1000 + 128, 128, None, LLAMA),
        ("model.layers.0.mlp.gate_proj", 256 * 999, 128, None, LLAMA),
        ("model.layers.0.mlp.projector", 256 * 1024, 128, None, LLAMA),
        ("vision.patch_embedding", 256 * 1024, 128, 256, LLAMA),
        ("encoder.layers.0.conv1", 256 * 1024, 128, 256, LLAMA),
        ("model.layers.0.mlp.gate_proj", 256 * 1024, 128, 0, LLAMA),
        ("model.layers.0.mlp.gate_proj", 256 * 1024, 128, None, {"hidden_size": "256"}),
        ("model.layers.0.mlp.gate_proj", 256 * 1024, 128, None, {"hidden_size": -256}),
    ],
)
def test_a_shape_is_never_guessed(
    module: str, numel: int, group: int, bias_rows: int | None, config: dict[str, Any]
) -> None:
    """No known axis, an unknown other axis, other groups or a possible convolution: no answer."""
    found = quanto_shapes.linear_shape(
        module, numel=numel, group=group, bias_rows=bias_rows, config=config
    )
    assert found is None


def test_unknown_shape_is_refused_with_advice(tmp_path: Path) -> None:
    """Without the sizes in config.json a grouped weight has no shape."""
    _write(tmp_path, "quanto_text", config={"model_type": "unheard_of"})
    with pytest.raises(CheckpointUnsupported, match=r"shape that quanto did not store.*dequantize"):
        decoding.find(tmp_path)


def test_a_module_of_the_map_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    """The map of types is complete: a weight without a tensor is a missing shard."""
    qmap = json.loads((DATA / "quanto_text" / quanto.QMAP_NAME).read_text())
    qmap["model.layers.1.mlp.up_proj"] = {"weights": "qint4", "activations": "none"}
    _write(tmp_path, "quanto_text", qmap=qmap)
    with pytest.raises(CheckpointIncomplete, match=r"layers\.1\.mlp\.up_proj"):
        decoding.find(tmp_path)


@pytest.mark.parametrize("entry", [None, "qint4", ["qint4"], {}, {"weights": 4}])
def test_a_map_of_another_kind_is_refused(tmp_path: Path, entry: object) -> None:
    """A module without a type of weights names the file."""
    _write(tmp_path, "quanto_text", qmap={GATE: entry})
    with pytest.raises(CheckpointRefused, match=r"quanto_qmap\.json"):
        decoding.find(tmp_path)


@pytest.mark.parametrize("declared", [["int4"], 4, {}, "int3"])
def test_odd_settings_are_ignored_or_refused(tmp_path: Path, declared: object) -> None:
    """Whatever stands in config.json, the packed rows tell the bits."""
    config = {"quantization_config": {"quant_method": "quanto", "weights": declared}}
    _write(tmp_path, "quanto_text", qmap=None, config=config)
    assert len(decoding.find(tmp_path)[1].groups) == 8


def _drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def _set(name: str, value: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(name, value)


BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_drop(f"{GATE}.weight._scale"), f"{GATE}.weight._scale"),
        (_drop(f"{GATE}.weight._shift"), f"{GATE}.weight._shift"),
        (_drop(f"{HEAD}.weight._scale"), f"{HEAD}.weight._scale"),
        (_set(f"{GATE}.weight._scale", torch.ones(240, dtype=BF16)), "240, 1"),
        (_set(f"{GATE}.weight._scale", torch.ones(239, 1, dtype=BF16)), "does not fit the scales"),
        (_set(f"{GATE}.weight._scale", torch.ones(240, 1, dtype=torch.int8)), "F32, F16 or BF16"),
        (_set(f"{GATE}.weight._shift", torch.ones(240, 1)), "BF16, U8 or I8"),
        (_set(f"{GATE}.weight._data._data", torch.ones(119, 32, dtype=torch.uint8)), "qint4"),
        (_set(f"{GATE}.weight._data._data", torch.ones(60, 32, dtype=torch.uint8)), "qint4"),
        (_set(f"{GATE}.weight._data._data", torch.ones(120, 32)), "U8, two axes"),
        (_set(f"{GATE}.weight._data._data", torch.ones(0, 32, dtype=torch.uint8)), "U8, two axes"),
        (_set(f"{HEAD}.weight._data", torch.ones(33, 160, dtype=torch.int8)), "qfloat8"),
        (_set(f"{HEAD}.weight._data", torch.ones(33, 160)), "I8 or F8"),
        (_set(f"{HEAD}.weight._data", torch.tensor(1.0).to(torch.float8_e4m3fn)), "one axis"),
        (_set(f"{HEAD}.weight._scale", torch.ones(32, 1, dtype=BF16)), "33, 1"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, change: Callable[[Tensors], None], text: str
) -> None:
    """Each missing or contradicting part is refused by name."""
    _write(tmp_path, "quanto_text", change)
    with pytest.raises(CheckpointRefused, match=text):
        decoding.find(tmp_path)


def test_a_bias_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Codes of one group a row have as many rows as the bias."""
    _write(tmp_path, "quanto_biased", _set(f"{OUT}.bias", torch.ones(63, dtype=torch.float16)))
    with pytest.raises(CheckpointUnsupported, match="out_proj"):
        decoding.find(tmp_path)


def test_one_scale_for_a_weight_of_one_row(tmp_path: Path) -> None:
    """quanto keeps a scalar where there is a single row."""
    codes, scale = torch.tensor([[-128, 0, 127]], dtype=torch.int8), torch.tensor(0.5)
    save_file(
        {"score.weight._data": codes, "score.weight._scale": scale},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text("{}")
    found = decoding.decoded(tmp_path)
    assert torch.equal(found["score.weight"], torch.tensor([[-64.0, 0.0, 63.5]]))


_FROM_CASE: dict[str, Any] = {}


def _write(
    folder: Path,
    case: str,
    change: Callable[[Tensors], None] = lambda tensors: None,
    *,
    qmap: dict[str, Any] | None = _FROM_CASE,
    config: dict[str, Any] | None = None,
) -> None:
    """Write `case` with changes; `config` replaces what tells the shapes where it names a model."""
    tensors = load_file(DATA / case / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    known = json.loads((DATA / case / "config.json").read_text())
    said = config if config and "model_type" in config else {**known, **(config or {})}
    (folder / "config.json").write_text(json.dumps(said))
    if qmap is _FROM_CASE:
        qmap = json.loads((DATA / case / quanto.QMAP_NAME).read_text())
    if qmap is not None:
        (folder / quanto.QMAP_NAME).write_text(json.dumps(qmap))
