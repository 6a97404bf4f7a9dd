"""Decoded rows in plans: any rows of a weight, whatever the blocks, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckptd.checkpoint import header
from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import StoredTensor
from ckptd.errors import CheckFailed, CheckpointCorrupt
from ckptd.plan import blocks, dequantize, evaluate, expression, plan
from ckptd.plan.nodes import Decode, Expression, Grown, NewRows
from ckptd.plan.plan import Computed
from ckptd.plan.sources import Sources
from ckptd.quant.formula import Arith
from ckptd.quant.formulas.scaled import Scaled
from ckptd.quant.group import Group
from ckptd.quant.parts import part, stacked

ROWS, COLUMNS, BLOCK = 300, 70, 64


def _file(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, StoredTensor]:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return {t.spec.name: t for t in header.read(folder / "model.safetensors").tensors}


def _fp8(rows: int = ROWS, experts: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    grid = (-(-rows // BLOCK), -(-COLUMNS // BLOCK))
    lead = (experts,) if experts else ()
    return {
        "codes": torch.randn(*lead, rows, COLUMNS).to(torch.float8_e4m3fn),
        "scale": torch.rand(*lead, *grid) + 0.5,
    }


def _expected(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    codes, scale = tensors["codes"].float(), tensors["scale"]
    spread = scale.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
    return codes * spread[..., : codes.shape[-2], : codes.shape[-1]]


def _group(stored: dict[str, StoredTensor]) -> Group:
    shape = stored["codes"].spec.shape
    count = shape[0] if len(shape) == 3 else 1
    codes = stacked(part(stored["codes"]), count)
    scales = stacked(part(stored["scale"], is_scale=True), count)
    formulas = tuple(
        Scaled(codes=c, scale=s, block=(BLOCK, BLOCK), dtype=Dtype.BF16)
        for c, s in zip(codes, scales, strict=True)
    )
    return Group(name="w", shape=shape, formulas=formulas, consumed=("codes", "scale"), scheme="")


def _value(wanted: Expression, stored: dict[str, StoredTensor]) -> torch.Tensor:
    path = stored["codes"].extent.path
    raw = bytearray()
    with Sources({path: header.read(path).stamp}) as sources:
        evaluator = evaluate.Evaluator(device="cpu", sources=sources)
        for segment in plan.segments_of([("w", wanted)]):
            assert isinstance(segment, Computed)
            for batch in blocks.batches([segment]):
                staged = evaluator.read(batch)
                raw += b"".join(evaluator.compute(staged))
                evaluator.release(staged)
    return torch.frombuffer(raw, dtype=evaluate._torch_dtype(wanted.dtype)).view(wanted.shape)


@pytest.mark.parametrize("dtype", [Dtype.BF16, Dtype.F16, Dtype.F32, Dtype.F64])
def test_a_weight_is_rounded_once_to_any_dtype(dtype: Dtype, tmp_path: Path) -> None:
    """Float32 products, one rounding; float64 holds the float32 values."""
    tensors = _fp8()
    stored = _file(tmp_path, tensors)
    wanted = dequantize.weight(_group(stored), dtype=dtype, arith=Arith.FLOAT32)
    found = _value(wanted, stored)
    assert torch.equal(found, _expected(tensors).to(found.dtype))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_rows_have_the_values_of_the_whole(data: st.DataObject, tmp_path: Path) -> None:
    """Rows that begin or end within a block of scales are cut out of whole blocks."""
    tensors = _fp8()
    stored = _file(tmp_path, tensors)
    whole = dequantize.weight(_group(stored), dtype=Dtype.BF16, arith=Arith.FLOAT32)
    start = data.draw(st.integers(0, ROWS - 1))
    stop = data.draw(st.integers(start + 1, ROWS))
    found = _value(expression.rows(whole, start, stop), stored)
    assert torch.equal(found, _expected(tensors).bfloat16()[start:stop])


def test_blocks_do_not_change_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks end at whole granules, also where the rows begin within one."""
    tensors = _fp8()
    stored = _file(tmp_path, tensors)
    whole = dequantize.weight(_group(stored), dtype=Dtype.BF16, arith=Arith.FLOAT32)
    monkeypatch.setattr(blocks, "_DECODED_BLOCK_BYTES", 1)
    found = _value(expression.rows(whole, 10, 290), stored)
    assert torch.equal(found, _expected(tensors).bfloat16()[10:290])
    (segment,) = plan.segments_of([("w", whole)])
    parts = [block.value for batch in blocks.batches([segment]) for block in batch]
    assert [part.shape[0] for part in parts] == [64, 64, 64, 64, 44]


def test_experts_lie_one_after_the_other(tmp_path: Path) -> None:
    """A weight of three axes is its experts' matrices, also in part and in another dtype."""
    tensors = _fp8(rows=100, experts=3)
    stored = _file(tmp_path, tensors)
    whole = dequantize.weight(_group(stored), dtype=Dtype.BF16, arith=Arith.FLOAT32)
    assert whole.shape == (3, 100, COLUMNS)
    expected = _expected(tensors).bfloat16()
    assert torch.equal(_value(whole, stored), expected)
    assert torch.equal(_value(expression.cast(whole, Dtype.F32), stored), expected.float())
    assert torch.equal(_value(expression.rows(whole, 1, 3), stored), expected[1:])


def test_rows_grow_from_a_decoded_weight(tmp_path: Path) -> None:
    """New rows take their statistics from the decoded values."""
    tensors = _fp8()
    stored = _file(tmp_path, tensors)
    whole = dequantize.weight(_group(stored), dtype=Dtype.F32, arith=Arith.FLOAT32)
    new = Grown(whole, (2, COLUMNS), 0, ROWS, NewRows.MEAN, 0.02, 7)
    found = _value(expression.concat([whole, new]), stored)
    mean = _expected(tensors).mean(0)
    assert torch.allclose(found[ROWS:], mean.expand(2, -1), atol=1e-3)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_are_refused(wrong: float, tmp_path: Path) -> None:
    """The weight and the number of such scales are named."""
    tensors = _fp8()
    tensors["scale"][2, 1] = wrong
    stored = _file(tmp_path, tensors)
    wanted = dequantize.weight(_group(stored), dtype=Dtype.BF16, arith=Arith.FLOAT32)
    with pytest.raises(CheckpointCorrupt, match=r"tensor 'w': a scale is infinite .*1 others"):
        _value(wanted, stored)


def test_values_too_large_for_float16_are_refused(tmp_path: Path) -> None:
    """What bfloat16 holds and float16 does not never becomes infinite."""
    tensors = _fp8()
    tensors["scale"][0, 0] = 1e6
    stored = _file(tmp_path, tensors)
    wanted = dequantize.weight(_group(stored), dtype=Dtype.F16, arith=Arith.FLOAT32)
    with pytest.raises(CheckFailed, match="too large for float16"):
        _value(wanted, stored)


def test_the_description_leaves_the_folder_out(tmp_path: Path) -> None:
    """The same checkpoint in another folder has the same plan; another dtype has not."""
    described = []
    for name in ("a", "b"):
        stored = _file(tmp_path / name, _fp8())
        whole = dequantize.weight(_group(stored), dtype=Dtype.BF16, arith=Arith.FLOAT32)
        assert isinstance(whole, Decode)
        described.append(plan._describe_value(whole))
    assert described[0] == described[1]
    other = dataclasses.replace(whole.formula, dtype=Dtype.F16)  # type: ignore[type-var]
    assert plan._describe_value(dataclasses.replace(whole, formula=other)) != described[0]
