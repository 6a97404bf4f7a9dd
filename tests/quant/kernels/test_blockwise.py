"""The kernel of nf4 and fp4 on its own: ranges of rows, parts of blocks, scales made ahead."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import Extent
from ckptd.quant.formulas.blockwise import Blockwise
from ckptd.quant.kernels import blockwise, decode, steps
from ckptd.quant.parts import Part
from tests.quant import decoding

NESTED_OFFSET = 0.0371


class Source:
    """A flat tensor of `count` random codes in a file, and what it decodes to in float32."""

    def __init__(self, folder: Path, *, count: int, block: int, nested_block: int | None) -> None:
        torch.manual_seed(0)
        self.block, self.nested_block = block, nested_block
        num_blocks = -(-count // block)
        codes = torch.randint(0, 256, (-(-count // 2),), dtype=torch.uint8)
        table = torch.randn(16)
        self.parts = {"codes": _part(folder, codes), "quant_map": _part(folder, table)}
        if nested_block is None:
            scales = torch.rand(num_blocks) + 0.5
            self.parts["absmax"] = _part(folder, scales)
        else:
            stored = torch.randint(0, 256, (num_blocks,), dtype=torch.uint8)
            nested, nested_map = torch.rand(-(-num_blocks // nested_block)), torch.randn(256)
            spread = nested.repeat_interleave(nested_block)[:num_blocks]
            scales = nested_map[stored.long()] * spread + NESTED_OFFSET
            self.parts["absmax"] = _part(folder, stored)
            self.parts["nested_absmax"] = _part(folder, nested)
            self.parts["nested_map"] = _part(folder, nested_map)
        nibbles = torch.stack([codes >> 4, codes & 15], dim=-1).view(-1)[:count].long()
        self.values = table[nibbles] * scales.repeat_interleave(block)[:count]

    def formula(self, shape: tuple[int, int], **settings: object) -> Blockwise:
        """Return the formula of a matrix of `shape` in it."""
        return Blockwise(
            **self.parts,
            block=self.block,
            nested_block=self.nested_block or 256,
            nested_offset=NESTED_OFFSET,
            shape=shape,
            dtype=Dtype.F32,
            **settings,  # type: ignore[arg-type]
        )


def _part(folder: Path, values: torch.Tensor) -> Part:
    path = folder / f"{len(list(folder.iterdir()))}.bin"
    path.write_bytes(values.numpy().tobytes())
    dtype = Dtype.U8 if values.dtype is torch.uint8 else Dtype.F32
    return Part(path.name, Extent(path, 0, values.nbytes), dtype, 1, len(values))


def _decode(formula: Blockwise, rows: range) -> torch.Tensor:
    out = torch.empty(
        (len(rows), formula.columns), dtype=getattr(torch, str(formula.dtype.torch_name))
    )
    tensors = [decoding.read(window) for window in formula.windows(rows)]
    decode.rows_into(formula, rows, tensors, out)
    return out


@pytest.mark.parametrize("nested_block", [None, 3])
@pytest.mark.parametrize("columns", [1, 7, 32, 50, 86, 400])
def test_any_rows_of_any_width(tmp_path: Path, columns: int, nested_block: int | None) -> None:
    """Every range of rows is what it is in the whole, wherever blocks begin and end."""
    source = Source(tmp_path, count=11 * columns, block=32, nested_block=nested_block)
    formula = source.formula((11, columns))
    for start in range(11):
        for stop in range(start + 1, 12):
            found = _decode(formula, range(start, stop))
            expected = source.values.view(11, columns)[start:stop]
            assert torch.equal(found, expected), (start, stop)


@pytest.mark.parametrize("nested_block", [None, 4])
def test_matrices_within_a_flat_tensor(tmp_path: Path, nested_block: int | None) -> None:
    """The experts of one tensor begin within a block, and within a byte."""
    source = Source(tmp_path, count=5 * 3 * 15, block=32, nested_block=nested_block)
    for expert in range(5):
        found = _decode(source.formula((3, 15), first=expert * 45), range(3))
        assert torch.equal(found, source.values.view(5, 3, 15)[expert])


def test_transposed(tmp_path: Path) -> None:
    """A transposed matrix is computed whole and is the transpose of the other."""
    source = Source(tmp_path, count=33 * 50, block=64, nested_block=3)
    formula = source.formula((33, 50), transposed=True)
    assert (formula.rows, formula.columns, formula.granule) == (50, 33, 50)
    assert torch.equal(_decode(formula, range(50)), source.values.view(33, 50).T)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("nested_block", [None, 4])
def test_pieces_change_nothing(
    tmp_path: Path, nested_block: int | None, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few elements and scales are in hand at once, the values are the same."""
    source = Source(tmp_path, count=37 * 86, block=32, nested_block=nested_block)
    formula = source.formula((37, 86), transposed=transposed)
    whole = _decode(formula, range(formula.rows))
    monkeypatch.setattr(steps, "PIECE_ELEMENTS", 200)
    monkeypatch.setattr(blockwise, "_HELD_SCALES", 8)
    assert torch.equal(_decode(formula, range(formula.rows)), whole)


@pytest.mark.parametrize("dtype", [Dtype.BF16, Dtype.F16])
def test_rounded_once(tmp_path: Path, dtype: Dtype) -> None:
    """A narrower result is the float32 one, rounded once."""
    source = Source(tmp_path, count=9 * 86, block=64, nested_block=4)
    formula = dataclasses.replace(source.formula((9, 86)), dtype=dtype)
    expected = source.values.view(9, 86).to(getattr(torch, str(dtype.torch_name)))
    assert torch.equal(_decode(formula, range(9)), expected)


def test_windows_are_small(tmp_path: Path) -> None:
    """Some rows need the bytes of their blocks and whole nested blocks of scales, no more."""
    source = Source(tmp_path, count=64 * 640, block=64, nested_block=16)
    codes, absmax, table, nested, nested_map = source.formula((64, 640)).windows(range(8, 10))
    assert codes.nbytes == 2 * 640 // 2
    assert absmax.nbytes == 20
    assert (table.columns, nested.columns, nested_map.columns) == (16, 2, 256)
