"""The layers of GPT-NeoX (the models made of them: gpt_neox).

Shapes: B batch, T new positions, S all positions so far, H heads, D hidden size, K head size,
X the fused query, key and value of one head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ckptd.models.checkpointing import GradientCheckpointingLayer
from ckptd.models.layers import activations, attention, rope
from ckptd.models.native import keys


class GPTNeoXAttention(nn.Module):
    """Attention over earlier positions."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = width // config.num_attention_heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=config.attention_bias)
        self.dense = nn.Linear(width, width, bias=config.attention_bias)

    def forward(
        self,
        hidden_BTD: torch.Tensor,
        mask: torch.Tensor | None,
        turn: tuple[torch.Tensor, torch.Tensor],
        cache: keys.AnyCache | None,
        *,
        want_weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the attended vectors (B, T, D) and, where wanted, the weights (B, H, T, S)."""
        fused_BHTX = keys.split_heads(self.query_key_value(hidden_BTD), 3 * self.head_dim)
        query_BHTK, key_BHTK, value_BHTK = fused_BHTX.chunk(3, dim=-1)
        query_BHTK, key_BHTK = rope.apply_rotary(query_BHTK, key_BHTK, *turn)
        key_BHSK, value_BHSK = keys.own(cache, self.layer_idx, key_BHTK, value_BHTK)
        out_BTHK, weights_BHTS = attention.attend(
            self.config._attn_implementation,
            query_BHTK,
            key_BHSK,
            value_BHSK,
            mask,
            scale=self.head_dim**-0.5,
            dropout=self.config.attention_dropout,
            training=self.training,
            is_causal=True,
            want_weights=want_weights,
        )
        return self.dense(out_BTHK.flatten(2)), weights_BHTS


class GPTNeoXMLP(nn.Module):
    """Two projections with an activation between."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = activations.make(config.hidden_act)

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Map (B, T, D) to the same."""
        out_BTD: torch.Tensor = self.dense_4h_to_h(self.act(self.dense_h_to_4h(hidden_BTD)))
        return out_BTD


class GPTNeoXLayer(GradientCheckpointingLayer):
    """One layer; with `use_parallel_residual` both halves read the layer's input."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.use_parallel_residual = config.use_parallel_residual
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_dropout = nn.Dropout(config.hidden_dropout)
        self.post_mlp_dropout = nn.Dropout(config.hidden_dropout)
        self.attention = GPTNeoXAttention(config, layer_idx)
        self.mlp = GPTNeoXMLP(config)

    def forward(
        self,
        hidden_BTD: torch.Tensor,
        mask: torch.Tensor | None,
        turn: tuple[torch.Tensor, torch.Tensor],
        *,
        past_key_values: keys.AnyCache | None = None,
        want_weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """Return the layer's output (B, T, D) and the weights where wanted."""
        attended_BTD, weights = self.attention(
            self.input_layernorm(hidden_BTD),
            mask,
            turn,
            past_key_values,
            want_weights=want_weights,
        )
        attended_BTD = self.post_attention_dropout(attended_BTD)
        if not self.use_parallel_residual:
            hidden_BTD = attended_BTD + hidden_BTD
            out_BTD = self.mlp(self.post_attention_layernorm(hidden_BTD))
            return self.post_mlp_dropout(out_BTD) + hidden_BTD, weights, None
        out_BTD = self.post_mlp_dropout(self.mlp(self.post_attention_layernorm(hidden_BTD)))
        return out_BTD + attended_BTD + hidden_BTD, weights, None
