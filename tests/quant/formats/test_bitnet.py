"""BitNet: both kinds of linear layer against transformers' values; what has no place is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptd.checkpoint import checkpoint
from ckptd.errors import CheckpointCorrupt, CheckpointUnsupported
from ckptd.quant import stored
from ckptd.quant.formats import bitnet
from ckptd.quant.formula import Arith
from tests.quant import decoding

DATA = Path(__file__).parents[2] / "data" / "quant"
CASES = ("bitnet_divide", "bitnet_multiply")
Q = "model.layers.0.self_attn.q_proj"

Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arith", list(Arith))
@pytest.mark.parametrize("step", [None, 1, 7])
def test_values_are_those_of_transformers(case: str, arith: Arith, step: int | None) -> None:
    """One product or quotient: both arithmetics have the same bits, however rows are divided."""
    found = decoding.decoded(DATA / case, arith=arith, step=step)
    decoding.assert_bit_equal(found, decoding.reference(DATA / case))


def test_scheme_warns_of_activations() -> None:
    """People are told that the plain model does not round activations, and what the scale does."""
    for case, word in zip(CASES, ("/", "*"), strict=True):
        scheme = decoding.find(DATA / case)[1].groups[0].scheme
        assert "activations" in scheme
        assert f"{word} scale" in scheme


def test_tensors_alone_do_not_tell_it() -> None:
    """Whether the scale divides is in config.json only: nothing is recognised without it."""
    seen = stored.of_checkpoint(checkpoint.open_checkpoint(DATA / CASES[0]))
    assert bitnet.FORMAT.recognise(seen) is None


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"linear_class": "autobitlinear", "quantization_mode": "online"}, "master weights"),
        ({"linear_class": "autobitlinear", "quantization_mode": None}, "master weights"),
        ({"linear_class": "bitlinear2"}, "linear_class"),
        ({"linear_class": ["bitlinear"]}, "linear_class"),
        ({"use_rms_norm": True}, "normalizes activations"),
    ],
)
def test_settings_that_a_plain_model_has_no_place_for(
    tmp_path: Path, settings: dict[str, object], text: str
) -> None:
    """Ternary weights made on the fly, unknown layers and norms within layers are refused."""
    _write(tmp_path, lambda tensors: None, settings)
    with pytest.raises(CheckpointUnsupported, match=text):
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
        (_set(f"{Q}.weight_scale", torch.ones(2)), "one value"),
        (_set(f"{Q}.weight_scale", torch.ones(1, dtype=torch.int8)), "F32, F16 or BF16"),
        (_set(f"{Q}.weight", torch.ones(16, 96, dtype=torch.int8)), "U8"),
        (_set(f"{Q}.weight", torch.ones(16, 96)), "U8"),
        (_set(f"{Q}.weight", torch.ones(16, dtype=torch.uint8)), "two axes"),
        (_set(f"{Q}.weight", torch.ones(16, 0, dtype=torch.uint8)), "two axes"),
        (_set(f"{Q}.bias", torch.ones(16)), "16 rows"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, change: Callable[[Tensors], None], text: str
) -> None:
    """Each missing or contradicting part is refused by name."""
    _write(tmp_path, change, {})
    with pytest.raises(CheckpointCorrupt, match=f"{Q}.*{text}"):
        decoding.find(tmp_path)


def test_norms_within_layers_are_refused_by_name(tmp_path: Path) -> None:
    """A norm beside a packed weight cannot go into the weight."""
    _write(tmp_path, _set(f"{Q}.rms_norm.weight", torch.ones(96)), {})
    with pytest.raises(CheckpointUnsupported, match=f"{Q}.rms_norm"):
        decoding.find(tmp_path)


def test_a_weight_without_rows(tmp_path: Path) -> None:
    """An empty weight is an empty weight."""
    _write(tmp_path, _set(f"{Q}.weight", torch.empty(0, 96, dtype=torch.uint8)), {})
    assert decoding.decoded(tmp_path)[f"{Q}.weight"].shape == (0, 96)


def _write(folder: Path, change: Callable[[Tensors], None], settings: dict[str, object]) -> None:
    tensors = load_file(DATA / CASES[0] / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((DATA / CASES[0] / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))
