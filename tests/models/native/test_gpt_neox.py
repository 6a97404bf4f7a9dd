"""GPT-NeoX against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from ckptd.models.native import gpt_neox
from tests.models.native import oracle

SMALL: dict[str, Any] = {
    "vocab_size": oracle.ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": oracle.PAD,
}
NAMES = (
    "GPTNeoXModel",
    "GPTNeoXForCausalLM",
    "GPTNeoXForSequenceClassification",
    "GPTNeoXForTokenClassification",
    "GPTNeoXForQuestionAnswering",
)


def test_defaults() -> None:
    """A configuration without arguments is that of transformers."""
    oracle.same_config("GPTNeoXConfig")
    oracle.same_config("GPTNeoXConfig", **SMALL)


def test_older_files() -> None:
    """What transformers 4 wrote about rotary positions is understood."""
    oracle.same_config("GPTNeoXConfig", rotary_pct=0.5, rotary_emb_base=5000)
    oracle.same_config("GPTNeoXConfig", rope_scaling={"type": "linear", "factor": 2.0})


@pytest.mark.parametrize("name", NAMES)
def test_declarations(name: str) -> None:
    """Class attributes, ties and the forward's arguments are those of transformers."""
    oracle.same_class(name)


@pytest.mark.parametrize("name", NAMES)
def test_state(name: str) -> None:
    """Tensors, counts and buffers are those of the files transformers writes."""
    oracle.same_state(oracle.pair(name, **SMALL))


@pytest.mark.parametrize("mask", oracle.MASKS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_forward(name: str, implementation: str, mask: str) -> None:
    """Every output is that of transformers, whatever the padding."""
    oracle.compare(
        oracle.pair(name, implementation, **SMALL),
        input_ids=oracle.ids(),
        attention_mask=oracle.MASKS[mask],
        output_hidden_states=True,
        output_attentions=implementation == "eager",
    )


@pytest.mark.parametrize(
    "switches",
    [
        {"use_parallel_residual": False},
        {"attention_bias": False, "hidden_act": "relu"},
        {"rotary_pct": 1.0, "rotary_emb_base": 500},
        {"tie_word_embeddings": True},
    ],
)
def test_switches(switches: dict[str, Any]) -> None:
    """Every switch of the configuration does what it does in transformers."""
    values = tuple((SMALL | switches).items())
    both = oracle.make("GPTNeoXForCausalLM", "sdpa", dict(values))
    oracle.compare(both, input_ids=oracle.ids())


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ],
)
def test_longer_context(scaling: dict[str, Any]) -> None:
    """Scaled rotary positions are those of transformers, beyond the first context, too."""
    rope = {"rope_theta": 10_000.0, "partial_rotary_factor": 0.5} | scaling
    both = oracle.make("GPTNeoXForCausalLM", "eager", SMALL | {"rope_parameters": rope})
    oracle.compare(both, input_ids=oracle.ids(length=80))


def test_vectors() -> None:
    """Vectors and positions may stand for tokens."""
    oracle.compare(
        oracle.pair("GPTNeoXForCausalLM", **SMALL),
        inputs_embeds=oracle.vectors(2, oracle.LENGTH, 32),
        position_ids=torch.arange(3, 3 + oracle.LENGTH)[None],
    )


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("mask", oracle.MASKS)
def test_cache(implementation: str, mask: str) -> None:
    """In steps, of one token and of several, the logits are those of transformers."""
    both = oracle.pair("GPTNeoXForCausalLM", implementation, **SMALL)
    given = oracle.MASKS[mask]
    seen = torch.ones_like(oracle.IGNORED_ROW) if given is None else given
    oracle.stepwise(both, (3, 4, 6, 7), seen, input_ids=oracle.ids())


@pytest.mark.parametrize("items", [None, 5])
def test_loss(items: int | None) -> None:
    """The loss is the next token's, its sum divided by the batch's items where they are given."""
    extra = {} if items is None else {"num_items_in_batch": items}
    both = oracle.pair("GPTNeoXForCausalLM", **SMALL)
    oracle.compare(both, input_ids=oracle.ids(), labels=oracle.ids(), logits_to_keep=0, **extra)


def test_other_losses() -> None:
    """Classes of rows and tokens, and spans of answers, cost what they cost in transformers."""
    padded = oracle.ids().masked_fill(oracle.MASKS["right"] == 0, oracle.PAD)
    both = oracle.pair("GPTNeoXForSequenceClassification", **SMALL)
    oracle.compare(both, input_ids=padded, labels=torch.tensor([0, 1]))
    labels = (oracle.ids(seed=3) % 2).masked_fill(oracle.MASKS["right"] == 0, -100)
    both = oracle.pair("GPTNeoXForTokenClassification", **SMALL)
    oracle.compare(both, input_ids=padded, labels=labels)
    ends = {"start_positions": torch.tensor([1, 50]), "end_positions": torch.tensor([3, 2])}
    both = oracle.pair("GPTNeoXForQuestionAnswering", **SMALL)
    oracle.compare(both, input_ids=padded, **ends)


def test_tuples() -> None:
    """Without `return_dict` the answer is a tuple of the fields that are there."""
    both = oracle.pair("GPTNeoXForCausalLM", **SMALL)
    with torch.no_grad():
        expected = both.theirs(oracle.ids(), use_cache=False, return_dict=False)
        found = both.ours(oracle.ids(), use_cache=False, return_dict=False)
    oracle.close(expected, found)


def test_head() -> None:
    """The head is `embed_out`, which can be read and replaced."""
    model = gpt_neox.GPTNeoXForCausalLM(gpt_neox.GPTNeoXConfig(**SMALL))
    assert model.get_output_embeddings() is model.embed_out
    assert model.get_input_embeddings() is model.gpt_neox.embed_in
    other = torch.nn.Linear(32, 5)
    model.set_output_embeddings(other)
    assert model.embed_out is other


def test_heads_share_the_width() -> None:
    """A hidden size that the heads cannot share is refused, as in transformers."""
    with pytest.raises(ValueError, match="num_attention_heads"):
        gpt_neox.GPTNeoXConfig(**SMALL | {"num_attention_heads": 5})


def test_checkpointing() -> None:
    """Gradients are the same when activations are computed twice."""
    model = gpt_neox.GPTNeoXForCausalLM(gpt_neox.GPTNeoXConfig(**SMALL))
    oracle.same_gradients(model, input_ids=oracle.ids(), labels=oracle.ids())


def test_ours_read_there(tmp_path: Any) -> None:
    """Weights under our names load in transformers without a missing or an unexpected key."""
    both = oracle.make("GPTNeoXForCausalLM", "sdpa", SMALL)
    both.ours.save_pretrained(tmp_path)
    again, info = transformers.GPTNeoXForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        oracle.close(again(oracle.ids()).logits, both.ours(oracle.ids()).logits)
