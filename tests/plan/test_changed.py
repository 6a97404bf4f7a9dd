"""Weights changed by adapters that are no product of two matrices: on all rows, and on any of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft.tuners.boft.layer import BOFTLayer

from ckptd.checkpoint.dtypes import Dtype
from ckptd.plan import blocks, changed, expression, fourier, plan
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
    Change.HADAMARD_KERNEL: (
        {"a": (ROWS, 2), "c": (ROWS, 2), "b": (2, 2, 2), "d": (2, 5), "e": (2, 2, 2), "f": (2, 5)},
        2,
    ),
    Change.KRONECKER_KERNEL: ({"a": (3, 1), "b": (2, 2, 2), "c": (2, 4), "d": (2, 5)}, 0),
    Change.BUTTERFLY: ({"n": (ROWS, 1), "a": (1, 2, 5, 5)}, 1),
    Change.FOURIER: ({"n": (7,)}, 0),
    Change.CIRCULANT: ({"a": (6, 5, 2)}, 0),
    Change.REFLECTION: ({"a": (COLUMNS, 3)}, 0),
}
"""The parts of each, in order, and how many of them are divided by rows."""
NUMBERS: dict[Change, tuple[float, ...]] = {Change.FOURIER: (7, ROWS, COLUMNS, 0)}
SCALES = {Change.ROTATION: 0.0, Change.REFLECTION: 0.0}


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
        case Change.HADAMARD_KERNEL:
            left, other_left, core, right, other_core, other_right = parts
            one = torch.einsum("ijk,pi,jr->prk", core, left, right)
            other = torch.einsum("ijk,pi,jr->prk", other_core, other_left, other_right)
            return base + 0.5 * (one * other).flatten(1)
        case Change.KRONECKER_KERNEL:
            inner = torch.einsum("ijk,ip,jr->prk", *parts[1:]).flatten(1)
            return base + 0.5 * torch.kron(parts[0], inner)
        case Change.BUTTERFLY:
            skews = [0.5 * (part - part.mT) for part in parts[1][0]]
            one = torch.eye(5, dtype=base.dtype)
            turns = [(one - skew) @ torch.linalg.inv(one + skew) for skew in skews]
            return base @ torch.block_diag(*turns).T * parts[0]
        case Change.FOURIER:
            spectrum = torch.zeros(ROWS * COLUMNS, dtype=base.dtype)
            drawn = torch.randperm(ROWS * COLUMNS, generator=torch.Generator().manual_seed(7))
            spectrum[drawn[:7]] = parts[0]
            return base + 0.5 * torch.fft.ifft2(spectrum.view(ROWS, COLUMNS)).real
        case Change.CIRCULANT:
            down, across, size = parts[0].shape
            made = torch.empty(down, size, across, size, dtype=base.dtype)
            for at in range(size):
                made[:, at] = parts[0].roll(at, dims=2)
            return base + 0.5 * made.reshape(ROWS, COLUMNS)
        case Change.REFLECTION:
            for plane in (parts[0] / parts[0].norm(dim=0)).T:
                base = base - 2 * torch.outer(base @ plane, plane)
            return base
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
        SCALES.get(change, 0.5),
        Dtype.BF16,
        numbers=NUMBERS.get(change, ()),
    )
    base = tensors["base"].double().view(ROWS, COLUMNS)
    expected = _expected(change, base, [tensors[name].double() for name in shapes])
    found = files.value(made)
    assert found.shape == shape
    assert torch.allclose(found.double().view(ROWS, COLUMNS), expected, rtol=2**-8, atol=1e-5)
    rows = files.value(expression.rows(made, 5, 11, axis=made.axis))
    assert torch.equal(rows, found.narrow(made.axis, 5, 6))
    monkeypatch.setattr(blocks, "_MERGED_BLOCK_BYTES", 1)
    (segment,) = plan.segments_of([("t", made)])
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


@pytest.mark.parametrize("total", [1, 2, 7, 1000, 70_001])
@pytest.mark.parametrize("seed", [0, 777, 2**32 + 5])
def test_the_places_of_a_spectrum_are_those_that_torch_draws(seed: int, total: int) -> None:
    """The first numbers of torch's permutation, without the others; more than one round of draws."""
    drawn = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    for count in {1, min(total, 1500), min(total, 7)}:
        assert fourier.places(seed, total, count) == tuple(drawn[:count].tolist())


def test_butterfly_turns_mix_the_columns_as_peft_says() -> None:
    """Several turns, which PEFT makes on a GPU alone: the product of its permuted block matrices."""
    layer = BOFTLayer(torch.nn.Linear(32, 3, bias=False))
    turns, blocks_, size = 3, 8, 4
    torch.manual_seed(0)
    values = torch.randn(turns, blocks_, size, size)
    lengths = torch.rand(3, 1) + 0.5
    whole = torch.eye(32)
    for turn in range(turns):
        mixed = layer.perm2mat(
            layer.block_butterfly_perm(32, blocks_ // 2**turn, size // 2, turns - 1)
        )
        turned = torch.block_diag(*layer.cayley_batch(values[turn]))
        whole = mixed @ turned @ mixed.T @ whole
    weight = torch.randn(3, 32)
    rows = weight.clone()
    changed.apply(rows, Change.BUTTERFLY, [lengths], [values], scale=1.0, first=0)
    assert torch.allclose(rows, (whole @ weight.T).T * lengths, atol=1e-5)
