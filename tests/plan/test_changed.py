"""Weights changed by adapters that are no product of two matrices: on all rows, and on any of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ckptd.checkpoint.dtypes import Dtype
from ckptd.plan import blocks, expression, plan
from ckptd.plan.nodes import Change, Changed
from tests.plan.test_composed import Files

ROWS, COLUMNS, RANK = 12, 10, 3
CHANGES: dict[Change, tuple[dict[str, tuple[int, ...]], int]] = {
    Change.ROWS: ({"n": (ROWS, 1)}, 1),
    Change.COLUMNS: ({"n": (1, COLUMNS)}, 0),
    Change.HADAMARD: (
        {"a": (ROWS, RANK), "c": (ROWS, 2), "b": (RANK, COLUMNS), "d": (2, COLUMNS)},
        2,
    ),
    Change.ROTATION: ({"a": (2, 10)}, 0),
    Change.KRONECKER: ({"a": (3, 2), "b": (4, 5)}, 0),
    Change.KRONECKER_LEFT: ({"a": (3, 1), "b": (1, 2), "c": (4, 5)}, 0),
    Change.KRONECKER_RIGHT: ({"a": (3, 2), "b": (4, 2), "c": (2, 5)}, 0),
    Change.KRONECKER_BOTH: ({"a": (3, 1), "b": (1, 2), "c": (4, 2), "d": (2, 5)}, 0),
}
"""The parts of each, in order, and how many of them are divided by rows."""


def _expected(change: Change, base: torch.Tensor, parts: list[torch.Tensor]) -> torch.Tensor:
    match change:
        case Change.ROWS | Change.COLUMNS:
            return base * parts[0]
        case Change.HADAMARD:
            return base + 0.5 * (parts[0] @ parts[2]) * (parts[1] @ parts[3])
        case Change.ROTATION:
            skew = torch.zeros(2, 5, 5, dtype=base.dtype)
            at = torch.triu_indices(5, 5, 1)
            skew[:, at[0], at[1]] = parts[0]
            skew = skew - skew.mT
            one = torch.eye(5, dtype=base.dtype)
            turns = [(one - part) @ torch.linalg.inv(one + part) for part in skew]
            return base @ torch.block_diag(*turns).T
        case Change.KRONECKER:
            return base + 0.5 * torch.kron(*parts)
        case Change.KRONECKER_LEFT:
            return base + 0.5 * torch.kron(parts[0] @ parts[1], parts[2])
        case Change.KRONECKER_RIGHT:
            return base + 0.5 * torch.kron(parts[0], parts[1] @ parts[2])
    return base + 0.5 * torch.kron(parts[0] @ parts[1], parts[2] @ parts[3])


@pytest.mark.parametrize("shape", [(ROWS, COLUMNS), (1, ROWS, COLUMNS), (ROWS, 5, 2)])
@pytest.mark.parametrize("change", CHANGES)
def test_the_whole_and_any_rows(
    change: Change, shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computed in float32 and rounded once; however it is divided into rows, the same bytes."""
    torch.manual_seed(1)
    shapes, num_by_row = CHANGES[change]
    tensors = {name: torch.randn(one) for name, one in shapes.items()}
    tensors["base"] = torch.randn(shape).bfloat16()
    files = Files(tmp_path / "t.safetensors", tensors)
    parts = tuple(files.loads[name] for name in shapes)
    made = Changed(
        files.loads["base"],
        COLUMNS,
        change,
        parts[:num_by_row],
        parts[num_by_row:],
        0.0 if change is Change.ROTATION else 0.5,
        Dtype.BF16,
    )
    base = tensors["base"].double().view(ROWS, COLUMNS)
    expected = _expected(change, base, [tensors[name].double() for name in shapes])
    found = files.value(made)
    assert found.shape == shape
    assert torch.allclose(found.double().view(ROWS, COLUMNS), expected, rtol=2**-8, atol=1e-5)
    rows = files.value(expression.rows(made, 5, 11, axis=made.axis))
    assert torch.equal(rows, found.narrow(made.axis, 5, 6))
    monkeypatch.setattr(blocks, "_MERGED_BLOCK_BYTES", 1)
    (segment,) = plan.segments_of("t", made, 0)
    assert sum(len(batch) for batch in blocks.batches([segment])) == ROWS
    assert torch.equal(files.value(made), found)


def test_factors_are_changed_before_they_are_multiplied(tmp_path: Path) -> None:
    """A factor of an adapter may be a changed matrix itself, of which columns are taken."""
    tensors = {"a": torch.randn(3, 8), "n": torch.randn(3)}
    files = Files(tmp_path / "t.safetensors", tensors)
    made = Changed(files.loads["a"], 8, Change.ROWS, (files.loads["n"],), (), 1.0, Dtype.F32)
    expected = tensors["a"] * tensors["n"][:, None]
    assert torch.equal(files.value(made), expected)
    assert torch.equal(files.value(expression.rows(made, 1, 3)), expected[1:])
