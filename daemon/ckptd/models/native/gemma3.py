"""Gemma 3, text: Gemma 2 with a norm over each head instead of bounded scores, and two bases."""

from __future__ import annotations

from typing import Any, ClassVar

from ckptd.models.config.config import PreTrainedConfig
from ckptd.models.config.rope_config import RopeKeys
from ckptd.models.layers import cache
from ckptd.models.native.decoder import DecoderForCausalLM, DecoderModel, DecoderPreTrainedModel
from ckptd.models.native.decoder_heads import (
    DecoderForSequenceClassification,
)
from ckptd.models.native.decoder_layers import DecoderLayer, Traits, check_heads


class Gemma3TextConfig(PreTrainedConfig):
    """Sizes and switches; the defaults are those of transformers.

    Layers that slide have their own rotary base. With `use_bidirectional_attention` (embedding
    models) a position sees both ways, half a window each: `sliding_window` becomes that half, and
    is saved as it was given.
    """

    model_type = "gemma3_text"
    rope_keys = RopeKeys(
        layers={
            "full_attention": ("rope_theta", 1_000_000.0),
            "sliding_attention": ("rope_local_base_freq", 10_000.0),
        }
    )

    vocab_size: int = 262208
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 131072
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
    final_logit_softcapping: float | None = None
    attn_logit_softcapping: float | None = None
    use_bidirectional_attention: bool | None = False

    def __post_init__(self) -> None:
        if self.use_bidirectional_attention and self.sliding_window is not None:
            self.sliding_window = self.sliding_window // 2 + 1
        # Older files say how many layers make one round, the last of which sees everything.
        pattern = self._extra.get("sliding_window_pattern", 6)
        if self.layer_types is None:
            self.layer_types = [
                "sliding_attention" if (idx + 1) % pattern else "full_attention"
                for idx in range(self.num_hidden_layers)
            ]
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """Every value, the window as it was given."""
        content = super().to_dict()
        if self.use_bidirectional_attention and self.sliding_window is not None:
            content["sliding_window"] = (self.sliding_window - 1) * 2
        return content

    def validate_architecture(self) -> None:
        """Check that the heads share the hidden size evenly."""
        check_heads(self)


class Gemma3DecoderLayer(DecoderLayer):
    """One layer, under the name that device maps know."""


class Gemma3PreTrainedModel(DecoderPreTrainedModel):
    """What Gemma3 models share."""

    config_class = Gemma3TextConfig
    _no_split_modules: ClassVar[list[str] | None] = ["Gemma3DecoderLayer"]
    _layer_class = Gemma3DecoderLayer

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
            qk_norm="head",
            is_causal=not config.use_bidirectional_attention,
        )


class Gemma3TextModel(Gemma3PreTrainedModel, DecoderModel):
    """Tokens to hidden states."""


class Gemma3ForCausalLM(Gemma3PreTrainedModel, DecoderForCausalLM):
    """Tokens to logits of the next one."""

    _body_class = Gemma3TextModel


class Gemma3TextForSequenceClassification(DecoderForSequenceClassification, Gemma3PreTrainedModel):
    """Classes of sequences."""

    _body_class = Gemma3TextModel
