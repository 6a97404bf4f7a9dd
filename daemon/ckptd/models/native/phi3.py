"""Phi-3 and Phi-4: fused projections, a window, and long contexts by longrope."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ckptd.models.config.config import PreTrainedConfig
from ckptd.models.config.rope_config import RopeKeys
from ckptd.models.native.decoder import DecoderForCausalLM, DecoderModel, DecoderPreTrainedModel
from ckptd.models.native.decoder_heads import (
    DecoderForSequenceClassification,
    DecoderForTokenClassification,
)
from ckptd.models.native.decoder_layers import DecoderLayer, Traits, head_size


class Phi3Config(PreTrainedConfig):
    """Sizes and switches; the defaults are those of Phi-3 mini 4k."""

    model_type = "phi3"
    rope_keys = RopeKeys(default_partial=1.0, type_aliases={"su": "longrope", "yarn": "longrope"})

    vocab_size: int = 32064
    hidden_size: int = 3072
    intermediate_size: int = 8192
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    attention_dropout: float = 0.0
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    original_max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 32000
    pad_token_id: int | None = 32000
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__()


class Phi3DecoderLayer(DecoderLayer):
    """One layer, under the name that device maps know."""


class Phi3PreTrainedModel(DecoderPreTrainedModel):
    """What Phi3 models share."""

    config_class = Phi3Config
    _no_split_modules: ClassVar[list[str] | None] = ["Phi3DecoderLayer"]
    _layer_class = Phi3DecoderLayer

    @classmethod
    def traits(cls, config: Any) -> Traits:
        """What this architecture does in its own way."""
        return Traits(
            activation=config.hidden_act,
            scale=head_size(config) ** -0.5,
            windows=(config.sliding_window,) * config.num_hidden_layers,
            is_fused=True,
            residual_dropout=config.resid_pdrop,
        )


class Phi3Model(Phi3PreTrainedModel, DecoderModel):
    """Tokens to hidden states."""


class Phi3ForCausalLM(Phi3PreTrainedModel, DecoderForCausalLM):
    """Tokens to logits of the next one."""

    _body_class = Phi3Model

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As everywhere; but beyond the original context all keys turn by the long factors.

        What is cached turned by the short ones, so the step that crosses the line gives the whole
        sequence anew, without the cache.
        """
        limit = self.config.original_max_position_embeddings
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if self._follows_length and 0 < past <= limit < input_ids.shape[1]:
            past_key_values = next_sequence_length = None
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length,
            past_key_values,
            attention_mask,
            inputs_embeds,
            is_first_iteration,
            **kwargs,
        )

    @property
    def _follows_length(self) -> bool:
        return bool(self.config.rope_parameters["rope_type"] == "longrope")


class Phi3ForSequenceClassification(DecoderForSequenceClassification, Phi3PreTrainedModel):
    """Classes of sequences."""

    _body_class = Phi3Model


class Phi3ForTokenClassification(DecoderForTokenClassification, Phi3PreTrainedModel):
    """Classes of tokens."""

    _body_class = Phi3Model
