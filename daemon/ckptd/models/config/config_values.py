"""Values of a configuration on their way into config.json, and back where torch is at hand.

Pure functions on plain values. torch is used where the process has it already; it is never imported.
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
from typing import Any

GENERATION_KEYS = frozenset(
    [
        "max_length",
        "min_length",
        "do_sample",
        "early_stopping",
        "num_beams",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "output_scores",
        "return_dict_in_generate",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "epsilon_cutoff",
        "eta_cutoff",
        "encoder_repetition_penalty",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "target_lookbehind",
        "num_beam_groups",
        "diversity_penalty",
    ]
)
"""Keys of generation that older files have in config.json; they belong in generation_config.json."""

RUNTIME_KEYS = frozenset(
    [
        "_extra",
        "_given",
        "_attn_implementation_internal",
        "_experts_implementation_internal",
        "_output_attentions",
        "_auto_class",
        "_commit_hash",
        "_is_quantized",
        "_pre_quantization_dtype",
        "ignore_keys_at_rope_validation",
        "base_model_tp_plan",
        "base_model_pp_plan",
        "base_model_fsdp_plan",
        "base_model_ep_plan",
        "distributed_config",
        "transformers_weights",
    ]
)
"""Attributes that say how this process runs the model; they are never saved."""

_CLASS_VARIABLE = re.compile(r"^(\w+\.)*(ClassVar|Final)\b")


def declared_names(cls: type) -> list[str]:
    """Return the names that `cls` itself annotates as fields: public, and not `ClassVar`."""
    return [
        name
        for name, annotation in inspect.get_annotations(cls).items()
        if not name.startswith("_") and not _CLASS_VARIABLE.match(_spelled(annotation))
    ]


def as_dtype(value: Any) -> Any:
    """Return the torch.dtype that a name such as "bfloat16" means; as it is while torch is absent.

    Raises:
        ValueError: torch has no data type of that name.
    """
    torch = sys.modules.get("torch")
    if not isinstance(value, str) or torch is None or value == "auto":
        return value
    found = getattr(torch, value.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype {value!r} is not the name of a torch data type, such as bfloat16")
    return found


def plain(value: Any) -> Any:
    """Return a deep copy that JSON can hold: dtypes as names, tuples as lists, objects as dicts."""
    if type(value).__name__ == "dtype" and type(value).__module__ == "torch":
        return str(value).removeprefix("torch.")
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "to_dict"):
        result = value.to_dict()
        result.pop("transformers_version", None)
        return result
    return copy.deepcopy(value)


def _spelled(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else repr(annotation)
