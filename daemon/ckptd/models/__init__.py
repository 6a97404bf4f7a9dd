"""The model layer: what a config.json and the names in a checkpoint mean, and models that run.

Two sides. Pure facts and decisions, made from names, dtypes, shapes and configurations
(`architectures`, `configuration`, `embeddings`, `ties`, `tying`, `unfamiliar`): they never import
torch, and the daemon uses them. And models in torch, written here from scratch with the documented
behaviour of transformers (`base`, `native` and what they need), imported on first use:

    from ckptd.models import AutoModelForCausalLM

Does not belong here: the plan, the Hub's protocol, and transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "AutoConfig": "auto",
    "AutoModel": "auto",
    "AutoModelForCausalLM": "auto",
    "AutoModelForImageClassification": "auto",
    "AutoModelForMaskedImageModeling": "auto",
    "AutoModelForMaskedLM": "auto",
    "AutoModelForMultipleChoice": "auto",
    "AutoModelForNextSentencePrediction": "auto",
    "AutoModelForPreTraining": "auto",
    "AutoModelForQuestionAnswering": "auto",
    "AutoModelForSeq2SeqLM": "auto",
    "AutoModelForSequenceClassification": "auto",
    "AutoModelForTextEncoding": "auto",
    "AutoModelForTokenClassification": "auto",
    "DynamicCache": "layers.cache",
    "EncoderDecoderCache": "layers.cache",
    "GenerationConfig": "generation.generation_config",
    "GenerationMixin": "generation.generation",
    "ModuleUtilsMixin": "module_utils",
    "PreTrainedConfig": "config.config",
    "PreTrainedModel": "base",
    "PushToHubMixin": "push",
}
"""Public names and the modules they live in."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Return a public name (or a native class), importing its module on first use.

    Raises:
        AttributeError: there is no such name.
    """
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name[:1].isupper():
        registry = importlib.import_module(f"{__name__}.registry")
        found = registry.find_class(name)
        if found is not None:
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
