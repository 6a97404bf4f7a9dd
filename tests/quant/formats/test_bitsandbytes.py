"""bitsandbytes: nf4, fp4 and int8 against the library's own values; damage is refused by name."""

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
from ckptd.quant import registry, stored
from ckptd.quant.formats import bitsandbytes
from ckptd.quant.formula import Arith
from tests.quant import decoding

DATA = Path(__file__).parents[2] / "data" / "quant"
MODELS = (
    "bnb_nf4_nested",
    "bnb_fp4_storage",
    "bnb_int8",
    "bnb_gpt2_nf4",
    "bnb_gpt2_int8",
    "bnb_encoder_decoder",
)
CASES = (*MODELS, "bnb_blocks")
FOUR_BIT, EIGHT_BIT, NESTED = "bnb_fp4_storage", "bnb_int8", "bnb_gpt2_nf4"
Q = "model.layers.0.self_attn.q_proj"
FC = "transformer.h.0.mlp.c_fc.weight"

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], Any]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arith", list(Arith))
@pytest.mark.parametrize("step", [None, 1, 7])
def test_values_are_the_library_s(case: str, arith: Arith, step: int | None) -> None:
    """The library computes in float32: both arithmetics have its bits, however rows are divided."""
    found = decoding.decoded(DATA / case, arith=arith, step=step)
    decoding.assert_bit_equal(found, decoding.reference(DATA / case))


@pytest.mark.parametrize("dtype", [Dtype.F32, Dtype.F16, Dtype.BF16])
@pytest.mark.parametrize("case", ["bnb_nf4_nested", "bnb_gpt2_int8"])
def test_other_dtypes_are_rounded_once(case: str, dtype: Dtype) -> None:
    """In another dtype a value is the float32 one, rounded once."""
    exact = decoding.decoded(DATA / case, arith=Arith.FLOAT32, dtype=Dtype.F32)
    found = decoding.decoded(DATA / case, arith=Arith.FLOAT32, dtype=dtype)
    kind = getattr(torch, str(dtype.torch_name))
    decoding.assert_bit_equal(found, {name: value.to(kind) for name, value in exact.items()})


@pytest.mark.parametrize("case", MODELS)
def test_nothing_quantized_is_left(case: str) -> None:
    """Every tensor that is not a weight of its own belongs to one that was found."""
    seen = stored.of_checkpoint(checkpoint.open_checkpoint(DATA / case))
    found = decoding.find(DATA / case)[1]
    consumed = {name for group in found.groups for name in group.consumed}
    rest = {name: seen.tensors[name].spec.dtype for name in seen.tensors.keys() - consumed}
    assert all(dtype in (Dtype.BF16, Dtype.F16) for dtype in rest.values()), rest


def test_conv1d_is_transposed_back() -> None:
    """GPT-2's Conv1D weights are (in, out) again; linear layers stay as they are."""
    shapes = {group.name: group.shape for group in decoding.find(DATA / "bnb_gpt2_nf4")[1].groups}
    assert shapes[FC] == (48, 192)
    nested = decoding.find(DATA / "bnb_encoder_decoder")[1].groups
    shapes = {group.name: group.shape for group in nested}
    assert shapes["encoder.encoder.layer.0.intermediate.dense.weight"] == (40, 32)
    assert shapes["decoder.transformer.h.0.mlp.c_fc.weight"] == (32, 128)


def test_same_names_without_conv1d_are_not_transposed(tmp_path: Path) -> None:
    """Models whose modules are only called like GPT-2's keep their weights as they are."""
    _write(tmp_path, NESTED, lambda tensors: None, {"model_type": "gpt_bigcode"})
    shapes = {group.name: group.shape for group in decoding.find(tmp_path)[1].groups}
    assert shapes[FC] == (192, 48)


def test_schemes_say_what_it_is() -> None:
    """People are told bits, table, block and nesting."""
    groups = {case: decoding.find(DATA / case)[1].groups for case in CASES}
    assert groups["bnb_nf4_nested"][0].scheme == "4-bit nf4, blocks of 64, nested"
    assert groups["bnb_fp4_storage"][0].scheme == "4-bit fp4, blocks of 64"
    assert groups["bnb_int8"][0].scheme == "8-bit int8, a scale a row"


@pytest.mark.parametrize("case", CASES)
def test_tensors_alone_tell_it(tmp_path: Path, case: str) -> None:
    """Without a quantization config the tensors say what the checkpoint is."""
    shutil.copytree(DATA / case, tmp_path / "model")
    config = json.loads((DATA / case / "config.json").read_text())
    config.pop("quantization_config", None)
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    seen = stored.of_checkpoint(checkpoint.open_checkpoint(tmp_path / "model"))
    assert registry.choose(seen) is bitsandbytes.FORMAT


def test_a_plain_checkpoint_is_not_recognised(tmp_path: Path) -> None:
    """A model without quantized tensors has no groups, whatever its config says."""

    def plain(tensors: Tensors) -> None:
        for name in list(tensors):
            if ".weight." in name or tensors[name].dim() != 1:
                del tensors[name]

    _write(tmp_path, FOUR_BIT, plain)
    seen = stored.of_checkpoint(checkpoint.open_checkpoint(tmp_path))
    assert bitsandbytes.FORMAT.recognise(seen) is None
    assert decoding.find(tmp_path)[1].groups == ()


@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_8bit": True, "load_in_4bit": False, "bnb_4bit_quant_type": "nf4"},
        {"load_in_4bit": ["yes"], "bnb_4bit_quant_storage": {"a": 1}, "blocksize": -1},
        {"llm_int8_skip_modules": 10**400, "bnb_4bit_use_double_quant": "maybe"},
    ],
)
def test_the_config_is_not_trusted(tmp_path: Path, settings: dict[str, object]) -> None:
    """Wrong bits or nonsense in the config change nothing: the tensors say it all."""
    _write(tmp_path, FOUR_BIT, lambda tensors: None, quantization=settings)
    decoding.assert_bit_equal(decoding.decoded(tmp_path), decoding.reference(DATA / FOUR_BIT))


@pytest.mark.parametrize("dtype", [None, "auto", "int8", ["bfloat16"], 16])
def test_int8_without_a_dtype_is_float32(tmp_path: Path, dtype: object) -> None:
    """Where config.json names no usable dtype, int8 gives what the library's function returns."""
    _write(tmp_path, EIGHT_BIT, lambda tensors: None, {"dtype": dtype})
    assert decoding.find(tmp_path)[1].groups[0].dtype is Dtype.F32


def test_int8_without_a_layout_is_rows(tmp_path: Path) -> None:
    """Files from before the layout was recorded hold rows."""
    _write(tmp_path, EIGHT_BIT, _drop(f"{Q}.weight_format"))
    decoding.assert_bit_equal(decoding.decoded(tmp_path), decoding.reference(DATA / EIGHT_BIT))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_of_16_bits_are_widened(tmp_path: Path, dtype: torch.dtype) -> None:
    """Where absmax was saved in 16 bits it is multiplied in float32, as the library does."""

    def narrow(tensors: Tensors) -> None:
        tensors[f"{Q}.weight.absmax"] = tensors[f"{Q}.weight.absmax"].to(dtype)

    _write(tmp_path, FOUR_BIT, narrow)
    found = decoding.decoded(tmp_path)[f"{Q}.weight"].double()
    expected = decoding.reference(DATA / FOUR_BIT)[f"{Q}.weight"].double()
    assert float((found - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 4, 4)])
def test_empty_weights(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """A weight without elements decodes to one."""

    def empty(tensors: Tensors) -> None:
        tensors[f"{Q}.weight"] = torch.empty((0, 1), dtype=torch.uint8)
        tensors[f"{Q}.weight.absmax"] = torch.empty(0)
        _state(shape=list(shape))(tensors)

    _write(tmp_path, FOUR_BIT, empty)
    assert decoding.decoded(tmp_path)[f"{Q}.weight"].shape == shape


STATE = f"{Q}.weight.quant_state.bitsandbytes__fp4"
NESTED_STATE = f"{FC}.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("case", "change", "names"),
    [
        (FOUR_BIT, lambda t: t.pop(f"{Q}.weight"), f"{Q}.weight"),
        (FOUR_BIT, lambda t: t.pop(f"{Q}.weight.absmax"), f"{Q}.weight.absmax"),
        (FOUR_BIT, lambda t: t.pop(f"{Q}.weight.quant_map"), f"{Q}.weight.quant_map"),
        (FOUR_BIT, lambda t: t.pop(STATE), f"{Q}.weight.absmax"),
        (NESTED, lambda t: t.pop(f"{FC}.nested_absmax"), f"{FC}.nested_absmax"),
        (NESTED, lambda t: t.pop(f"{FC}.nested_quant_map"), f"{FC}.nested_quant_map"),
        (NESTED, lambda t: t.pop(NESTED_STATE), FC),
        (EIGHT_BIT, lambda t: t.pop(f"{Q}.SCB"), f"{Q}.SCB"),
        (EIGHT_BIT, lambda t: [t.pop(f"{Q}.SCB"), t.pop(f"{Q}.weight_format")], f"{Q}.SCB"),
        (EIGHT_BIT, lambda t: t.pop(f"{Q}.weight"), f"{Q}.weight"),
        (FOUR_BIT, lambda t: _shorten(t, f"{Q}.weight"), f"{Q}.weight"),
        (FOUR_BIT, lambda t: _shorten(t, f"{Q}.weight.absmax"), f"{Q}.weight.absmax"),
        (FOUR_BIT, lambda t: _shorten(t, f"{Q}.weight.quant_map"), f"{Q}.weight.quant_map"),
        (NESTED, lambda t: _shorten(t, f"{FC}.absmax"), f"{FC}.absmax"),
        (NESTED, lambda t: _shorten(t, f"{FC}.nested_quant_map"), f"{FC}.nested_quant_map"),
        (EIGHT_BIT, lambda t: _shorten(t, f"{Q}.SCB"), f"{Q}.SCB"),
        (FOUR_BIT, lambda t: _cast(t, f"{Q}.weight.absmax", torch.uint8), f"{Q}.weight.absmax"),
        (NESTED, lambda t: _cast(t, f"{FC}.absmax", torch.float32), f"{FC}.absmax"),
        (FOUR_BIT, lambda t: _cast(t, f"{Q}.weight", torch.int64), f"{Q}.weight"),
        (EIGHT_BIT, lambda t: _cast(t, f"{Q}.SCB", torch.float16), f"{Q}.SCB"),
        (EIGHT_BIT, lambda t: _cast(t, f"{Q}.weight", torch.float16), f"{Q}.weight"),
        (EIGHT_BIT, lambda t: _cast(t, f"{Q}.weight_format", torch.int64), f"{Q}.weight_format"),
    ],
)
def test_missing_and_wrong_partners(tmp_path: Path, case: str, change: Change, names: str) -> None:
    """A partner that is missing, too short or of another dtype is named."""
    _write(tmp_path, case, change)
    with pytest.raises(CheckpointCorrupt, match=names):
        decoding.find(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"quant_type": "nf4"},
        {"blocksize": 65},
        {"blocksize": "64"},
        {"blocksize": True},
        {"blocksize": None},
        {"dtype": "int8"},
        {"dtype": 16},
        {"dtype": None},
        {"shape": None},
        {"shape": []},
        {"shape": [64, -64]},
        {"shape": [64, "64"]},
        {"shape": [64, 64.0]},
        {"shape": [64, 65]},
        {"shape": [1 << 70, 1]},
        {"shape": [1] * 100},
        {"nested_blocksize": 256},
        {"nested_blocksize": 0, "nested_offset": 0.0, "nested_dtype": "float32"},
        {"nested_blocksize": 256, "nested_offset": float("nan"), "nested_dtype": "float32"},
        {"nested_blocksize": 256, "nested_offset": 10**400, "nested_dtype": "float32"},
        {"nested_blocksize": 256, "nested_offset": "0", "nested_dtype": "float32"},
        {"nested_blocksize": 256, "nested_offset": 0.0, "nested_dtype": "float16"},
    ],
)
def test_hostile_states(tmp_path: Path, changes: dict[str, object]) -> None:
    """A state with a value of another type or size is refused, naming a tensor of the weight."""
    _write(tmp_path, FOUR_BIT, _state(**changes))
    with pytest.raises(CheckpointRefused, match=f"{Q}.weight"):
        decoding.find(tmp_path)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 60000])
def test_states_that_are_not_json_objects(tmp_path: Path, text: bytes) -> None:
    """A state that is no JSON object is refused by name."""

    def damage(tensors: Tensors) -> None:
        tensors[STATE] = torch.tensor(list(text), dtype=torch.uint8)

    _write(tmp_path, FOUR_BIT, damage)
    with pytest.raises(CheckpointCorrupt, match="JSON"):
        decoding.find(tmp_path)


def test_a_state_of_another_dtype(tmp_path: Path) -> None:
    """A state that is not bytes is refused by name."""
    _write(tmp_path, FOUR_BIT, lambda tensors: _cast(tensors, STATE, torch.float32))
    with pytest.raises(CheckpointCorrupt, match="bitsandbytes__fp4"):
        decoding.find(tmp_path)


def test_unknown_tables(tmp_path: Path) -> None:
    """A table that the library does not have is refused."""

    def rename(tensors: Tensors) -> None:
        tensors[STATE.replace("fp4", "af4")] = tensors.pop(STATE)

    _write(tmp_path, FOUR_BIT, rename)
    with pytest.raises(CheckpointUnsupported, match="af4"):
        decoding.find(tmp_path)


def test_two_states_of_one_weight(tmp_path: Path) -> None:
    """A weight that claims to be both nf4 and fp4 is refused."""

    def double(tensors: Tensors) -> None:
        text = bytes(tensors[STATE].tolist()).replace(b"fp4", b"nf4")
        tensors[STATE.replace("fp4", "nf4")] = torch.tensor(list(text), dtype=torch.uint8)

    _write(tmp_path, FOUR_BIT, double)
    with pytest.raises(CheckpointCorrupt, match=f"{Q}.weight"):
        decoding.find(tmp_path)


@pytest.mark.parametrize(
    ("number", "layout"), [(1, "col32"), (2, "turing"), (3, "ampere"), (9, "?")]
)
def test_int8_in_the_order_of_tiles(tmp_path: Path, number: int, layout: str) -> None:
    """int8 in the order of a GPU's tiles is refused by the name of that order."""

    def tile(tensors: Tensors) -> None:
        tensors[f"{Q}.weight_format"] = torch.tensor(number, dtype=torch.uint8)

    _write(tmp_path, EIGHT_BIT, tile)
    with pytest.raises(CheckpointUnsupported, match=layout if number < 4 else "unknown"):
        decoding.find(tmp_path)


def _write(
    folder: Path,
    case: str,
    change: Change,
    config: dict[str, object] | None = None,
    quantization: dict[str, object] | None = None,
) -> None:
    """Write a case into `folder` with its tensors and its configs changed."""
    tensors = load_file(DATA / case / "model.safetensors")
    change(tensors)
    settings = json.loads((DATA / case / "config.json").read_text()) | (config or {})
    settings["quantization_config"] |= quantization or {}
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "model.safetensors")


def _drop(name: str) -> Change:
    return lambda tensors: tensors.pop(name)


def _shorten(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name][:-1].clone()


def _cast(tensors: Tensors, name: str, dtype: torch.dtype) -> None:
    tensors[name] = tensors[name].to(dtype)


def _state(**changes: object) -> Callable[[Tensors], None]:
    """Return a change of the settings beside the query projection."""

    def change(tensors: Tensors) -> None:
        settings = json.loads(bytes(tensors[STATE].tolist())) | changes
        tensors[STATE] = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)

    return change
