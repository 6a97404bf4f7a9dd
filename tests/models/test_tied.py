"""Tied weights of modules: maps, patterns, and tying."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
import transformers
from torch import nn

from ckptd.models.base import PreTrainedModel
from ckptd.models.config.config import PreTrainedConfig
from tests.models.pairs import ours

D_FINE = {
    r"bbox_embed.(?![0])\d+": "bbox_embed.0",
    r"class_embed.(?![0])\d+": "class_embed.0",
    "model.decoder.class_embed": "class_embed",
    "model.decoder.bbox_embed": "bbox_embed",
}


class Perceptron(nn.Module):
    """Two layers, as a box head has them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])


class Body(nn.Module):
    """A decoder whose heads are filled in later."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Module()


def build(base: type, config: object) -> nn.Module:
    """Return a model with the page's D-FINE names, on either base class."""

    class Detector(base):  # type: ignore[misc, valid-type]
        _tied_weights_keys = D_FINE

        def __init__(self) -> None:
            super().__init__(config)
            self.class_embed = nn.ModuleList([nn.Linear(2, 3) for _ in range(3)])
            self.bbox_embed = nn.ModuleList([Perceptron() for _ in range(3)])
            self.model = Body()
            self.model.decoder.class_embed = nn.ModuleList([nn.Linear(2, 3) for _ in range(3)])
            self.model.decoder.bbox_embed = nn.ModuleList([Perceptron() for _ in range(3)])
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            pass

    return Detector()


def test_the_pages_example_expands_as_in_transformers() -> None:
    """Patterns and modules become full names, chains end at the first source."""
    model = build(PreTrainedModel, PreTrainedConfig(tie_word_embeddings=True))
    other = build(
        transformers.PreTrainedModel, transformers.PreTrainedConfig(tie_word_embeddings=True)
    )
    expected = other.get_expanded_tied_weights_keys()
    assert len(expected) == 2 * 5 + 2 + 4 * 5 - 2 or expected
    assert model.get_expanded_tied_weights_keys() == expected
    assert model.all_tied_weights_keys == expected
    assert model.bbox_embed[2].layers[1].weight is model.bbox_embed[0].layers[1].weight
    assert model.model.decoder.class_embed[1].bias is model.class_embed[0].bias


def test_nothing_is_tied_where_the_configuration_says_so() -> None:
    """With the flag off the map is empty and the parameters are two."""
    model = ours("LlamaForCausalLM", tie_word_embeddings=False)
    assert model.get_expanded_tied_weights_keys(all_submodels=True) == {}
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    """The error names the pattern."""

    class Wrong(PreTrainedModel):
        _tied_weights_keys: ClassVar[dict[str, str]] = {r"head.\d+.weight": "embed.weight"}

        def __init__(self) -> None:
            super().__init__(PreTrainedConfig(tie_word_embeddings=True))
            self.embed = nn.Embedding(3, 2)
            self.post_init()

    with pytest.raises(ValueError, match="head"):
        Wrong()


def test_a_bare_call_ties_whatever_the_values_are() -> None:
    """tie_weights() asks the configuration again and takes the source's values."""
    model = ours("LlamaForCausalLM", tie_word_embeddings=False)
    embedding = model.model.embed_tokens.weight
    assert not torch.equal(embedding, model.lm_head.weight)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is embedding
    assert model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}


def test_a_missing_source_is_swapped() -> None:
    """Where only the head was loaded, the embedding becomes the head's parameter."""
    model = ours("LlamaForCausalLM", tie_word_embeddings=True)
    head = nn.Parameter(torch.full_like(model.lm_head.weight, 5.0))
    model.lm_head.weight = head
    missing = {"model.embed_tokens.weight", "other"}
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    assert model.model.embed_tokens.weight is head
    assert missing == {"other"}


def test_two_that_differ_stay_apart_and_the_flag_follows() -> None:
    """Both loaded with other values: not tied, out of the map, and saved as two from then on."""
    model = ours("LlamaForCausalLM", tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(torch.full_like(model.lm_head.weight, 5.0))
    model.tie_weights(missing_keys=set(), recompute_mapping=False)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.all_tied_weights_keys == {}
    assert model.config.tie_word_embeddings is False


def test_a_heads_bias_gets_as_many_rows() -> None:
    """Tying to a longer weight pads the bias beside it with zeros."""
    model = ours("BertForMaskedLM")
    decoder = model.get_output_embeddings()
    with torch.no_grad():
        decoder.bias.fill_(1.0)
    longer = nn.Parameter(torch.zeros(105, 32))
    model.get_input_embeddings().weight = longer
    model.tie_weights()
    assert decoder.weight is longer
    assert decoder.bias.tolist() == [1.0] * 99 + [0.0] * 6


def test_marked_targets_are_not_initialised_again() -> None:
    """mark_tied_weights_as_initialized sets the flag on every target."""
    model = ours("LlamaForCausalLM", tie_word_embeddings=True)
    model.mark_tied_weights_as_initialized()
    assert model.lm_head.weight._is_hf_initialized
