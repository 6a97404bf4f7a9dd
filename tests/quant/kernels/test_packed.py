"""Packed codes: the stream of bits, the values of codes, and the order of roundings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import Extent
from ckptd.quant.formula import Arith
from ckptd.quant.formulas.packed import Packed, Values
from ckptd.quant.kernels import bitstream, decode
from ckptd.quant.parts import Part


def packed(codes: torch.Tensor, bits: int, *, dense: bool = True) -> torch.Tensor:
    """Return the bytes of the words that hold each row of `codes`, bit by bit."""
    rows = []
    for row in codes.tolist():
        if dense:
            stream = sum(code << place * bits for place, code in enumerate(row))
            words = -(-len(row) * bits // 32)
        else:
            in_word = 32 // bits
            words = -(-len(row) // in_word)
            stream = sum(
                code << place // in_word * 32 + place % in_word * bits
                for place, code in enumerate(row)
            )
        rows.append(list(stream.to_bytes(words * 4, "little")))
    return torch.tensor(rows, dtype=torch.uint8)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_comes_out_of_the_stream(bits: int, dense: bool) -> None:
    """Codes of any width, in rows of any length, are what was put in."""
    generator = torch.Generator().manual_seed(bits)
    for columns in (1, 3, 8, 31, 32, 33, 100):
        codes = torch.randint(0, 1 << bits, (3, columns), generator=generator)
        raw = packed(codes, bits, dense=dense)
        found = bitstream.unpacked(raw, bits=bits, columns=columns, dense=dense)
        assert torch.equal(found, codes.to(torch.uint8))


def part(name: str, value: torch.Tensor, dtype: Dtype, *, columns: int | None = None) -> Part:
    """Return a part that stands for a tensor handed to the kernel."""
    width = value.shape[1] if columns is None else columns
    return Part(name, Extent(Path(name), 0, value.nbytes), dtype, value.shape[0], width)


def test_e2m3_is_sign_exponent_and_mantissa() -> None:
    """All 64 codes have the values of the specification; the zeros keep their sign."""
    codes = torch.arange(64)[None]
    raw = packed(codes, 6)
    scale = torch.tensor([[128]], dtype=torch.uint8).view(torch.float8_e8m0fnu)  # 2
    formula = Packed(
        codes=part("codes", raw, Dtype.U8),
        scale=part("scale", scale, Dtype.F8_E8M0),
        bits=6,
        columns=64,
        group=64,
        values=Values.E2M3,
        dtype=Dtype.BF16,
    )
    out = torch.empty(1, 64, dtype=torch.bfloat16)
    decode.rows_into(formula, range(1), [raw, scale], out)
    magnitudes = [m / 8 for m in range(8)] + [
        (1 + m / 8) * 2.0**e for e in range(3) for m in range(8)
    ]
    expected = torch.tensor([magnitudes + [-value for value in magnitudes]]) * 2
    assert torch.equal(out.float(), expected)
    assert torch.equal(out.signbit(), codes >= 32)


@pytest.mark.parametrize("arith", list(Arith))
def test_the_library_rounds_the_product_before_the_bias(arith: Arith) -> None:
    """In float32 only the sum is rounded; a library rounds both, in the dtype of its scales."""
    codes = torch.tensor([[3, 5, 15, 7]])
    raw = packed(codes, 4)
    scale = torch.tensor([[1.0078125]], dtype=torch.bfloat16)
    bias = torch.tensor([[-2.984375]], dtype=torch.bfloat16)
    formula = Packed(
        codes=part("codes", raw, Dtype.U8),
        scale=part("scale", scale, Dtype.BF16),
        bias=part("bias", bias, Dtype.BF16),
        bits=4,
        columns=4,
        group=4,
        dtype=Dtype.BF16,
        arith=arith,
    )
    out = torch.empty(1, 4, dtype=torch.bfloat16)
    decode.rows_into(formula, range(1), [raw, scale, bias], out)
    exact = (codes.float() * scale.float() + bias.float()).bfloat16()
    library = codes.bfloat16() * scale + bias
    assert not torch.equal(exact, library)
    assert torch.equal(out, library if arith is Arith.LIBRARY else exact)


def test_rows_may_begin_within_a_block() -> None:
    """Scales of many rows, and packed zeros that begin within a word, are found for any rows."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 8, (70, 64), generator=generator)
    zeros = torch.randint(0, 8, (35, 2), generator=generator)
    scale = torch.rand(35, 2, generator=generator)
    raw = packed(codes, 3)
    words = packed(zeros.T.contiguous(), 3).view(torch.int32).T.contiguous()
    formula = Packed(
        codes=part("codes", raw, Dtype.U8),
        scale=part("scale", scale, Dtype.F32),
        zero=part("zero", words, Dtype.I32),
        bits=3,
        columns=64,
        group=32,
        row_block=2,
        zero_bits=3,
        dtype=Dtype.F32,
    )
    spread = (zeros.repeat_interleave(2, 0), scale.repeat_interleave(2, 0))
    zero, factor = (grid.repeat_interleave(32, 1) for grid in spread)
    for rows in (range(70), range(1, 2), range(33, 70), range(64, 67)):
        grid = formula.grid_rows(rows)
        held = formula.zero_words(grid)
        out = torch.empty(len(rows), 64)
        tensors = [
            raw[rows.start : rows.stop],
            scale[grid.start : grid.stop],
            words[held.start : held.stop],
        ]
        decode.rows_into(formula, rows, tensors, out)
        assert torch.equal(out, ((codes - zero) * factor)[rows.start : rows.stop])
