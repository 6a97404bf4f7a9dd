"""Llama (1 to 3.3): the family's plain form; everything else is said as a difference from it."""

from __future__ import annotations

from typing import Any, ClassVar

from ckptd.models.config.config import PreTrainedConfig
from ckptd.models.native.decoder import DecoderForCausalLM, DecoderModel, DecoderPreTrainedModel
from ckptd.models.native.decoder_heads import (
    DecoderForQuestionAnswering,
    DecoderForSequenceClassification,
    DecoderForTokenClassification,
)
from ckptd.models.native.decoder_layers import DecoderLayer, Traits, check_heads, head_size


class LlamaConfig(PreTrainedConfig):
    """Sizes and switches; the defaults are those of Llama 2 7B."""

    model_type = "llama"

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
    pretraining_tp: int | None = 1
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float | None = 0.0
    mlp_bias: bool = False
    head_dim: int | None = None

    def __post_init__(self) -> None:
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__()

    def validate_architecture(self) -> None:
        """Check that the heads share the hidden size evenly."""
        check_heads(self)


class LlamaDecoderLayer(DecoderLayer):
    """One layer, under the name that device maps know."""


class LlamaPreTrainedModel(DecoderPreTrainedModel):
    """What Llama models share."""

    config_class = LlamaConfig
    _no_split_modules: ClassVar[list[str] | None] = ["LlamaDecoderLayer"]
    _layer_class = LlamaDecoderLayer

    @classmethod
    def traits(cls, config: Any) -> Traits:
        """What this architecture does in its own way."""
        return Traits(
            activation=config.hidden_act,
            scale=head_size(config) ** -0.5,
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            mlp_bias=config.mlp_bias,
        )


class LlamaModel(LlamaPreTrainedModel, DecoderModel):
    """Tokens to hidden states."""


class LlamaForCausalLM(LlamaPreTrainedModel, DecoderForCausalLM):
    """Tokens to logits of the next one."""

    _body_class = LlamaModel


class LlamaForSequenceClassification(DecoderForSequenceClassification, LlamaPreTrainedModel):
    """Classes of sequences."""

    _body_class = LlamaModel


class LlamaForTokenClassification(DecoderForTokenClassification, LlamaPreTrainedModel):
    """Classes of tokens."""

    _body_class = LlamaModel


class LlamaForQuestionAnswering(DecoderForQuestionAnswering, LlamaPreTrainedModel):
    """The span that answers a question."""

    base_model_prefix = "transformer"
    _body_class = LlamaModel
