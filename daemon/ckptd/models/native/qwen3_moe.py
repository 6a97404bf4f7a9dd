"""Qwen3 MoE: Qwen3 with a mixture of experts in all layers, or in those the configuration says."""

from __future__ import annotations

from typing import Any, ClassVar

from ckptd.models.config.config import PreTrainedConfig
from ckptd.models.native.decoder import DecoderForCausalLM, DecoderModel, DecoderPreTrainedModel
from ckptd.models.native.decoder_heads import (
    DecoderForQuestionAnswering,
    DecoderForSequenceClassification,
    DecoderForTokenClassification,
)
from ckptd.models.native.decoder_layers import Attention, DecoderLayer, Traits, head_size
from ckptd.models.native.experts import Mixture, SparseBlock


class Qwen3MoeConfig(PreTrainedConfig):
    """Sizes and switches; the defaults are those of transformers.

    Every `decoder_sparse_step`-th layer has experts, except those in `mlp_only_layers`.
    """

    model_type = "qwen3_moe"
    attribute_map: ClassVar[dict[str, str]] = {"num_experts": "num_local_experts"}

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    num_key_value_heads: int = 4
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    attention_dropout: float = 0.0
    decoder_sparse_step: int = 1
    moe_intermediate_size: int = 768
    num_experts_per_tok: int = 8
    num_local_experts: int = 128
    norm_topk_prob: bool = False
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    mlp_only_layers: list[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self) -> None:
        if not self.use_sliding_window:
            self.sliding_window = None
        if self.mlp_only_layers is None:
            self.mlp_only_layers = []
        super().__post_init__()


class Qwen3MoeDecoderLayer(DecoderLayer):
    """One layer, under the name that device maps know."""


class Qwen3MoePreTrainedModel(DecoderPreTrainedModel):
    """What Qwen3Moe models share."""

    config_class = Qwen3MoeConfig
    _can_record_outputs: ClassVar[dict[str, Any] | None] = {
        "router_logits": SparseBlock,
        "hidden_states": DecoderLayer,
        "attentions": Attention,
    }
    _no_split_modules: ClassVar[list[str] | None] = ["Qwen3MoeDecoderLayer"]
    _layer_class = Qwen3MoeDecoderLayer

    @classmethod
    def traits(cls, config: Any) -> Traits:
        """What this architecture does in its own way."""
        return Traits(
            activation=config.hidden_act,
            scale=head_size(config) ** -0.5,
            windows=(config.sliding_window,) * config.num_hidden_layers,
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            qk_norm="head",
            sparse_layers=_sparse_layers(config),
            mixture=Mixture(
                num_experts=config.num_local_experts,
                num_chosen=config.num_experts_per_tok,
                intermediate_size=config.moe_intermediate_size,
                normalises=config.norm_topk_prob,
                keeps_float32=False,
                module_name="mlp",
                projections=("gate_proj", "up_proj", "down_proj"),
            ),
        )


class Qwen3MoeModel(Qwen3MoePreTrainedModel, DecoderModel):
    """Tokens to hidden states."""


class Qwen3MoeForCausalLM(Qwen3MoePreTrainedModel, DecoderForCausalLM):
    """Tokens to logits of the next one."""

    _body_class = Qwen3MoeModel


class Qwen3MoeForSequenceClassification(DecoderForSequenceClassification, Qwen3MoePreTrainedModel):
    """Classes of sequences."""

    _body_class = Qwen3MoeModel


class Qwen3MoeForTokenClassification(DecoderForTokenClassification, Qwen3MoePreTrainedModel):
    """Classes of tokens."""

    _body_class = Qwen3MoeModel


class Qwen3MoeForQuestionAnswering(DecoderForQuestionAnswering, Qwen3MoePreTrainedModel):
    """The span that answers a question."""

    base_model_prefix = "transformer"
    _body_class = Qwen3MoeModel


def _sparse_layers(config: Any) -> frozenset[int]:
    if not config.num_local_experts:
        return frozenset()
    step = config.decoder_sparse_step
    every = range(step - 1, config.num_hidden_layers, step)
    return frozenset(every) - frozenset(config.mlp_only_layers)
