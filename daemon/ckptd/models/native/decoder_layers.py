"""The building blocks of the decoder family: norm, attention, MLP, layer; and what differs in them.

`Traits` describes an architecture in values; the blocks read nothing else of it, so that a new
architecture of the family is a new description, not new code. Module and parameter names are those
of the Hub's checkpoints.

Shapes: B batch, T new positions, D hidden size, H query heads, K key-value heads, C head size,
R rotated channels, S keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ckptd.models.checkpointing import GradientCheckpointingLayer
from ckptd.models.layers import activations, attention, rope
from ckptd.models.layers.cache import Cache
from ckptd.models.native.experts import Mixture, SparseBlock

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine, each (B, T, R)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What an architecture does in its own way; the defaults are Llama's."""

    activation: str
    scale: float
    """Factor of the attention scores."""
    windows: tuple[int | None, ...] = ()
    """Keys each layer's queries see, their own included; None for all, empty where all see all."""
    without_positions: frozenset[int] = frozenset()
    """Layers that do not turn queries and keys by position."""
    rotates_in_float32: bool = False
    """Turned in float32 and rounded once (OLMo); else cosine and sine are rounded first."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    is_fused: bool = False
    """One projection for query, key and value, one for gate and up (Phi-3)."""
    qk_norm: Literal["none", "head", "whole"] = "none"
    """Norm of queries and keys: over each head, or over all heads at once before the split."""
    norm: Literal["cast", "float32", "offset"] = "cast"
    """Norm weights meet the rounded values, the float32 ones, or the latter as 1 + weight."""
    norm_places: Literal["before", "after", "both"] = "before"
    """Where a layer's norms stand around attention and MLP."""
    softcap: float | None = None
    """Bound of the attention scores."""
    is_causal: bool = True
    residual_multiplier: float = 1.0
    residual_dropout: float = 0.0
    embedding_multiplier: float = 1.0
    """Factor of what enters the first layer, given embeddings included (Granite)."""
    embedding_scale: float | None = None
    """Factor that the embedding module itself applies (Gemma)."""
    logits_divisor: float = 1.0
    logits_softcap: float | None = None
    mixture: Mixture | None = None
    sparse_layers: frozenset[int] = frozenset()
    """Layers whose MLP is a mixture of experts."""

    def window(self, layer_idx: int) -> int | None:
        """Keys that this layer's queries see, their own included; None for all."""
        return self.windows[layer_idx] if self.windows else None


def head_size(config: Any) -> int:
    """Channels of one head: as the configuration says, or an even share of the hidden size."""
    given: int | None = getattr(config, "head_dim", None)
    return given or int(config.hidden_size // config.num_attention_heads)


def check_heads(config: Any) -> None:
    """Check that the heads share the hidden size evenly.

    Raises:
        ValueError: they do not.
    """
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"The hidden size ({config.hidden_size}) is not a multiple of the number of attention"
            f" heads ({config.num_attention_heads})."
        )


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights that change nothing."""
        self.weight.fill_(0.0 if self.kind == "offset" else 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., size) to (..., size), in the dtype of `x`."""
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        if self.kind == "cast":
            return self.weight * x32.to(x.dtype)
        if self.kind == "offset":
            return (x32 * (1.0 + self.weight.float())).to(x.dtype)
        return (self.weight * x32).to(x.dtype)

    def extra_repr(self) -> str:
        """Size and epsilon."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class ScaledEmbedding(nn.Embedding):
    """An embedding that multiplies what it looks up; the factor is a buffer that is not saved."""

    def __init__(self, rows: int, size: int, padding_idx: int | None, scale: float) -> None:
        super().__init__(rows, size, padding_idx)
        self.scale = scale
        self.embed_scale: torch.Tensor
        self.reset_buffers()

    def reset_buffers(self, device: torch.device | str | None = None) -> None:
        """Make the factor afresh, on `device` (for modules made on the meta device)."""
        factor = torch.tensor(self.scale, device=device)
        self.register_buffer("embed_scale", factor, persistent=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name
        """Indices (B, T) to (B, T, D)."""
        return super().forward(input) * self.embed_scale.to(self.weight.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: Any, traits: Traits, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.traits = traits
        self.layer_idx = layer_idx
        size, heads, groups = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        self.head_dim = head_size(config)
        self.widths = (heads * self.head_dim, groups * self.head_dim, groups * self.head_dim)
        if traits.is_fused:
            self.o_proj = nn.Linear(self.widths[0], size, bias=traits.output_bias)
            self.qkv_proj = nn.Linear(size, sum(self.widths), bias=traits.qkv_bias)
        else:
            self.q_proj = nn.Linear(size, self.widths[0], bias=traits.qkv_bias)
            self.k_proj = nn.Linear(size, self.widths[1], bias=traits.qkv_bias)
            self.v_proj = nn.Linear(size, self.widths[2], bias=traits.qkv_bias)
            self.o_proj = nn.Linear(self.widths[0], size, bias=traits.output_bias)
        if traits.qk_norm != "none":
            whole = traits.qk_norm == "whole"
            q_size, k_size = self.widths[:2] if whole else (self.head_dim, self.head_dim)
            self.q_norm = RMSNorm(q_size, config.rms_norm_eps, traits.norm)
            self.k_norm = RMSNorm(k_size, config.rms_norm_eps, traits.norm)

    def forward(
        self,
        x_BTD: torch.Tensor,
        rotation: Rotation | None,
        mask: torch.Tensor | None,
        past_key_values: Cache | None,
        want_weights: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, D) attended, and the weights (B, H, T, S) where wanted; the cache is written."""
        query_BHTC, key_BKTC, value_BKTC = self._project(x_BTD)
        if rotation is not None:
            query_BHTC, key_BKTC = rope.apply_rotary(query_BHTC, key_BKTC, *rotation)
        if past_key_values is not None:
            key_BKTC, value_BKTC = past_key_values.update(key_BKTC, value_BKTC, self.layer_idx)
        out_BTHC, weights_BHTS = attention.attend(
            self.config._attn_implementation,
            query_BHTC,
            key_BKTC,
            value_BKTC,
            mask,
            scale=self.traits.scale,
            dropout=self.config.attention_dropout or 0.0,
            softcap=self.traits.softcap,
            training=self.training,
            is_causal=self.traits.is_causal,
            want_weights=want_weights,
        )
        return self.o_proj(out_BTHC.flatten(2)), weights_BHTS

    def _project(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query (B, H, T, C), key and value (B, K, T, C), normed as the traits say."""
        if self.traits.is_fused:
            query, key, value = self.qkv_proj(x_BTD).split(self.widths, dim=-1)
        else:
            query, key, value = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        if self.traits.qk_norm == "whole":
            query, key = self.q_norm(query), self.k_norm(key)
        shape = (*x_BTD.shape[:-1], -1, self.head_dim)
        query, key, value = query.view(shape), key.view(shape), value.view(shape)
        if self.traits.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)), gate and up in one matrix where the traits say so."""

    def __init__(self, config: Any, traits: Traits) -> None:
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, traits.mlp_bias
        self.is_fused = traits.is_fused
        if self.is_fused:
            self.gate_up_proj = nn.Linear(size, 2 * inner, bias=bias)
        else:
            self.gate_proj = nn.Linear(size, inner, bias=bias)
            self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)
        self.act_fn = activations.make(traits.activation)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """(B, T, D) to (B, T, D)."""
        if self.is_fused:
            gate, up = self.gate_up_proj(x_BTD).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x_BTD), self.up_proj(x_BTD)
        out_BTD: torch.Tensor = self.down_proj(self.act_fn(gate) * up)
        return out_BTD


class DecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP (or experts), each with its norms and added to what came in.

    The norms' names say where they stand in a checkpoint, not what they do: with norms before only,
    `post_attention_layernorm` is the one before the MLP; with norms after as well,
    `pre_feedforward_layernorm` is.
    """

    def __init__(self, config: Any, traits: Traits, layer_idx: int) -> None:
        super().__init__()
        self.traits = traits
        self.self_attn = Attention(config, traits, layer_idx)
        self.is_sparse = layer_idx in traits.sparse_layers
        self.mlp_name = "mlp"
        if self.is_sparse:
            assert traits.mixture is not None
            self.mlp_name = traits.mixture.module_name
            block = SparseBlock(config.hidden_size, traits.mixture, traits.activation)
            self.add_module(self.mlp_name, block)
        else:
            self.mlp = MLP(config, traits)
        for name in _NORMS[traits.norm_places]:
            norm = RMSNorm(config.hidden_size, config.rms_norm_eps, traits.norm)
            self.add_module(name, norm)

    def forward(
        self,
        x_BTD: torch.Tensor,
        rotation: Rotation | None = None,
        mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        want_weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """(B, T, D), the attention weights where wanted, the router's logits where there are any."""
        before_attention, after_attention, before_mlp, after_mlp = _ROLES[self.traits.norm_places]
        update_BTD, weights_BHTS = self.self_attn(
            self._normed(before_attention, x_BTD), rotation, mask, past_key_values, want_weights
        )
        x_BTD = self._added(x_BTD, self._normed(after_attention, update_BTD))
        router_logits: torch.Tensor | None = None
        mlp = getattr(self, self.mlp_name)
        update_BTD = mlp(self._normed(before_mlp, x_BTD))
        if self.is_sparse:
            update_BTD, router_logits = update_BTD
        x_BTD = self._added(x_BTD, self._normed(after_mlp, update_BTD))
        return x_BTD, weights_BHTS, router_logits

    def _normed(self, name: str | None, x_BTD: torch.Tensor) -> torch.Tensor:
        normed_BTD: torch.Tensor = x_BTD if name is None else getattr(self, name)(x_BTD)
        return normed_BTD

    def _added(self, x_BTD: torch.Tensor, update_BTD: torch.Tensor) -> torch.Tensor:
        if self.traits.residual_dropout and self.training:
            update_BTD = nn.functional.dropout(update_BTD, self.traits.residual_dropout)
        if self.traits.residual_multiplier != 1.0:
            update_BTD = update_BTD * self.traits.residual_multiplier
        return x_BTD + update_BTD


_ROLES: dict[str, tuple[str | None, str | None, str | None, str | None]] = {
    "before": ("input_layernorm", None, "post_attention_layernorm", None),
    "after": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "both": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
"""Norms before and after attention, before and after the MLP, by `Traits.norm_places`."""

_NORMS = {places: [name for name in names if name] for places, names in _ROLES.items()}
"""The norms a layer has, in the order in which checkpoints list them."""
