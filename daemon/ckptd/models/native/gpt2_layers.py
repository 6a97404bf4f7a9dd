"""The layers of GPT-2 (the models made of them: gpt2).

Shapes: B batch, T new positions, S all positions so far or the encoder's, H heads, D hidden size,
K head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ckptd.models.checkpointing import GradientCheckpointingLayer
from ckptd.models.layers import activations, attention
from ckptd.models.native import keys


class Conv1D(nn.Module):
    """A linear map whose weight (inputs, outputs) is stored transposed.

    `init_scale` multiplies the standard deviation at initialisation.
    """

    def __init__(self, num_outputs: int, num_inputs: int, init_scale: float = 1.0) -> None:
        super().__init__()
        self.nf = num_outputs
        self.nx = num_inputs
        self.init_scale = init_scale
        self.weight = nn.Parameter(torch.empty(num_inputs, num_outputs))
        self.bias = nn.Parameter(torch.zeros(num_outputs))
        nn.init.normal_(self.weight, std=0.02 * init_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., inputs) to (..., outputs)."""
        flat = torch.addmm(self.bias, x.reshape(-1, self.nx), self.weight)
        return flat.view(*x.shape[:-1], self.nf)

    def extra_repr(self) -> str:
        """The two sizes."""
        return f"nf={self.nf}, nx={self.nx}"


class GPT2Attention(nn.Module):
    """Attention over earlier positions, or, with `crossing`, over an encoder's output."""

    def __init__(self, config: Any, layer_idx: int, *, crossing: bool = False) -> None:
        super().__init__()
        width = config.n_embd
        if width % config.n_head:
            raise ValueError(f"n_embd {width} is no multiple of n_head {config.n_head}")
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = width // config.n_head
        self.scale = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer_idx + 1
        self.c_attn = Conv1D((2 if crossing else 3) * width, width)
        if crossing:
            self.q_attn = Conv1D(width, width)
        self.c_proj = Conv1D(width, width, init_scale=_residual_scale(config))
        self.attn_dropout = nn.Dropout(config.attn_pdrop)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        hidden_BTD: torch.Tensor,
        mask: torch.Tensor | None,
        cache: keys.AnyCache | None,
        *,
        encoder_BSD: torch.Tensor | None = None,
        want_weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the attended vectors (B, T, D) and, where wanted, the weights (B, H, T, S)."""
        if encoder_BSD is None:
            query_BTD, key_BTD, value_BTD = self.c_attn(hidden_BTD).chunk(3, dim=-1)
            pair = self._heads(key_BTD), self._heads(value_BTD)
            key_BHSK, value_BHSK = keys.own(cache, self.layer_idx, *pair)
        else:
            source_BSD = encoder_BSD
            query_BTD = self.q_attn(hidden_BTD)
            key_BHSK, value_BHSK = keys.crossing(
                cache, self.layer_idx, lambda: self._encoder_pair(source_BSD)
            )
        query_BHTK = self._heads(query_BTD)
        dtype = query_BHTK.dtype
        if self.config.reorder_and_upcast_attn:
            query_BHTK, key_BHSK, value_BHSK = (
                part.float() for part in (query_BHTK, key_BHSK, value_BHSK)
            )
        out_BTHK, weights_BHTS = attention.attend(
            self.config._attn_implementation,
            query_BHTK,
            key_BHSK,
            value_BHSK,
            mask,
            scale=self.scale,
            dropout=self.attn_dropout.p,
            training=self.training,
            is_causal=encoder_BSD is None,
            want_weights=want_weights,
        )
        out_BTD = self.c_proj(out_BTHK.flatten(2).to(dtype))
        return self.resid_dropout(out_BTD), weights_BHTS

    def _heads(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return keys.split_heads(x_BTD, self.head_dim)

    def _encoder_pair(self, encoder_BSD: torch.Tensor) -> keys.Pair:
        key_BSD, value_BSD = self.c_attn(encoder_BSD).chunk(2, dim=-1)
        return self._heads(key_BSD), self._heads(value_BSD)


class GPT2MLP(nn.Module):
    """Two projections with an activation between."""

    def __init__(self, inner_size: int, config: Any) -> None:
        super().__init__()
        self.c_fc = Conv1D(inner_size, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, inner_size, init_scale=_residual_scale(config))
        self.act = activations.make(config.activation_function)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Map (B, T, D) to the same."""
        out_BTD: torch.Tensor = self.dropout(self.c_proj(self.act(self.c_fc(hidden_BTD))))
        return out_BTD


class GPT2Block(GradientCheckpointingLayer):
    """One layer: attention, attention to the encoder where there is one, and the MLP."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        width, eps = config.n_embd, config.layer_norm_epsilon
        self.ln_1 = nn.LayerNorm(width, eps=eps)
        self.attn = GPT2Attention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(width, eps=eps)
        if config.add_cross_attention:
            self.crossattention = GPT2Attention(config, layer_idx, crossing=True)
            self.ln_cross_attn = nn.LayerNorm(width, eps=eps)
        self.mlp = GPT2MLP(config.n_inner or 4 * width, config)

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
        out_BTD, weights = self.attn(
            self.ln_1(hidden_BTD), mask, past_key_values, want_weights=want_weights
        )
        hidden_BTD = hidden_BTD + out_BTD
        crossing = None
        if encoder_BSD is not None:
            out_BTD, crossing = self.crossattention(
                self.ln_cross_attn(hidden_BTD),
                encoder_mask,
                past_key_values,
                encoder_BSD=encoder_BSD,
                want_weights=want_weights,
            )
            hidden_BTD = hidden_BTD + out_BTD
        return hidden_BTD + self.mlp(self.ln_2(hidden_BTD)), weights, crossing


def _residual_scale(config: Any) -> float:
    """Projections into the residual stream start smaller: each layer adds two of them."""
    return float((2 * config.n_layer) ** -0.5)
