"""Wide values of 8-bit and 4-bit floats: all codes, all scales, however rows are divided."""

from __future__ import annotations

import pytest
import torch

from ckptd.quant.kernels import float8, fp4, grid

FLOAT8 = (
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
)
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("with_nan", [False, True])
def test_every_code_is_torch_s_own(dtype: torch.dtype, with_nan: bool) -> None:
    """All 256 codes have the bits of torch's conversion, with and without the NaN among them."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    if not with_nan:
        codes = codes[~codes.float().isnan()]
    codes = codes.view(1, -1)
    out, room = torch.empty(codes.shape), torch.empty(codes.shape, dtype=torch.int16)
    float8.widen(codes, out, room)
    found, expected = out * float8.factor(dtype), codes.float()
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    assert torch.equal(found[~nan].view(torch.int32), expected[~nan].view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.float8_e4m3fn, torch.bfloat16])
def test_scales_of_every_kind(dtype: torch.dtype) -> None:
    """Scales in float32 are torch's own, the smallest exponent (a subnormal) among them."""
    raw = torch.arange(254, dtype=torch.uint8)
    scales = raw.view(dtype).view(1, -1)
    expected = scales.float()
    assert torch.equal(float8.values(scales).nan_to_num(), expected.nan_to_num())


def test_every_nibble() -> None:
    """Sixteen codes are the values of E2M1, with signed zero."""
    halves = (torch.arange(16) << 12).to(torch.int16).view(1, -1)
    x = torch.empty(1, 16)
    fp4.widen(halves, x)
    expected = torch.tensor([*E2M1, *(-one for one in E2M1)])
    assert torch.equal((x * fp4.FACTOR)[0], expected)
    assert torch.equal(x[0].signbit(), torch.arange(16) > 7)


@pytest.mark.parametrize(
    ("scale", "moderate"), [(1.0, True), (-1.0, True), (2.0**100, False), (float("inf"), False)]
)
def test_scales_near_the_end_take_no_factor(scale: float, moderate: bool) -> None:
    """A power of two is put into scales only where none can overflow."""
    assert grid.is_moderate(torch.tensor([[0.5, scale]])) is moderate
