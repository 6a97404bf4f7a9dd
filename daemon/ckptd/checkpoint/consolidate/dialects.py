"""Names that trainers give the tensors of architectures they have written themselves: the tables.

A dialect maps names to those that transformers has, with `{}` for the number of the layer. Sources:
the state dict adapters of torchtitan, `convert_weights` of torchtune, prime-rl's converters for
mixtures of experts; Meta's own files have the names of torchtitan's llama3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """The names of one trainer for some model types.

    `sign` is a name by which the dialect is told; `rotary` maps the names of
    projections whose rows are for rotary positions on pairs to the config's key for their heads;
    `experts` are stacked, and their names have a second `{}` for the expert; `single` have a first
    axis of length 1 that is taken off; `unneeded` are buffers that no model loads. Names that are in
    no table are refused, unless `keeps_others`: then they are transformers' own.
    """

    trainer: str
    sign: str
    model_types: frozenset[str]
    names: Mapping[str, str]
    rotary: Mapping[str, str] = field(default_factory=dict)
    experts: Mapping[str, str] = field(default_factory=dict)
    single: Mapping[str, str] = field(default_factory=dict)
    unneeded: frozenset[str] = frozenset()
    keeps_others: bool = False


_ENDS = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.attention.wo.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.feed_forward.w1.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.feed_forward.w2.weight": "model.layers.{}.mlp.down_proj.weight",
    "layers.{}.feed_forward.w3.weight": "model.layers.{}.mlp.up_proj.weight",
}
_QKV = {
    "layers.{}.attention.wq.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.attention.wk.weight": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.attention.wv.weight": "model.layers.{}.self_attn.v_proj.weight",
}
_STACKED = {
    "layers.{}.moe.experts.w1": "model.layers.{}.mlp.experts.{}.gate_proj.weight",
    "layers.{}.moe.experts.w2": "model.layers.{}.mlp.experts.{}.down_proj.weight",
    "layers.{}.moe.experts.w3": "model.layers.{}.mlp.experts.{}.up_proj.weight",
}
_ROUTER = {"layers.{}.moe.router.gate.weight": "model.layers.{}.mlp.gate.weight"}
_BIAS = "model.layers.{}.mlp.gate.e_score_correction_bias"
_COUNTERS = frozenset({"layers.{}.moe.tokens_per_expert", "rope.freqs", "freqs_cis", "rope.cache"})
_HEADS, _KV_HEADS = "num_attention_heads", "num_key_value_heads"

LLAMA = Dialect(
    trainer="torchtitan or Meta",
    sign="layers.{}.attention.wo.weight",
    model_types=frozenset({"llama", "mistral"}),
    names=_ENDS | _QKV,
    rotary={
        "layers.{}.attention.wq.weight": _HEADS,
        "layers.{}.attention.wk.weight": _KV_HEADS,
    },
    unneeded=_COUNTERS,
)
QWEN3 = Dialect(
    trainer="torchtitan",
    sign="layers.{}.attention.wo.weight",
    model_types=frozenset({"qwen3", "qwen3_moe"}),
    names=_ENDS
    | _QKV
    | _ROUTER
    | {
        "layers.{}.attention.q_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
        "layers.{}.attention.k_norm.weight": "model.layers.{}.self_attn.k_norm.weight",
    },
    experts=_STACKED,
    unneeded=_COUNTERS,
)
DEEPSEEK_V3 = Dialect(
    trainer="torchtitan",
    sign="layers.{}.attention.wo.weight",
    model_types=frozenset({"deepseek_v3"}),
    names=_ENDS
    | _ROUTER
    | {
        "layers.{}.moe.expert_bias": _BIAS,
        "layers.{}.attention.wq.weight": "model.layers.{}.self_attn.q_proj.weight",
        "layers.{}.attention.wq_a.weight": "model.layers.{}.self_attn.q_a_proj.weight",
        "layers.{}.attention.q_norm.weight": "model.layers.{}.self_attn.q_a_layernorm.weight",
        "layers.{}.attention.wq_b.weight": "model.layers.{}.self_attn.q_b_proj.weight",
        "layers.{}.attention.wkv_a.weight": "model.layers.{}.self_attn.kv_a_proj_with_mqa.weight",
        "layers.{}.attention.kv_norm.weight": "model.layers.{}.self_attn.kv_a_layernorm.weight",
        "layers.{}.attention.wkv_b.weight": "model.layers.{}.self_attn.kv_b_proj.weight",
        "layers.{}.moe.shared_experts.w1.weight": (
            "model.layers.{}.mlp.shared_experts.gate_proj.weight"
        ),
        "layers.{}.moe.shared_experts.w2.weight": (
            "model.layers.{}.mlp.shared_experts.down_proj.weight"
        ),
        "layers.{}.moe.shared_experts.w3.weight": (
            "model.layers.{}.mlp.shared_experts.up_proj.weight"
        ),
    },
    experts=_STACKED,
    unneeded=_COUNTERS,
)
_TUNE = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "layers.{}.sa_norm.scale": "model.layers.{}.input_layernorm.weight",
    "layers.{}.mlp_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.attn.q_proj.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.attn.k_proj.weight": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.attn.v_proj.weight": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.attn.output_proj.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.mlp.w1.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.mlp.w2.weight": "model.layers.{}.mlp.down_proj.weight",
    "layers.{}.mlp.w3.weight": "model.layers.{}.mlp.up_proj.weight",
}
TUNE_LLAMA = Dialect(
    trainer="torchtune",
    sign="layers.{}.attn.output_proj.weight",
    model_types=frozenset({"llama", "mistral"}),
    names=_TUNE,
    rotary={
        "layers.{}.attn.q_proj.weight": _HEADS,
        "layers.{}.attn.k_proj.weight": _KV_HEADS,
    },
)
TUNE_QWEN2 = Dialect(
    trainer="torchtune",
    sign="layers.{}.attn.output_proj.weight",
    model_types=frozenset({"qwen2"}),
    names=_TUNE
    | {
        "layers.{}.attn.q_proj.bias": "model.layers.{}.self_attn.q_proj.bias",
        "layers.{}.attn.k_proj.bias": "model.layers.{}.self_attn.k_proj.bias",
        "layers.{}.attn.v_proj.bias": "model.layers.{}.self_attn.v_proj.bias",
    },
)
PRIME_MOE = Dialect(
    trainer="prime-rl",
    sign="model.layers.{}.mlp.experts.w1",
    model_types=frozenset({"qwen3_moe", "glm4_moe"}),
    names={
        "model.layers.{}.mlp.router.gate.weight": "model.layers.{}.mlp.gate.weight",
        "model.layers.{}.mlp.expert_bias": _BIAS,
    },
    experts={
        "model.layers.{}.mlp.experts.w1": "model.layers.{}.mlp.experts.{}.gate_proj.weight",
        "model.layers.{}.mlp.experts.w2": "model.layers.{}.mlp.experts.{}.down_proj.weight",
        "model.layers.{}.mlp.experts.w3": "model.layers.{}.mlp.experts.{}.up_proj.weight",
    },
    single={
        "model.layers.{}.mlp.shared_expert.w1": (
            "model.layers.{}.mlp.shared_experts.gate_proj.weight"
        ),
        "model.layers.{}.mlp.shared_expert.w2": (
            "model.layers.{}.mlp.shared_experts.down_proj.weight"
        ),
        "model.layers.{}.mlp.shared_expert.w3": (
            "model.layers.{}.mlp.shared_experts.up_proj.weight"
        ),
    },
    unneeded=frozenset({"model.layers.{}.mlp.tokens_per_expert"}),
    keeps_others=True,
)
DIALECTS = (LLAMA, QWEN3, DEEPSEEK_V3, TUNE_LLAMA, TUNE_QWEN2, PRIME_MOE)
