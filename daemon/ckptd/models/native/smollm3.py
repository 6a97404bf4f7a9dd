"""SmolLM3: Llama in which every fourth layer has no positions (NoPE)."""

from __future__ import annotations

from typing import Any, ClassVar

from ckptd.models.config.config import PreTrainedConfig
from ckptd.models.config.rope_config import RopeKeys
from ckptd.models.layers import cache
from ckptd.models.native.decoder import DecoderForCausalLM, DecoderModel, DecoderPreTrainedModel
from ckptd.models.native.decoder_heads import (
    DecoderForQuestionAnswering,
    DecoderForSequenceClassification,
    DecoderForTokenClassification,
)
from ckptd.models.native.decoder_layers import DecoderLayer, Traits, head_size


class SmolLM3Config(PreTrainedConfig):
    """Sizes and switches; the defaults are those of SmolLM3 3B.

    `no_rope_layers` has 1 for a layer with positions and 0 for one without, by default every
    `no_rope_layer_interval`-th; those may slide (`use_sliding_window`).
    """

    model_type = "smollm3"
    rope_keys = RopeKeys(default_theta=2_000_000.0)

    vocab_size: int = 128256
    hidden_size: int = 2048
    intermediate_size: int = 11008
    num_hidden_layers: int = 36
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 4
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 128004
    bos_token_id: int | None = 128000
    eos_token_id: int | list[int] | None = 128001
    rope_parameters: dict[str, Any] | None = None
    use_sliding_window: bool = False
    sliding_window: int | None = None
    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: int = 4
    layer_types: list[str] | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.no_rope_layers is None:
            self.no_rope_layers = [
                int((idx + 1) % self.no_rope_layer_interval != 0)
                for idx in range(self.num_hidden_layers)
            ]
        if self.layer_types is None:
            slides = self.use_sliding_window and self.sliding_window is not None
            self.layer_types = [
                "sliding_attention" if slides and not has_rope else "full_attention"
                for has_rope in self.no_rope_layers
            ]
        super().__post_init__()


class SmolLM3DecoderLayer(DecoderLayer):
    """One layer, under the name that device maps know."""


class SmolLM3PreTrainedModel(DecoderPreTrainedModel):
    """What SmolLM3 models share."""

    config_class = SmolLM3Config
    _no_split_modules: ClassVar[list[str] | None] = ["SmolLM3DecoderLayer"]
    _layer_class = SmolLM3DecoderLayer

    @classmethod
    def traits(cls, config: Any) -> Traits:
        """What this architecture does in its own way."""
        return Traits(
            activation=config.hidden_act,
            scale=head_size(config) ** -0.5,
            windows=tuple(cache.sliding_windows(config)),
            without_positions=frozenset(
                idx for idx, has_rope in enumerate(config.no_rope_layers) if not has_rope
            ),
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            mlp_bias=config.mlp_bias,
        )


class SmolLM3Model(SmolLM3PreTrainedModel, DecoderModel):
    """Tokens to hidden states."""


class SmolLM3ForCausalLM(SmolLM3PreTrainedModel, DecoderForCausalLM):
    """Tokens to logits of the next one."""

    _body_class = SmolLM3Model


class SmolLM3ForSequenceClassification(DecoderForSequenceClassification, SmolLM3PreTrainedModel):
    """Classes of sequences."""

    _body_class = SmolLM3Model


class SmolLM3ForTokenClassification(DecoderForTokenClassification, SmolLM3PreTrainedModel):
    """Classes of tokens."""

    _body_class = SmolLM3Model


class SmolLM3ForQuestionAnswering(DecoderForQuestionAnswering, SmolLM3PreTrainedModel):
    """The span that answers a question."""

    base_model_prefix = "transformer"
    _body_class = SmolLM3Model
