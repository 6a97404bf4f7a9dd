"""Decoding whole checkpoints in tests, in steps of any size, past plan and stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from ckptd.checkpoint import checkpoint
from ckptd.checkpoint.dtypes import Dtype
from ckptd.quant import registry, stored
from ckptd.quant.formula import Arith, Formula
from ckptd.quant.group import Format, Found, Group
from ckptd.quant.kernels import decode
from ckptd.quant.parts import Window


def find(path: Path) -> tuple[Format, Found]:
    """Return the format of the folder at `path` and what it finds there."""
    seen = stored.of_checkpoint(checkpoint.open_checkpoint(path))
    chosen = registry.choose(seen)
    assert chosen is not None
    return chosen, chosen.find(seen)


def decoded(
    path: Path,
    *,
    arith: Arith = Arith.LIBRARY,
    dtype: Dtype | None = None,
    step: int | None = None,
) -> dict[str, torch.Tensor]:
    """Return every weight of the folder at `path`, `step` granules at a time (None: at once).

    In `Arith.LIBRARY` the dtype is the library's; else `dtype`, or the library's without it.
    """
    _, found = find(path)
    return {
        group.name: weight(group, arith=arith, dtype=dtype, step=step) for group in found.groups
    }


def weight(
    group: Group, *, arith: Arith, dtype: Dtype | None = None, step: int | None = None
) -> torch.Tensor:
    """Return the weight that `group` is."""
    made = []
    for formula in group.formulas:
        changes = {"arith": arith} if dtype is None else {"arith": arith, "dtype": dtype}
        made.append(_rows(dataclasses.replace(formula, **changes), step))
    return torch.cat(made).reshape(group.shape)


def _rows(formula: Formula, step: int | None) -> torch.Tensor:
    out = torch.empty(
        (formula.rows, formula.columns), dtype=getattr(torch, str(formula.dtype.torch_name))
    )
    size = formula.rows if step is None else step * formula.granule
    for start in range(0, formula.rows, max(1, size)):
        rows = range(start, min(start + size, formula.rows))
        tensors = [read(window) for window in formula.windows(rows)]
        decode.rows_into(formula, rows, tensors, out[rows.start : rows.stop])
    return out


def read(window: Window) -> torch.Tensor:
    """Return a window's values as `(rows, columns)`, as the evaluator hands them to kernels."""
    with window.extent.path.open("rb") as file:
        data = b"".join(_ranges(window, file.fileno()))
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)
    name = window.dtype.torch_name
    dtype = torch.uint8 if name is None else getattr(torch, name)
    return raw.to(torch.uint8).view(dtype).view(window.rows, -1)


def _ranges(window: Window, fd: int) -> Iterator[bytes]:
    import os

    for place in range(window.count):
        offset = window.extent.offset + place * window.stride_bytes
        yield os.pread(fd, window.width_bytes, offset)


def reference(path: Path) -> dict[str, torch.Tensor]:
    """Return the library's own dequantized tensors of a fixture folder."""
    return load_file(path / "reference.safetensors")


def assert_bit_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Fail, naming the tensor, unless names, dtypes, shapes and all bits agree (NaN counts)."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        ours = found[name]
        assert (ours.dtype, ours.shape) == (value.dtype, value.shape), name
        same = torch.equal(
            ours.contiguous().view(torch.uint8), value.contiguous().view(torch.uint8)
        )
        assert same, f"{name}: {int((ours != value).sum())} of {value.numel()} differ"
