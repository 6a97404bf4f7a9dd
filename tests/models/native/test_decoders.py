"""The decoder family against transformers: tiny random models with every weight off its default.

Left padding must not even change the rows that see nothing, so whole tensors are compared.
"""

from __future__ import annotations

import copy
import functools
import importlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from ckptd.models.cache import DynamicCache

TOLERANCE = 1e-5
PAD, ROWS, LENGTH = 0, 99, 12
SMALL: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FACTORS = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0]}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        **FACTORS,
    },
}
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN3_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "head_dim": 16,
}
GEMMA = {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 24}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One architecture in one configuration."""

    name: str
    prefix: str
    module: str
    config_name: str
    values: tuple[tuple[str, Any], ...]

    def config_values(self) -> dict[str, Any]:
        """Return fresh arguments of the configuration."""
        return SMALL | {key: _thawed(value) for key, value in self.values}


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return ("dict", tuple((key, _frozen(item)) for key, item in value.items()))
    return ("list", tuple(value)) if isinstance(value, list) else value


def _thawed(value: Any) -> Any:
    if isinstance(value, tuple):
        kind, items = value
        return {k: _thawed(v) for k, v in items} if kind == "dict" else list(items)
    return value


def _case(variant: str, prefix: str, module: str = "", **values: Any) -> Case:
    module = module or prefix.lower()
    return Case(
        name=f"{module}-{variant}",
        prefix=prefix,
        module=module,
        config_name="Gemma3TextConfig" if prefix == "Gemma3" else f"{prefix}Config",
        values=tuple((key, _frozen(value)) for key, value in values.items()),
    )


def _model_name(case: Case, head: str) -> str:
    is_text_only = case.prefix == "Gemma3" and head != "ForCausalLM"
    return f"{case.prefix}{'Text' if is_text_only else ''}{head}"


CASES = [
    _case("plain", "Llama"),
    _case("bias", "Llama", attention_bias=True, mlp_bias=True, head_dim=16),
    _case("tied", "Llama", tie_word_embeddings=True, num_key_value_heads=4),
    *(_case(name, "Llama", rope_parameters=rope) for name, rope in ROPES.items()),
    _case("window", "Mistral", sliding_window=5),
    _case("no-window", "Mistral", sliding_window=None, head_dim=16),
    _case("plain", "Qwen2"),
    _case("window", "Qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=2),
    _case("plain", "Qwen3", head_dim=16),
    _case("window", "Qwen3", use_sliding_window=True, sliding_window=4, max_window_layers=1),
    _case("bias", "Qwen3", head_dim=8, attention_bias=True, tie_word_embeddings=True),
    _case("plain", "Granite"),
    _case(
        "multipliers",
        "Granite",
        embedding_multiplier=3.0,
        logits_scaling=2.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
        attention_bias=True,
    ),
    _case("plain", "SmolLM3"),
    _case("window", "SmolLM3", use_sliding_window=True, sliding_window=4, no_rope_layer_interval=2),
    _case("plain", "Olmo2"),
    _case("bias", "Olmo2", attention_bias=True, num_key_value_heads=4),
    _case("plain", "Phi3"),
    _case("window", "Phi3", sliding_window=5, tie_word_embeddings=True),
    _case(
        "longrope",
        "Phi3",
        rope_parameters={"rope_type": "longrope", **FACTORS},
        original_max_position_embeddings=8,
    ),
    _case(
        "partial", "Phi3", rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}
    ),
    _case("plain", "Gemma2", **GEMMA),
    _case("no-caps", "Gemma2", **GEMMA, attn_logit_softcapping=None, final_logit_softcapping=None),
    _case("plain", "Gemma3", **GEMMA),
    _case("pattern", "Gemma3", **GEMMA, sliding_window_pattern=2, final_logit_softcapping=5.0),
    _case(
        "both-ways", "Gemma3", **(GEMMA | {"sliding_window": 6}), use_bidirectional_attention=True
    ),
    _case("plain", "Mixtral", **MIXTRAL),
    _case("window", "Mixtral", **MIXTRAL, sliding_window=5, head_dim=16),
    _case("plain", "Qwen3Moe", "qwen3_moe", **QWEN3_MOE),
    _case(
        "mixed",
        "Qwen3Moe",
        "qwen3_moe",
        **QWEN3_MOE,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        decoder_sparse_step=2,
    ),
]
IDS = [case.name for case in CASES]
FIRST = {case.prefix: case.name for case in reversed(CASES)}.values()
every_case = pytest.mark.parametrize("case", CASES, ids=IDS)
CAUSAL = [case for case in CASES if case.name != "gemma3-both-ways"]
causal_case = pytest.mark.parametrize("case", CAUSAL, ids=[case.name for case in CAUSAL])
HEADS = [
    (case, head)
    for case in CASES
    if case.name.endswith(("plain", "mistral-window"))
    for head in ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
    if hasattr(transformers, _model_name(case, head))
]


def _class_of(case: Case, name: str) -> Any:
    return getattr(importlib.import_module(f"ckptd.models.native.{case.module}"), name)


def _shaken(model: Any) -> Any:
    """Move every weight off its initial value: biases, norms, multipliers then matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@functools.cache
def _pair(case: Case, head: str = "ForCausalLM") -> tuple[Any, Any, frozenset[str]]:
    """Return their model, ours with the weights of their file, and the names in the file."""
    torch.manual_seed(0)
    values = case.config_values()
    config = getattr(transformers, case.config_name)(**values)
    theirs = _shaken(getattr(transformers, _model_name(case, head))(config))
    ours = _class_of(case, _model_name(case, head))(
        _class_of(case, case.config_name)(**case.config_values())
    ).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        tensors = load_file(Path(folder) / "model.safetensors")
    lacking = ours.load_state_dict(tensors, strict=False).missing_keys
    assert set(lacking) <= set(ours.all_tied_weights_keys)
    return theirs, ours, frozenset(tensors)


def _tokens(padding: str, length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, ROWS, (3, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding == "none":
        return ids, None
    side = slice(0, 4) if padding == "left" else slice(length - 4, length)
    mask[0, side] = 0
    ids[mask == 0] = PAD
    return ids, mask


def _gap(left: torch.Tensor, right: torch.Tensor) -> float:
    assert left.shape == right.shape
    return float((left - right).abs().max())


def _use(implementation: str, *models: Any) -> None:
    for model in models:
        supports = model._supports_sdpa
        model.set_attn_implementation(implementation if supports else "eager")


@every_case
def test_names_are_those_of_the_file(case: Case) -> None:
    """Our parameters carry the names that transformers writes to disk."""
    _, ours, names = _pair(case)
    tied = set(ours.all_tied_weights_keys)
    assert set(ours.state_dict()) - tied == names - tied


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@every_case
def test_logits_states_and_loss(case: Case, padding: str) -> None:
    """Logits, hidden states and loss equal transformers', whatever the padding."""
    theirs, ours, _ = _pair(case)
    _use("sdpa", theirs, ours)
    ids, mask = _tokens(padding)
    labels = ids.masked_fill(ids == PAD, -100)
    arguments = {"attention_mask": mask, "labels": labels, "output_hidden_states": True}
    with torch.no_grad():
        expected, found = theirs(ids, **arguments), ours(ids, **arguments)
    assert _gap(found.logits, expected.logits) < TOLERANCE
    assert _gap(found.loss, expected.loss) < TOLERANCE
    for mine, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert _gap(mine, other) < TOLERANCE


@every_case
def test_attentions(case: Case) -> None:
    """With eager attention the weights of every layer equal transformers'."""
    theirs, ours, _ = _pair(case)
    _use("eager", theirs, ours)
    ids, mask = _tokens("left")
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, output_attentions=True)
        found = ours(ids, attention_mask=mask, output_attentions=True)
    assert _gap(found.logits, expected.logits) < TOLERANCE
    for mine, other in zip(found.attentions, expected.attentions, strict=True):
        assert _gap(mine, other) < TOLERANCE


@causal_case
def test_a_cache_changes_nothing(case: Case) -> None:
    """A prompt in two pieces and then token by token give the logits of one long forward."""
    theirs, ours, _ = _pair(case)
    _use("sdpa", theirs, ours)
    ids, mask = _tokens("left")
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
    assert _gap(torch.cat(parts, dim=1)[1:], expected[1:]) < TOLERANCE
    assert _gap(torch.cat(parts, dim=1)[0, 4:], expected[0, 4:]) < TOLERANCE


@every_case
def test_embeddings_may_be_given(case: Case) -> None:
    """`inputs_embeds` go where looked-up embeddings go, and nothing is scaled twice."""
    theirs, ours, _ = _pair(case)
    _use("sdpa", theirs, ours)
    embeds = torch.randn(2, 6, SMALL["hidden_size"], generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, found = theirs(inputs_embeds=embeds), ours(inputs_embeds=embeds)
    assert _gap(found.logits, expected.logits) < TOLERANCE


@pytest.mark.parametrize("case", [c for c in CASES if c.name in FIRST], ids=lambda c: c.module)
def test_configuration_defaults(case: Case) -> None:
    """A configuration without arguments says what transformers' says."""
    expected = getattr(transformers, case.config_name)().to_dict()
    found = _class_of(case, case.config_name)().to_dict()
    private = {key for key in expected if key.startswith("_")}
    for key in expected.keys() - private - {"transformers_version"}:
        assert found.get(key) == expected[key], key


def test_the_window_of_both_ways_is_halved_once(tmp_path: Path) -> None:
    """Gemma 3 halves a window that looks both ways, and saves it as it was given."""
    config_class = _class_of(CASES[IDS.index("gemma3-plain")], "Gemma3TextConfig")
    config_class(sliding_window=512, use_bidirectional_attention=True).save_pretrained(tmp_path)
    ours = config_class.from_pretrained(tmp_path)
    theirs = transformers.Gemma3TextConfig.from_pretrained(tmp_path)
    assert ours.sliding_window == theirs.sliding_window == 257


@every_case
def test_footprint(case: Case) -> None:
    """Parameters and buffers take as many bytes as transformers'."""
    theirs, ours, _ = _pair(case)
    assert ours.get_memory_footprint() == theirs.get_memory_footprint()
    assert ours.num_parameters() == theirs.num_parameters()


@pytest.mark.parametrize(("case", "head"), HEADS, ids=[f"{c.name}-{h}" for c, h in HEADS])
def test_other_heads(case: Case, head: str) -> None:
    """Classifiers and the span head have the file's names, and give the same logits and loss."""
    theirs, ours, names = _pair(case, head)
    _use("sdpa", theirs, ours)
    assert set(ours.state_dict()) == names
    assert ours.base_model_prefix == theirs.base_model_prefix
    ids, mask = _tokens("left")
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
            assert _gap(found[name], expected[name]) < TOLERANCE


@pytest.mark.parametrize("prefix", ["Mixtral", "Qwen3Moe"])
def test_routers_are_recorded_and_balanced(prefix: str) -> None:
    """Router logits and the balancing loss equal transformers', padding not counted."""
    case = next(c for c in CASES if c.prefix == prefix and c.name.endswith("plain"))
    theirs, ours, _ = _pair(case)
    ids, mask = _tokens("left")
    arguments = {"attention_mask": mask, "labels": ids, "output_router_logits": True}
    with torch.no_grad():
        expected, found = theirs(ids, **arguments), ours(ids, **arguments)
    assert _gap(found.aux_loss, expected.aux_loss) < TOLERANCE
    assert _gap(found.loss, expected.loss) < TOLERANCE
    for mine, other in zip(found.router_logits, expected.router_logits, strict=True):
        assert _gap(mine, other) < TOLERANCE


@pytest.mark.parametrize(
    "name", ["llama-plain", "gemma2-plain", "mixtral-plain", "qwen3_moe-mixed"]
)
def test_gradients(name: str) -> None:
    """Gradients of the loss, divided by `num_items_in_batch`, equal transformers'."""
    theirs, ours, _ = _pair(CASES[IDS.index(name)])
    _use("eager", theirs, ours)
    ids, mask = _tokens("right")
    for model in (theirs, ours):
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids, num_items_in_batch=7).loss.backward()
    for part in ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"):
        expected = theirs.get_parameter(part).grad
        assert _gap(ours.get_parameter(part).grad, expected) < TOLERANCE


@pytest.mark.parametrize("name", ["llama-plain", "olmo2-plain", "gemma3-plain", "mixtral-plain"])
def test_bfloat16_rounds_alike(name: str) -> None:
    """In bfloat16 logits differ by no more than rounding."""
    theirs, ours = (copy.deepcopy(model) for model in _pair(CASES[IDS.index(name)])[:2])
    ids, mask = _tokens("left")
    with torch.no_grad():
        expected = theirs.bfloat16()(ids, attention_mask=mask).logits
        found = ours.bfloat16()(ids, attention_mask=mask).logits
    assert found.dtype == torch.bfloat16
    assert _gap(found.float(), expected.float()) < 0.04


@pytest.mark.parametrize(
    "keep", [1, 3, torch.tensor([0, 2]), torch.tensor([[0, 1], [2, 3], [4, 5]])]
)
def test_only_wanted_logits(keep: int | torch.Tensor) -> None:
    """`logits_to_keep` picks the last positions, or those given for all rows or for each."""
    theirs, ours, _ = _pair(CASES[0])
    ids, _ = _tokens("none")
    with torch.no_grad():
        expected, found = theirs(ids, logits_to_keep=keep), ours(ids, logits_to_keep=keep)
    assert _gap(found.logits, expected.logits) < TOLERANCE


@pytest.mark.parametrize("name", ["llama-plain", "mistral-window"])
def test_packed_sequences_do_not_meet(name: str) -> None:
    """Without mask and cache, positions that start anew start a sequence of their own."""
    theirs, ours, _ = _pair(CASES[IDS.index(name)])
    _use("sdpa", theirs, ours)
    ids, _ = _tokens("none")
    positions = torch.cat([torch.arange(7), torch.arange(LENGTH - 7)])[None]
    with torch.no_grad():
        expected = theirs(ids[:1], position_ids=positions, use_cache=False).logits
        found = ours(ids[:1], position_ids=positions, use_cache=False).logits
        alone = ours(ids[:1, 7:]).logits
    assert _gap(found, expected) < TOLERANCE
    assert _gap(found[:, 7:], alone) < TOLERANCE


@pytest.mark.parametrize("name", ["llama-dynamic", "llama-longrope"])
def test_positions_beyond_the_trained_length(name: str) -> None:
    """Rotary types that follow the length do so like transformers: long, short again, longer."""
    theirs, ours, _ = _pair(CASES[IDS.index(name)])
    _use("sdpa", theirs, ours)
    for length in (80, 20, 70, 10, 90):
        ids, _ = _tokens("none", length)
        with torch.no_grad():
            expected, found = theirs(ids).logits, ours(ids).logits
        assert _gap(found, expected) < TOLERANCE, length


def test_a_mask_of_ones_own() -> None:
    """A four-dimensional mask is used as it is, additive or boolean."""
    theirs, ours, _ = _pair(CASES[0])
    _use("sdpa", theirs, ours)
    ids, _ = _tokens("none")
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    seen[6:, 2:4] = False
    with torch.no_grad():
        expected = theirs(ids, attention_mask=seen[None, None]).logits
        boolean = ours(ids, attention_mask=seen[None, None]).logits
        lowest = torch.finfo(torch.float32).min
        additive = torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~seen, lowest)
        added = ours(ids, attention_mask=additive).logits
    assert _gap(boolean, expected) < TOLERANCE
    assert _gap(added, expected) < TOLERANCE


def test_a_tuple_is_given_where_one_is_wanted() -> None:
    """`return_dict=False` gives the fields that are set, in order."""
    _, ours, _ = _pair(CASES[0])
    ids, _ = _tokens("none")
    answer = ours(ids, labels=ids, use_cache=False, return_dict=False)
    assert [part.shape for part in answer] == [torch.Size([]), torch.Size([3, LENGTH, ROWS])]


@pytest.mark.parametrize("arguments", [{}, {"input_ids": 1, "inputs_embeds": 1}])
def test_one_input_is_needed(arguments: dict[str, Any]) -> None:
    """Both or neither of tokens and embeddings are refused."""
    _, ours, _ = _pair(CASES[0])
    given = {name: torch.zeros(1, 2, dtype=torch.int64) for name in arguments}
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        ours(**given)


def test_checkpointed_layers_give_the_same_gradients() -> None:
    """Gradient checkpointing changes neither loss nor gradients, and makes no cache."""
    ours = copy.deepcopy(_pair(CASES[0])[1]).train()
    ids, _ = _tokens("none")
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
    config_class = _class_of(CASES[0], "LlamaConfig")
    with pytest.raises(ValueError, match="not a multiple of the number of attention heads"):
        config_class(hidden_size=30, num_attention_heads=4)
