"""GPT-NeoX (Pythia): rotary positions on a part of each head, attention and MLP side by side.

Parameter names are those of the Hub's checkpoints: the fused projection `query_key_value` holds
query, key and value of one head after the other, and the head is `embed_out`.

Shapes: B batch, T new positions, S all positions so far, H heads, D hidden size, K head size,
R rotated channels, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ckptd.models import activations, attention, rope
from ckptd.models.base import PreTrainedModel
from ckptd.models.cache import Cache
from ckptd.models.checkpointing import GradientCheckpointingLayer
from ckptd.models.config import PreTrainedConfig
from ckptd.models.generation import GenerationMixin
from ckptd.models.native import heads, keys, record
from ckptd.models.outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from ckptd.models.rope_config import RopeKeys


class GPTNeoXConfig(PreTrainedConfig):
    """Sizes and switches of a GPT-NeoX; the defaults are those of `gpt-neox-20b`."""

    model_type = "gpt_neox"
    rope_keys = RopeKeys(theta="rotary_emb_base", partial="rotary_pct", default_partial=0.25)

    vocab_size: int = 50432
    hidden_size: int = 6144
    num_hidden_layers: int = 44
    num_attention_heads: int = 64
    intermediate_size: int = 24576
    hidden_act: str = "gelu"
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    classifier_dropout: float = 0.1
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    use_parallel_residual: bool = True
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = True
    is_decoder: bool = False

    def validate_architecture(self) -> None:
        """Check that the heads share the hidden size evenly."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )


class GPTNeoXAttention(nn.Module):
    """Attention over earlier positions."""

    def __init__(self, config: GPTNeoXConfig, layer_idx: int) -> None:
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

    def __init__(self, config: GPTNeoXConfig) -> None:
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

    def __init__(self, config: GPTNeoXConfig, layer_idx: int) -> None:
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


class GPTNeoXPreTrainedModel(PreTrainedModel):
    """What all GPT-NeoX classes share."""

    config_class = GPTNeoXConfig
    base_model_prefix = "gpt_neox"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["GPTNeoXLayer"]  # noqa: RUF012 - ClassVar in the base
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012 - ClassVar in the base
        r"attention.bias",
        r"attention.masked_bias",
    ]
    _input_embed_layer = "embed_in"


class GPTNeoXModel(GPTNeoXPreTrainedModel):
    """The body: token embedding, the layers, the last norm."""

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__(config)
        self.embed_in = nn.Embedding(config.vocab_size, config.hidden_size)
        self.emb_dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(
            GPTNeoXLayer(config, idx) for idx in range(config.num_hidden_layers)
        )
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.rotary_emb = rope.RotaryEmbedding(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **options: Any,
    ) -> Any:
        """Run the body on `input_ids` (B, T) or `inputs_embeds` (B, T, D).

        `attention_mask` (B, S) covers the cached positions, too. Positions count on from the
        cache, padding included, unless given.

        Returns:
            `BaseModelOutputWithPast`, or its fields as a tuple.

        Raises:
            ValueError: both or neither input given.
        """
        hidden_BTD = record.embedded(input_ids, inputs_embeds, self.embed_in)
        cache = keys.begin_own(past_key_values, use_cache, self)
        mask = keys.causal_mask(self.config, hidden_BTD, cache, attention_mask, position_ids)
        if position_ids is None:
            past = keys.past_length(cache)
            stop = past + hidden_BTD.shape[1]
            position_ids = torch.arange(past, stop, device=hidden_BTD.device)[None]
        turn = self.rotary_emb(hidden_BTD, position_ids)
        kept = record.Record(self.config, options)
        hidden_BTD = self.emb_dropout(hidden_BTD)
        hidden_BTD = kept.run(self.layers, hidden_BTD, mask, turn, past_key_values=cache)
        hidden_BTD = self.final_layer_norm(hidden_BTD)
        kept.state(hidden_BTD)
        return kept.answer(
            BaseModelOutputWithPast(
                last_hidden_state=hidden_BTD,
                past_key_values=cache,
                hidden_states=kept.hidden_states,
                attentions=kept.attentions,
            )
        )


class GPTNeoXForCausalLM(GPTNeoXPreTrainedModel, GenerationMixin):
    """The body with logits over the vocabulary."""

    _tied_weights_keys = {"embed_out.weight": "gpt_neox.embed_in.weight"}  # noqa: RUF012

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__(config)
        self.gpt_neox = GPTNeoXModel(config)
        self.embed_out: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the head."""
        return self.embed_out

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Put `new_embeddings` where the head is."""
        self.embed_out = new_embeddings

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """Run the body as `GPTNeoXModel` does and give logits of the last `logits_to_keep` positions.

        0 keeps all of them; a tensor names positions. `labels` (B, T) give the loss of the next
        token; `num_items_in_batch` divides its sum.

        Returns:
            `CausalLMOutputWithPast`, or its fields as a tuple.
        """
        body = self.gpt_neox(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=True,
            **options,
        )
        logits_BTV = self.embed_out(heads.last_positions(body.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = heads.next_token_loss(logits_BTV, labels, options.get("num_items_in_batch"))
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            past_key_values=body.past_key_values,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )
        return record.answer(self.config, return_dict, output)
