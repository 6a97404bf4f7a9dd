"""GPT-2 against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import safetensors.torch
import torch

from ckptd.models.native import gpt2
from ckptd.models.native.gpt2_layers import Conv1D
from tests.models.native import oracle

SMALL: dict[str, Any] = {
    "vocab_size": oracle.ROWS,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": oracle.PAD,
}
NAMES = (
    "GPT2Model",
    "GPT2LMHeadModel",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2ForQuestionAnswering",
)


def test_defaults() -> None:
    """A configuration without arguments is that of transformers, aliases included."""
    oracle.same_config("GPT2Config")
    oracle.same_config("GPT2Config", hidden_size=48, num_attention_heads=2, num_hidden_layers=3)


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
    """Every output is that of transformers, whatever the padding, with token types."""
    oracle.compare(
        oracle.pair(name, implementation, **SMALL),
        input_ids=oracle.ids(),
        attention_mask=oracle.MASKS[mask],
        token_type_ids=oracle.ids(seed=1),
        output_hidden_states=True,
        output_attentions=implementation == "eager",
    )


@pytest.mark.parametrize("name", NAMES[:2])
def test_vectors(name: str) -> None:
    """Vectors and positions may stand for tokens."""
    oracle.compare(
        oracle.pair(name, **SMALL),
        inputs_embeds=oracle.vectors(2, oracle.LENGTH, 32),
        position_ids=torch.arange(3, 3 + oracle.LENGTH)[None],
    )


@pytest.mark.parametrize(
    "switches",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False, "n_inner": 40},
        {"reorder_and_upcast_attn": True, "activation_function": "relu"},
        {"tie_word_embeddings": False},
    ],
)
def test_switches(switches: dict[str, Any]) -> None:
    """Every switch of the configuration does what it does in transformers."""
    both = oracle.pair("GPT2LMHeadModel", **SMALL | switches)
    oracle.compare(both, input_ids=oracle.ids())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("mask", oracle.MASKS)
def test_cache(implementation: str, mask: str) -> None:
    """In steps, of one token and of several, the logits are those of transformers."""
    both = oracle.pair("GPT2LMHeadModel", implementation, **SMALL)
    given = oracle.MASKS[mask]
    seen = torch.ones_like(oracle.IGNORED_ROW) if given is None else given
    oracle.stepwise(both, (3, 4, 6, 7), seen, input_ids=oracle.ids())


@pytest.mark.parametrize("items", [None, 5])
def test_loss(items: int | None) -> None:
    """The loss is the next token's, its sum divided by the batch's items where they are given."""
    labels = oracle.ids().masked_fill(oracle.MASKS["right"] == 0, -100)
    extra = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    both = oracle.pair("GPT2LMHeadModel", **SMALL)
    oracle.compare(both, input_ids=oracle.ids(), labels=labels, **extra)


@pytest.mark.parametrize(
    ("num_labels", "labels"),
    [
        (1, torch.tensor([0.5, -1.0])),
        (3, torch.tensor([2, 0])),
        (3, torch.tensor([[0.0, 1, 1], [1, 0, 0]])),
    ],
)
def test_classification_loss(num_labels: int, labels: torch.Tensor) -> None:
    """Labels decide between regression, one class and several; the configuration stays as it is."""
    both = oracle.make("GPT2ForSequenceClassification", "sdpa", SMALL | {"num_labels": num_labels})
    padded = oracle.ids().masked_fill(oracle.MASKS["right"] == 0, oracle.PAD)
    oracle.compare(both, input_ids=padded, labels=labels)
    assert both.ours.config.problem_type is None


def test_other_losses() -> None:
    """Classes of tokens and spans of answers cost what they cost in transformers."""
    labels = (oracle.ids(seed=3) % 2).masked_fill(oracle.MASKS["right"] == 0, -100)
    both = oracle.pair("GPT2ForTokenClassification", **SMALL)
    oracle.compare(both, input_ids=oracle.ids(), labels=labels)
    ends = {"start_positions": torch.tensor([1, 50]), "end_positions": torch.tensor([3, 2])}
    both = oracle.pair("GPT2ForQuestionAnswering", **SMALL)
    oracle.compare(both, input_ids=oracle.ids(), **ends)


def test_rows_need_a_pad_token() -> None:
    """Several rows without a pad token cannot be classified: nobody knows where they end."""
    config = gpt2.GPT2Config(**SMALL | {"pad_token_id": None})
    with pytest.raises(ValueError, match="padding token"):
        gpt2.GPT2ForSequenceClassification(config)(oracle.ids())


def test_tuples() -> None:
    """Without `return_dict` the answer is a tuple of the fields that are there."""
    both = oracle.pair("GPT2LMHeadModel", **SMALL)
    given = {"input_ids": oracle.ids(), "output_hidden_states": True, "return_dict": False}
    with torch.no_grad():
        expected, found = both.theirs(**given), both.ours(**given)
    assert len(found) == len(expected) == 3
    oracle.close(expected[0], found[0])
    oracle.close(expected[2], found[2])


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4])])
def test_logits_to_keep(keep: int | torch.Tensor) -> None:
    """Only the wanted positions get logits."""
    both = oracle.pair("GPT2LMHeadModel", **SMALL)
    oracle.compare(both, input_ids=oracle.ids(), logits_to_keep=keep)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_cross_attention(implementation: str) -> None:
    """With cross-attention the layers read an encoder, whose keys are computed once."""
    both = oracle.pair("GPT2LMHeadModel", implementation, **SMALL, add_cross_attention=True)
    encoder = {
        "encoder_hidden_states": oracle.vectors(2, 5, 32),
        "encoder_attention_mask": torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]),
    }
    found = oracle.compare(
        both, input_ids=oracle.ids(), output_attentions=implementation == "eager", **encoder
    )
    assert found.past_key_values.is_updated == {0: True, 1: True}
    mask = torch.ones_like(oracle.IGNORED_ROW)
    oracle.stepwise(both, (3, 4, 7), mask, input_ids=oracle.ids(), **encoder)


def test_needs_cross_attention() -> None:
    """An encoder's output is refused by a model that cannot read it."""
    model = gpt2.GPT2Model(gpt2.GPT2Config(**SMALL))
    with pytest.raises(ValueError, match="add_cross_attention"):
        model(oracle.ids(), encoder_hidden_states=oracle.vectors(2, 5, 32))


@pytest.mark.parametrize("given", [{}, {"input_ids": oracle.ids(), "inputs_embeds": torch.ones(1)}])
def test_one_input(given: dict[str, Any]) -> None:
    """Exactly one of tokens and vectors is given."""
    model = gpt2.GPT2Model(gpt2.GPT2Config(**SMALL))
    with pytest.raises(ValueError, match="exactly one"):
        model(**given)


def test_initial_weights() -> None:
    """Projections into the residual stream start smaller by the root of twice the depth."""
    torch.manual_seed(0)
    config = gpt2.GPT2Config(**SMALL | {"n_layer": 8, "n_embd": 64, "initializer_range": 0.1})
    model = gpt2.GPT2Model(config)
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            expected = 0.1 / 4 if name.endswith("c_proj") else 0.1
            assert module.weight.std().item() == pytest.approx(expected, rel=0.06), name
            assert not module.bias.any()


def test_head_is_the_embedding() -> None:
    """A tied head is the embedding's own parameter; an untied one is not."""
    tied = gpt2.GPT2LMHeadModel(gpt2.GPT2Config(**SMALL))
    apart = gpt2.GPT2LMHeadModel(gpt2.GPT2Config(**SMALL, tie_word_embeddings=False))
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    assert apart.lm_head.weight is not apart.get_input_embeddings().weight


def test_checkpointing() -> None:
    """Gradients are the same when activations are computed twice."""
    values = SMALL | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = gpt2.GPT2LMHeadModel(gpt2.GPT2Config(**values))
    oracle.same_gradients(model, input_ids=oracle.ids(), labels=oracle.ids())


def test_body_with_old_buffers(tmp_path: Any) -> None:
    """A body's file, with the masks that old releases saved in it, loads into the head model whole."""
    both = oracle.make("GPT2Model", "sdpa", SMALL)
    both.theirs.save_pretrained(tmp_path)
    old = {f"h.{idx}.attn.bias": torch.ones(1, 1, 64, 64) for idx in range(2)}
    safetensors.torch.save_file({**both.saved, **old}, tmp_path / "model.safetensors")
    model, info = gpt2.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        found = model.transformer(oracle.ids()).last_hidden_state
        oracle.close(both.theirs(oracle.ids()).last_hidden_state, found)


def test_half() -> None:
    """In bfloat16 the logits differ by rounding only."""
    both = oracle.make("GPT2LMHeadModel", "sdpa", SMALL)
    with torch.no_grad():
        expected = both.theirs.bfloat16()(oracle.ids()).logits
        found = both.ours.bfloat16()(oracle.ids()).logits
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
