"""The decoder family's configurations that are tested, and models of both sides with one's weights."""

from __future__ import annotations

import functools
import importlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

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


def model_name(case: Case, head: str) -> str:
    """Return the name of the model class with this head."""
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
CAUSAL = [case for case in CASES if case.name != "gemma3-both-ways"]
HEADS = [
    (case, head)
    for case in CASES
    if case.name.endswith(("plain", "mistral-window"))
    for head in ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
    if hasattr(transformers, model_name(case, head))
]


def class_of(case: Case, name: str) -> Any:
    """Return our class of that name."""
    return getattr(importlib.import_module(f"ckptd.models.native.{case.module}"), name)


def _shaken(model: Any) -> Any:
    """Move every weight off its initial value: biases, norms, multipliers then matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@functools.cache
def pair(case: Case, head: str = "ForCausalLM") -> tuple[Any, Any, frozenset[str]]:
    """Return their model, ours with the weights of their file, and the names in the file."""
    torch.manual_seed(0)
    values = case.config_values()
    config = getattr(transformers, case.config_name)(**values)
    theirs = _shaken(getattr(transformers, model_name(case, head))(config))
    ours = class_of(case, model_name(case, head))(
        class_of(case, case.config_name)(**case.config_values())
    ).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        tensors = load_file(Path(folder) / "model.safetensors")
    lacking = ours.load_state_dict(tensors, strict=False).missing_keys
    assert set(lacking) <= set(ours.all_tied_weights_keys)
    return theirs, ours, frozenset(tensors)


def tokens(padding: str, length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return token ids (3, length) and, where padding is asked for, their mask."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, ROWS, (3, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding == "none":
        return ids, None
    side = slice(0, 4) if padding == "left" else slice(length - 4, length)
    mask[0, side] = 0
    ids[mask == 0] = PAD
    return ids, mask


def gap(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return the largest difference of two tensors of the same shape."""
    assert left.shape == right.shape
    return float((left - right).abs().max())


def use(implementation: str, *models: Any) -> None:
    """Let both models compute attention this way, where they can."""
    for model in models:
        supports = model._supports_sdpa
        model.set_attn_implementation(implementation if supports else "eager")
