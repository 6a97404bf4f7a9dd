"""Scaled dot-product attention, and which implementation a model may ask for.

`attend` is the one place where queries meet keys. `eager` spells the arithmetic out (softmax in
float32 or more) and can give the weights; `sdpa` is `torch.nn.functional.scaled_dot_product_attention`,
which picks a fused kernel and gives none. Query heads outnumber key-value heads by a whole factor
(grouped-query attention): head h reads key-value head h // (H // K).

Masks are additive (floating, 0 or the dtype's minimum, or any bias) or boolean (True may be seen),
and broadcast to (B, H, T, S). A row that may see nothing gives finite values: the mean of all
values with `eager`, zeros with `sdpa`, as in transformers.

Shapes: B batch, H query heads, K key-value heads, G = H // K, T queries, S keys, D head size.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from typing import Any

import torch
from torch.nn import functional

_log = logging.getLogger(__name__)

IMPLEMENTATIONS = ("eager", "sdpa")
"""What runs here. The flash names run through `sdpa`, whose CUDA kernels are the same algorithm."""

FLASH_PACKAGES = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn.cute",
}
"""The package that a flash implementation promises to use."""

_KERNEL = re.compile(r"^[^/:@\s]+/[^/:@\s]+(?:@[^/:\s]+)?(?::[^/:\s]+)?$")


def resolve(requested: str | None, model_class: Any) -> str:
    """The implementation to run: None means `sdpa` where the class supports it, else `eager`.

    `model_class` says what it supports by `_supports_sdpa` and `_supports_flash_attn`.

    Raises:
        ImportError: a flash implementation whose package is missing; a kernel of the Hub
            (`org/repo`, optionally `@revision` and `:function`) without the `kernels` package.
        ValueError: an unknown name; `sdpa` or a flash name for a class that does not support it;
            a kernel of the Hub although `kernels` is there (ckptd runs no code from the Hub).
    """
    if requested is None:
        return "sdpa" if model_class._supports_sdpa else "eager"
    name, class_name = requested, model_class.__name__
    if _KERNEL.match(name):
        if importlib.util.find_spec("kernels") is None:
            raise ImportError(
                f"attn_implementation={name!r} names a kernel of the Hub, which needs the package"
                " `kernels` (pip install kernels); `sdpa` and `eager` need nothing"
            )
        raise ValueError(f"attn_implementation={name!r}: ckptd runs no kernels of the Hub")
    if name not in IMPLEMENTATIONS and name not in FLASH_PACKAGES:
        known = ", ".join((*IMPLEMENTATIONS, *FLASH_PACKAGES))
        raise ValueError(
            f'Specified `attn_implementation="{name}"` is not supported; {class_name} knows {known}'
        )
    flash = name in FLASH_PACKAGES
    declaration = "_supports_flash_attn" if flash else "_supports_sdpa"
    if name != "eager" and not getattr(model_class, declaration):
        raise ValueError(
            f"{class_name} does not support `{name}`: its {declaration} is false;"
            ' load it with `attn_implementation="eager"`'
        )
    if flash and not _is_installed(FLASH_PACKAGES[name]):
        package = FLASH_PACKAGES[name].partition(".")[0]
        raise ImportError(
            f"attn_implementation={name!r} needs the package `{package}`, which is not installed;"
            " `sdpa` runs the same algorithm on CUDA without it"
        )
    return name


def choose(model: Any, wanted: str | dict[str, str]) -> None:
    """Let `model`, and the models inside it, attend as `wanted`: see `set_attn_implementation`.

    Raises:
        ImportError, ValueError: as `resolve` does for one of the models; then nothing is changed.
    """
    top = model.config
    parts = {name: getattr(top, name, None) for name in top.sub_configs}
    parts = {"": top} | {name: config for name, config in parts.items() if config is not None}
    by_part = wanted if isinstance(wanted, dict) else dict.fromkeys(parts, wanted)
    models = [module for module in model.modules() if hasattr(module, "_supports_sdpa")]
    resolved = {}
    for part, name in by_part.items():
        if part not in parts:
            _log.warning("%s has no part %r: its attention is not set", type(model).__name__, part)
            continue
        user = next((one for one in models if one.config is parts[part]), model)
        resolved[part] = resolve(name, type(user))
    for part, name in resolved.items():
        parts[part]._attn_implementation = {"": name}
    for inner in models:
        if "" in resolved and not any(inner.config is config for config in parts.values()):
            inner.config._attn_implementation = {"": resolved[""]}


def attend(
    implementation: str,
    query_BHTD: torch.Tensor,
    key_BKSD: torch.Tensor,
    value_BKSD: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    training: bool = False,
    is_causal: bool = False,
    want_weights: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attended values (B, T, H, D), contiguous, and the weights (B, H, T, S) where wanted.

    Without a mask, `is_causal` lets query t see the keys up to its own, the last query seeing all.
    `dropout` acts on the weights, in training only. `softcap` bounds the scores by
    c * tanh(score / c). Whoever wants weights or a soft-cap gets `eager` arithmetic.

    Raises:
        ValueError: query heads are no multiple of key-value heads.
    """
    if query_BHTD.shape[1] % key_BKSD.shape[1]:
        raise ValueError(
            f"{query_BHTD.shape[1]} query heads are no multiple of {key_BKSD.shape[1]}"
            " key-value heads"
        )
    rate = dropout if training else 0.0
    num_queries, num_keys = query_BHTD.shape[2], key_BKSD.shape[2]
    if mask is not None or num_queries == 1:
        is_causal = False
    elif is_causal and (num_queries != num_keys or implementation == "eager" or want_weights):
        seen_TS = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query_BHTD.device)
        mask, is_causal = seen_TS.tril(num_keys - num_queries), False
    if implementation == "eager" or softcap is not None or want_weights:
        return _eager(query_BHTD, key_BKSD, value_BKSD, mask, scale, rate, softcap)
    out_BHTD = _sdpa(query_BHTD, key_BKSD, value_BKSD, mask, scale, rate, is_causal)
    return out_BHTD.transpose(1, 2).contiguous(), None


def _eager(
    query_BHTD: torch.Tensor,
    key_BKSD: torch.Tensor,
    value_BKSD: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    rate: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    # Repeated keys cost a copy; folding the heads into rows would round differently from what the
    # models were published with, which in bfloat16 is visible.
    share = query_BHTD.shape[1] // key_BKSD.shape[1]
    key_BHSD = key_BKSD.repeat_interleave(share, dim=1) if share > 1 else key_BKSD
    value_BHSD = value_BKSD.repeat_interleave(share, dim=1) if share > 1 else value_BKSD
    scores_BHTS = torch.matmul(query_BHTD, key_BHSD.transpose(2, 3)) * scale
    if softcap is not None:
        scores_BHTS = torch.tanh(scores_BHTS / softcap) * softcap
    if mask is not None:
        scores_BHTS = scores_BHTS + _additive(mask, scores_BHTS.dtype)
    # The lowest float64 would be -inf in float32, and a row that sees nothing not a number.
    precise = torch.promote_types(scores_BHTS.dtype, torch.float32)
    weights_BHTS = scores_BHTS.softmax(dim=-1, dtype=precise).to(query_BHTD.dtype)
    weights_BHTS = functional.dropout(weights_BHTS, p=rate, training=rate > 0)
    out_BHTD = torch.matmul(weights_BHTS, value_BHSD)
    return out_BHTD.transpose(1, 2).contiguous(), weights_BHTS


def _sdpa(
    query_BHTD: torch.Tensor,
    key_BKSD: torch.Tensor,
    value_BKSD: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    rate: float,
    is_causal: bool,
) -> torch.Tensor:
    batch, heads, num_queries, _ = query_BHTD.shape
    groups = key_BKSD.shape[1]
    share = heads // groups
    mask = _hard(mask)
    if share > 1 and num_queries == 1:
        # A decoding step: the heads that share keys become rows, so keys are not copied.
        query_BKGD = query_BHTD.view(batch, groups, share, -1)
        if mask is not None and mask.dim() == 4 and mask.shape[1] == heads:
            mask = mask.view(mask.shape[0], groups, share, -1)
        out_BKGD = functional.scaled_dot_product_attention(
            query_BKGD, key_BKSD, value_BKSD, attn_mask=mask, dropout_p=rate, scale=scale
        )
        return out_BKGD.reshape(batch, heads, 1, -1)
    with_gqa = share > 1 and mask is None
    if share > 1 and not with_gqa:
        # Kernels that take a mask and grouped heads together are rare; torch would fall back.
        key_BKSD = key_BKSD.repeat_interleave(share, dim=1)
        value_BKSD = value_BKSD.repeat_interleave(share, dim=1)
    return functional.scaled_dot_product_attention(
        query_BHTD,
        key_BKSD,
        value_BKSD,
        attn_mask=mask,
        dropout_p=rate,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=with_gqa,
    )


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask
    zeros = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zeros, torch.finfo(dtype).min)


def _hard(mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask with -inf for the dtype's minimum: torch then knows which rows see nothing."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask.masked_fill(mask <= torch.finfo(mask.dtype).min, float("-inf"))


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False
