"""What generation settings may hold together, which have no effect, and which nobody here serves.

Pure functions over a mapping of setting names to values, in which None means "not given". Free of
torch; the settings themselves are those of `generation_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEFAULTS: Mapping[str, Any] = {
    "max_length": 20,
    "min_length": 0,
    "do_sample": False,
    "use_cache": True,
    "early_stopping": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_return_sequences": 1,
    "output_scores": False,
    "return_dict_in_generate": False,
}
"""What holds where neither the call nor the model says anything; `max_length` counts new tokens then."""

OUTPUT_FLAGS = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")

SERVED_ELSEWHERE = (
    "early_stopping",
    "stop_strings",
    "use_mtp",
    "cache_implementation",
    "cache_config",
    "max_cache_len",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "encoder_repetition_penalty",
    "length_penalty",
    "bad_words_ids",
    "remove_invalid_values",
    "exponential_decay_length_penalty",
    "sequence_bias",
    "token_healing",
    "guidance_scale",
    "watermarking_config",
    "encoder_no_repeat_ngram_size",
    "is_assistant",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
    "assistant_early_exit",
    "assistant_lookbehind",
    "target_lookbehind",
    "assistant_ensemble_weight",
    "speculation_type",
    "disable_compile",
    "low_memory",
    "penalty_alpha",
    "dola_layers",
    "diversity_penalty",
    "num_beam_groups",
    "constraints",
    "force_words_ids",
    "prefill_chunk_size",
)
"""Settings of transformers that `generate` here does not follow; they are kept, None when absent."""

SUPPORTED = (
    "greedy decoding and sampling (num_beams=1) with temperature, top_k, top_p, min_p, "
    "repetition_penalty, no_repeat_ngram_size, suppressed and forced tokens, minimum and maximum "
    "lengths, eos_token_id, max_time, stopping_criteria and logits_processor"
)

_ONLY_WHEN_SAMPLING: Mapping[str, Any] = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
_ONLY_WITH_BEAMS: Mapping[str, Any] = {"early_stopping": False, "length_penalty": 1.0}
_ARGUMENTS_OF_GENERATE = (
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "assistant_model",
    "streamer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
)
_UNSERVED: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "constraints": (),
    "force_words_ids": (),
    "stop_strings": (),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "guidance_scale": (1,),
    "sequence_bias": (),
    "bad_words_ids": (),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
    "token_healing": (False,),
    "prompt_lookup_num_tokens": (),
    "assistant_early_exit": (),
    "use_mtp": (False,),
    "prefill_chunk_size": (),
    "remove_invalid_values": (False,),
    "cache_implementation": ("dynamic", "hybrid"),
}
"""Settings that change tokens or memory and that `generate` lacks, with the values that ask nothing."""
_UNSERVED_WHEN_SAMPLING: Mapping[str, tuple[Any, ...]] = {
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}


def require_possible(settings: Mapping[str, Any]) -> None:
    """Refuse settings that cannot be meant.

    Raises:
        ValueError: with the setting and its value.
    """
    for name in _ARGUMENTS_OF_GENERATE:
        if name in settings:
            raise ValueError(f"{name} is not a generation setting: pass it to generate() itself")
    early = settings.get("early_stopping")
    if early not in (None, True, False, "never"):
        raise ValueError(f"early_stopping must be true, false or 'never', not {early!r}")
    new = settings.get("max_new_tokens")
    if new is not None and new <= 0:
        raise ValueError(f"max_new_tokens must be greater than 0, not {new}")
    _require_possible_returns(settings)
    _require_possible_forcing(settings)


def _require_possible_returns(settings: Mapping[str, Any]) -> None:
    """Refuse more returned sequences than the way of decoding can tell apart."""
    returned, beams = settings.get("num_return_sequences") or 1, settings.get("num_beams") or 1
    if returned > 1 and beams == 1 and not settings.get("do_sample"):
        raise ValueError(
            f"num_return_sequences={returned} needs do_sample=True: greedy decoding gives the same "
            "sequence every time"
        )
    if returned > beams > 1:
        raise ValueError(f"num_return_sequences={returned} is more than num_beams={beams}")


def _require_possible_forcing(settings: Mapping[str, Any]) -> None:
    """Refuse to force only tokens that are suppressed: no token would be left."""
    suppressed = set(settings.get("suppress_tokens") or ())
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        forced = settings.get(name)
        if forced is None:
            continue
        ids = {forced} if isinstance(forced, int) else set(forced)
        if ids and ids <= suppressed:
            raise ValueError(f"{name}={sorted(ids)} is in suppress_tokens: no token would be left")


def idle_settings(settings: Mapping[str, Any], given: set[str]) -> dict[str, str]:
    """Return the settings that have no effect beside the others, with the reason.

    `given` names what the caller set just now (empty: nobody knows). What a model's own file brings
    along is not complained about when the caller turned off what it belongs to.
    """
    found: dict[str, str] = {}

    def check(switch: str, table: Mapping[str, Any], reason: str) -> None:
        for name, neutral in table.items():
            value = settings.get(name)
            inherited = switch in given and name not in given
            if value is not None and value != neutral and not inherited:
                found[name] = f"{name}={value!r} {reason}"

    pad = settings.get("pad_token_id")
    if pad is not None and pad < 0:
        found["pad_token_id"] = f"pad_token_id={pad} is no token: set one before padding a batch"
    if settings.get("do_sample") is not True:
        check("do_sample", _ONLY_WHEN_SAMPLING, "is used only with do_sample=True")
    if settings.get("num_beams") in (None, 1):
        check("num_beams", _ONLY_WITH_BEAMS, "is used only with num_beams > 1")
    if settings.get("use_cache") is False:
        for name in ("cache_implementation", "cache_config"):
            if settings.get(name) is not None:
                found[name] = f"{name} is not used with use_cache=False"
    if settings.get("return_dict_in_generate") is not True:
        for name in OUTPUT_FLAGS:
            if settings.get(name) is True:
                found[name] = f"{name} is used only with return_dict_in_generate=True"
    return found


def require_served(settings: Mapping[str, Any]) -> None:
    """Refuse what `generate` does not do, instead of giving other tokens than those asked for.

    Raises:
        ValueError: with every such setting, and what there is.
    """
    tables = [_UNSERVED]
    if settings.get("do_sample"):
        tables.append(_UNSERVED_WHEN_SAMPLING)
    refused = [
        f"{name}={settings[name]!r}"
        for table in tables
        for name, neutral in table.items()
        if settings.get(name) is not None and settings[name] not in neutral
    ]
    if refused:
        raise ValueError(f"generate() does not support {', '.join(refused)}; it does {SUPPORTED}")
