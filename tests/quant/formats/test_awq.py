"""AWQ: every layout and width, against the dequantization of AutoAWQ and GPTQModel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptd.errors import CheckpointCorrupt, CheckpointUnsupported
from ckptd.quant.formula import Arith
from tests.quant import copies, decoding

DATA = Path(__file__).parents[2] / "data" / "quant"
CASES = (
    "awq_gemm",
    "awq_gemm_whole",
    "awq_gemv_g32",
    "awq_gemv_g64",
    "awq_gemv_g128",
    "awq_gemv_fast_g32",
    "awq_gemv_fast_g64",
    "awq_gemv_fast_g128",
    "awq_gptqmodel_widths",
)
GEMM = DATA / "awq_gemm"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arith", Arith)
def test_weights_are_bit_equal(case: str, arith: Arith) -> None:
    """In fp16 a weight has the library's bits, in its order of roundings and in float32."""
    found = decoding.decoded(DATA / case, arith=arith)
    decoding.assert_bit_equal(found, decoding.reference(DATA / case))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("step", [1, 2])
def test_values_do_not_depend_on_how_rows_are_divided(case: str, step: int) -> None:
    """A weight decoded some granules at a time is the weight decoded at once."""
    found = decoding.decoded(DATA / case, step=step)
    decoding.assert_bit_equal(found, decoding.reference(DATA / case))


@pytest.mark.parametrize("case", CASES)
def test_the_layout_is_known_by_its_shapes(case: str, tmp_path: Path) -> None:
    """Without a version in the config the tensors tell which layout they have."""

    def forget(said: copies.Config) -> None:
        for key in ("version", "format", "checkpoint_format"):
            said.pop(key, None)

    copy = copies.changed(DATA / case, tmp_path / "bare", quantization=forget)
    decoding.assert_bit_equal(decoding.decoded(copy), decoding.reference(DATA / case))


def test_bfloat16_scales_make_bfloat16(tmp_path: Path) -> None:
    """The result has the dtype of the scales, as the library's has."""

    def cast(tensors: copies.Tensors) -> None:
        tensors["a.q.scales"] = tensors["a.q.scales"].bfloat16()

    copy = copies.changed(GEMM, tmp_path / "wide", tensors=cast)
    assert decoding.decoded(copy)["a.q.weight"].dtype is torch.bfloat16


def test_partners_may_lie_in_another_file(tmp_path: Path) -> None:
    """Scales and zeros are found in whichever shard they are."""
    copy = copies.changed(
        GEMM, tmp_path / "two", split=lambda name: name.endswith(("qzeros", "scales"))
    )
    decoding.assert_bit_equal(decoding.decoded(copy), decoding.reference(GEMM))


@pytest.mark.parametrize("case", ["awq_gemm", "awq_gemv_g64", "awq_gemv_fast_g64"])
def test_the_scale_of_an_activation_goes_into_the_weight(case: str, tmp_path: Path) -> None:
    """What divided the activation divides the columns of the weight behind it."""
    expected = decoding.reference(DATA / case)["a.q.weight"]
    scale = torch.linspace(0.5, 3, expected.shape[1]).half()
    copy = copies.changed(
        DATA / case, tmp_path / "act", tensors=lambda one: one.update({"a.act.scales": scale})
    )
    (group,) = (one for one in decoding.find(copy)[1].groups if one.name == "a.q.weight")
    assert "a.act.scales" in group.consumed
    found = decoding.weight(group, arith=Arith.FLOAT32)
    torch.testing.assert_close(found, (expected.float() / scale.float()).half(), rtol=2e-3, atol=0)


def test_an_activation_that_nothing_follows_is_refused(tmp_path: Path) -> None:
    """A scale that no weight can take up would be lost: it is named."""
    scale = {"a.act.scales": torch.ones(33)}
    copy = copies.changed(GEMM, tmp_path / "act", tensors=lambda one: one.update(scale))
    with pytest.raises(CheckpointUnsupported) as caught:
        decoding.find(copy)
    assert caught.value.tensor == "a.act.scales"


def _pop(name: str) -> Callable[[copies.Tensors], Any]:
    return lambda tensors: tensors.pop(name)


def _cut(name: str, *, rows: int = 0, columns: int = 0) -> Callable[[copies.Tensors], None]:
    def change(tensors: copies.Tensors) -> None:
        height, width = tensors[name].shape
        tensors[name] = tensors[name][: height - rows, : width - columns].contiguous()

    return change


@pytest.mark.parametrize(
    ("case", "change", "tensor"),
    [
        ("awq_gemm", _pop("a.q.qzeros"), "a.q.qweight"),
        ("awq_gemm", _pop("a.q.scales"), "a.q.qweight"),
        ("awq_gemm", _cut("a.q.qweight", columns=1), "a.q.qzeros"),
        ("awq_gemm", _cut("a.q.qweight", rows=32), "a.q.scales"),
        ("awq_gemm", _cut("a.q.scales", columns=8), "a.q.qzeros"),
        ("awq_gemm", _cut("a.q.qzeros", rows=1), "a.q.qzeros"),
        ("awq_gemm", lambda one: one.update({"a.q.g_idx": torch.ones(4)}), "a.q.g_idx"),
        ("awq_gemv_g32", _cut("a.q.scales", columns=8), "a.q.scales"),
        ("awq_gemv_g32", _cut("a.q.qweight", rows=1), "a.q.qzeros"),
        ("awq_gemv_fast_g32", _cut("a.q.qweight", columns=1), "a.q.qweight"),
        ("awq_gemv_fast_g32", _cut("a.q.qzeros", columns=4), "a.q.qzeros"),
        ("awq_gemv_fast_g32", _cut("a.q.scales", rows=1), "a.q.qzeros"),
    ],
)
def test_partners_that_do_not_fit_are_refused(
    case: str, change: Callable[[copies.Tensors], None], tensor: str, tmp_path: Path
) -> None:
    """A partner that is missing or cut is named."""
    copy = copies.changed(DATA / case, tmp_path / "bad", tensors=change)
    with pytest.raises(CheckpointCorrupt) as caught:
        decoding.find(copy)
    assert caught.value.tensor == tensor


@pytest.mark.parametrize("case", ["awq_gemm", "awq_gemv_g32", "awq_gemv_fast_g32"])
@pytest.mark.parametrize("size", [None, "32", 0, -7, 1, True, [32]])
def test_groups_that_nobody_names_are_refused(case: str, size: Any, tmp_path: Path) -> None:
    """A group_size that does not make the scales' groups is refused, whatever it is."""
    copy = copies.changed(
        DATA / case, tmp_path / "bad", quantization=lambda one: one.update(group_size=size)
    )
    with pytest.raises(CheckpointCorrupt, match="group"):
        decoding.find(copy)


def test_marlin_is_refused_by_name(tmp_path: Path) -> None:
    """The layout of a kernel is refused before a byte is read."""
    copy = copies.changed(
        GEMM, tmp_path / "bad", quantization=lambda one: one.update(version="Marlin")
    )
    with pytest.raises(CheckpointUnsupported, match="marlin"):
        decoding.find(copy)
