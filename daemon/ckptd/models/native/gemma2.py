"""Gemma 2: norms around both blocks, bounded scores and logits, every other layer slides."""

from __future__ import annotations

from typing import Any, ClassVar

from ckptd.models.config.config import PreTrainedConfig
from ckptd.models.layers import cache
from ckptd.models.native.decoder import DecoderForCausalLM, DecoderModel, DecoderPreTrainedModel
from ckptd.models.native.decoder_heads import (
    DecoderForSequenceClassification,
    DecoderForTokenClassification,
)
from ckptd.models.native.decoder_layers import DecoderLayer, Traits, check_heads


class Gemma2Config(PreTrainedConfig):
    """Sizes and switches; the defaults are those of Gemma 2 2B."""

    model_type = "gemma2"

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    bos_token_id: int | None = 2
    tie_word_embeddings: bool = True
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float | None = 0.0
    query_pre_attn_scalar: int = 256
    sliding_window: int | None = 4096
    layer_types: list[str] | None = None
    final_logit_softcapping: float | None = 30.0
    attn_logit_softcapping: float | None = 50.0
    use_bidirectional_attention: bool | None = None

    def __post_init__(self) -> None:
        if self.layer_types is None:
            kinds = ("sliding_attention", "full_attention")
            self.layer_types = [kinds[idx % 2] for idx in range(self.num_hidden_layers)]
        super().__post_init__()

    def validate_architecture(self) -> None:
        """Check that the heads share the hidden size evenly."""
        check_heads(self)


class Gemma2DecoderLayer(DecoderLayer):
    """One layer, under the name that device maps know."""


class Gemma2PreTrainedModel(DecoderPreTrainedModel):
    """What Gemma2 models share."""

    config_class = Gemma2Config
    _no_split_modules: ClassVar[list[str] | None] = ["Gemma2DecoderLayer"]
    _layer_class = Gemma2DecoderLayer
    _supports_sdpa: ClassVar[bool] = False
    _supports_flash_attn: ClassVar[bool] = False

    @classmethod
    def traits(cls, config: Any) -> Traits:
        """What this architecture does in its own way."""
        return Traits(
            activation=config.hidden_activation,
            scale=config.query_pre_attn_scalar**-0.5,
            windows=tuple(cache.sliding_windows(config)),
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            norm="offset",
            norm_places="both",
            embedding_scale=config.hidden_size**0.5,
            logits_softcap=config.final_logit_softcapping,
            softcap=config.attn_logit_softcapping,
        )


class Gemma2Model(Gemma2PreTrainedModel, DecoderModel):
    """Tokens to hidden states."""


class Gemma2ForCausalLM(Gemma2PreTrainedModel, DecoderForCausalLM):
    """Tokens to logits of the next one."""

    _body_class = Gemma2Model


class Gemma2ForSequenceClassification(DecoderForSequenceClassification, Gemma2PreTrainedModel):
    """Classes of sequences."""

    _body_class = Gemma2Model


class Gemma2ForTokenClassification(DecoderForTokenClassification, Gemma2PreTrainedModel):
    """Classes of tokens."""

    _body_class = Gemma2Model
