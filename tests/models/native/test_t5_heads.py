"""T5's heads that classify, against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ckptd.models.native import t5_heads
from tests.models.native import oracle
from tests.models.native.test_t5 import SMALL

SEQUENCE, TOKEN, ANSWER = NAMES = (
    "T5ForSequenceClassification",
    "T5ForTokenClassification",
    "T5ForQuestionAnswering",
)
END = 1


def ended(count: int = 1) -> torch.Tensor:
    """Return tokens whose rows have `count` end tokens, the last of them in different places."""
    ids = oracle.ids()
    for row, stop in enumerate((oracle.LENGTH, oracle.LENGTH - 2)):
        ids[row, stop - count : stop] = END
    return ids


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
    """Every output is that of transformers, with and without padding."""
    oracle.compare(
        oracle.pair(name, implementation, **SMALL),
        input_ids=ended(),
        attention_mask=oracle.MASKS[mask],
        output_hidden_states=True,
        output_attentions=implementation == "eager",
    )


@pytest.mark.parametrize("name", [SEQUENCE, ANSWER])
def test_a_decoder_of_its_own(name: str) -> None:
    """The decoder may have its own tokens and mask, and an encoder's output of an earlier call."""
    both = oracle.pair(name, **SMALL)
    given = {"input_ids": ended(), "decoder_input_ids": oracle.ids(seed=5)}
    oracle.compare(both, **given, decoder_attention_mask=oracle.IGNORED_ROW)
    encoder = both.ours.transformer.encoder if name == SEQUENCE else both.ours.encoder
    with torch.no_grad():
        encoded = (encoder(ended()).last_hidden_state,)
        found = both.ours(**given, encoder_outputs=encoded)
        plain = both.ours(**given)
    torch.testing.assert_close(found[0], plain[0])


@pytest.mark.parametrize(
    ("num_labels", "labels"),
    [
        (1, torch.tensor([0.5, -1.0])),
        (3, torch.tensor([2, 0])),
        (3, torch.tensor([[0.0, 1, 1], [1, 0, 0]])),
    ],
)
def test_sequence_loss(num_labels: int, labels: torch.Tensor) -> None:
    """Labels decide between regression, one class and several; the last end token is read."""
    both = oracle.make(SEQUENCE, "sdpa", SMALL | {"num_labels": num_labels})
    oracle.compare(both, input_ids=ended(2), labels=labels)


def test_other_losses() -> None:
    """Token and span losses are those of transformers, labels beyond the end left out."""
    labels = oracle.ids(seed=3) % 2
    labels[0, :2] = -100
    oracle.compare(oracle.pair(TOKEN, **SMALL), input_ids=oracle.ids(), labels=labels)
    ends: dict[str, Any] = {
        "start_positions": torch.tensor([1, 99]),
        "end_positions": torch.tensor([[3], [2]]),
    }
    oracle.compare(oracle.pair(ANSWER, **SMALL), input_ids=oracle.ids(), **ends)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"inputs_embeds": torch.ones(1, 2, 32)}, NotImplementedError, SEQUENCE),
        ({}, ValueError, "input_ids"),
        ({"input_ids": torch.tensor([[5, END], [END, END]])}, ValueError, "same number of <eos>"),
        ({"input_ids": torch.tensor([[5, 6], [6, 7]])}, ValueError, "at least one <eos>"),
    ],
)
def test_sequences_need_their_end(given: Any, error: type[Exception], text: str) -> None:
    """Without tokens, or without as many ends in each row, nothing can be read."""
    model = oracle.pair(SEQUENCE, **SMALL)
    with pytest.raises(error, match=text):
        model.ours(**given)
    with pytest.raises(error):
        model.theirs(**given)


def test_answers_need_an_input() -> None:
    """Neither tokens nor vectors for either half is refused."""
    both = oracle.pair(ANSWER, **SMALL)
    for model in (both.ours, both.theirs):
        with pytest.raises(ValueError, match="input_ids"):
            model(inputs_embeds=torch.ones(1, 2, 32))


@pytest.mark.parametrize("name", NAMES)
def test_initial_weights(name: str) -> None:
    """Every matrix of a fresh model has the spread it has in transformers, biases are zero."""
    both = oracle.pair(name, **SMALL)
    torch.manual_seed(0)
    theirs, ours = (type(model)(model.config) for model in (both.theirs, both.ours))
    for key, parameter in theirs.named_parameters():
        found = ours.get_parameter(key)
        if parameter.numel() > 200:
            assert found.std().item() == pytest.approx(parameter.std().item(), rel=0.25), key
        elif key.endswith("bias"):
            assert not found.any(), key


def test_the_head_is_the_class_that_checkpoints_name() -> None:
    """The head's projections have the names of the Hub's checkpoints."""
    head = oracle.pair(SEQUENCE, **SMALL).ours.classification_head
    assert isinstance(head, t5_heads.T5ClassificationHead)
    assert {name for name, _ in head.named_parameters()} == {
        "dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias",
    }  # fmt: skip
