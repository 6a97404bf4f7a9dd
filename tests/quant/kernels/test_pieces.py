"""Weights of several pieces: memory that is kept from piece to piece, and the table of pairs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ckptd.checkpoint.dtypes import Dtype
from ckptd.quant.formula import Arith
from ckptd.quant.kernels import pairs, steps
from tests.benchmarks import layer_files, layers
from tests.quant import decoding

ROWS, COLUMNS = 576, 4096
KINDS = (
    "fp8_tensor", "modelopt_fp8", "modelopt_w4a16", "awq_gemv", "torchao_int4", "ct_w4a16", "mlx4",
    "gptq4", "awq4", "hqq4", "gguf_q4_0",
)  # fmt: skip
RAGGED = ROWS // 3 + 1
"""Granules at once, so that the last piece is smaller than the others."""


@pytest.mark.parametrize("dtype", [Dtype.BF16, Dtype.F32])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_do_not_show_in_the_values(kind: str, dtype: Dtype, tmp_path: Path) -> None:
    """A weight of three pieces has the bits that it has a few rows at a time."""
    assert ROWS * COLUMNS > 2 * steps.PIECE_ELEMENTS
    torch.manual_seed(3)
    layer_files.write(tmp_path / "made", layers.LAYERS[kind](ROWS, COLUMNS))
    whole = decoding.decoded(tmp_path / "made", arith=Arith.FLOAT32, dtype=dtype)
    few = decoding.decoded(tmp_path / "made", arith=Arith.FLOAT32, dtype=dtype, step=RAGGED)
    decoding.assert_bit_equal(few, whole)
    least = decoding.decoded(tmp_path / "made", arith=Arith.FLOAT32, dtype=dtype, step=32)
    decoding.assert_bit_equal(least, whole)


@pytest.mark.parametrize("dtype", [Dtype.BF16, Dtype.F16])
@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"])
def test_a_table_of_pairs_has_the_values_of_the_arithmetic(
    kind: str, dtype: Dtype, tmp_path: Path
) -> None:
    """Every pair of codes is its two values times the scale, rounded once; NaN stays NaN."""
    codes = torch.arange(256, dtype=torch.uint8)
    every = torch.stack((codes.repeat_interleave(256), codes.repeat(256)), 1).view(64, -1)
    held = every.repeat(8, 1).view(getattr(torch, kind))
    assert held.numel() >= 1 << 20
    scale = torch.tensor(0.0037)
    save_file({"a.weight": held, "a.weight_scale": scale}, tmp_path / "model.safetensors")
    said = '{"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}'
    (tmp_path / "config.json").write_text(said)
    group = decoding.find(tmp_path)[1].groups[0]
    target = torch.empty(held.shape, dtype=getattr(torch, str(dtype.torch_name)))
    assert pairs.are_apt(group.formulas[0], held, target)  # type: ignore[arg-type]
    found = decoding.weight(group, arith=Arith.FLOAT32, dtype=dtype)
    expected = (held.float() * scale).to(target.dtype)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
