"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from typing import Any, ClassVar

from ckptd.models.config.config import PreTrainedConfig
from ckptd.models.config.rope_config import RopeKeys
from ckptd.models.native.decoder import DecoderForCausalLM, DecoderModel, DecoderPreTrainedModel
from ckptd.models.native.decoder_heads import (
    DecoderForQuestionAnswering,
    DecoderForSequenceClassification,
    DecoderForTokenClassification,
)
from ckptd.models.native.decoder_layers import Attention, DecoderLayer, Traits, head_size
from ckptd.models.native.experts import Mixture, SparseBlock


class MixtralConfig(PreTrainedConfig):
    """Sizes and switches; the defaults are those of Mixtral 8x7B."""

    model_type = "mixtral"
    attribute_map: ClassVar[dict[str, str]] = {"num_experts": "num_local_experts"}
    rope_keys = RopeKeys(default_theta=1_000_000.0)

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
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    attention_dropout: float = 0.0
    num_experts_per_tok: int = 2
    num_local_experts: int = 8
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    router_jitter_noise: float = 0.0
    rope_parameters: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__()


class MixtralDecoderLayer(DecoderLayer):
    """One layer, under the name that device maps know."""


class MixtralPreTrainedModel(DecoderPreTrainedModel):
    """What Mixtral models share."""

    config_class = MixtralConfig
    _can_record_outputs: ClassVar[dict[str, Any] | None] = {
        "router_logits": SparseBlock,
        "hidden_states": DecoderLayer,
        "attentions": Attention,
    }
    _no_split_modules: ClassVar[list[str] | None] = ["MixtralDecoderLayer"]
    _layer_class = MixtralDecoderLayer

    @classmethod
    def traits(cls, config: Any) -> Traits:
        """What this architecture does in its own way."""
        return Traits(
            activation=config.hidden_act,
            scale=head_size(config) ** -0.5,
            windows=(config.sliding_window,) * config.num_hidden_layers,
            sparse_layers=frozenset(range(config.num_hidden_layers)),
            mixture=Mixture(
                num_experts=config.num_local_experts,
                num_chosen=config.num_experts_per_tok,
                intermediate_size=config.intermediate_size,
                normalises=True,
                keeps_float32=True,
                module_name="block_sparse_moe",
                projections=("w1", "w3", "w2"),
                jitter=config.router_jitter_noise,
            ),
        )


class MixtralModel(MixtralPreTrainedModel, DecoderModel):
    """Tokens to hidden states."""


class MixtralForCausalLM(MixtralPreTrainedModel, DecoderForCausalLM):
    """Tokens to logits of the next one."""

    _body_class = MixtralModel


class MixtralForSequenceClassification(DecoderForSequenceClassification, MixtralPreTrainedModel):
    """Classes of sequences."""

    _body_class = MixtralModel


class MixtralForTokenClassification(DecoderForTokenClassification, MixtralPreTrainedModel):
    """Classes of tokens."""

    _body_class = MixtralModel


class MixtralForQuestionAnswering(DecoderForQuestionAnswering, MixtralPreTrainedModel):
    """The span that answers a question."""

    _body_class = MixtralModel
