"""Decoding straight into tensors: each row in its place, whoever decodes it, and threads given back."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptd.checkpoint import header
from ckptd.checkpoint.dtypes import Dtype
from ckptd.errors import CheckFailed, SourceChanged
from ckptd.plan import fill_decoded
from ckptd.plan.fill_decoded import Decoding
from ckptd.quant import parts
from ckptd.quant.formulas.scaled import Scaled
from ckptd.quant.group import Group

ROWS, COLUMNS, EXPERTS = 9000, 1200, 3
"""More than a block a matrix, and blocks that begin within an expert."""


@pytest.fixture
def stored(tmp_path: Path) -> header.Header:
    """An int8 matrix with a scale a row, as it is and as three experts."""
    torch.manual_seed(0)
    codes = torch.randint(-128, 128, (ROWS, COLUMNS), dtype=torch.int8)
    tensors = {"codes": codes, "scale": torch.rand(ROWS, 1)}
    save_file(tensors, tmp_path / "model.safetensors")
    return header.read(tmp_path / "model.safetensors")


def groups(stored: header.Header) -> tuple[Group, Group]:
    found = {tensor.spec.name: tensor for tensor in stored.tensors}
    codes, scale = parts.part(found["codes"]), parts.part(found["scale"], is_scale=True)

    def formula(codes: parts.Part, scale: parts.Part) -> Scaled:
        return Scaled(codes=codes, scale=scale, block=(1, COLUMNS), dtype=Dtype.BF16)

    pairs = zip(parts.stacked(codes, EXPERTS), parts.stacked(scale, EXPERTS), strict=True)
    return (
        _group("whole", (ROWS, COLUMNS), (formula(codes, scale),)),
        _group("experts", (EXPERTS, ROWS // EXPERTS, COLUMNS), tuple(formula(*p) for p in pairs)),
    )


def _group(name: str, shape: tuple[int, ...], formulas: tuple[Scaled, ...]) -> Group:
    return Group(name=name, shape=shape, formulas=formulas, consumed=(name,), scheme="int8")


def values(stored: header.Header) -> torch.Tensor:
    tensors = load_file(stored.path)
    return tensors["codes"].float() * tensors["scale"]


def decode(stored: header.Header, *decodings: Decoding, num_threads: int | None = None) -> None:
    fill_decoded.fill(decodings, stamps={stored.path: stored.stamp}, num_threads=num_threads)


@pytest.mark.parametrize("num_threads", [None, 1, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_row_is_in_its_place(
    stored: header.Header, dtype: torch.dtype, num_threads: int | None
) -> None:
    """Matrices and experts, blocks by any number of threads, rounded once to the target's dtype."""
    targets = [torch.full(group.shape, torch.nan, dtype=dtype) for group in groups(stored)]
    decodings = [Decoding(*pair) for pair in zip(groups(stored), targets, strict=True)]
    decode(stored, *decodings, num_threads=num_threads)
    expected = values(stored).to(dtype)
    for target in targets:
        assert torch.equal(target.view(ROWS, COLUMNS), expected)


def test_torch_has_its_threads_back_after_overlapping_calls(stored: header.Header) -> None:
    """However calls overlap and end, the process computes with as many threads as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    whole, _ = groups(stored)
    try:
        target = torch.empty(whole.shape)
        calls = [
            threading.Thread(target=decode, args=(stored, Decoding(whole, target)))
            for _ in range(4)
        ]
        for call in calls:
            call.start()
        for call in calls:
            call.join()
        with pytest.raises(ValueError, match="whole"):
            decode(stored, Decoding(whole, target[1:]))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "target",
    [
        torch.empty(ROWS, COLUMNS + 1),
        torch.empty(COLUMNS, ROWS).t(),
        torch.empty(ROWS, COLUMNS, device="meta"),
    ],
    ids=["shape", "transposed", "meta"],
)
def test_a_target_that_does_not_fit_is_refused(stored: header.Header, target: torch.Tensor) -> None:
    """It names the weight, before anything is read."""
    with pytest.raises(ValueError, match="whole"):
        decode(stored, Decoding(groups(stored)[0], target))


def test_a_changed_file_is_noticed(stored: header.Header) -> None:
    """What was decoded from it is void."""
    whole, _ = groups(stored)
    tensors = {"codes": torch.zeros(ROWS, COLUMNS, dtype=torch.int8), "scale": torch.ones(ROWS, 1)}
    save_file(tensors, stored.path)
    with pytest.raises(SourceChanged):
        decode(stored, Decoding(whole, torch.empty(whole.shape)))


def test_values_beyond_float16_stop_all_threads(tmp_path: Path) -> None:
    """The weight is named."""
    tensors = {
        "codes": torch.ones(ROWS, COLUMNS, dtype=torch.int8),
        "scale": torch.full((ROWS, 1), 1e6),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    stored = header.read(tmp_path / "model.safetensors")
    whole, _ = groups(stored)
    with pytest.raises(CheckFailed, match="whole"):
        decode(stored, Decoding(whole, torch.empty(whole.shape, dtype=torch.float16)))


def test_nothing_to_decode_is_nothing_done(tmp_path: Path) -> None:
    """A plain checkpoint costs nothing here, and an empty weight is no failure."""
    fill_decoded.fill([], stamps={})
    tensors = {"codes": torch.empty(0, 4, dtype=torch.int8), "scale": torch.empty(0, 1)}
    save_file(tensors, tmp_path / "model.safetensors")
    stored = header.read(tmp_path / "model.safetensors")
    found = {tensor.spec.name: parts.part(tensor) for tensor in stored.tensors}
    formula = Scaled(codes=found["codes"], scale=found["scale"], block=(1, 4), dtype=Dtype.BF16)
    decode(stored, Decoding(_group("empty", (0, 4), (formula,)), torch.empty(0, 4)))
