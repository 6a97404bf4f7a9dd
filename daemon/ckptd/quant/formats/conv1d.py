"""Modules whose plain weight is `(inputs, outputs)`: transformers' Conv1D, of GPT-2 and relatives.

Libraries transpose such a weight before they quantize it; afterwards it is transposed back.

Source: transformers 5.24, the models that use pytorch_utils.Conv1D.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODELS = frozenset(
    {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"}
)
MODULES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})


def is_conv1d(config: Mapping[str, Any], module: str) -> bool:
    """Return whether `module` is one: a name of theirs, in a model that has them at any depth."""
    return module.rpartition(".")[2] in MODULES and _has_conv1d(config)


def _has_conv1d(config: Mapping[str, Any]) -> bool:
    kind = config.get("model_type")
    nested = (value for value in config.values() if isinstance(value, Mapping))
    return (isinstance(kind, str) and kind in MODELS) or any(map(_has_conv1d, nested))
