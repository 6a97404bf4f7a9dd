"""What holds for every native class with every head: running, training and generating."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from ckptd.models import registry
from tests.models.native.cases import (
    CASES,
    CAUSAL,
    HEADS,
    LAYERS,
    PAD,
    TEXT,
    TINY,
    WIDTH,
    WITH_LOSS,
    Case,
    first_of,
    name_of,
    run,
)


def test_every_architecture_is_tried() -> None:
    """An architecture without a row here is not tested."""
    assert TINY.keys() == registry.CONFIGS.keys()


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_hidden_states_and_attentions(case: Case) -> None:
    """Each layer's states and attention weights are given when asked, by argument and by config."""
    model = case.model()
    model.set_attn_implementation("eager")
    inputs = case.inputs()
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        output = model(**inputs, **asked)
        model.config.output_hidden_states = model.config.output_attentions = True
        configured = model(**inputs)
        model.config.output_hidden_states = model.config.output_attentions = False
        plain = model(**inputs)
    prefixes = ("decoder_", "encoder_") if "encoder_last_hidden_state" in output else ("",)
    for prefix in prefixes:
        states, weights = output[f"{prefix}hidden_states"], output[f"{prefix}attentions"]
        assert len(states) == LAYERS + 1
        assert len(weights) == LAYERS
        assert {state.shape[-1] for state in states} == {WIDTH}
        assert {weight.shape[1] for weight in weights} == {HEADS}
        for weight in weights:
            torch.testing.assert_close(weight.sum(-1), torch.ones_like(weight.sum(-1)))
        assert all(map(torch.equal, configured[f"{prefix}hidden_states"], states))
        assert f"{prefix}hidden_states" not in plain
        assert f"{prefix}attentions" not in plain
    torch.testing.assert_close(first_of(output), first_of(plain))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_hidden_states_carry_gradients(case: Case) -> None:
    """States and attention weights that are given can be trained through."""
    model = case.model()
    model.set_attn_implementation("eager")
    output = model(**case.inputs(), output_hidden_states=True, output_attentions=True)
    prefix = "encoder_" if "encoder_hidden_states" in output else ""
    kept = (output[f"{prefix}hidden_states"][0], output[f"{prefix}attentions"][0])
    for tensor in kept:
        tensor.retain_grad()
    first_of(output).flatten()[0].backward(retain_graph=True)
    assert all(tensor.grad is not None for tensor in kept)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_tuple_is_the_same_answer(case: Case) -> None:
    """`return_dict=False`, as argument or in the configuration, gives the fields as a tuple."""
    model = case.model()
    inputs = case.inputs(labels=True)
    with torch.no_grad():
        whole = model(**inputs, output_hidden_states=True)
        parts = model(**inputs, output_hidden_states=True, return_dict=False)
    assert isinstance(parts, tuple)
    assert len(parts) == len(whole)
    for one, other in zip(whole.to_tuple(), parts, strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_attention_implementations_agree(case: Case) -> None:
    """`eager` and `sdpa` answer alike, with a padding mask as well."""
    model = case.model()
    inputs = case.inputs()
    if case.is_text:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][0, ..., :2] = 0
    answers = []
    if case.model_type == "gemma2":  # whose soft cap the fused kernels have no way to apply
        with pytest.raises(ValueError, match="does not support `sdpa`"):
            model.set_attn_implementation("sdpa")
        return
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert model.config._attn_implementation == implementation
        answers.append(run(model, inputs))
    per_token = answers[0].dim() == 3 or case.head == "question_answering"
    if case.is_text and per_token and case.head != "multiple_choice":
        answers = [answer[:, 2:] for answer in answers]  # what padding says means nothing
    torch.testing.assert_close(*answers, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("case", TEXT, ids=name_of)
def test_vectors_stand_for_tokens(case: Case) -> None:
    """`inputs_embeds` of the tokens answer what the tokens answer."""
    model = case.model()
    inputs = case.inputs()
    if case.name == "T5ForSequenceClassification":
        with pytest.raises(NotImplementedError, match="T5ForSequenceClassification"):
            model(inputs_embeds=torch.ones(1, 2, WIDTH))
        return
    tokens = dict(inputs)
    embed = model.get_input_embeddings()
    for name, new in (
        ("input_ids", "inputs_embeds"),
        ("decoder_input_ids", "decoder_inputs_embeds"),
    ):
        if name in inputs:
            with torch.no_grad():
                inputs[new] = embed(inputs.pop(name))
    if case.name == "T5ForQuestionAnswering":
        inputs["decoder_input_ids"] = model._shift_right(tokens["input_ids"])
    if case.head == "sequence_classification" and case.model_type not in {"bert", "roberta"}:
        tokens = {name: value[:1] for name, value in tokens.items()}
        inputs = {name: value[:1] for name, value in inputs.items()}
    torch.testing.assert_close(run(model, inputs), run(model, tokens))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_row_is_the_same_in_a_batch(case: Case) -> None:
    """Rows do not see each other: alone and in a batch a row answers alike."""
    model = case.model()
    inputs = case.inputs(rows=3)
    together = run(model, inputs)
    alone = run(model, {name: value[1:2] for name, value in inputs.items()})
    torch.testing.assert_close(alone, together[1:2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", WITH_LOSS, ids=name_of)
def test_training_reaches_every_weight(case: Case) -> None:
    """The loss is finite and every parameter gets a gradient, with checkpointed layers the same."""
    model = case.model().train()
    inputs = case.inputs(labels=True)
    gradients = []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model.zero_grad()
        output = model(**inputs)
        assert output.loss.isfinite()
        output.loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    lacking = {name for name, gradient in gradients[0].items() if gradient is None}
    assert lacking == {name for name in lacking if is_unused(case, name)}
    for name in gradients[0].keys() - lacking:
        torch.testing.assert_close(gradients[0][name], gradients[1][name])
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def is_unused(case: Case, name: str) -> bool:
    """Whether a loss does not depend on a parameter: experts that no token chose."""
    return "experts" in name and case.model_type in {"mixtral", "qwen3_moe"}


@pytest.mark.parametrize("case", CAUSAL, ids=name_of)
def test_generation_with_a_cache_equals_that_without(case: Case) -> None:
    """Greedy tokens are the same with and without cache, also for a batch padded on the left."""
    values = {"is_decoder": True} if case.model_type in {"bert", "roberta"} else {}
    model = case.model(**values)
    ids = case.inputs()["input_ids"]
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = PAD, 0
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        cached = model.generate(ids, attention_mask=mask, use_cache=True, **options)
        plain = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(cached, plain)
    assert cached.shape[1] >= 6


@pytest.mark.parametrize("case", CAUSAL, ids=name_of)
def test_padding_on_the_left_changes_nothing(case: Case) -> None:
    """The last position answers the same however much padding stands before the row."""
    values = {"is_decoder": True} if case.model_type in {"bert", "roberta"} else {}
    model = case.model(**values)
    ids = case.inputs()["input_ids"]
    padded = torch.nn.functional.pad(ids, (4, 0), value=PAD)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (4, 0))
    inputs = {"input_ids": padded, "attention_mask": mask}
    alone: dict[str, Any] = {"input_ids": ids}
    if case.model_type == "t5":
        inputs["decoder_input_ids"] = alone["decoder_input_ids"] = ids
    else:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        if case.model_type == "roberta":  # whose positions start behind the pad token's
            del inputs["position_ids"]
            return_to = model.config.pad_token_id
            inputs["position_ids"] = (mask.cumsum(1) * mask) + return_to
    torch.testing.assert_close(
        run(model, inputs)[:, -1], run(model, alone)[:, -1], atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_first_argument_is_the_main_input(case: Case) -> None:
    """`forward` takes its main input first, under the documented name."""
    parameters = list(inspect.signature(case.cls.forward).parameters)
    assert parameters[1] == case.cls.main_input_name
