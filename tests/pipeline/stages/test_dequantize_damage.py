"""Damaged checkpoints of every family: refused by the name of the tensor, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptd import errors
from ckptd.checkpoint import header
from ckptd.quant.formula import Formula, parts
from ckptd.quant.group import Group
from tests.pipeline.stages.conftest import planned, run
from tests.quant import decoding

CASES_PATH = Path(__file__).parents[2] / "data" / "quant"
CASES = sorted(path.name for path in CASES_PATH.iterdir() if (path / "model.safetensors").is_file())
"""One folder a format and variant, as the real libraries wrote them."""

Change = Callable[[torch.Tensor], torch.Tensor]


def _damaged(case: str, out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Return a copy of a case whose tensors `change` changed in place."""
    shutil.copytree(CASES_PATH / case, out, ignore=shutil.ignore_patterns("reference.*"))
    path = out / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=dict(header.read(path).metadata))
    return out


def _groups(case: str) -> tuple[Group, ...]:
    return decoding.find(CASES_PATH / case)[1].groups


def _scales(formula: Formula) -> list[str]:
    return [part.name for part in parts(formula) if part.is_scale]


def _codes(group: Group) -> str:
    """Return the largest stored tensor of a weight, which has its codes."""
    sizes = {part.name: part.extent.nbytes for part in parts(group.formulas[0])}
    return max(sizes, key=lambda name: sizes[name])


def _first_scale(case: str) -> tuple[str, Group]:
    """Return the scale of the first weight whose scale is a tensor of several values."""
    tensors = load_file(CASES_PATH / case / "model.safetensors")
    for group in _groups(case):
        for name in _scales(group.formulas[0]):
            if tensors[name].numel() > 1 and name != _codes(group):
                return name, group
    pytest.skip("no weight of this case has more than one scale")


def _changed(name: str, change: Change) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


def _with_first(value: float) -> Change:
    """Return what sets the first value: NaN is 255 where scales are exponents in bytes."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
            changed.view(-1)[0] = value
        else:
            raw = changed.view(torch.uint8).view(-1)
            raw[0] = 255 if tensor.dtype in (torch.uint8, torch.float8_e8m0fnu) else 127
        return changed

    return change


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", CASES)
def test_a_scale_that_is_not_finite_stops_the_job(case: str, value: float, tmp_path: Path) -> None:
    """A scale that is infinite or not a number is named; no folder is left that looks finished."""
    name, group = _first_scale(case)
    folder = _damaged(case, tmp_path / "source", _changed(name, _with_first(value)))
    with pytest.raises(errors.CheckpointCorrupt, match="infinite or not a number") as refused:
        run(folder, "- dequantize", tmp_path / "out")
    assert refused.value.tensor == group.name
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", CASES)
def test_a_scale_that_is_missing_is_refused_by_name(case: str, tmp_path: Path) -> None:
    """Codes without their scale are refused before a byte is written, naming one of the module."""
    name, group = _first_scale(case)
    folder = _damaged(case, tmp_path / "source", lambda tensors: tensors.__delitem__(name))
    with pytest.raises(errors.CheckpointRefused) as refused:
        planned(folder, "- dequantize")
    assert any(one in str(refused.value) for one in (*group.consumed, group.name))


@pytest.mark.parametrize("case", CASES)
def test_a_scale_too_few_never_gives_the_same_weight(case: str, tmp_path: Path) -> None:
    """One scale too few along an axis is refused by name, or the plan says another shape or grouping.

    A single scale that is left is that of a whole tensor, which is allowed; and an AWQ weight may
    have as many outputs as it has scales: no loader takes the narrower weight.
    """
    name, group = _first_scale(case)
    stored = load_file(CASES_PATH / case / "model.safetensors")[name]
    for axis in range(stored.ndim):
        if stored.shape[axis] < 2 or stored.numel() == 2:
            continue
        change = _changed(name, lambda one, axis=axis: one.narrow(axis, 0, one.shape[axis] - 1))
        found = _found_again(_damaged(case, tmp_path / f"{axis}", change), group)
        assert found is None or (found.shape, found.scheme) != (group.shape, group.scheme)


@pytest.mark.parametrize("case", CASES)
def test_truncated_codes_never_give_a_weight_of_that_shape(case: str, tmp_path: Path) -> None:
    """Codes that end early are refused by name, or give a narrower weight, which no loader takes."""
    _, group = _first_scale(case)
    name = _codes(group)
    stored = load_file(CASES_PATH / case / "model.safetensors")[name]
    for axis in range(stored.ndim):
        half = stored.shape[axis] // 2
        if half == 0:
            continue
        change = _changed(name, lambda one, axis=axis, half=half: one.narrow(axis, 0, half))
        found = _found_again(_damaged(case, tmp_path / f"{axis}", change), group)
        assert found is None or found.shape != group.shape


def _found_again(folder: Path, group: Group) -> Group | None:
    """Return what the weight of `group` is in a damaged folder, None where it is refused by name."""
    try:
        found = decoding.find(folder)[1]
    except errors.CheckpointRefused as refused:
        said = str(refused)
    else:
        return next(one for one in found.groups if one.name == group.name)
    assert any(one in said for one in (*group.consumed, group.name))
    return None


_WIDTHS = ("bits", "num_bits", "nbits", "w_bit", "wbits")


def _other_widths(config: Any) -> Iterator[None]:
    """Give every bit width anywhere in a config another value, one after the other."""
    children = config.values() if isinstance(config, dict) else config
    for child in children:
        if isinstance(child, dict | list):
            yield from _other_widths(child)
    if isinstance(config, dict):
        for key in [key for key in _WIDTHS if type(config.get(key)) is int]:
            said = config[key]
            for width in (1, 2, 3, 4, 5, 6, 7, 8, 16, 0, -4, 10**9):
                if width != said and {width, said} != {7, 8}:  # both are four to a word of 32 bits
                    config[key] = width
                    yield
            config[key] = said


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_bit_width_never_gives_other_values(case: str, tmp_path: Path) -> None:
    """A width in the config that contradicts the tensors is refused, or was never needed."""
    folder = _damaged(case, tmp_path / "source", lambda _: None)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    wanted = decoding.decoded(folder)
    for _ in _other_widths(config):
        path.write_text(json.dumps(config))
        try:
            found = decoding.decoded(folder)
        except errors.CheckpointRefused:
            continue
        for name in found.keys() & wanted.keys():
            if found[name].shape == wanted[name].shape:
                torch.testing.assert_close(found[name], wanted[name], equal_nan=True)
