"""The encoder that BERT and RoBERTa share: attention, norms after each half, a pooler.

bert and roberta give the classes their names, their embeddings and their heads. As a decoder
(`config.is_decoder`) the layers see earlier positions only, and with `config.add_cross_attention`
they also attend to another encoder's output.

Shapes: B batch, T positions, S all positions so far or the encoder's, H heads, D hidden size,
K head size, V vocabulary, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ckptd.models.base import PreTrainedModel
from ckptd.models.checkpointing import GradientCheckpointingLayer
from ckptd.models.config.config import PreTrainedConfig
from ckptd.models.layers import activations, attention
from ckptd.models.layers.outputs import BaseModelOutputWithPoolingAndCrossAttentions
from ckptd.models.native import keys, record


class EncoderConfig(PreTrainedConfig):
    """Sizes and switches; the defaults are those of the base models."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    use_cache: bool = True
    classifier_dropout: float | None = None
    is_decoder: bool = False
    add_cross_attention: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    def validate_architecture(self) -> None:
        """Check that the heads share the hidden size evenly."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"The hidden size ({self.hidden_size}) is not a multiple of the number of "
                f"attention heads ({self.num_attention_heads})"
            )

    @property
    def head_dropout(self) -> float:
        """The dropout before a classifier."""
        given = self.classifier_dropout
        return self.hidden_dropout_prob if given is None else given


class SelfAttention(nn.Module):
    """Projections to query, key and value, and attention."""

    def __init__(self, config: EncoderConfig, layer_idx: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = width // config.num_attention_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

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
            key_BHSK, value_BHSK = keys.own(cache, self.layer_idx, *self._pair(hidden_BTD))
        else:
            source_BSD = encoder_BSD
            key_BHSK, value_BHSK = keys.crossing(
                cache, self.layer_idx, lambda: self._pair(source_BSD)
            )
        out_BTHK, weights_BHTS = attention.attend(
            self.config._attn_implementation,
            keys.split_heads(self.query(hidden_BTD), self.head_dim),
            key_BHSK,
            value_BHSK,
            mask,
            scale=self.head_dim**-0.5,
            dropout=self.config.attention_probs_dropout_prob,
            training=self.training,
            is_causal=self.config.is_decoder and encoder_BSD is None,
            want_weights=want_weights,
        )
        return out_BTHK.flatten(2), weights_BHTS

    def _pair(self, source_BSD: torch.Tensor) -> keys.Pair:
        key_BHSK = keys.split_heads(self.key(source_BSD), self.head_dim)
        return key_BHSK, keys.split_heads(self.value(source_BSD), self.head_dim)


class Output(nn.Module):
    """Projection, dropout, and the norm of the sum with what the half had read."""

    def __init__(self, num_inputs: int, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(num_inputs, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: torch.Tensor, read_BTD: torch.Tensor) -> torch.Tensor:
        """Map (B, T, inputs) to (B, T, D)."""
        out_BTD: torch.Tensor = self.LayerNorm(self.dropout(self.dense(x)) + read_BTD)
        return out_BTD


class Attention(nn.Module):
    """Attention, and the projection of what it gathered."""

    def __init__(self, config: EncoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.self = SelfAttention(config, layer_idx)
        self.output = Output(config.hidden_size, config)

    def forward(
        self, hidden_BTD: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the normed sum (B, T, D) and, where wanted, the weights (B, H, T, S)."""
        out_BTD, weights_BHTS = self.self(hidden_BTD, *args, **kwargs)
        return self.output(out_BTD, hidden_BTD), weights_BHTS


class Intermediate(nn.Module):
    """The widening half of the MLP."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = activations.make(config.hidden_act)

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Map (B, T, D) to (B, T, intermediate size)."""
        out: torch.Tensor = self.intermediate_act_fn(self.dense(hidden_BTD))
        return out


class Layer(GradientCheckpointingLayer):
    """One layer: attention, attention to the encoder where there is one, and the MLP."""

    def __init__(self, config: EncoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer_idx)
        if config.add_cross_attention:
            if not config.is_decoder:
                raise ValueError("add_cross_attention needs config.is_decoder=True")
            self.crossattention = Attention(config, layer_idx)
        self.intermediate = Intermediate(config)
        self.output = Output(config.intermediate_size, config)

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
        hidden_BTD, weights = self.attention(
            hidden_BTD, mask, past_key_values, want_weights=want_weights
        )
        crossing = None
        if encoder_BSD is not None:
            hidden_BTD, crossing = self.crossattention(
                hidden_BTD,
                encoder_mask,
                past_key_values,
                encoder_BSD=encoder_BSD,
                want_weights=want_weights,
            )
        return self.output(self.intermediate(hidden_BTD), hidden_BTD), weights, crossing


class Encoder(nn.Module):
    """The layers, of the class that the architecture names."""

    def __init__(self, config: EncoderConfig, layer_class: type[Layer]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layer_class(config, i) for i in range(config.num_hidden_layers))


class Pooler(nn.Module):
    """The first position, projected."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Map (B, T, D) to (B, D)."""
        out_BD: torch.Tensor = self.activation(self.dense(hidden_BTD[:, 0]))
        return out_BD


class Embeddings(nn.Module):
    """Tokens, token types and positions, summed and normed.

    `position_padding` is the row of the position embedding that stands for padding, where one does.
    Buffers `position_ids` and `token_type_ids` (1, max positions), int64, are not saved.
    """

    def __init__(self, config: EncoderConfig, position_padding: int | None = None) -> None:
        super().__init__()
        self.max_positions = config.max_position_embeddings
        pad = config.pad_token_id
        width = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=pad)
        self.position_embeddings = nn.Embedding(
            self.max_positions, width, padding_idx=position_padding
        )
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.reset_buffers()

    def reset_buffers(self, device: torch.device | str | None = None) -> None:
        """Compute the buffers afresh, on `device` (for modules made on the meta device)."""
        position_ids = torch.arange(self.max_positions, device=device)[None]
        self.register_buffer("position_ids", position_ids, persistent=False)
        zeros = torch.zeros_like(position_ids)
        self.register_buffer("token_type_ids", zeros, persistent=False)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        past: int,
    ) -> torch.Tensor:
        """Map tokens (B, T) or vectors (B, T, D) to (B, T, D); `past` positions are cached.

        Raises:
            ValueError: both or neither input given; more positions than the model has.
        """
        hidden_BTD = record.embedded(input_ids, inputs_embeds, self.word_embeddings)
        if position_ids is None:
            position_ids = self.positions(input_ids, hidden_BTD, past)
        if token_type_ids is None:
            token_type_ids = torch.zeros(
                hidden_BTD.shape[:2], dtype=torch.long, device=hidden_BTD.device
            )
        hidden_BTD = hidden_BTD + self.token_type_embeddings(token_type_ids)
        hidden_BTD = hidden_BTD + self.position_embeddings(position_ids)
        out_BTD: torch.Tensor = self.dropout(self.LayerNorm(hidden_BTD))
        return out_BTD

    def positions(
        self, input_ids: torch.Tensor | None, hidden_BTD: torch.Tensor, past: int
    ) -> torch.Tensor:
        """Return the positions (B or 1, T) of an input whose positions are not given.

        Raises:
            ValueError: more positions than the model has.
        """
        stop = past + hidden_BTD.shape[1]
        self.check_count(stop)
        return torch.arange(past, stop, device=hidden_BTD.device)[None]

    def check_count(self, num_positions: int) -> None:
        """Check that the model has so many positions.

        Raises:
            ValueError: it has not.
        """
        if num_positions > self.max_positions:
            raise ValueError(
                f"{num_positions} positions, but the model has {self.max_positions} "
                "(config.max_position_embeddings)"
            )


class EncoderPreTrainedModel(PreTrainedModel):
    """What BERT and RoBERTa classes share."""

    supports_gradient_checkpointing = True
    _can_record_outputs = {  # noqa: RUF012 - ClassVar in the base
        "hidden_states": Layer,
        "attentions": SelfAttention,
        "cross_attentions": SelfAttention,
    }
    _supports_sdpa = True
    _supports_flash_attn = True
    _input_embed_layer = "word_embeddings"

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as usual, and what the architecture alone has: buffers, the head's own bias."""
        super()._init_weights(module)
        if isinstance(module, Embeddings):
            module.reset_buffers(module.word_embeddings.weight.device)
        elif isinstance(getattr(module, "decoder", None), nn.Linear):
            bias = getattr(module, "bias", None)
            if isinstance(bias, nn.Parameter):
                nn.init.zeros_(bias)


class EncoderModel(EncoderPreTrainedModel):
    """The body: embeddings, the layers, the pooler where one is wanted.

    The architecture names the classes of its parts.
    """

    embeddings_class: type[Embeddings] = Embeddings
    layer_class: type[Layer] = Layer

    def __init__(self, config: EncoderConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = self.embeddings_class(config)
        self.encoder = Encoder(config, self.layer_class)
        self.pooler = Pooler(config) if add_pooling_layer else None
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: keys.AnyCache | None = None,
        use_cache: bool | None = None,
        **options: Any,
    ) -> Any:
        """Run the body on `input_ids` (B, T) or `inputs_embeds` (B, T, D).

        `attention_mask` (B, S) covers cached positions, too. A cache, and an encoder's output
        (B, S, D), are for decoders only.

        Returns:
            `BaseModelOutputWithPoolingAndCrossAttentions`, or its fields as a tuple.

        Raises:
            ValueError: both or neither input given; an encoder's output for a model without
                cross-attention; more positions than the model has.
        """
        crossing = encoder_hidden_states is not None
        if crossing and not self.config.add_cross_attention:
            raise ValueError("encoder_hidden_states need config.add_cross_attention=True")
        use_cache = use_cache if self.config.is_decoder else False
        cache = keys.begin(past_key_values, use_cache, self, crossing=crossing)
        hidden_BTD = self.embeddings(
            input_ids, token_type_ids, position_ids, inputs_embeds, keys.past_length(cache)
        )
        kept = record.Record(self.config, options, crossing=crossing)
        hidden_BTD = kept.run(
            self.encoder.layer,
            hidden_BTD,
            self._mask(hidden_BTD, cache, attention_mask),
            past_key_values=cache,
            encoder_BSD=encoder_hidden_states,
            encoder_mask=keys.padding_mask(self.config, hidden_BTD, encoder_attention_mask),
        )
        kept.state(hidden_BTD)
        return kept.answer(
            BaseModelOutputWithPoolingAndCrossAttentions(
                last_hidden_state=hidden_BTD,
                pooler_output=None if self.pooler is None else self.pooler(hidden_BTD),
                hidden_states=kept.hidden_states,
                past_key_values=cache,
                attentions=kept.attentions,
                cross_attentions=kept.cross_attentions,
            )
        )

    def _mask(
        self,
        hidden_BTD: torch.Tensor,
        cache: keys.AnyCache | None,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor | None:
        if self.config.is_decoder:
            return keys.causal_mask(self.config, hidden_BTD, cache, attention_mask)
        return keys.padding_mask(self.config, hidden_BTD, attention_mask)
