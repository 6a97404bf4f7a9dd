"""Qwen2 and Qwen2.5: Llama with biases on query, key and value; upper layers may slide."""

from __future__ import annotations

from typing import Any, ClassVar

from ckptd.models.config.config import PreTrainedConfig
from ckptd.models.layers import cache
from ckptd.models.native.decoder import DecoderForCausalLM, DecoderModel, DecoderPreTrainedModel
from ckptd.models.native.decoder_heads import (
    DecoderForQuestionAnswering,
    DecoderForSequenceClassification,
    DecoderForTokenClassification,
)
from ckptd.models.native.decoder_layers import DecoderLayer, Traits, head_size


class Qwen2Config(PreTrainedConfig):
    """Sizes and switches; the defaults are those of transformers.

    The window counts only with `use_sliding_window`, and then for layers from `max_window_layers` on
    unless `layer_types` says which.
    """

    model_type = "qwen2"

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 32
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: list[str] | None = None
    attention_dropout: float = 0.0
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self) -> None:
        if not self.use_sliding_window:
            self.sliding_window = None
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.layer_types is None:
            first = (
                self.num_hidden_layers if self.sliding_window is None else self.max_window_layers
            )
            self.layer_types = [
                "full_attention" if idx < first else "sliding_attention"
                for idx in range(self.num_hidden_layers)
            ]
        super().__post_init__()


class Qwen2DecoderLayer(DecoderLayer):
    """One layer, under the name that device maps know."""


class Qwen2PreTrainedModel(DecoderPreTrainedModel):
    """What Qwen2 models share."""

    config_class = Qwen2Config
    _no_split_modules: ClassVar[list[str] | None] = ["Qwen2DecoderLayer"]
    _layer_class = Qwen2DecoderLayer

    @classmethod
    def traits(cls, config: Any) -> Traits:
        """What this architecture does in its own way."""
        return Traits(
            activation=config.hidden_act,
            scale=head_size(config) ** -0.5,
            windows=tuple(cache.sliding_windows(config)),
            qkv_bias=True,
        )


class Qwen2Model(Qwen2PreTrainedModel, DecoderModel):
    """Tokens to hidden states."""


class Qwen2ForCausalLM(Qwen2PreTrainedModel, DecoderForCausalLM):
    """Tokens to logits of the next one."""

    _body_class = Qwen2Model


class Qwen2ForSequenceClassification(DecoderForSequenceClassification, Qwen2PreTrainedModel):
    """Classes of sequences."""

    _body_class = Qwen2Model


class Qwen2ForTokenClassification(DecoderForTokenClassification, Qwen2PreTrainedModel):
    """Classes of tokens."""

    _body_class = Qwen2Model


class Qwen2ForQuestionAnswering(DecoderForQuestionAnswering, Qwen2PreTrainedModel):
    """The span that answers a question."""

    base_model_prefix = "transformer"
    _body_class = Qwen2Model
