"""MXFP4 experts of gpt-oss against transformers' values, in all layouts in which they are met."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptd.checkpoint import checkpoint
from ckptd.checkpoint.dtypes import Dtype
from ckptd.errors import CheckpointCorrupt
from ckptd.quant import registry, stored
from ckptd.quant.formats import mxfp4
from ckptd.quant.formula import Arith
from tests.quant import decoding

DATA = Path(__file__).parents[2] / "data" / "quant"
CASE = "mxfp4_gptoss"
X = "model.layers.0.mlp.experts"
GATE_UP, DOWN = f"{X}.gate_up_proj", f"{X}.down_proj"

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], Any]


@pytest.mark.parametrize("case", [CASE, "mxfp4_original"])
@pytest.mark.parametrize("arith", list(Arith))
@pytest.mark.parametrize("step", [None, 1, 2])
def test_values_are_those_of_transformers(case: str, arith: Arith, step: int | None) -> None:
    """A power of two is exact: both arithmetics have the same bits, however rows are divided."""
    found = decoding.decoded(DATA / case, arith=arith, step=step)
    decoding.assert_bit_equal(found, decoding.reference(DATA / case))


def test_biases_stay_as_they_are() -> None:
    """Only blocks and scales go into a weight."""
    found = decoding.find(DATA / CASE)[1]
    consumed = [name for group in found.groups for name in group.consumed]
    assert sorted(consumed) == [
        f"{name}_{part}" for name in (DOWN, GATE_UP) for part in ("blocks", "scales")
    ]
    assert found.groups[0].scheme == "4-bit mxfp4, groups of 32"


def test_one_formula_an_expert() -> None:
    """Experts are decoded one by one, so that a gigabyte of blocks streams."""
    group = {group.name: group for group in decoding.find(DATA / CASE)[1].groups}[GATE_UP]
    assert group.shape == (2, 96, 128)
    assert [(formula.rows, formula.columns) for formula in group.formulas] == [(96, 128)] * 2


def test_tensors_alone_tell_it(tmp_path: Path) -> None:
    """OpenAI's own config names no method: blocks and scales do."""
    for case in (CASE, "mxfp4_original"):
        folder = tmp_path / case
        folder.mkdir()
        _write(folder, case, lambda tensors: None, keep_method=False)
        seen = stored.of_checkpoint(checkpoint.open_checkpoint(folder))
        assert registry.choose(seen) is mxfp4.FORMAT


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_flat_blocks_and_named_exponents(tmp_path: Path, dtype: torch.dtype) -> None:
    """Blocks of three axes and scales of the exponents' own type are the same bytes."""

    def change(tensors: Tensors) -> None:
        tensors[f"{DOWN}_blocks"] = tensors[f"{DOWN}_blocks"].flatten(2)
        tensors[f"{DOWN}_scales"] = tensors[f"{DOWN}_scales"].view(dtype)

    _write(tmp_path, CASE, change)
    decoding.assert_bit_equal(decoding.decoded(tmp_path), decoding.reference(DATA / CASE))


def test_a_partly_plain_checkpoint(tmp_path: Path) -> None:
    """A projection that is plain already is left alone."""
    value = decoding.reference(DATA / CASE)[GATE_UP]

    def change(tensors: Tensors) -> None:
        del tensors[f"{GATE_UP}_blocks"], tensors[f"{GATE_UP}_scales"]
        tensors[GATE_UP] = value

    _write(tmp_path, CASE, change)
    found = decoding.find(tmp_path)[1]
    assert [group.name for group in found.groups] == [DOWN]
    assert found.renamed == ()


def test_plain_weights_called_blocks_get_their_name_back(tmp_path: Path) -> None:
    """Dequantized weights that were saved under the name of blocks are only renamed."""
    values = decoding.reference(DATA / CASE)
    _write(tmp_path, CASE, _misname(values), keep_method=False)
    chosen, found = decoding.find(tmp_path)
    assert chosen is mxfp4.FORMAT
    assert found.groups == ()
    assert dict(found.renamed) == {f"{DOWN}_blocks": DOWN, f"{GATE_UP}_blocks": GATE_UP}


def test_plain_weights_that_their_bias_does_not_fit(tmp_path: Path) -> None:
    """Misnamed weights that lie the other way round than the model wants are refused."""
    values = decoding.reference(DATA / CASE)
    turned = {name: value.transpose(1, 2).contiguous() for name, value in values.items()}
    _write(tmp_path, CASE, _misname(turned))
    with pytest.raises(CheckpointCorrupt, match="down_proj_blocks"):
        decoding.find(tmp_path)


def test_groups_along_the_outputs(tmp_path: Path) -> None:
    """Blocks whose columns are the outputs, as the bias says, are the weight as it lies."""

    def change(tensors: Tensors) -> None:  # the bias of the inputs' length makes them outputs
        for name, length in ((GATE_UP, 96), (DOWN, 64)):
            tensors[f"{name}_bias"] = torch.zeros(2, length)

    _write(tmp_path, CASE, change)
    values = decoding.reference(DATA / CASE)
    turned = {name: value.transpose(1, 2) for name, value in values.items()}
    decoding.assert_bit_equal(decoding.decoded(tmp_path), turned)


@pytest.mark.parametrize("along_outputs", [False, True])
def test_square_weights_lie_as_their_siblings(tmp_path: Path, along_outputs: bool) -> None:
    """A square weight says nothing itself: it lies as the other one of its experts."""

    def change(tensors: Tensors) -> None:
        for part in ("blocks", "scales"):
            tensors[f"{DOWN}_{part}"] = tensors[f"{DOWN}_{part}"][:, :64].clone()
        tensors[f"{DOWN}_bias"] = torch.zeros(2, 64)
        if along_outputs:
            tensors[f"{GATE_UP}_bias"] = torch.zeros(2, 96)

    _write(tmp_path, CASE, change)
    expected = decoding.reference(DATA / CASE)[DOWN][:, :, :64]
    expected = expected.transpose(1, 2) if along_outputs else expected
    assert torch.equal(decoding.decoded(tmp_path)[DOWN], expected)


def test_extreme_exponents(tmp_path: Path) -> None:
    """The smallest and largest exponents give what float32 arithmetic gives, rounded once."""

    def change(tensors: Tensors) -> None:
        scales = tensors[f"{DOWN}_scales"]
        scales.view(-1)[:4] = torch.tensor([0, 1, 253, 254], dtype=torch.uint8)

    _write(tmp_path, CASE, change)
    tensors = load_file(tmp_path / "model.safetensors")
    codes = tensors[f"{DOWN}_blocks"].flatten(2)
    nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(2).long()
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    table = torch.cat([magnitudes, -magnitudes])
    exponents = tensors[f"{DOWN}_scales"].double() - 127
    exact = table[nibbles] * torch.exp2(exponents).repeat_interleave(32, dim=2)
    found = decoding.decoded(tmp_path)[DOWN]
    assert torch.equal(found, exact.transpose(1, 2).to(torch.float32).to(torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda t: t.pop(f"{DOWN}_scales"), "down_proj_scales"),
        (lambda t: t.pop(f"{DOWN}_blocks"), "down_proj_scales"),
        (lambda t: _cut(t, f"{DOWN}_blocks", 0), "down_proj_blocks"),
        (lambda t: _cut(t, f"{DOWN}_blocks", 1), "down_proj_blocks"),
        (lambda t: _cut(t, f"{DOWN}_blocks", 3), "down_proj_blocks"),
        (lambda t: _cut(t, f"{DOWN}_scales", 2), "down_proj_blocks"),
        (lambda t: _cut(t, f"{DOWN}_bias", 1), "down_proj_blocks"),
        (lambda t: _cast(t, f"{DOWN}_blocks", torch.int16), "down_proj_blocks"),
        (lambda t: _cast(t, f"{DOWN}_blocks", torch.bfloat16), "down_proj_blocks"),
        (lambda t: _cast(t, f"{DOWN}_scales", torch.float32), "down_proj_scales"),
        (lambda t: t.update({f"{DOWN}_scales": t[f"{DOWN}_scales"][0]}), "down_proj_scales"),
        (lambda t: t.update({f"{DOWN}_scales": t[f"{DOWN}_scales"][:0]}), "down_proj_scales"),
    ],
)
def test_damage_is_refused_by_name(tmp_path: Path, change: Change, name: str) -> None:
    """Missing partners, truncated blocks and other dtypes are refused, naming the tensor."""
    _write(tmp_path, CASE, change)
    with pytest.raises(CheckpointCorrupt, match=name):
        decoding.find(tmp_path)


def test_scales_are_marked_to_be_finite() -> None:
    """The exponent that stands for NaN is the evaluator's to refuse: scales are marked."""
    for group in decoding.find(DATA / CASE)[1].groups:
        for formula in group.formulas:
            marks = [(w.dtype, w.is_scale) for w in formula.windows(range(formula.rows))]
            assert marks == [(Dtype.U8, False), (Dtype.F8_E8M0, True)]


def _misname(values: Tensors) -> Change:
    def change(tensors: Tensors) -> None:
        for name, value in values.items():
            del tensors[f"{name}_scales"]
            tensors[f"{name}_blocks"] = value

    return change


def _write(folder: Path, case: str, change: Change, *, keep_method: bool = True) -> None:
    """Write a case into `folder` with its tensors changed."""
    tensors = load_file(DATA / case / "model.safetensors")
    change(tensors)
    config = json.loads((DATA / case / "config.json").read_text())
    if not keep_method:
        config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors"
    )


def _cut(tensors: Tensors, name: str, axis: int) -> None:
    tensors[name] = tensors[name].narrow(axis, 0, tensors[name].shape[axis] - 1).clone()


def _cast(tensors: Tensors, name: str, dtype: torch.dtype) -> None:
    tensors[name] = tensors[name].to(dtype)
