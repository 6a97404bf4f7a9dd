"""config.json from the metadata of a GGUF file, for the architectures whose every key is known.

What transformers reads of a GGUF file is here, and what it leaves at a default that need not be
this model's: scaled rotary embeddings, sliding windows, sizes of experts. Whatever the file does
not say and only one value fits is derived from the shapes of its tensors. An architecture that is
not in `MAKERS` is refused: then the original config.json is needed. Sources: transformers
(modeling_gguf_pytorch_utils, integrations/ggml) and llama.cpp's converters.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptd.checkpoint import gguf_rope
from ckptd.checkpoint.gguf import Value
from ckptd.checkpoint.header import StoredTensor
from ckptd.errors import CheckpointCorrupt, CheckpointUnsupported

Config = dict[str, Any]
HINT = "give the original config.json with --assets (`assets:` in a definition)"
_GEMMA2_27B_LAYERS, _GEMMA3_27B_LAYERS = 46, 62
"""The only sizes whose attention is scaled by hidden_size / heads and not by head_dim."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a GGUF model says of itself: metadata, and tensors by GGUF name."""

    path: Path
    architecture: str
    metadata: Mapping[str, Value]
    tensors: Mapping[str, StoredTensor]

    def number(self, key: str, default: float | None = None) -> Any:
        """Return the number `<architecture>.key`, as short as float32 allows.

        Raises:
            CheckpointCorrupt: it is absent and has no default, or is no number.
        """
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointCorrupt(
                f"the metadata has no number {self.architecture}.{key}",
                path=self.path,
                found=repr(value)[:80],
                hint=HINT,
            )
        return _shortest(value) if isinstance(value, float) else value

    def optional(self, key: str) -> Any:
        """Return the number `<architecture>.key`, or None where it is absent."""
        return self.number(key) if f"{self.architecture}.{key}" in self.metadata else None

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the stored shape of a tensor.

        Raises:
            CheckpointCorrupt: there is none of that name, or it is a scalar.
        """
        tensor = self.tensors.get(name)
        if tensor is None or not tensor.spec.shape:
            raise CheckpointCorrupt("is not in the file", path=self.path, tensor=name, hint=HINT)
        return tensor.spec.shape

    def token(self, key: str) -> int | None:
        """Return the id of a special token, if the metadata has it."""
        value = self.metadata.get(f"tokenizer.ggml.{key}_token_id")
        return value if type(value) is int else None


def make(facts: Facts) -> Config:
    """Return the config that the metadata describes.

    Raises:
        CheckpointUnsupported: an architecture, or a setting, that has no counterpart here.
        CheckpointCorrupt: a key that its architecture must have is absent.
    """
    maker = MAKERS.get(facts.architecture)
    if maker is None:
        raise CheckpointUnsupported(
            f"no config.json, and none can be made for the architecture {facts.architecture!r}",
            path=facts.path,
            expected=", ".join(sorted(MAKERS)),
            found=facts.architecture or "none",
            hint=HINT,
        )
    config = maker(facts)
    return config | {f"{name}_token_id": facts.token(key) for name, key in _TOKENS.items()}


_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}
"""Their name here and there; null where the file has none, for defaults are another model's."""


def _shortest(value: float) -> float:
    """Return the decimal number with the fewest digits that is the same float32."""
    for digits in range(5, 10):
        rounded = float(f"{value:.{digits}g}")
        if struct.pack("<f", rounded) == struct.pack("<f", value):
            return rounded
    return value


def _decoder(facts: Facts, model_type: str, architecture: str) -> Config:
    """Return the keys that all decoders of Llama's kind share."""
    heads = facts.number("attention.head_count")
    config = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": facts.number("embedding_length"),
        "intermediate_size": facts.number("feed_forward_length"),
        "num_hidden_layers": facts.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": facts.number("attention.head_count_kv", heads),
        "max_position_embeddings": facts.number("context_length"),
        "rms_norm_eps": facts.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": facts.number("rope.freq_base", 10000.0),
        "vocab_size": facts.shape("token_embd.weight")[0],
        "tie_word_embeddings": "output.weight" not in facts.tensors,
    }
    return config | gguf_rope.scaling(facts)


def _llama(facts: Facts) -> Config:
    """Return the config of Llama, or of Mistral or Mixtral, which have its architecture here."""
    experts = facts.optional("expert_count") or 0
    name = f"{facts.metadata.get('general.name')} {facts.metadata.get('general.basename')}"
    biased = "blk.0.attn_q.bias" in facts.tensors or "blk.0.ffn_up.bias" in facts.tensors
    if experts:
        config = _decoder(facts, "mixtral", "MixtralForCausalLM")
        config["num_local_experts"] = experts
        config["num_experts_per_tok"] = facts.number("expert_used_count")
    elif "mistral" in name.lower() and not biased:
        config = _decoder(facts, "mistral", "MistralForCausalLM")
    else:
        config = _decoder(facts, "llama", "LlamaForCausalLM")
        config["attention_bias"] = "blk.0.attn_output.bias" in facts.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in facts.tensors
        _refuse_half_biased(facts)
    if config["model_type"] != "llama":
        config["sliding_window"] = facts.optional("attention.sliding_window") or None
    heads = config["num_attention_heads"]
    rotated = facts.number("rope.dimension_count", config["hidden_size"] // max(1, heads))
    config["head_dim"] = facts.number("attention.key_length", rotated)
    return config


def _refuse_half_biased(facts: Facts) -> None:
    names = ("attn_q", "attn_k", "attn_v", "attn_output")
    there = {name for name in names if f"blk.0.{name}.bias" in facts.tensors}
    if there and len(there) < len(names):
        raise CheckpointUnsupported(
            "some projections of its attention have a bias and others not, unlike any Llama",
            path=facts.path,
            tensor="blk.0.attn_q.bias",
            hint=HINT,
        )


def _qwen2(facts: Facts) -> Config:
    return _decoder(facts, "qwen2", "Qwen2ForCausalLM")


def _qwen3(facts: Facts) -> Config:
    config = _decoder(facts, "qwen3", "Qwen3ForCausalLM")
    return config | {"head_dim": facts.number("attention.key_length")}


def _experts(facts: Facts) -> Config:
    """Return the keys of the experts of Qwen's models; their width is that of their tensors."""
    return {
        "num_experts": facts.number("expert_count"),
        "num_experts_per_tok": facts.number("expert_used_count"),
        "moe_intermediate_size": facts.shape("blk.0.ffn_gate_exps.weight")[1],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen2moe(facts: Facts) -> Config:
    config = _decoder(facts, "qwen2_moe", "Qwen2MoeForCausalLM") | _experts(facts)
    return config | {
        "shared_expert_intermediate_size": facts.shape("blk.0.ffn_gate_shexp.weight")[0],
        "norm_topk_prob": False,
    }


def _qwen3moe(facts: Facts) -> Config:
    config = _decoder(facts, "qwen3_moe", "Qwen3MoeForCausalLM") | _experts(facts)
    return config | {"head_dim": facts.number("attention.key_length"), "norm_topk_prob": True}


def _gemma(facts: Facts) -> Config:
    config = _decoder(facts, "gemma", "GemmaForCausalLM")
    return config | {"head_dim": facts.number("attention.key_length")}


def _gemma2(facts: Facts) -> Config:
    config = _decoder(facts, "gemma2", "Gemma2ForCausalLM")
    return config | {
        "head_dim": facts.number("attention.key_length"),
        "query_pre_attn_scalar": _attention_scalar(facts, _GEMMA2_27B_LAYERS),
        "attn_logit_softcapping": facts.number("attn_logit_softcapping"),
        "final_logit_softcapping": facts.number("final_logit_softcapping"),
        "sliding_window": facts.number("attention.sliding_window"),
    }


def _gemma3(facts: Facts) -> Config:
    config = _decoder(facts, "gemma3_text", "Gemma3ForCausalLM")
    return config | {
        "head_dim": facts.number("attention.key_length"),
        "query_pre_attn_scalar": _attention_scalar(facts, _GEMMA3_27B_LAYERS),
        "final_logit_softcapping": facts.optional("final_logit_softcapping"),
        "sliding_window": facts.number("attention.sliding_window"),
        "rope_theta": facts.number("rope.freq_base", 1000000.0),
        "rope_local_base_freq": facts.number("rope.freq_base_swa", 10000.0),
    }


def _attention_scalar(facts: Facts, layers: int) -> int:
    if facts.number("block_count") == layers:
        heads: int = facts.number("attention.head_count")
        return int(facts.number("embedding_length") // max(1, heads))
    return int(facts.number("attention.key_length"))


def _phi3(facts: Facts) -> Config:
    config = _decoder(facts, "phi3", "Phi3ForCausalLM")
    head_dim = config["hidden_size"] // max(1, config["num_attention_heads"])
    positions = config["max_position_embeddings"]
    rotated = facts.number("rope.dimension_count", head_dim)
    return config | {
        "partial_rotary_factor": rotated / head_dim if head_dim else 1.0,
        "original_max_position_embeddings": facts.number(
            "rope.scaling.original_context_length", positions
        ),
        "sliding_window": facts.optional("attention.sliding_window") or None,
    }


def _gpt2(facts: Facts) -> Config:
    width = facts.number("embedding_length")
    inner = facts.number("feed_forward_length", 4 * width)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": width,
        "n_head": facts.number("attention.head_count"),
        "n_layer": facts.number("block_count"),
        "n_positions": facts.number("context_length"),
        "n_ctx": facts.number("context_length"),
        "n_inner": None if inner == 4 * width else inner,
        "layer_norm_epsilon": facts.number("attention.layer_norm_epsilon"),
        "vocab_size": facts.shape("token_embd.weight")[0],
        "tie_word_embeddings": "output.weight" not in facts.tensors,
    }


def _gpt_oss(facts: Facts) -> Config:
    """Return the config of gpt-oss, whose rotary embedding is scaled without rounding its bounds."""
    config = _decoder(facts, "gpt_oss", "GptOssForCausalLM")
    scaling = config.get("rope_scaling", {"rope_type": "default"})  # left out, it would be scaled
    config["rope_scaling"] = {"truncate": False} | scaling
    return config | {
        "head_dim": facts.number("attention.key_length"),
        "num_local_experts": facts.number("expert_count"),
        "num_experts_per_tok": facts.number("expert_used_count"),
        "sliding_window": facts.number("attention.sliding_window"),
        "attention_bias": "blk.0.attn_q.bias" in facts.tensors,
    }


MAKERS: dict[str, Callable[[Facts], Config]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen2moe": _qwen2moe,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3moe,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "gpt-oss": _gpt_oss,
}
"""By `general.architecture`."""
