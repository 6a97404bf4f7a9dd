"""Mistral: Llama whose layers all look back over one sliding window."""

from __future__ import annotations

from typing import Any, ClassVar

from ckptd.models.config.config import PreTrainedConfig
from ckptd.models.native.decoder import DecoderForCausalLM, DecoderModel, DecoderPreTrainedModel
from ckptd.models.native.decoder_heads import (
    DecoderForQuestionAnswering,
    DecoderForSequenceClassification,
    DecoderForTokenClassification,
)
from ckptd.models.native.decoder_layers import DecoderLayer, Traits, head_size


class MistralConfig(PreTrainedConfig):
    """Sizes and switches; the defaults are those of Mistral 7B v0.1."""

    model_type = "mistral"

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096 * 32
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    sliding_window: int | None = 4096
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__()


class MistralDecoderLayer(DecoderLayer):
    """One layer, under the name that device maps know."""


class MistralPreTrainedModel(DecoderPreTrainedModel):
    """What Mistral models share."""

    config_class = MistralConfig
    _no_split_modules: ClassVar[list[str] | None] = ["MistralDecoderLayer"]
    _layer_class = MistralDecoderLayer

    @classmethod
    def traits(cls, config: Any) -> Traits:
        """What this architecture does in its own way."""
        return Traits(
            activation=config.hidden_act,
            scale=head_size(config) ** -0.5,
            windows=(config.sliding_window,) * config.num_hidden_layers,
        )


class MistralModel(MistralPreTrainedModel, DecoderModel):
    """Tokens to hidden states."""


class MistralForCausalLM(MistralPreTrainedModel, DecoderForCausalLM):
    """Tokens to logits of the next one."""

    _body_class = MistralModel


class MistralForSequenceClassification(DecoderForSequenceClassification, MistralPreTrainedModel):
    """Classes of sequences."""

    _body_class = MistralModel


class MistralForTokenClassification(DecoderForTokenClassification, MistralPreTrainedModel):
    """Classes of tokens."""

    _body_class = MistralModel


class MistralForQuestionAnswering(DecoderForQuestionAnswering, MistralPreTrainedModel):
    """The span that answers a question."""

    _body_class = MistralModel
