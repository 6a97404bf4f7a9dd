"""Which key each query may see, as a mask for `attention.attend`.

Positions are counted over everything a cache has seen: queries stand at `past .. past + T - 1`, the
S keys are the last S positions up to there (a sliding layer's cache keeps no earlier ones). The
caller's `attention_mask` is 1 for tokens and 0 for padding, left or right, and covers all
`past + T` positions.

With `implementation="sdpa"` a mask is boolean (True may be seen), which fused kernels read
without conversion; else additive in `dtype`: 0, or the dtype's minimum (not -inf, so that a row
that sees nothing stays finite). None means: nothing to hide beyond what `is_causal` says.

Shapes: B batch (1 where all rows agree), T queries, S keys.
"""

from __future__ import annotations

import torch


def causal_mask(
    attention_mask: torch.Tensor | None,
    *,
    num_queries: int,
    num_keys: int,
    past: int,
    window: int | None = None,
    dtype: torch.dtype,
    device: torch.device,
    implementation: str = "eager",
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Mask (B, 1, T, S) of a decoder layer, or None where plain causal attention suffices.

    `window` is how many keys a query sees, its own included. A four-dimensional
    `attention_mask`, boolean or additive, is the caller's own and passes through. `position_ids`
    (B, T) separate packed sequences when neither an attention mask nor a past is given: where a
    position does not follow its predecessor, a new sequence starts, which sees nothing before it.

    Raises:
        ValueError: the attention mask covers fewer positions than `past + num_queries`.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return _own(attention_mask[..., -num_keys:], dtype, implementation)
    first_key = past + num_queries - num_keys
    padding_BS = _padding(attention_mask, first_key, num_keys, device)
    is_bare = attention_mask is None and past == 0
    sequence_BT = _packed(position_ids) if is_bare and position_ids is not None else None
    if window is not None and num_keys <= window:
        window = None
    hides_nothing = padding_BS is None and sequence_BT is None and window is None
    if hides_nothing and num_queries in (1, num_keys):
        return None
    query_T1 = torch.arange(past, past + num_queries, device=device)[:, None]
    key_S = torch.arange(first_key, first_key + num_keys, device=device)
    seen = key_S <= query_T1
    if window is not None:
        seen = seen & (key_S > query_T1 - window)
    return _as(_narrowed(seen[None, None], padding_BS, sequence_BT), dtype, implementation)


def bidirectional_mask(
    attention_mask: torch.Tensor | None,
    *,
    num_queries: int,
    dtype: torch.dtype,
    device: torch.device,
    implementation: str = "eager",
    window: int | None = None,
) -> torch.Tensor | None:
    """Mask (B, 1, 1 or T, S) of an encoder layer or of cross-attention, None where all is seen.

    `attention_mask` is (B, S), (B, T, S), or four-dimensional and then the caller's own. `window`
    (queries and keys being the same positions) hides keys that are that far away or farther.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return _own(attention_mask, dtype, implementation)
    seen: torch.Tensor | None = None
    if attention_mask is not None and attention_mask.dim() == 3:
        seen = attention_mask.to(device, torch.bool)[:, None]
    elif attention_mask is not None:
        padding_BS = _padding(attention_mask, 0, attention_mask.shape[-1], device)
        seen = None if padding_BS is None else padding_BS[:, None, None, :]
    if window is not None and num_queries > window:
        position_T = torch.arange(num_queries, device=device)
        near = (position_T[:, None] - position_T).abs()[None, None] < window
        seen = near if seen is None else seen & near
    return None if seen is None else _as(seen, dtype, implementation)


def _padding(
    attention_mask: torch.Tensor | None, first_key: int, num_keys: int, device: torch.device
) -> torch.Tensor | None:
    """True for tokens, (B, S); None when every key is one."""
    if attention_mask is None:
        return None
    if attention_mask.shape[-1] < first_key + num_keys:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[-1]} positions, expected"
            f" {first_key + num_keys}: those in the cache and the new ones"
        )
    padding_BS = attention_mask[:, first_key : first_key + num_keys].to(device, torch.bool)
    # Under torch.compile the answer would have to leave the graph.
    if not torch.compiler.is_compiling() and bool(padding_BS.all()):
        return None
    return padding_BS


def _narrowed(
    seen: torch.Tensor, padding_BS: torch.Tensor | None, sequence_BT: torch.Tensor | None
) -> torch.Tensor:
    """What is seen (B, 1, T, S) when padding and other packed sequences are hidden too."""
    if padding_BS is not None:
        seen = seen & padding_BS[:, None, None, :]
    if sequence_BT is not None:
        seen = seen & (sequence_BT[:, None, :, None] == sequence_BT[:, None, None, :])
    return seen


def _packed(position_ids_BT: torch.Tensor) -> torch.Tensor | None:
    """Number of the packed sequence each position belongs to, (B, T); None when there is one."""
    starts_BT = torch.diff(position_ids_BT, prepend=position_ids_BT[:, :1] - 1, dim=-1) != 1
    if torch.compiler.is_compiling() or not bool(starts_BT.any()):
        return None
    return starts_BT.cumsum(-1)


def _own(mask: torch.Tensor, dtype: torch.dtype, implementation: str) -> torch.Tensor:
    if mask.is_floating_point():
        return mask.to(dtype)
    return _as(mask.to(torch.bool), dtype, implementation)


def _as(seen: torch.Tensor, dtype: torch.dtype, implementation: str) -> torch.Tensor:
    if implementation != "eager":
        return seen
    return torch.where(
        seen, torch.zeros((), dtype=dtype, device=seen.device), torch.finfo(dtype).min
    )
