"""BERT and RoBERTa against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from ckptd.models.native import bert, roberta
from tests.models.native import oracle

SMALL: dict[str, Any] = {
    "vocab_size": oracle.ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
CHOICES = ("BertForMultipleChoice", "RobertaForMultipleChoice")
NAMES = (
    *(f"Bert{head}" for head in HEADS),
    *(f"Roberta{head}" for head in HEADS),
    "BertForPreTraining",
    "BertForNextSentencePrediction",
)
DECODERS = ("BertLMHeadModel", "RobertaForCausalLM")
MASKED_LM = ("BertForMaskedLM", "RobertaForMaskedLM")


@pytest.mark.parametrize("name", ["BertConfig", "RobertaConfig"])
def test_defaults(name: str) -> None:
    """A configuration without arguments is that of transformers."""
    oracle.same_config(name)


@pytest.mark.parametrize("name", NAMES + DECODERS + CHOICES)
def test_declarations(name: str) -> None:
    """Class attributes, ties and the forward's arguments are those of transformers."""
    oracle.same_class(name)


@pytest.mark.parametrize("name", NAMES + DECODERS + CHOICES)
def test_state(name: str) -> None:
    """Tensors, counts and buffers are those of the files transformers writes."""
    oracle.same_state(oracle.pair(name, **SMALL))


@pytest.mark.parametrize("mask", oracle.MASKS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_forward(name: str, implementation: str, mask: str) -> None:
    """Every output is that of transformers, with padding, pad tokens and token types."""
    given = oracle.MASKS[mask]
    ids = oracle.ids()
    if given is not None:
        # RoBERTa sees padding in the tokens, not in the mask.
        ids = ids.masked_fill(given == 0, 1)
    oracle.compare(
        oracle.pair(name, implementation, **SMALL),
        input_ids=ids,
        attention_mask=given,
        token_type_ids=oracle.ids(seed=1) % 2,
        output_hidden_states=True,
        output_attentions=implementation == "eager",
    )


@pytest.mark.parametrize("name", NAMES)
def test_vectors(name: str) -> None:
    """Vectors may stand for tokens, and positions may be given."""
    both = oracle.pair(name, **SMALL)
    vectors = oracle.vectors(2, oracle.LENGTH, 32)
    oracle.compare(both, inputs_embeds=vectors)
    oracle.compare(both, inputs_embeds=vectors, position_ids=torch.arange(3, 10)[None])


@pytest.mark.parametrize("name", MASKED_LM)
def test_masked_loss(name: str) -> None:
    """The loss is that of the positions whose label is not -100."""
    labels = oracle.ids(seed=3).masked_fill(oracle.ids(seed=4) % 2 == 0, -100)
    oracle.compare(oracle.pair(name, **SMALL), input_ids=oracle.ids(), labels=labels)


@pytest.mark.parametrize("name", MASKED_LM)
def test_untied_head(name: str) -> None:
    """An untied head has weights and a bias of its own, in the file and in the forward."""
    both = oracle.pair(name, **SMALL, tie_word_embeddings=False)
    oracle.same_state(both)
    oracle.compare(both, input_ids=oracle.ids())
    head = both.ours.get_output_embeddings()
    assert head.weight is not both.ours.get_input_embeddings().weight


@pytest.mark.parametrize("name", MASKED_LM)
def test_tied_head(name: str) -> None:
    """A tied head is the embedding's parameter, and both names of its bias are one."""
    model = oracle.pair(name, **SMALL).ours
    head = model.get_output_embeddings()
    parent = model.lm_head if name.startswith("Roberta") else model.cls.predictions
    assert head is parent.decoder
    assert head.weight is model.get_input_embeddings().weight
    assert head.bias is parent.bias


def test_pretraining_loss() -> None:
    """BERT's training loss is that of both heads, and needs both labels."""
    both = oracle.pair("BertForPreTraining", **SMALL)
    labels = {"labels": oracle.ids(seed=3), "next_sentence_label": torch.tensor([0, 1])}
    oracle.compare(both, input_ids=oracle.ids(), **labels)
    assert both.ours(oracle.ids(), labels=labels["labels"]).loss is None


def test_sentence_loss() -> None:
    """The loss of the second sentence is that of transformers."""
    both = oracle.pair("BertForNextSentencePrediction", **SMALL)
    oracle.compare(both, input_ids=oracle.ids(), labels=torch.tensor([0, 1]))


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("labelled", [False, True])
def test_choices(name: str, labelled: bool) -> None:
    """Every choice is scored alone, from tokens or vectors, with masks, types and positions."""
    both = oracle.pair(name, **SMALL)
    ids = oracle.ids(rows=6).view(2, 3, oracle.LENGTH)
    mask = torch.ones_like(ids)
    mask[0, 1, 4:] = 0
    given: dict[str, Any] = {"labels": torch.tensor([2, 0])} if labelled else {}
    given |= {"attention_mask": mask, "output_hidden_states": True}
    found = oracle.compare(both, input_ids=ids, token_type_ids=ids % 2, **given)
    assert found.logits.shape == (2, 3)
    positions = torch.arange(3, 3 + oracle.LENGTH).expand(2, 3, -1)
    vectors = oracle.vectors(2, 3, oracle.LENGTH, 32)
    oracle.compare(both, inputs_embeds=vectors, position_ids=positions, **given)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        both.ours(attention_mask=mask)


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
@pytest.mark.parametrize(
    ("num_labels", "labels"),
    [
        (1, torch.tensor([0.5, -1.0])),
        (3, torch.tensor([2, 0])),
        (3, torch.tensor([[0.0, 1, 1], [1, 0, 0]])),
    ],
)
def test_classification_loss(family: str, num_labels: int, labels: torch.Tensor) -> None:
    """Labels decide between regression, one class and several."""
    values = SMALL | {"num_labels": num_labels, "classifier_dropout": 0.5}
    both = oracle.make(f"{family}ForSequenceClassification", "sdpa", values)
    oracle.compare(both, input_ids=oracle.ids(), labels=labels)


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_token_loss(family: str) -> None:
    """Every position has a class, or -100."""
    both = oracle.make(f"{family}ForTokenClassification", "sdpa", SMALL | {"num_labels": 5})
    labels = (oracle.ids(seed=3) % 5).masked_fill(oracle.MASKS["right"] == 0, -100)
    oracle.compare(both, input_ids=oracle.ids(), labels=labels)


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_span_loss(family: str) -> None:
    """Answers have a start and an end; those beyond the sequence do not count."""
    both = oracle.pair(f"{family}ForQuestionAnswering", **SMALL)
    oracle.compare(
        both,
        input_ids=oracle.ids(),
        start_positions=torch.tensor([1, 50]),
        end_positions=torch.tensor([[3], [2]]),
    )


@pytest.mark.parametrize("name", ["BertModel", "RobertaModel"])
def test_without_pooler(name: str) -> None:
    """Without the pooling layer there is no pooled output and no weight for it."""
    both = oracle.make(name, "sdpa", SMALL, add_pooling_layer=False)
    oracle.same_state(both)
    assert oracle.compare(both, input_ids=oracle.ids()).pooler_output is None


@pytest.mark.parametrize("name", ["BertModel", "RobertaModel", "BertForQuestionAnswering"])
def test_tuples(name: str) -> None:
    """Without `return_dict` the answer is a tuple of the fields that are there."""
    both = oracle.pair(name, **SMALL)
    given = {"output_hidden_states": True, "return_dict": False}
    with torch.no_grad():
        oracle.close(both.theirs(oracle.ids(), **given), both.ours(oracle.ids(), **given))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", DECODERS)
def test_as_decoder(name: str, implementation: str) -> None:
    """As a decoder it sees earlier positions only, and remembers them."""
    both = oracle.pair(name, implementation, **SMALL, is_decoder=True)
    for mask in oracle.MASKS.values():
        oracle.compare(both, input_ids=oracle.ids(), attention_mask=mask)
    oracle.compare(both, input_ids=oracle.ids(), labels=oracle.ids())
    mask = torch.ones_like(oracle.IGNORED_ROW)
    oracle.stepwise(both, (3, 4, 6, 7), mask, input_ids=oracle.ids())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", DECODERS)
def test_cross_attention(name: str, implementation: str) -> None:
    """With cross-attention a decoder reads an encoder, whose keys are computed once."""
    switches = {"is_decoder": True, "add_cross_attention": True}
    both = oracle.pair(name, implementation, **SMALL, **switches)
    encoder = {
        "encoder_hidden_states": oracle.vectors(2, 5, 32),
        "encoder_attention_mask": torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]),
    }
    oracle.compare(
        both, input_ids=oracle.ids(), output_attentions=implementation == "eager", **encoder
    )
    mask = torch.ones_like(oracle.IGNORED_ROW)
    oracle.stepwise(both, (3, 4, 7), mask, input_ids=oracle.ids(), **encoder)


@pytest.mark.parametrize("model_class", [bert.BertModel, roberta.RobertaModel])
def test_contradictions(model_class: Any) -> None:
    """What the configuration rules out is refused with a sentence."""
    config_class = model_class.config_class
    with pytest.raises(ValueError, match="attention heads"):
        config_class(**SMALL | {"num_attention_heads": 5})
    with pytest.raises(ValueError, match="is_decoder"):
        model_class(config_class(**SMALL, add_cross_attention=True))
    model = model_class(config_class(**SMALL))
    with pytest.raises(ValueError, match="exactly one"):
        model()
    with pytest.raises(ValueError, match="add_cross_attention"):
        model(oracle.ids(), encoder_hidden_states=oracle.vectors(2, 5, 32))


@pytest.mark.parametrize("model_class", [bert.BertModel, roberta.RobertaModel])
def test_too_long(model_class: Any) -> None:
    """More positions than the model has are refused, with both numbers."""
    model = model_class(model_class.config_class(**SMALL))
    with pytest.raises(ValueError, match=r"41.*40"):
        model(oracle.ids(length=41 if model_class is bert.BertModel else 39))


def test_padding_takes_no_positions() -> None:
    """RoBERTa takes an input longer than its positions when enough of it is padding."""
    both = oracle.pair("RobertaModel", **SMALL)
    ids = oracle.ids(length=40)
    ids[:, 30:] = 1
    oracle.compare(both, input_ids=ids, attention_mask=(ids != 1).long())


@pytest.mark.parametrize("name", MASKED_LM)
def test_initial_weights(name: str) -> None:
    """Matrices start normal, biases and the padding row at zero, norms at one."""
    torch.manual_seed(0)
    cls = oracle.our_class(name)
    model = cls(cls.config_class(**SMALL, initializer_range=0.1))
    embedding = model.get_input_embeddings()
    assert embedding.weight.std().item() == pytest.approx(0.1, rel=0.1)
    assert not embedding.weight[embedding.padding_idx].any()
    assert not model.get_output_embeddings().bias.any()


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM"])
def test_checkpointing(name: str) -> None:
    """Gradients are the same when activations are computed twice."""
    cls = oracle.our_class(name)
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = cls(cls.config_class(**SMALL, **rates))
    oracle.same_gradients(model, input_ids=oracle.ids(), labels=oracle.ids())


@pytest.mark.parametrize("name", MASKED_LM)
def test_ours_read_there(name: str, tmp_path: Any) -> None:
    """Weights under our names load in transformers without a missing or an unexpected key."""
    both = oracle.make(name, "sdpa", SMALL)
    both.ours.save_pretrained(tmp_path)
    again, info = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        oracle.close(again(oracle.ids()).logits, both.ours(oracle.ids()).logits)
