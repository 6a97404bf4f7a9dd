"""OLMo 2: norms after attention and MLP, and over all heads of queries and keys at once."""

from __future__ import annotations

from typing import Any, ClassVar

from ckptd.models.config.config import PreTrainedConfig
from ckptd.models.native.decoder import DecoderForCausalLM, DecoderModel, DecoderPreTrainedModel
from ckptd.models.native.decoder_heads import (
    DecoderForSequenceClassification,
)
from ckptd.models.native.decoder_layers import DecoderLayer, Traits, head_size


class Olmo2Config(PreTrainedConfig):
    """Sizes and switches; the defaults are those of OLMo 2 7B."""

    model_type = "olmo2"

    vocab_size: int = 50304
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 50279
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    rms_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__()


class Olmo2DecoderLayer(DecoderLayer):
    """One layer, under the name that device maps know."""


class Olmo2PreTrainedModel(DecoderPreTrainedModel):
    """What Olmo2 models share."""

    config_class = Olmo2Config
    _no_split_modules: ClassVar[list[str] | None] = ["Olmo2DecoderLayer"]
    _layer_class = Olmo2DecoderLayer

    @classmethod
    def traits(cls, config: Any) -> Traits:
        """What this architecture does in its own way."""
        return Traits(
            activation=config.hidden_act,
            scale=head_size(config) ** -0.5,
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            qk_norm="whole",
            rotates_in_float32=True,
            norm="float32",
            norm_places="after",
        )


class Olmo2Model(Olmo2PreTrainedModel, DecoderModel):
    """Tokens to hidden states."""


class Olmo2ForCausalLM(Olmo2PreTrainedModel, DecoderForCausalLM):
    """Tokens to logits of the next one."""

    _body_class = Olmo2Model


class Olmo2ForSequenceClassification(DecoderForSequenceClassification, Olmo2PreTrainedModel):
    """Classes of sequences."""

    _body_class = Olmo2Model
