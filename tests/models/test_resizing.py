"""resize_token_embeddings, beside transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.models.pairs import CLASSES, ours, state_of, theirs

CASES = [
    {"new_num_tokens": 120},
    {"new_num_tokens": 50},
    {"new_num_tokens": 99},
    {"pad_to_multiple_of": 64},
    {"new_num_tokens": 101, "pad_to_multiple_of": 8},
    {"new_num_tokens": 130, "mean_resizing": False},
    {},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("name", "tied"),
    # transformers makes every T5 a tied one
    [
        (name, tied)
        for name in CLASSES
        for tied in (True, False)
        if tied or not name.startswith("T5")
    ],
)
def test_shapes_old_rows_and_configuration_are_those_of_transformers(
    name: str, case: dict[str, Any], tied: bool
) -> None:
    """Every tensor has the same shape, every old row its bits, the configuration the same size."""
    original = theirs(name, tie_word_embeddings=tied)
    model = ours(name, original, tie_word_embeddings=tied)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    original.resize_token_embeddings(**case)
    embedding = model.resize_token_embeddings(**case)
    assert embedding is model.get_input_embeddings()
    shapes = {key: tuple(value.shape) for key, value in state_of(original).items()}
    assert {key: tuple(v.shape) for key, v in model.state_dict().items()} == shapes
    assert model.config.vocab_size == original.config.vocab_size
    for key, value in model.state_dict().items():
        rows = min(len(value), len(before[key])) if value.dim() else 0
        assert torch.equal(value[:rows], before[key][:rows]), key
    head = model.get_output_embeddings()
    assert (head.weight is embedding.weight) is (
        original.get_output_embeddings().weight is original.get_input_embeddings().weight
    )
    assert head.out_features == len(embedding.weight)


def test_the_model_runs_with_its_new_rows() -> None:
    """Forward and backward pass through new rows."""
    model = ours("LlamaForCausalLM")
    model.resize_token_embeddings(110)
    ids = torch.tensor([[100, 109]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight.grad.shape == (110, 32)


def test_new_rows_have_the_documented_distribution() -> None:
    """Mean and covariance of many new rows are the old mean and 1e-9 of the old covariance."""
    model = ours("LlamaForCausalLM", vocab_size=400, hidden_size=8, tie_word_embeddings=False)
    with torch.no_grad():
        mixed = torch.randn(400, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64)
        model.model.embed_tokens.weight.data = (mixed * 1000).to(torch.float32)
    old = model.model.embed_tokens.weight.detach().double()
    model.double()
    model.resize_token_embeddings(400 + 20_000)
    new = model.model.embed_tokens.weight.detach()[400:].double()
    centred = old - old.mean(0)
    covariance = centred.T @ centred / len(old) * 1e-9
    found = torch.cov(new.T, correction=0)
    scale = covariance.diagonal().sqrt()
    assert ((new.mean(0) - old.mean(0)).abs() < 5e-3 * scale + 1e-7 * old.abs().max()).all() or (
        (new.mean(0) - old.mean(0)).abs() / scale
    ).max() < 0.2
    correlation = (found - covariance) / torch.outer(scale, scale)
    assert correlation.abs().max() < 0.2


def test_each_matrix_grows_around_its_own_mean() -> None:
    """An untied head's new rows follow the head, not the embedding."""
    model = ours("LlamaForCausalLM", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.add_(10.0)
    model.resize_token_embeddings(110)
    head = model.lm_head.weight.detach()
    torch.testing.assert_close(head[99:].mean(0), head[:99].mean(0), atol=1e-3, rtol=0)


def test_biases_grow_as_documented() -> None:
    """An untied head's bias takes its mean, a tied one zero."""
    for tied, expected in ((True, 0.0), (False, 2.0)):
        model = ours("BertForMaskedLM", tie_word_embeddings=tied)
        with torch.no_grad():
            model.get_output_embeddings().bias.fill_(2.0)
        model.resize_token_embeddings(103)
        bias = model.get_output_embeddings().bias
        assert len(bias) == 103
        assert bias[99:].tolist() == [expected] * 4


def test_the_seed_decides_the_new_rows() -> None:
    """torch.manual_seed makes a resize repeatable."""
    results = []
    for _ in range(2):
        model = ours("LlamaForCausalLM")
        torch.manual_seed(7)
        model.resize_token_embeddings(110)
        results.append(model.get_input_embeddings().weight.detach().clone())
    assert torch.equal(*results)


def test_a_padding_row_beyond_the_end_is_forgotten() -> None:
    """Shrinking below padding_idx removes it from the embedding, as in transformers."""
    model = ours("LlamaForCausalLM", pad_token_id=90)
    model.resize_token_embeddings(50)
    assert model.get_input_embeddings().padding_idx is None


def test_frozen_parameters_stay_frozen() -> None:
    """requires_grad of embedding and head survive."""
    model = ours("LlamaForCausalLM", tie_word_embeddings=False)
    model.lm_head.requires_grad_(False)
    model.resize_token_embeddings(110)
    assert not model.lm_head.weight.requires_grad
    assert model.get_input_embeddings().weight.requires_grad


@pytest.mark.parametrize("multiple", [64.0, "64", 0, -8])
def test_a_wrong_multiple_is_refused(multiple: Any) -> None:
    """Only positive integers pad."""
    with pytest.raises(ValueError, match="pad_to_multiple_of"):
        ours("LlamaForCausalLM").resize_token_embeddings(pad_to_multiple_of=multiple)


def test_edges_of_the_number_of_rows() -> None:
    """Zero rows are possible, negative ones are not."""
    model = ours("LlamaForCausalLM", pad_token_id=None)
    model.resize_token_embeddings(0)
    assert model.get_input_embeddings().weight.shape == (0, 32)
    with pytest.raises(RuntimeError, match="-1"):
        model.resize_token_embeddings(-1)


def test_other_embeddings_than_nn_embedding_are_refused() -> None:
    """The error names the kind that was found."""
    model = ours("LlamaForCausalLM")
    model.set_input_embeddings(nn.Linear(3, 4))
    with pytest.raises(TypeError, match="Linear"):
        model.resize_token_embeddings(5)
