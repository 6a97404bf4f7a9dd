"""Where attention layers get their keys and values, computed now or remembered, and their masks.

Shapes: B batch, H heads, T new positions, S encoder positions or kept and new ones, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ckptd.models.layers import masks
from ckptd.models.layers.cache import Cache, DynamicCache, EncoderDecoderCache

AnyCache = Cache | EncoderDecoderCache
Pair = tuple[torch.Tensor, torch.Tensor]


def begin(
    past: AnyCache | None, use_cache: bool | None, model: Any, *, crossing: bool = False
) -> AnyCache | None:
    """Return the cache to write into: the caller's, a fresh one, or None where none is wanted.

    With `crossing`, the layers attend to an encoder, whose keys are remembered beside the
    decoder's; a plain cache is wrapped, not copied. See `begin_own` for the rest.
    """
    if isinstance(past, EncoderDecoderCache):
        return past
    past = begin_own(past, use_cache, model)
    if crossing and past is not None:
        return EncoderDecoderCache(past, DynamicCache())
    return past


def begin_own(past: Cache | None, use_cache: bool | None, model: Any) -> Cache | None:
    """Return the cache to write into where the layers attend to nothing but their own positions.

    `use_cache` None leaves it to `model.config`. A model whose layers are checkpointed in training
    gets none: positions would be written twice.
    """
    if past is not None:
        return past
    wanted = model.config.use_cache if use_cache is None else use_cache
    if not wanted or (model.training and model.is_gradient_checkpointing):
        return None
    return DynamicCache()


def past_length(cache: AnyCache | None) -> int:
    """Positions that the cache has seen."""
    return 0 if cache is None else cache.get_seq_length()


def own(
    cache: AnyCache | None, layer_idx: int, key_BHTD: torch.Tensor, value_BHTD: torch.Tensor
) -> Pair:
    """Return the keys and values (B, H, S, D) of all positions so far; the new ones are kept."""
    if cache is None:
        return key_BHTD, value_BHTD
    return cache.update(key_BHTD, value_BHTD, layer_idx)


def crossing(cache: AnyCache | None, layer_idx: int, compute: Callable[[], Pair]) -> Pair:
    """Return the encoder's keys and values (B, H, S, D), computed once and then remembered."""
    if not isinstance(cache, EncoderDecoderCache):
        return compute()
    if cache.is_updated.get(layer_idx):
        layer = cache.cross_attention_cache.layers[layer_idx]
        assert layer.keys is not None
        assert layer.values is not None
        return layer.keys, layer.values
    cache.is_updated[layer_idx] = True
    return cache.cross_attention_cache.update(*compute(), layer_idx)


def split_heads(hidden_BTD: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return (B, T, heads * size) as (B, heads, T, size), a view."""
    return hidden_BTD.view(*hidden_BTD.shape[:-1], -1, head_dim).transpose(1, 2)


def causal_mask(
    config: Any,
    hidden_BTD: torch.Tensor,
    cache: AnyCache | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Return the mask of layers that see earlier positions, the cached ones included."""
    num_queries = hidden_BTD.shape[1]
    return masks.causal_mask(
        attention_mask,
        num_queries=num_queries,
        num_keys=num_queries if cache is None else cache.num_keys(num_queries),
        past=past_length(cache),
        dtype=hidden_BTD.dtype,
        device=hidden_BTD.device,
        implementation=config._attn_implementation,
        position_ids=position_ids,
    )


def padding_mask(
    config: Any, hidden_BTD: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the mask of layers that see every position but padding (an encoder's, or their own)."""
    return masks.bidirectional_mask(
        attention_mask,
        num_queries=hidden_BTD.shape[1],
        dtype=hidden_BTD.dtype,
        device=hidden_BTD.device,
        implementation=config._attn_implementation,
    )
