"""What the tensors of a GGUF model are called elsewhere, and what its converter did to them.

One `Naming` an architecture of llama.cpp. Names on the left are modules of GGUF, without `blk.N.`
and `.weight`; on the right modules as `save_pretrained` of transformers writes them, experts each
under a name of its own. Sources: llama.cpp's `tensor_mapping` and converters, transformers' files.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_BLOCK = re.compile(r"^blk\.(\d+)\.(.+)$")
_ONE_EXPERT = re.compile(r"^(ffn_(?:gate|up|down))\.(\d+)$")
"""Experts of the first Mixtral files, which had a tensor each."""

DROPPED = frozenset(
    {
        "rope_freqs.weight",
        "rope_factors_long.weight",
        "rope_factors_short.weight",
        "attn_rot_embd.weight",
        "attn_rot_embd.freqs",
    }
)
"""Computed from config.json by every other library; the last two stand in blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Naming:
    """How the tensors of one architecture are called and changed.

    `experts` have an axis of experts first; `{}` in their name is the expert's number. `heads`
    are modules whose rows are interleaved within each head, with the metadata key of the number
    of heads. `transposed` are matrices of `Conv1D`, or experts that are multiplied from the left.
    `shifted`: one is added to norms. `named` are tensors of a block, on the left with `.weight` or
    `.bias`, whose whole plain name stands on the right: experts among them stay one tensor. Of a
    pair in `woven` the first has the even columns of the plain tensor and the second the odd ones.
    """

    model_types: tuple[str, ...]
    top: Mapping[str, str]
    block: Mapping[str, str]
    prefix: str = "model.layers."
    experts: Mapping[str, str] = field(default_factory=dict)
    heads: Mapping[str, str] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    shifted: bool = False
    named: Mapping[str, str] = field(default_factory=dict)
    woven: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a tensor belongs: its plain name (`{}` for the expert), and its GGUF module.

    `partner` is the GGUF tensor that has the other half of its columns; of the two, the second one
    is `is_second`.
    """

    name: str
    module: str
    kind: str = "weight"
    of_experts: bool = False
    partner: str | None = None
    is_second: bool = False


def place(naming: Naming, name: str) -> Place | None:
    """Return where the GGUF tensor `name` belongs; None for one that is not known."""
    module, _, kind = name.rpartition(".")
    block = _BLOCK.match(module)
    if kind not in ("weight", "bias"):
        return None
    if block is None:
        plain = naming.top.get(module)
        return None if plain is None else Place(name=f"{plain}.{kind}", module=module, kind=kind)
    number, module = block.groups()
    prefix = f"{naming.prefix}{number}."
    if f"{module}.{kind}" in naming.named:
        return _named(naming, number, module, kind)
    one = _ONE_EXPERT.match(module)
    if one is not None and f"{one[1]}_exps" in naming.experts:
        plain = naming.experts[f"{one[1]}_exps"].format(one[2])
        return Place(name=f"{prefix}{plain}.{kind}", module=module, kind=kind)
    if module in naming.experts and kind == "weight":
        plain = naming.experts[module]
        return Place(name=f"{prefix}{plain}.{kind}", module=module, of_experts=True)
    plain = naming.block.get(module)
    if plain is None:
        return None
    return Place(name=f"{prefix}{plain}.{kind}", module=module, kind=kind)


def _named(naming: Naming, number: str, module: str, kind: str) -> Place:
    """Return where a tensor of block `number` belongs that has a name of its own."""
    own = f"{module}.{kind}"
    firsts = {second: first for first, second in naming.woven.items()}
    partner = naming.woven.get(own, firsts.get(own))
    return Place(
        name=f"{naming.prefix}{number}.{naming.named[own]}",
        module=module,
        kind=kind,
        partner=None if partner is None else f"blk.{number}.{partner}",
        is_second=own in firsts,
    )


def is_dropped(name: str) -> bool:
    """Return whether a tensor only serves llama.cpp."""
    block = _BLOCK.match(name)
    return (block[2] if block else name) in DROPPED


_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_MLP = {
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_DENSE = {**_ATTENTION, **_MLP, "ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA = {
    **_ATTENTION,
    **_MLP,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_EXPERTS = {
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_HEADS = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}

_LLAMA = Naming(model_types=("llama", "mistral"), top=_TOP, block=_DENSE, heads=_HEADS)
MIXTRAL = Naming(
    model_types=("mixtral",),
    top=_TOP,
    block={
        **_ATTENTION,
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate_inp": "block_sparse_moe.gate",
    },
    experts={
        "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
        "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
        "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    },
    heads=_HEADS,
)
"""Of the architecture `llama`, too: told by its experts."""
_QWEN2 = Naming(model_types=("qwen2",), top=_TOP, block=_DENSE)
_QWEN3 = Naming(model_types=("qwen3",), top=_TOP, block={**_DENSE, **_HEAD_NORMS})

NAMINGS: dict[str, Naming] = {
    "llama": _LLAMA,
    "qwen2": _QWEN2,
    "qwen2moe": dataclasses.replace(
        _QWEN2,
        model_types=("qwen2_moe",),
        block={
            **_DENSE,
            "ffn_gate_inp": "mlp.gate",
            "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
            "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
            "ffn_up_shexp": "mlp.shared_expert.up_proj",
            "ffn_down_shexp": "mlp.shared_expert.down_proj",
        },
        experts=_EXPERTS,
    ),
    "qwen3": _QWEN3,
    "qwen3moe": dataclasses.replace(
        _QWEN3,
        model_types=("qwen3_moe",),
        block={**_DENSE, **_HEAD_NORMS, "ffn_gate_inp": "mlp.gate"},
        experts=_EXPERTS,
    ),
    "gemma": Naming(model_types=("gemma",), top=_TOP, block=_DENSE, shifted=True),
    "gemma2": Naming(model_types=("gemma2",), top=_TOP, block=_GEMMA, shifted=True),
    "gemma3": Naming(
        model_types=("gemma3_text",), top=_TOP, block={**_GEMMA, **_HEAD_NORMS}, shifted=True
    ),
    "phi3": Naming(
        model_types=("phi3",),
        top=_TOP,
        block={
            "attn_norm": "input_layernorm",
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
    ),
    "gpt2": Naming(
        model_types=("gpt2",),
        top={
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        prefix="transformer.h.",
        block={
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        transposed=frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
    ),
    "gpt-oss": Naming(
        model_types=("gpt_oss",),
        top=_TOP,
        block={
            **_ATTENTION,
            "post_attention_norm": "post_attention_layernorm",
            "ffn_gate_inp": "mlp.router",
        },
        transposed=frozenset({"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}),
        named={
            "attn_sinks.weight": "self_attn.sinks",
            "ffn_gate_exps.weight": "mlp.experts.gate_up_proj",
            "ffn_gate_exps.bias": "mlp.experts.gate_up_proj_bias",
            "ffn_up_exps.weight": "mlp.experts.gate_up_proj",
            "ffn_up_exps.bias": "mlp.experts.gate_up_proj_bias",
            "ffn_down_exps.weight": "mlp.experts.down_proj",
            "ffn_down_exps.bias": "mlp.experts.down_proj_bias",
        },
        woven={
            "ffn_gate_exps.weight": "ffn_up_exps.weight",
            "ffn_gate_exps.bias": "ffn_up_exps.bias",
        },
    ),
    "smollm3": Naming(model_types=("smollm3",), top=_TOP, block=_DENSE, heads=_HEADS),
    "granite": Naming(model_types=("granite",), top=_TOP, block=_DENSE, heads=_HEADS),
    "command-r": Naming(model_types=("cohere",), top=_TOP, block=_DENSE),
    "stablelm": Naming(model_types=("stablelm",), top=_TOP, block=_DENSE),
    "olmo2": Naming(
        model_types=("olmo2",),
        top=_TOP,
        block={
            **_ATTENTION,
            **_MLP,
            **_HEAD_NORMS,
            "post_attention_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
    ),
    "starcoder2": Naming(
        model_types=("starcoder2",),
        top=_TOP,
        block={
            **_ATTENTION,
            "ffn_norm": "post_attention_layernorm",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
    ),
}
"""By `general.architecture`."""
