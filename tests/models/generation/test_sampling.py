"""The functions of sampling: equal to transformers' processors, and true to what they promise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as oracle

from ckptd.models.generation import sampling
from ckptd.models.generation.generation_config import GenerationConfig

FEW = settings(max_examples=60, deadline=None)


@st.composite
def logits(draw: st.DrawFn, ties: bool = True) -> torch.Tensor:
    """Rows of logits, some of them equal, some forbidden (never a whole row)."""
    rows, vocabulary = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    values = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(draw(seeds)))
    values *= draw(st.sampled_from([0.01, 1.0, 30.0]))
    if ties and draw(st.booleans()):
        values = values.round()
    if draw(st.booleans()):
        values[:, 1::3] = -math.inf
    return values


seeds = st.integers(0, 2**31)
odds = st.floats(0.0, 1.0)


def kept(processed: torch.Tensor) -> torch.Tensor:
    return processed > -math.inf


@FEW
@given(values=logits(), k=st.integers(1, 15))
def test_top_k_equals_transformers(values: torch.Tensor, k: int) -> None:
    """Top-k keeps what transformers keeps, ties and forbidden tokens included."""
    expected = oracle.TopKLogitsWarper(k)(None, values)
    assert torch.equal(sampling.top_k(values, k), expected)


@FEW
@given(values=logits(), p=odds)
def test_top_p_equals_transformers(values: torch.Tensor, p: float) -> None:
    """Top-p keeps what transformers keeps, to the token."""
    expected = oracle.TopPLogitsWarper(p)(None, values)
    assert torch.equal(sampling.top_p(values, p), expected)


@FEW
@given(values=logits(ties=False), p=odds)
def test_min_p_equals_transformers(values: torch.Tensor, p: float) -> None:
    """Min-p keeps what transformers keeps."""
    expected = oracle.MinPLogitsWarper(p)(None, values)
    assert torch.equal(sampling.min_p(values, p), expected)


@FEW
@given(values=logits(), penalty=st.floats(0.1, 3.0), seed=seeds, length=st.integers(0, 9))
def test_penalty_equals_transformers(
    values: torch.Tensor, penalty: float, seed: int, length: int
) -> None:
    """The penalty for repetition does transformers' arithmetic; left padding does not count."""
    generator = torch.Generator().manual_seed(seed)
    rows, vocabulary = values.shape
    ids = torch.randint(0, vocabulary + 2, (rows, length), generator=generator)
    padding = torch.randint(0, length + 1, (rows,), generator=generator)
    expected = oracle.RepetitionPenaltyLogitsProcessor(penalty, padding)(ids, values)
    assert torch.equal(sampling.penalized(values, ids, penalty, padding), expected)


@FEW
@given(values=logits(), n=st.integers(1, 4), seed=seeds, length=st.integers(0, 12))
def test_no_ngram_twice_equals_transformers(
    values: torch.Tensor, n: int, seed: int, length: int
) -> None:
    """The tokens that would complete a known n-gram are forbidden, as in transformers."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, min(3, values.shape[1]), (len(values), length), generator=generator)
    expected = oracle.NoRepeatNGramLogitsProcessor(n)(ids, values)
    assert torch.equal(sampling.without_repeated(values, ids, n), expected)


@FEW
@given(values=logits(), p=odds)
def test_top_p_keeps_enough_and_no_more(values: torch.Tensor, p: float) -> None:
    """What top-p keeps has the mass p, and would not have it without its least probable token."""
    result = kept(sampling.top_p(values, p))
    probabilities = values.double().softmax(-1)
    for row in range(len(values)):
        chosen = probabilities[row][result[row]]
        assert chosen.sum() >= p - 1e-5
        assert len(chosen) == 1 or chosen.sum() - chosen.min() <= p + 1e-5


@FEW
@given(
    values=logits(),
    narrow=st.sampled_from(
        [
            lambda v: sampling.top_k(v, 1),
            lambda v: sampling.top_k(v, 3),
            lambda v: sampling.top_p(v, 0.0),
            lambda v: sampling.top_p(v, 0.5),
            lambda v: sampling.min_p(v, 1.0),
        ]
    ),
)
def test_the_likeliest_token_always_stays(
    values: torch.Tensor, narrow: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Narrowing never forbids a row's likeliest token, changes no kept logit and no input."""
    before = values.clone()
    result = narrow(values)
    best = values.amax(-1)
    assert torch.equal(result.amax(-1), best)
    assert torch.equal(result[kept(result)], values[kept(result)])
    assert torch.equal(values, before)


@FEW
@given(values=logits(), seed=seeds)
def test_forbidden_tokens_are_never_drawn(values: torch.Tensor, seed: int) -> None:
    """A drawn or likeliest token has a logit above -inf."""
    torch.manual_seed(seed)
    for sample in (False, True):
        tokens = sampling.chosen(values, sample=sample)
        assert kept(values.gather(1, tokens[:, None])).all()


def test_without_and_only_are_opposites() -> None:
    """`without` forbids the listed tokens, `only` all others; unknown ids are passed over."""
    values, listed = torch.randn(2, 6), torch.tensor([1, 4])
    without = sampling.without(values, torch.tensor([1, 4, 99]))
    assert torch.equal(kept(without), ~kept(sampling.only(values, listed)))


def test_processors_come_in_the_order_of_transformers() -> None:
    """Penalty, then length, then the caller's, then temperature, top-k and top-p: same logits."""
    config = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_k=6,
        top_p=0.8,
        min_p=0.05,
        repetition_penalty=1.7,
        min_length=9,
    )
    ids, values = torch.randint(0, 16, (3, 5)), torch.randn(3, 16)
    eos = torch.tensor([2, 3])
    start = sampling.Start(num_tokens=4, left_padding=None, eos_tokens=eos)
    shift = torch.randn(16)
    steps = sampling.processors(config, start, [lambda _, scores: scores + shift])
    theirs = [
        oracle.RepetitionPenaltyLogitsProcessor(1.7),
        oracle.MinLengthLogitsProcessor(9, eos),
        lambda _, scores: scores + shift,
        oracle.TemperatureLogitsWarper(0.7),
        oracle.TopKLogitsWarper(6),
        oracle.TopPLogitsWarper(0.8),
        oracle.MinPLogitsWarper(0.05),
    ]
    expected = values
    for step in theirs:
        expected = step(ids, expected)
    assert torch.equal(sampling.applied(steps, ids, values), expected)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"temperature": 0.0}, "do_sample=False"),
        ({"temperature": -1.0}, "temperature must be above 0"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": -0.5}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any], expected: str) -> None:
    """A value outside its range is a ValueError that names the setting and the range."""
    config = GenerationConfig(do_sample=True, **setting)
    start = sampling.Start(num_tokens=1, left_padding=None, eos_tokens=None)
    with pytest.raises(ValueError, match=expected):
        sampling.processors(config, start)


@pytest.mark.parametrize(
    ("setting", "length", "expected"),
    [
        ({"min_new_tokens": 2}, 4, {2}),
        ({"min_new_tokens": 2}, 5, set()),
        ({"forced_bos_token_id": 5}, 1, set(range(8)) - {5}),
        ({"forced_eos_token_id": [6, 7], "max_length": 9}, 8, set(range(8)) - {6, 7}),
        ({"forced_eos_token_id": 6, "max_length": 9}, 7, set()),
        ({"suppress_tokens": [0, 1]}, 7, {0, 1}),
        ({"begin_suppress_tokens": [4]}, 3, {4}),
        ({"begin_suppress_tokens": [4]}, 4, set()),
    ],
)
def test_tokens_are_forbidden_at_their_lengths(
    setting: dict[str, Any], length: int, expected: set[int]
) -> None:
    """Minimum length, forced and suppressed tokens act at the lengths they name and no others."""
    start = sampling.Start(num_tokens=3, left_padding=None, eos_tokens=torch.tensor([2]))
    steps = sampling.processors(GenerationConfig(**setting), start)
    result = sampling.applied(steps, torch.full((1, length), 3), torch.randn(1, 8))
    assert {i for i in range(8) if not kept(result)[0, i]} == expected
