"""How large the key-value cache of a model is, from config.json alone.

Counted as transformers' `DynamicCache` fills it: a key and a value for each layer, head and token;
layers with a window keep no more than the window; layers that share another's cache have none;
multi-head latent attention (DeepSeek) keeps one compressed latent and one rotary key for all heads.
What the configuration does not say is never guessed: the answer is then None. A window counts only
where `layer_types` says which layers have it; without that, every layer is counted whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_WIDTH = ("hidden_size", "n_embd", "d_model")
_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
_UNEVEN = ("per_layer_config", "global_head_dim", "num_global_key_value_heads", "kv_sharing_modes")
"""Layers with dimensions of their own: not counted."""
_RECURRENT = ("mamba", "ssm", "state_size", "linear_attn", "linear_num", "time_mix", "attn_layer")


def num_elements(config: Mapping[str, Any], *, context: int, batch: int) -> int | None:
    """Return the numbers that the cache holds for `batch` sequences of `context` tokens.

    `config` is that of the text model. None where it does not tell: dimensions are missing, the
    model has an encoder, or some of its layers keep another kind of state.
    """
    layers = _first(config, _LAYERS)
    width = _token_width(config)
    if layers is None or width is None or config.get("is_encoder_decoder"):
        return None
    if any(config.get(key) is not None for key in _UNEVEN):
        return None
    kinds = config.get("layer_types")
    shared = _integer(config, "num_kv_shared_layers") or 0
    if not isinstance(kinds, list):
        if any(key.startswith(_RECURRENT) for key in config):
            return None
        return max(0, layers - shared) * context * batch * width
    tokens = [_tokens(kind, config, context) for kind in kinds[: max(0, len(kinds) - shared)]]
    known = [count for count in tokens if count is not None]
    return sum(known) * batch * width if len(known) == len(tokens) else None


def head_size(config: Mapping[str, Any]) -> int | None:
    """Return the width of one attention head, or None where the configuration does not tell."""
    head = _first(config, ("head_dim", "d_kv"))
    if head is not None:
        return head
    width, heads = _first(config, _WIDTH), _first(config, _HEADS)
    return None if width is None or not heads else width // heads


def _token_width(config: Mapping[str, Any]) -> int | None:
    """Return the numbers kept for one token in one layer."""
    latent, rotary = _integer(config, "kv_lora_rank"), _integer(config, "qk_rope_head_dim")
    if latent is not None and rotary is not None:
        return latent + rotary
    head, heads = head_size(config), _kv_heads(config)
    return None if head is None or heads is None else 2 * heads * head


def _kv_heads(config: Mapping[str, Any]) -> int | None:
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 1
    if "new_decoder_architecture" in config and not config["new_decoder_architecture"]:
        return _first(config, _HEADS)  # Falcon: num_kv_heads stands there, and is not used
    return _first(config, (*_KV_HEADS, *_HEADS))


def _tokens(kind: object, config: Mapping[str, Any], context: int) -> int | None:
    """Return the tokens that a layer of this kind keeps of `context`."""
    if kind == "full_attention":
        return context
    if kind in ("moe", "mlp"):
        return 0
    key = _WINDOWS.get(kind) if isinstance(kind, str) else None
    window = None if key is None else _integer(config, key)
    return None if window is None else min(context, window)


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    return next((n for key in keys if (n := _integer(config, key)) is not None), None)


def _integer(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
