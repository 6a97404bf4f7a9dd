"""The decoder family against transformers: tiny random models with every weight off its default.

Left padding must not even change the rows that see nothing, so whole tensors are compared.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ckptd.models.layers.cache import DynamicCache
from tests.models.native.decoder_pairs import (
    CASES,
    CAUSAL,
    FIRST,
    HEADS,
    IDS,
    LENGTH,
    PAD,
    ROWS,
    SMALL,
    TOLERANCE,
    Case,
    class_of,
    gap,
    pair,
    tokens,
    use,
)

every_case = pytest.mark.parametrize("case", CASES, ids=IDS)
causal_case = pytest.mark.parametrize("case", CAUSAL, ids=[case.name for case in CAUSAL])


@every_case
def test_names_are_those_of_the_file(case: Case) -> None:
    """Our parameters carry the names that transformers writes to disk."""
    _, ours, names = pair(case)
    tied = set(ours.all_tied_weights_keys)
    assert set(ours.state_dict()) - tied == names - tied


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@every_case
def test_logits_states_and_loss(case: Case, padding: str) -> None:
    """Logits, hidden states and loss equal transformers', whatever the padding."""
    theirs, ours, _ = pair(case)
    use("sdpa", theirs, ours)
    ids, mask = tokens(padding)
    labels = ids.masked_fill(ids == PAD, -100)
    arguments = {"attention_mask": mask, "labels": labels, "output_hidden_states": True}
    with torch.no_grad():
        expected, found = theirs(ids, **arguments), ours(ids, **arguments)
    assert gap(found.logits, expected.logits) < TOLERANCE
    assert gap(found.loss, expected.loss) < TOLERANCE
    for mine, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert gap(mine, other) < TOLERANCE


@every_case
def test_attentions(case: Case) -> None:
    """With eager attention the weights of every layer equal transformers'."""
    theirs, ours, _ = pair(case)
    use("eager", theirs, ours)
    ids, mask = tokens("left")
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, output_attentions=True)
        found = ours(ids, attention_mask=mask, output_attentions=True)
    assert gap(found.logits, expected.logits) < TOLERANCE
    for mine, other in zip(found.attentions, expected.attentions, strict=True):
        assert gap(mine, other) < TOLERANCE


@causal_case
def test_a_cache_changes_nothing(case: Case) -> None:
    """A prompt in two pieces and then token by token give the logits of one long forward."""
    theirs, ours, _ = pair(case)
    use("sdpa", theirs, ours)
    ids, mask = tokens("left")
    assert mask is not None
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, use_cache=False).logits
        cache = DynamicCache(config=ours.config)
        parts = []
        for start, stop in ((0, 3), (3, 7), *((at, at + 1) for at in range(7, LENGTH))):
            if case.name == "phi3-longrope" and stop == 9:
                # Beyond the original context all keys turn by the long list: begin anew.
                cache, start, parts = DynamicCache(config=ours.config), 0, []
            out = ours(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
            parts.append(out.logits)
    assert cache.get_seq_length() == LENGTH
    assert gap(torch.cat(parts, dim=1)[1:], expected[1:]) < TOLERANCE
    assert gap(torch.cat(parts, dim=1)[0, 4:], expected[0, 4:]) < TOLERANCE


@every_case
def test_embeddings_may_be_given(case: Case) -> None:
    """`inputs_embeds` go where looked-up embeddings go, and nothing is scaled twice."""
    theirs, ours, _ = pair(case)
    use("sdpa", theirs, ours)
    embeds = torch.randn(2, 6, SMALL["hidden_size"], generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, found = theirs(inputs_embeds=embeds), ours(inputs_embeds=embeds)
    assert gap(found.logits, expected.logits) < TOLERANCE


@pytest.mark.parametrize("case", [c for c in CASES if c.name in FIRST], ids=lambda c: c.module)
def test_configuration_defaults(case: Case) -> None:
    """A configuration without arguments says what transformers' says."""
    expected = getattr(transformers, case.config_name)().to_dict()
    found = class_of(case, case.config_name)().to_dict()
    private = {key for key in expected if key.startswith("_")}
    for key in expected.keys() - private - {"transformers_version"}:
        assert found.get(key) == expected[key], key


def test_the_window_of_both_ways_is_halved_once(tmp_path: Path) -> None:
    """Gemma 3 halves a window that looks both ways, and saves it as it was given."""
    config_class = class_of(CASES[IDS.index("gemma3-plain")], "Gemma3TextConfig")
    config_class(sliding_window=512, use_bidirectional_attention=True).save_pretrained(tmp_path)
    ours = config_class.from_pretrained(tmp_path)
    theirs = transformers.Gemma3TextConfig.from_pretrained(tmp_path)
    assert ours.sliding_window == theirs.sliding_window == 257


@every_case
def test_footprint(case: Case) -> None:
    """Parameters and buffers take as many bytes as transformers'."""
    theirs, ours, _ = pair(case)
    assert ours.get_memory_footprint() == theirs.get_memory_footprint()
    assert ours.num_parameters() == theirs.num_parameters()


@pytest.mark.parametrize(("case", "head"), HEADS, ids=[f"{c.name}-{h}" for c, h in HEADS])
def test_other_heads(case: Case, head: str) -> None:
    """Classifiers and the span head have the file's names, and give the same logits and loss."""
    theirs, ours, names = pair(case, head)
    use("sdpa", theirs, ours)
    assert set(ours.state_dict()) == names
    assert ours.base_model_prefix == theirs.base_model_prefix
    ids, mask = tokens("left")
    labels: dict[str, Any] = {"labels": torch.tensor([0, 1, 1])}
    if head == "ForTokenClassification":
        labels = {"labels": ids % 2}
    elif head == "ForQuestionAnswering":
        labels = {"start_positions": torch.tensor([1, 2, 3])}
        labels["end_positions"] = torch.tensor([2, 5, 40])
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, **labels)
        found = ours(ids, attention_mask=mask, **labels)
    for name in ("loss", "logits", "start_logits", "end_logits"):
        if name in expected:
            assert gap(found[name], expected[name]) < TOLERANCE


@pytest.mark.parametrize("prefix", ["Mixtral", "Qwen3Moe"])
def test_routers_are_recorded_and_balanced(prefix: str) -> None:
    """Router logits and the balancing loss equal transformers', padding not counted."""
    case = next(c for c in CASES if c.prefix == prefix and c.name.endswith("plain"))
    theirs, ours, _ = pair(case)
    ids, mask = tokens("left")
    arguments = {"attention_mask": mask, "labels": ids, "output_router_logits": True}
    with torch.no_grad():
        expected, found = theirs(ids, **arguments), ours(ids, **arguments)
    assert gap(found.aux_loss, expected.aux_loss) < TOLERANCE
    assert gap(found.loss, expected.loss) < TOLERANCE
    for mine, other in zip(found.router_logits, expected.router_logits, strict=True):
        assert gap(mine, other) < TOLERANCE


@pytest.mark.parametrize(
    "name", ["llama-plain", "gemma2-plain", "mixtral-plain", "qwen3_moe-mixed"]
)
def test_gradients(name: str) -> None:
    """Gradients of the loss, divided by `num_items_in_batch`, equal transformers'."""
    theirs, ours, _ = pair(CASES[IDS.index(name)])
    use("eager", theirs, ours)
    ids, mask = tokens("right")
    for model in (theirs, ours):
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids, num_items_in_batch=7).loss.backward()
    for part in ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"):
        expected = theirs.get_parameter(part).grad
        assert gap(ours.get_parameter(part).grad, expected) < TOLERANCE


@pytest.mark.parametrize("name", ["llama-plain", "olmo2-plain", "gemma3-plain", "mixtral-plain"])
def test_bfloat16_rounds_alike(name: str) -> None:
    """In bfloat16 logits differ by no more than rounding."""
    theirs, ours = (copy.deepcopy(model) for model in pair(CASES[IDS.index(name)])[:2])
    ids, mask = tokens("left")
    with torch.no_grad():
        expected = theirs.bfloat16()(ids, attention_mask=mask).logits
        found = ours.bfloat16()(ids, attention_mask=mask).logits
    assert found.dtype == torch.bfloat16
    assert gap(found.float(), expected.float()) < 0.04


@pytest.mark.parametrize(
    "keep", [1, 3, torch.tensor([0, 2]), torch.tensor([[0, 1], [2, 3], [4, 5]])]
)
def test_only_wanted_logits(keep: int | torch.Tensor) -> None:
    """`logits_to_keep` picks the last positions, or those given for all rows or for each."""
    theirs, ours, _ = pair(CASES[0])
    ids, _ = tokens("none")
    with torch.no_grad():
        expected, found = theirs(ids, logits_to_keep=keep), ours(ids, logits_to_keep=keep)
    assert gap(found.logits, expected.logits) < TOLERANCE


@pytest.mark.parametrize("name", ["llama-plain", "mistral-window"])
def test_packed_sequences_do_not_meet(name: str) -> None:
    """Without mask and cache, positions that start anew start a sequence of their own."""
    theirs, ours, _ = pair(CASES[IDS.index(name)])
    use("sdpa", theirs, ours)
    ids, _ = tokens("none")
    positions = torch.cat([torch.arange(7), torch.arange(LENGTH - 7)])[None]
    with torch.no_grad():
        expected = theirs(ids[:1], position_ids=positions, use_cache=False).logits
        found = ours(ids[:1], position_ids=positions, use_cache=False).logits
        alone = ours(ids[:1, 7:]).logits
    assert gap(found, expected) < TOLERANCE
    assert gap(found[:, 7:], alone) < TOLERANCE


@pytest.mark.parametrize("name", ["llama-dynamic", "llama-longrope"])
def test_positions_beyond_the_trained_length(name: str) -> None:
    """Rotary types that follow the length do so like transformers: long, short again, longer."""
    theirs, ours, _ = pair(CASES[IDS.index(name)])
    use("sdpa", theirs, ours)
    for length in (80, 20, 70, 10, 90):
        ids, _ = tokens("none", length)
        with torch.no_grad():
            expected, found = theirs(ids).logits, ours(ids).logits
        assert gap(found, expected) < TOLERANCE, length


def test_a_mask_of_ones_own() -> None:
    """A four-dimensional mask is used as it is, additive or boolean."""
    theirs, ours, _ = pair(CASES[0])
    use("sdpa", theirs, ours)
    ids, _ = tokens("none")
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    seen[6:, 2:4] = False
    with torch.no_grad():
        expected = theirs(ids, attention_mask=seen[None, None]).logits
        boolean = ours(ids, attention_mask=seen[None, None]).logits
        lowest = torch.finfo(torch.float32).min
        additive = torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~seen, lowest)
        added = ours(ids, attention_mask=additive).logits
    assert gap(boolean, expected) < TOLERANCE
    assert gap(added, expected) < TOLERANCE


def test_a_tuple_is_given_where_one_is_wanted() -> None:
    """`return_dict=False` gives the fields that are set, in order."""
    _, ours, _ = pair(CASES[0])
    ids, _ = tokens("none")
    answer = ours(ids, labels=ids, use_cache=False, return_dict=False)
    assert [part.shape for part in answer] == [torch.Size([]), torch.Size([3, LENGTH, ROWS])]


@pytest.mark.parametrize("arguments", [{}, {"input_ids": 1, "inputs_embeds": 1}])
def test_one_input_is_needed(arguments: dict[str, Any]) -> None:
    """Both or neither of tokens and embeddings are refused."""
    _, ours, _ = pair(CASES[0])
    given = {name: torch.zeros(1, 2, dtype=torch.int64) for name in arguments}
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        ours(**given)


def test_checkpointed_layers_give_the_same_gradients() -> None:
    """Gradient checkpointing changes neither loss nor gradients, and makes no cache."""
    ours = copy.deepcopy(pair(CASES[0])[1]).train()
    ids, _ = tokens("none")
    gradients = []
    for wanted in (False, True):
        if wanted:
            ours.gradient_checkpointing_enable()
        ours.zero_grad()
        answer = ours(ids, labels=ids)
        answer.loss.backward()
        gradients.append(ours.model.layers[0].mlp.up_proj.weight.grad.clone())
    assert answer.past_key_values is None
    assert torch.equal(*gradients)


def test_sizes_that_do_not_fit_are_refused() -> None:
    """Heads that do not share the hidden size evenly are refused when the configuration is made."""
    config_class = class_of(CASES[0], "LlamaConfig")
    with pytest.raises(ValueError, match="not a multiple of the number of attention heads"):
        config_class(hidden_size=30, num_attention_heads=4)
