"""One half of T5, its configuration and what its classes share (the models: t5).

Shapes: B batch, T positions, S encoder positions, H heads, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ckptd.models.base import PreTrainedModel
from ckptd.models.config.config import PreTrainedConfig
from ckptd.models.layers.outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions
from ckptd.models.native import heads, keys, record
from ckptd.models.native.t5_layers import (
    RelativeAttentionBias,
    T5Block,
    T5LayerCrossAttention,
    T5LayerNorm,
    T5LayerSelfAttention,
    T5Projection,
)


class T5Config(PreTrainedConfig):
    """Sizes and switches of a T5; the defaults are those of `t5-small`.

    `tie_word_embeddings=False` (T5 1.1) means that the head has a matrix of its own, and that the
    decoder's output is not scaled before it, which `scale_decoder_outputs` says by itself. The
    original drops the flag once it has been read, and a fresh model with it; here it stays. The
    stacks share their embedding in any case.

    Raises:
        ValueError: `feed_forward_proj` is neither an activation nor `gated-` and one.
    """

    model_type = "t5"
    attribute_map = {  # noqa: RUF012 - ClassVar in the base
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    }

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    is_encoder_decoder: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    classifier_dropout: float = 0.0
    is_decoder: bool = False
    scale_decoder_outputs: bool | None = None
    tie_word_embeddings: bool = True
    dense_act_fn: str | None = None
    is_gated_act: bool | None = None

    def __post_init__(self) -> None:
        """Fill what follows from other fields."""
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_layers
        parts = self.feed_forward_proj.split("-")
        self.dense_act_fn = parts[-1]
        self.is_gated_act = parts[0] == "gated"
        if self.feed_forward_proj == "gated-gelu":
            self.dense_act_fn = "gelu_new"
        if self.scale_decoder_outputs is None:
            self.scale_decoder_outputs = self.tie_word_embeddings
        super().__post_init__()

    def validate_architecture(self) -> None:
        """Check the name of the MLP."""
        parts = self.feed_forward_proj.split("-")
        if len(parts) > 2 or (len(parts) == 2 and parts[0] != "gated"):
            raise ValueError(
                f"feed_forward_proj {self.feed_forward_proj!r} is neither an activation such as "
                "'relu' nor a gated one such as 'gated-gelu'"
            )


class T5PreTrainedModel(PreTrainedModel):
    """What all T5 classes share."""

    config_class = T5Config
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _can_record_outputs = {  # noqa: RUF012 - ClassVar in the base
        "hidden_states": T5Block,
        "attentions": T5LayerSelfAttention,
        "cross_attentions": T5LayerCrossAttention,
    }
    _supports_sdpa = True
    _no_split_modules = ["T5Block"]  # noqa: RUF012 - ClassVar in the base
    _keep_in_fp32_modules = ["wo"]  # noqa: RUF012 - ClassVar in the base

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise by T5's rules: each matrix by its sizes, embeddings and head by 1."""
        factor = self.config.initializer_factor
        if isinstance(module, T5LayerNorm):
            nn.init.constant_(module.weight, factor)
        elif isinstance(module, T5Projection | RelativeAttentionBias):
            nn.init.normal_(module.weight, std=module.init_std)
        elif isinstance(module, nn.Embedding | nn.Linear):
            nn.init.normal_(module.weight, std=factor)
        else:
            super()._init_weights(module)

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Return the ties; only the head's depends on the configuration, the stacks share always."""
        if all_submodels:
            return super().get_expanded_tied_weights_keys(all_submodels=True)
        ties = dict(self._tied_weights_keys or {})
        if not self.config.tie_word_embeddings:
            ties.pop("lm_head.weight", None)
        return ties

    def _shift_right(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return labels (B, T) as the decoder reads them: one place later, -100 as padding.

        Raises:
            ValueError: the configuration has no start token or no pad token.
        """
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or pad is None:
            raise ValueError(
                f"shifting labels needs decoder_start_token_id (found {start}) and pad_token_id "
                f"(found {pad}) in the configuration; T5 starts with its pad token"
            )
        shifted_BT = input_ids.roll(1, dims=-1)
        shifted_BT[..., 0] = start
        return shifted_BT.masked_fill(shifted_BT == heads.IGNORED, pad)

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Return `labels` (B, T) as the decoder reads them."""
        return self._shift_right(labels)


class T5Stack(T5PreTrainedModel):
    """One half: the layers and the last norm, over an embedding that it is given."""

    def __init__(self, config: T5Config, embed_tokens: nn.Embedding, *, is_decoder: bool) -> None:
        super().__init__(config)
        self.is_decoder = is_decoder
        self.embed_tokens: nn.Module = embed_tokens
        count = config.num_decoder_layers if is_decoder else config.num_layers
        assert count is not None
        self.block = nn.ModuleList(
            T5Block(config, idx, is_decoder=is_decoder) for idx in range(count)
        )
        self.final_layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: keys.AnyCache | None = None,
        use_cache: bool | None = None,
        **options: Any,
    ) -> Any:
        """Run the stack on `input_ids` (B, T) or `inputs_embeds` (B, T, D).

        A decoder also reads the encoder's output (B, S, D), and caches where that is wanted.

        Returns:
            `BaseModelOutputWithPastAndCrossAttentions` (of an encoder `BaseModelOutput`), or its
            fields as a tuple.

        Raises:
            ValueError: both or neither input given.
        """
        hidden_BTD = self.dropout(record.embedded(input_ids, inputs_embeds, self.embed_tokens))
        crossing = encoder_hidden_states is not None
        use_cache = use_cache if self.is_decoder else False
        cache = keys.begin(past_key_values, use_cache, self, crossing=crossing)
        kept = record.Record(self.config, options, crossing=crossing)
        hidden_BTD = kept.run(
            self.block,
            hidden_BTD,
            self._mask(hidden_BTD, cache, attention_mask),
            past_key_values=cache,
            encoder_BSD=encoder_hidden_states,
            encoder_mask=keys.padding_mask(self.config, hidden_BTD, encoder_attention_mask),
        )
        hidden_BTD = self.dropout(self.final_layer_norm(hidden_BTD))
        kept.state(hidden_BTD)
        states, weights = kept.hidden_states, kept.attentions
        if not self.is_decoder:
            return kept.answer(BaseModelOutput(hidden_BTD, states, weights))
        return kept.answer(
            BaseModelOutputWithPastAndCrossAttentions(
                hidden_BTD, cache, states, weights, kept.cross_attentions
            )
        )

    def _mask(
        self,
        hidden_BTD: torch.Tensor,
        cache: keys.AnyCache | None,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the distances' bias (1 or B, H, T, S), lowest where nothing may be seen."""
        num_queries = hidden_BTD.shape[1]
        past = keys.past_length(cache)
        distances: Any = self.get_submodule("block.0.layer.0.SelfAttention.relative_attention_bias")
        bias_1HTS: torch.Tensor = distances.bias(num_queries, past + num_queries)
        bias_1HTS = bias_1HTS.to(hidden_BTD.device, hidden_BTD.dtype)
        # Half of the lowest value: the sum with a bias stays finite, so that a row that sees nothing
        # averages its values, whichever implementation computes it.
        lowest = torch.finfo(bias_1HTS.dtype).min / 2
        if not self.is_decoder:
            seen = keys.padding_mask(self.config, hidden_BTD, attention_mask)
        else:
            seen = keys.causal_mask(self.config, hidden_BTD, cache, attention_mask)
            if seen is None and num_queries > 1:
                seen = bias_1HTS.new_ones(num_queries, num_queries, dtype=torch.bool).tril()
        if seen is None:
            return bias_1HTS
        if seen.is_floating_point():
            return (bias_1HTS + seen).clamp(min=lowest)
        return bias_1HTS.masked_fill(~seen, lowest)
