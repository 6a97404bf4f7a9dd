"""Evaluation: values are torch's and transformers', however the work is divided."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from ckptd.checkpoint import header
from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import Extent
from ckptd.errors import CheckFailed, SourceChanged
from ckptd.plan import blocks, evaluate, expression
from ckptd.plan.blocks import GROWN_GROUP_ROWS, Block
from ckptd.plan.buffers import BufferPool
from ckptd.plan.nodes import Cast, Expression, Grown, Load, NewRows
from ckptd.plan.plan import Computed
from ckptd.plan.sources import Sources

FLOATS = [Dtype.F64, Dtype.F32, Dtype.F16, Dtype.BF16]
SHAPES: list[tuple[int, ...]] = [(), (0,), (3, 0, 2), (1,), (7,), (13, 17), (3, 1, 5), (1, 4097)]


class Bench:
    """One stored file and an evaluator over it."""

    def __init__(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, path)
        self.header = header.read(path)
        self.sources = Sources({path: self.header.stamp})
        self.evaluator = evaluate.Evaluator(device="cpu", sources=self.sources)

    def load(self, name: str) -> Load:
        """Return the expression that is a stored tensor."""
        return expression.load(next(t for t in self.header.tensors if t.spec.name == name))

    def value(self, wanted: Expression, name: str = "t") -> torch.Tensor:
        """Return the value, computed in blocks as the stream does it."""
        segment = Computed(name, wanted, 0, expression.nbytes(wanted))
        raw = bytearray()
        for batch in blocks.batches([segment]):
            raw += self.bytes_of(batch)
        dtype = evaluate._torch_dtype(wanted.dtype)
        return torch.frombuffer(raw or bytearray(8), dtype=dtype)[
            : math.prod(wanted.shape)
        ].reshape(wanted.shape)

    def bytes_of(self, batch: list[Block]) -> bytes:
        """Return the bytes of one batch."""
        staged = self.evaluator.read(batch)
        try:
            return b"".join(self.evaluator.compute(staged))
        finally:
            self.evaluator.release(staged)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Any]:
    """Return a function that stores tensors and gives a bench over them."""
    made: list[Bench] = []

    def make(**tensors: torch.Tensor) -> Bench:
        made.append(Bench(tmp_path / f"{len(made)}.safetensors", tensors))
        return made[-1]

    yield make
    for one in made:
        one.sources.__exit__()


def _grown(source: Expression, rows: int, **changes: Any) -> Grown:
    values: dict[str, Any] = {
        "axis": 0, "first": 0, "method": NewRows.MEAN, "std": 0.02, "seed": 0,
    } | changes  # fmt: skip
    axis = values["axis"]
    shape = (*source.shape[:axis], rows, *source.shape[axis + 1 :])
    return Grown(source=source, shape=shape, **values)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(FLOATS, 2)))
def test_a_cast_is_torchs_bit_for_bit(
    source: Dtype, target: Dtype, shape: tuple[int, ...], bench: Any, monkeypatch: Any
) -> None:
    """All pairs of float dtypes, odd and empty shapes, special values, in blocks of any size."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)
    torch.manual_seed(1)
    tensor = torch.randn(shape, dtype=torch.float64) * 10
    flat = tensor.view(-1)
    special = [-0.0, math.inf, -math.inf, math.nan, 1e-8, 6e-8, 65280.0]
    flat[: len(special)] = torch.tensor(special[: len(flat)])
    tensor = tensor.to(evaluate._torch_dtype(source))

    one = bench(t=tensor)
    found = one.value(expression.cast(one.load("t"), target))

    expected = tensor.to(evaluate._torch_dtype(target))
    assert found.shape == expected.shape
    bits = torch.uint8 if found.dim() else getattr(torch, f"int{target.bits}")
    assert torch.equal(found.view(bits), expected.view(bits))


@pytest.mark.parametrize(
    ("source", "target", "value"),
    [
        (Dtype.BF16, Dtype.F16, 70_000.0),
        (Dtype.F32, Dtype.F16, -65_520.0),
        (Dtype.F32, Dtype.BF16, 3.4e38),
        (Dtype.F64, Dtype.F32, 1e39),
    ],
)
def test_a_value_beyond_the_target_is_refused(
    source: Dtype, target: Dtype, value: float, bench: Any
) -> None:
    """A finite weight never becomes infinite silently; tensor, count and dtype are named."""
    tensor = torch.zeros(999, dtype=evaluate._torch_dtype(source))
    tensor[500:502] = value
    tensor[7] = math.inf
    tensor[8] = math.nan
    one = bench(t=tensor)
    with pytest.raises(CheckFailed, match=rf"'t'.*2 values.*{target.torch_name}"):
        one.value(expression.cast(one.load("t"), target))


def test_overflow_inside_statistics_names_the_tensor(bench: Any) -> None:
    """New rows after a cast: the refusal still says which tensor."""
    one = bench(w=torch.full((9, 2), 1e6))
    half = expression.cast(one.load("w"), Dtype.F16)
    with pytest.raises(CheckFailed, match="'w'"):
        one.value(_grown(half, 2), name="w")


def test_large_tensors_are_divided_whatever_their_shape(bench: Any, monkeypatch: Any) -> None:
    """A few enormous rows (fused experts) make blocks as small as many small rows."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4096)
    one = bench(t=torch.randn(2, 1, 10_000))
    value = expression.cast(one.load("t"), Dtype.F64)
    segment = Computed("t", value, 0, expression.nbytes(value))
    batches = list(blocks.batches([segment]))
    assert max(block.cost_bytes for batch in batches for block in batch) <= 2 * 4096
    assert torch.equal(one.value(value), load(one, "t").double())


def load(one: Bench, name: str) -> torch.Tensor:
    """Return a stored tensor through the evaluator's plainest path."""
    return one.value(one.load(name)).clone()


def test_batches_hold_many_small_tensors() -> None:
    """Tens of thousands of small tensors take few round trips, within the block size."""
    nbytes = 2000
    small = [
        Computed(
            f"{n}",
            expression.cast(
                Load(Extent(Path("x"), n * nbytes, nbytes), Dtype.BF16, (1000,)), Dtype.F16
            ),
            n * nbytes,
            nbytes,
        )
        for n in range(50_000)
    ]
    batches = list(blocks.batches(small))
    assert len(batches) <= 50_000 * nbytes // blocks.BLOCK_BYTES + 1
    assert all(sum(block.nbytes for block in batch) <= blocks.BLOCK_BYTES for batch in batches)


def _llama(rows: int, width: int, dtype: torch.dtype = torch.float32) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=rows, hidden_size=width, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(config).to(dtype)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows", [40, 300])
def test_the_mean_is_that_of_transformers(rows: int, bench: Any) -> None:
    """New rows lie around the mean that resize_token_embeddings takes.

    With fewer rows than columns they are that mean to rounding, else within the documented noise.
    """
    model = _llama(rows, 64)
    old = model.get_input_embeddings().weight.detach().clone()
    one = bench(w=old)
    model.resize_token_embeddings(rows + 10, mean_resizing=True)
    theirs = model.get_input_embeddings().weight.detach()[rows:]
    ours = one.value(_grown(one.load("w"), 10))
    noise = 0 if rows <= 64 else 8 * math.sqrt(1e-9) * float(old.std())
    assert (ours - theirs).abs().max() <= noise + 1e-7


def test_the_covariance_is_that_of_the_old_rows(bench: Any) -> None:
    """Many new rows: mean within its error, covariance 1e-9 times the biased one of the source."""
    torch.manual_seed(5)
    mix = torch.randn(6, 6)
    old = (torch.randn(3000, 6) @ mix + torch.arange(6) * 0.01).float()
    one = bench(w=old)
    count = 20_000
    new = one.value(_grown(one.load("w"), count)).double()
    mean, covariance = old.double().mean(0), torch.cov(old.double().T, correction=0) * 1e-9
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(covariance), (new - mean).T, upper=False
    )
    # Whitened values are independent standard normal, but for the float32 rounding of the values.
    assert white.mean(1).abs().max() < 5 / math.sqrt(count)
    error = white @ white.T / count - torch.eye(6)
    assert error.abs().max() < 6 * math.sqrt(2 / count)
    kurtosis = (white**4).mean(1)
    assert (kurtosis - 3).abs().max() < 6 * math.sqrt(96 / count)


@pytest.mark.parametrize("case", ["few rows", "square", "constant column"])
def test_without_a_proper_covariance_rows_are_the_mean(case: str, bench: Any) -> None:
    """No more rows than columns, or a column without spread: the mean exactly, in every row."""
    old = torch.randn({"few rows": 5, "square": 8, "constant column": 50}[case], 8)
    if case == "constant column":
        old[:, 3] = 0.5
    one = bench(w=old.to(torch.bfloat16))
    new = one.value(_grown(one.load("w"), 3))
    expected = old.to(torch.bfloat16).double().mean(0).float().to(torch.bfloat16)
    assert torch.equal(new, expected.expand(3, 8))


@pytest.mark.parametrize("method", list(NewRows))
def test_new_rows_do_not_depend_on_the_division(method: NewRows, bench: Any) -> None:
    """Made at once, in groups, or cut anywhere: the same bits; another seed, others."""
    width = 1 if method is NewRows.BIAS_MEAN else 24
    source = torch.randn(500, width) if width > 1 else torch.randn(500)
    one = bench(w=source)
    rows = 3 * GROWN_GROUP_ROWS + 11
    new = _grown(one.load("w"), rows, method=method)
    whole = one.value(new)
    for cuts in ([64, 128], [1, 5, 63, 65, 190], [100]):
        edges = [0, *cuts, rows]
        parts = [expression.rows(new, a, b) for a, b in itertools.pairwise(edges)]
        assert torch.equal(torch.cat([one.value(part) for part in parts]), whole)
    other = one.value(_grown(one.load("w"), rows, method=method, seed=1))
    exact = method is NewRows.ZERO or method is NewRows.BIAS_MEAN
    assert exact or not torch.equal(other, whole)


def test_new_rows_do_not_depend_on_the_block_size(bench: Any, monkeypatch: Any) -> None:
    """The memory at hand changes how many passes are made, not what comes out."""
    one = bench(w=torch.randn(500, 24))
    new = expression.cast(_grown(one.load("w"), 400), Dtype.BF16)
    whole = one.value(new)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1)
    monkeypatch.setattr(blocks, "_GROWN_BLOCK_BYTES", 1)
    segment = Computed("w", new, 0, expression.nbytes(new))
    assert len(list(blocks.batches([segment]))) == math.ceil(400 / GROWN_GROUP_ROWS)
    assert torch.equal(one.value(new), whole)


def test_rows_of_a_vector_behind_an_axis_of_one(bench: Any) -> None:
    """final_logits_bias has shape [1, V]: it grows along axis 1."""
    one = bench(b=torch.arange(10.0).reshape(1, 10))
    new = one.value(_grown(one.load("b"), 6, axis=1, method=NewRows.BIAS_MEAN))
    assert new.shape == (1, 6)
    assert torch.allclose(new, torch.tensor(4.5), atol=1e-6)


def test_normal_rows_have_the_standard_deviation_asked_for(bench: Any) -> None:
    """Mean 0 and std, within five standard errors over many values."""
    one = bench(w=torch.randn(10, 100))
    new = one.value(_grown(one.load("w"), 2000, method=NewRows.NORMAL, std=0.05)).double()
    assert abs(float(new.mean())) < 5 * 0.05 / math.sqrt(new.numel())
    assert abs(float(new.std()) / 0.05 - 1) < 5 / math.sqrt(2 * new.numel())


def test_zero_rows_are_zero_and_keep_the_dtype(bench: Any) -> None:
    """Every bit is clear."""
    one = bench(w=torch.randn(10, 4).to(torch.float16))
    new = one.value(_grown(one.load("w"), 7, method=NewRows.ZERO))
    assert new.dtype is torch.float16
    assert not new.any()


def test_bias_values_are_the_mean_with_a_breath_of_noise(bench: Any) -> None:
    """Around the mean with 1e-9 of the standard deviation, a single value included."""
    one = bench(b=torch.randn(1000, dtype=torch.float64) + 3, single=torch.tensor([2.0]))
    stored = load(one, "b")
    new = one.value(_grown(one.load("b"), 5000, method=NewRows.BIAS_MEAN))
    spread = (new - stored.mean()).std() / (1e-9 * stored.std())
    assert abs(float(spread) - 1) < 0.1
    assert one.value(_grown(one.load("single"), 2, method=NewRows.BIAS_MEAN)).tolist() == [2, 2]


def test_statistics_of_an_empty_source_are_zero(bench: Any) -> None:
    """Growing a table without rows has nothing to take a mean of."""
    one = bench(w=torch.zeros(0, 4), b=torch.zeros(0))
    assert not one.value(_grown(one.load("w"), 3)).any()
    assert not one.value(_grown(one.load("b"), 3, method=NewRows.BIAS_MEAN)).any()


def test_joined_parts_are_evaluated_in_place(bench: Any) -> None:
    """Casting old and new rows together equals casting each."""
    one = bench(a=torch.randn(5, 3), b=torch.randn(2, 3))
    joined = expression.concat([one.load("a"), one.load("b")])
    whole = Cast(joined, Dtype.BF16)
    expected = torch.cat([load(one, "a"), load(one, "b")]).to(torch.bfloat16)
    assert torch.equal(one.value(whole), expected)


def test_memory_is_used_again(bench: Any, monkeypatch: Any) -> None:
    """Block after block of the same size allocates no further buffer."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4096)
    made = []

    def allocate(capacity: int) -> torch.Tensor:
        made.append(capacity)
        return torch.empty(capacity, dtype=torch.uint8)

    one = bench(t=torch.randn(100, 100))
    one.evaluator._pool = BufferPool(allocate)
    one.value(expression.cast(one.load("t"), Dtype.BF16))
    assert len(made) == 2


def test_a_device_that_is_not_there_is_named() -> None:
    """The refusal says how many devices there are, and what to do."""
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(CheckFailed, match=missing) as caught:
        evaluate.choose_device(missing)
    assert caught.value.hint
    assert evaluate.choose_device("cpu") == "cpu"


def test_a_source_that_shrank_is_seen(bench: Any) -> None:
    """Reading a block beyond the end of the file is SourceChanged, not garbage."""
    one = bench(t=torch.randn(100))
    value = one.load("t")
    beyond = Load(
        Extent(value.extent.path, value.extent.offset + 8, value.extent.nbytes),
        value.dtype,
        value.shape,
    )
    with pytest.raises(SourceChanged):
        one.value(expression.cast(beyond, Dtype.F16))
