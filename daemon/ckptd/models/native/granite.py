"""Granite 3: Llama with multipliers on embeddings, attention scores, residuals and logits."""

from __future__ import annotations

from typing import Any, ClassVar

from ckptd.models.config.config import PreTrainedConfig
from ckptd.models.native.decoder import DecoderForCausalLM, DecoderModel, DecoderPreTrainedModel
from ckptd.models.native.decoder_layers import DecoderLayer, Traits


class GraniteConfig(PreTrainedConfig):
    """Sizes and switches; the defaults are those of transformers, with multipliers of one."""

    model_type = "granite"

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    embedding_multiplier: float = 1.0
    logits_scaling: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float = 1.0

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__()


class GraniteDecoderLayer(DecoderLayer):
    """One layer, under the name that device maps know."""


class GranitePreTrainedModel(DecoderPreTrainedModel):
    """What Granite models share."""

    config_class = GraniteConfig
    _no_split_modules: ClassVar[list[str] | None] = ["GraniteDecoderLayer"]
    _layer_class = GraniteDecoderLayer

    @classmethod
    def traits(cls, config: Any) -> Traits:
        """What this architecture does in its own way."""
        return Traits(
            activation=config.hidden_act,
            scale=config.attention_multiplier,
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            mlp_bias=config.mlp_bias,
            residual_multiplier=config.residual_multiplier,
            embedding_multiplier=config.embedding_multiplier,
            logits_divisor=config.logits_scaling,
        )


class GraniteModel(GranitePreTrainedModel, DecoderModel):
    """Tokens to hidden states."""


class GraniteForCausalLM(GranitePreTrainedModel, DecoderForCausalLM):
    """Tokens to logits of the next one."""

    _body_class = GraniteModel
