"""Blocks: small casts that are neighbours are one, and nothing else about them changes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import Extent, FileStamp
from ckptd.errors import CheckFailed
from ckptd.plan import blocks, evaluate, expression, plan
from ckptd.plan.nodes import Expression, Load
from ckptd.plan.plan import Computed
from ckptd.plan.sources import Sources

FLOATS = {
    Dtype.F64: (torch.float64, torch.int64, 0x7FF << 52),
    Dtype.F32: (torch.float32, torch.int32, 0xFF << 23),
    Dtype.F16: (torch.float16, torch.int16, 0x1F << 10),
    Dtype.BF16: (torch.bfloat16, torch.int16, 0xFF << 7),
}
"""The dtypes of torch, integers as wide, and the bits of a NaN's exponent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A tensor of the source: its elements, what is made of it, and bytes between it and the next."""

    numel: int
    source: Dtype
    target: Dtype
    is_wild: bool
    gap_bytes: int


STORED = st.builds(
    Stored,
    numel=st.sampled_from([0, 1, 7, 64, 64, 128, 192, 1000, 1024]),
    source=st.sampled_from(list(FLOATS)),
    target=st.sampled_from(list(FLOATS)),
    is_wild=st.integers(0, 19).map(lambda number: number == 0),
    gap_bytes=st.sampled_from([0, 0, 0, 8]),
)


def _alike(tensors: list[Stored], source: Dtype, target: Dtype) -> list[Stored]:
    """Return tensors of which most can be joined: all of the same dtypes."""
    return [dataclasses.replace(one, source=source, target=target) for one in tensors]


TENSORS = st.one_of(
    st.lists(STORED, max_size=12),
    st.builds(
        _alike,
        st.lists(STORED, max_size=12),
        st.sampled_from(list(FLOATS)),
        st.sampled_from(list(FLOATS)),
    ),
)


def _bytes(stored: Stored, seed: int) -> bytes:
    """Return weights among which every eighth is a NaN of its own; the wild ones are any bits."""
    dtype, whole, nan = FLOATS[stored.source]
    random = torch.Generator().manual_seed(seed)
    limits = torch.iinfo(whole)
    bits = torch.randint(
        limits.min, limits.max, (stored.numel,), generator=random, dtype=torch.int64
    ).to(whole)
    if not stored.is_wild:
        weights = torch.randn(stored.numel, generator=random, dtype=torch.float64).to(dtype)
        is_nan = torch.arange(stored.numel) % 8 == 3
        bits = torch.where(is_nan, bits | nan | 1, weights.view(whole))
    return bits.numpy().tobytes()


def _written(path: Path, tensors: Sequence[Stored], seed: int) -> dict[str, Expression]:
    """Write the tensors into the file at `path`; return what is to be made of each."""
    values: dict[str, Expression] = {}
    raw = bytearray()
    for number, stored in enumerate(tensors):
        content = _bytes(stored, seed + number)
        load = Load(Extent(path, len(raw), len(content)), stored.source, (stored.numel,))
        values[f"t{number}"] = expression.cast(load, stored.target)
        raw += content + bytes(stored.gap_bytes)
    path.write_bytes(raw)
    return values


def _made(path: Path, batches: Iterator[list[blocks.Block]]) -> list[tuple[int, bytes]] | str:
    """Return each block's place and bytes, or why there are none."""
    made = []
    with Sources({path: FileStamp.of(path.stat())}) as sources:
        evaluator = evaluate.Evaluator(device="cpu", sources=sources)
        for batch in batches:
            staged = evaluator.read(batch)
            try:
                values = evaluator.compute(staged)
                made += [(one.offset, bytes(v)) for one, v in zip(batch, values, strict=True)]
            except CheckFailed as error:
                return str(error)
            finally:
                evaluator.release(staged)
    return made


def _in_a_row(made: list[tuple[int, bytes]] | str) -> bytes | str:
    """Return all bytes, of blocks that follow each other without gap."""
    if isinstance(made, str):
        return made
    for (offset, content), (following, _) in itertools.pairwise(made):
        assert offset + len(content) == following
    return b"".join(content for _, content in made)


ODD = [
    Stored(numel=numel, source=Dtype.F16, target=Dtype.F32, is_wild=False, gap_bytes=0)
    for numel in (7, 64, 1000, 7, 7, 64)
]
"""What torch casts in two ways: NaNs of float16, in whole vectors and behind the last of them."""


@example(tensors=ODD, seed=0, block_bytes=8 << 20)
@given(
    tensors=TENSORS,
    seed=st.integers(0, 1 << 32),
    block_bytes=st.sampled_from([512, 1024, 10_000, 8 << 20]),
)
def test_a_tensors_bytes_do_not_depend_on_its_neighbours(
    tensors: list[Stored], seed: int, block_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever is joined, bytes are those of every tensor made alone, and so is what is refused.

    Any sizes and dtypes, side by side or not, with NaNs that hold bits of their own.
    """
    path = tmp_path_factory.mktemp("blocks") / "source"
    segments = list(plan.segments_of(_written(path, tensors, seed).items()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_BYTES", block_bytes)
        together = _made(path, blocks.batches(segments))
        alone = _made(path, (b for one in segments for b in blocks.batches([one])))
    assert _in_a_row(together) == _in_a_row(alone)


def _cast(
    number: int, *, place: int, offset: int, path: str = "x", target: Dtype = Dtype.F32
) -> Computed:
    """Return the cast of 1024 numbers of bfloat16 at `place` of a file."""
    load = Load(Extent(Path(path), place, 2048), Dtype.BF16, (32, 32))
    value = expression.cast(load, target)
    return Computed(f"t{number}", value, offset, expression.nbytes(value))


def test_small_casts_that_are_neighbours_are_one_block() -> None:
    """Thousands of tensors take as many reads, casts and writes as their bytes fill blocks."""
    casts = [_cast(n, place=2048 * n, offset=8 + 4096 * n) for n in range(5000)]
    found = [block for batch in blocks.batches(casts) for block in batch]
    assert [block.nbytes for block in found] == [8 << 20, 8 << 20, 5000 * 4096 - (16 << 20)]
    assert [one for block in found for one in block.joined] == casts


@pytest.mark.parametrize(
    "second",
    [
        _cast(1, place=2048, offset=4104),
        _cast(1, place=2056, offset=4096),
        _cast(1, place=0, offset=4096),
        _cast(1, place=2048, offset=4096, path="y"),
        _cast(1, place=2048, offset=4096, target=Dtype.F16),
    ],
    ids=["output apart", "source apart", "the same source", "another file", "another dtype"],
)
def test_other_casts_stay_apart(second: Computed) -> None:
    """A gap on either side, another file or another dtype begins a block of its own."""
    first = _cast(0, place=0, offset=0)
    (batch,) = blocks.batches([first, second])
    assert [block.tensor for block in batch] == ["t0", "t1"]


def test_a_refusal_names_the_tensor_at_fault(tmp_path: Path) -> None:
    """Of many in one block, the one that holds what does not fit."""
    path = tmp_path / "source"
    numbers = torch.ones(8, 64)
    numbers[5, 7] = 70_000
    path.write_bytes(numbers.numpy().tobytes())
    loads = [Load(Extent(path, 256 * n, 256), Dtype.F32, (64,)) for n in range(8)]
    values = [(f"t{n}", expression.cast(one, Dtype.F16)) for n, one in enumerate(loads)]
    (batch,) = blocks.batches(plan.segments_of(values))
    assert len(batch) == 1
    assert _made(path, iter([batch])) == _made(path, blocks.batches(plan.segments_of(values[5:6])))
