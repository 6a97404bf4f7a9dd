"""The layers of T5 (the models made of them: t5): relative positions, norms without mean or bias.

Each projection knows the standard deviation it starts with (`init_std`), which T5 derives from the
sizes instead of scaling the attention scores.

Shapes: B batch, T new positions, S all positions so far or the encoder's, H heads, D hidden size,
K head size, F inner size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ckptd.models.checkpointing import GradientCheckpointingLayer
from ckptd.models.layers import activations, attention
from ckptd.models.native import keys


class T5Projection(nn.Linear):
    """A linear map without bias that knows how it starts."""

    def __init__(self, num_inputs: int, num_outputs: int, init_std: float) -> None:
        super().__init__(num_inputs, num_outputs, bias=False)
        self.init_std = init_std


class T5LayerNorm(nn.Module):
    """Scaling to a root mean square of 1, in float32, and a learned weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Map (.., D) to the same."""
        mean_square = hidden_BTD.float().pow(2).mean(-1, keepdim=True)
        hidden_BTD = hidden_BTD * torch.rsqrt(mean_square + self.eps)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            hidden_BTD = hidden_BTD.to(self.weight.dtype)
        return self.weight * hidden_BTD


class RelativeAttentionBias(nn.Embedding):
    """A learned bias a head for each distance, distances growing coarser as they grow.

    Half of the buckets (of each direction, where both are seen) hold one distance each; the others
    grow logarithmically up to `max_distance`, beyond which all share the last.
    """

    def __init__(self, config: Any, *, bidirectional: bool) -> None:
        super().__init__(config.relative_attention_num_buckets, config.num_heads)
        self.max_distance = config.relative_attention_max_distance
        self.bidirectional = bidirectional
        self.init_std = config.initializer_factor * config.d_model**-0.5

    def bias(self, num_queries: int, num_keys: int) -> torch.Tensor:
        """Return the bias (1, H, T, S); the queries are the last positions."""
        device = self.weight.device
        key_S = torch.arange(num_keys, device=device)
        query_T1 = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
        bias_TSH: torch.Tensor = self(self._buckets(key_S - query_T1))
        return bias_TSH.permute(2, 0, 1)[None]

    def _buckets(self, offset_TS: torch.Tensor) -> torch.Tensor:
        count = self.num_embeddings
        start_TS = torch.zeros_like(offset_TS)
        if self.bidirectional:
            count //= 2
            start_TS = (offset_TS > 0) * count
            distance_TS = offset_TS.abs()
        else:
            distance_TS = (-offset_TS).clamp(min=0)
        exact = count // 2
        growth = torch.log(distance_TS.clamp(min=1).float() / exact)
        growth = growth / math.log(self.max_distance / exact) * (count - exact)
        coarse_TS = (exact + growth.long()).clamp(max=count - 1)
        return start_TS + torch.where(distance_TS < exact, distance_TS, coarse_TS)


class T5Attention(nn.Module):
    """Attention whose scores are not scaled; the first layer of a stack holds the distances' bias."""

    def __init__(self, config: Any, layer_idx: int, bias: RelativeAttentionBias | None) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        width, head_dim = config.d_model, config.d_kv
        inner = config.num_heads * head_dim
        factor = config.initializer_factor
        self.q = T5Projection(width, inner, factor * (width * head_dim) ** -0.5)
        self.k = T5Projection(width, inner, factor * width**-0.5)
        self.v = T5Projection(width, inner, factor * width**-0.5)
        self.o = T5Projection(inner, width, factor * inner**-0.5)
        if bias is not None:
            self.relative_attention_bias = bias

    def forward(
        self,
        hidden_BTD: torch.Tensor,
        mask: torch.Tensor | None,
        cache: keys.AnyCache | None,
        *,
        encoder_BSD: torch.Tensor | None = None,
        want_weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the attended vectors (B, T, D) and, where wanted, the weights (B, H, T, S).

        `mask` is additive and holds the distances' bias, too.
        """
        if encoder_BSD is None:
            key_BHSK, value_BHSK = keys.own(cache, self.layer_idx, *self._pair(hidden_BTD))
        else:
            source_BSD = encoder_BSD
            key_BHSK, value_BHSK = keys.crossing(
                cache, self.layer_idx, lambda: self._pair(source_BSD)
            )
        out_BTHK, weights_BHTS = attention.attend(
            self.config._attn_implementation,
            keys.split_heads(self.q(hidden_BTD), self.config.d_kv),
            key_BHSK,
            value_BHSK,
            mask,
            scale=1.0,
            dropout=self.config.dropout_rate,
            training=self.training,
            want_weights=want_weights,
        )
        return self.o(out_BTHK.flatten(2)), weights_BHTS

    def _pair(self, source_BSD: torch.Tensor) -> keys.Pair:
        key_BHSK = keys.split_heads(self.k(source_BSD), self.config.d_kv)
        return key_BHSK, keys.split_heads(self.v(source_BSD), self.config.d_kv)


class T5LayerSelfAttention(nn.Module):
    """Norm, attention over the stack's own positions, and the sum with what was read."""

    def __init__(self, config: Any, layer_idx: int, bias: RelativeAttentionBias | None) -> None:
        super().__init__()
        self.SelfAttention = T5Attention(config, layer_idx, bias)
        self.layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(
        self, hidden_BTD: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the sum (B, T, D) and, where wanted, the weights (B, H, T, S)."""
        out_BTD, weights_BHTS = self.SelfAttention(self.layer_norm(hidden_BTD), *args, **kwargs)
        return hidden_BTD + self.dropout(out_BTD), weights_BHTS


class T5LayerCrossAttention(nn.Module):
    """Norm, attention over the encoder's output, and the sum with what was read."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.EncDecAttention = T5Attention(config, layer_idx, None)
        self.layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(
        self, hidden_BTD: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the sum (B, T, D) and, where wanted, the weights (B, H, T, S)."""
        out_BTD, weights_BHTS = self.EncDecAttention(self.layer_norm(hidden_BTD), *args, **kwargs)
        return hidden_BTD + self.dropout(out_BTD), weights_BHTS


class T5DenseActDense(nn.Module):
    """Two projections with an activation between."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, inner, factor = config.d_model, config.d_ff, config.initializer_factor
        self.wi = T5Projection(width, inner, factor * width**-0.5)
        self.wo = T5Projection(inner, width, factor * inner**-0.5)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.act = activations.make(config.dense_act_fn)

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Map (B, T, D) to the same."""
        return _last(self.wo, self.dropout(self.act(self.wi(hidden_BTD))))


class T5DenseGatedActDense(nn.Module):
    """Two projections, the first of which is multiplied with a gate."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, inner, factor = config.d_model, config.d_ff, config.initializer_factor
        self.wi_0 = T5Projection(width, inner, factor * width**-0.5)
        self.wi_1 = T5Projection(width, inner, factor * width**-0.5)
        self.wo = T5Projection(inner, width, factor * inner**-0.5)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.act = activations.make(config.dense_act_fn)

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Map (B, T, D) to the same."""
        gated_BTF = self.act(self.wi_0(hidden_BTD)) * self.wi_1(hidden_BTD)
        return _last(self.wo, self.dropout(gated_BTF))


class T5LayerFF(nn.Module):
    """Norm, the MLP, and the sum with what was read."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        mlp = T5DenseGatedActDense if config.is_gated_act else T5DenseActDense
        self.DenseReluDense = mlp(config)
        self.layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Map (B, T, D) to the same."""
        out_BTD: torch.Tensor = self.dropout(self.DenseReluDense(self.layer_norm(hidden_BTD)))
        return hidden_BTD + out_BTD


class T5Block(GradientCheckpointingLayer):
    """One layer: attention, in a decoder attention to the encoder, and the MLP."""

    def __init__(self, config: Any, layer_idx: int, *, is_decoder: bool) -> None:
        super().__init__()
        bias = None
        if layer_idx == 0:
            bias = RelativeAttentionBias(config, bidirectional=not is_decoder)
        parts: list[nn.Module] = [T5LayerSelfAttention(config, layer_idx, bias)]
        if is_decoder:
            parts.append(T5LayerCrossAttention(config, layer_idx))
        self.layer = nn.ModuleList([*parts, T5LayerFF(config)])

    def forward(
        self,
        hidden_BTD: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        past_key_values: keys.AnyCache | None = None,
        encoder_BSD: torch.Tensor | None = None,
        encoder_mask: torch.Tensor | None = None,
        want_weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return the layer's output (B, T, D) and both attentions' weights where wanted."""
        hidden_BTD, weights = self.layer[0](
            hidden_BTD, mask, past_key_values, want_weights=want_weights
        )
        hidden_BTD = _finite(hidden_BTD)
        crossing = None
        if encoder_BSD is not None:
            hidden_BTD, crossing = self.layer[1](
                hidden_BTD,
                encoder_mask,
                past_key_values,
                encoder_BSD=encoder_BSD,
                want_weights=want_weights,
            )
            hidden_BTD = _finite(hidden_BTD)
        return _finite(self.layer[-1](hidden_BTD)), weights, crossing


def _last(wo: nn.Linear, inner_BTF: torch.Tensor) -> torch.Tensor:
    """Project back, in the dtype of the weight: it stays in float32 where the model is float16."""
    if wo.weight.is_floating_point():
        inner_BTF = inner_BTF.to(wo.weight.dtype)
    out_BTD: torch.Tensor = wo(inner_BTF)
    return out_BTD


def _finite(hidden_BTD: torch.Tensor) -> torch.Tensor:
    """Bound what float16 cannot hold, where some value overflowed."""
    if hidden_BTD.dtype != torch.float16:
        return hidden_BTD
    limit = torch.finfo(torch.float16).max
    bound = torch.where(hidden_BTD.isinf().any(), limit - 1000, limit)
    return hidden_BTD.clamp(min=-bound, max=bound)
