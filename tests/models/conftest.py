"""Tiny random models of many families, saved by transformers itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ckptd.checkpoint import header
from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import TensorSpec
from ckptd.models import configuration, tying

ROWS, WIDTH = 99, 32
SMALL: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT: dict[str, Any] = {
    k: v for k, v in SMALL.items() if k not in ("head_dim", "num_key_value_heads")
}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": ROWS,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
T5: dict[str, Any] = {
    "vocab_size": ROWS,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
GPT: dict[str, Any] = {
    "vocab_size": ROWS,
    "n_embd": WIDTH,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
ROPE_3D: dict[str, Any] = {
    "rope_type": "default",
    "mrope_section": [1, 1, 2],
    "rope_theta": 10000.0,
}
QWEN_VISION: dict[str, Any] = {"depth": 2, "num_heads": 4, "patch_size": 14, "embed_dim": WIDTH}
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "albert": ("AlbertForMaskedLM", "AlbertConfig", BERT | {"embedding_size": 16}),
    "bart": ("BartForConditionalGeneration", "BartConfig", SEQ2SEQ),
    "bart base": ("BartModel", "BartConfig", SEQ2SEQ),
    "bert": ("BertForMaskedLM", "BertConfig", BERT),
    "bert classifier": ("BertForSequenceClassification", "BertConfig", BERT),
    "bert pretraining": ("BertForPreTraining", "BertConfig", BERT),
    "bert untied": ("BertForMaskedLM", "BertConfig", BERT | {"tie_word_embeddings": False}),
    "bloom": ("BloomForCausalLM", "BloomConfig", GPT | {"hidden_size": WIDTH}),
    "cohere": ("CohereForCausalLM", "CohereConfig", SMALL),
    "deberta v2": ("DebertaV2ForMaskedLM", "DebertaV2Config", BERT),
    "deberta v2 new": ("DebertaV2ForMaskedLM", "DebertaV2Config", BERT | {"legacy": False}),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"vocab_size": ROWS, "dim": WIDTH, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    ),
    "electra": ("ElectraForMaskedLM", "ElectraConfig", BERT | {"embedding_size": 16}),
    "falcon": ("FalconForCausalLM", "FalconConfig", BERT),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", SMALL),
    "gemma3 text": ("Gemma3ForCausalLM", "Gemma3TextConfig", SMALL),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"text_config": SMALL, "vision_config": VISION, "mm_tokens_per_image": 4},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "vocab_size": ROWS,
            "hidden_size": WIDTH,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", BERT),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", GPT | {"rotary_dim": 4}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", SMALL),
    "llama base": ("LlamaModel", "LlamaConfig", SMALL),
    "llama tied": ("LlamaForCausalLM", "LlamaConfig", SMALL | {"tie_word_embeddings": True}),
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": SMALL | {"model_type": "llama"},
            "vision_config": VISION | {"model_type": "clip_vision_model"},
            "image_token_index": 5,
        },
    ),
    "llava with qwen2": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": SMALL | {"model_type": "qwen2"},
            "tie_word_embeddings": True,
            "vision_config": VISION | {"model_type": "clip_vision_model"},
            "image_token_index": 5,
        },
    ),
    "marian": (
        "MarianMTModel",
        "MarianConfig",
        SEQ2SEQ | {"decoder_vocab_size": ROWS, "pad_token_id": 1},
    ),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", SEQ2SEQ),
    "mistral": ("MistralForCausalLM", "MistralConfig", SMALL),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": ROWS,
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "ffn_dim": 48,
            "num_attention_heads": 4,
            "word_embed_proj_dim": WIDTH,
            "max_position_embeddings": 64,
        },
    ),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", SEQ2SEQ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", SMALL),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", SMALL),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "text_config": SMALL | {"rope_parameters": ROPE_3D},
            "vision_config": {
                "depth": 2,
                "num_heads": 4,
                "hidden_size": WIDTH,
                "intermediate_size": 48,
                "out_hidden_size": WIDTH,
            },
        },
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {
            "text_config": SMALL | {"rope_parameters": ROPE_3D},
            "vision_config": QWEN_VISION | {"hidden_size": WIDTH},
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", SMALL | MOE),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", BERT | {"pad_token_id": 1}),
    "switch": (
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        T5 | {"num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5 encoder": ("T5EncoderModel", "T5Config", T5),
    "umt5": ("UMT5ForConditionalGeneration", "UMT5Config", T5),
    "vit": ("ViTForImageClassification", "ViTConfig", VISION),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 32, "max_target_positions": 32},
    ),
    "xlm_roberta": ("XLMRobertaForCausalLM", "XLMRobertaConfig", BERT | {"is_decoder": True}),
}


def specs(weights: Mapping[str, torch.Tensor]) -> dict[str, TensorSpec]:
    """Return the specifications of float32 tensors."""
    return {
        name: TensorSpec(name=name, dtype=Dtype.F32, shape=tuple(value.shape))
        for name, value in weights.items()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint that transformers wrote, and the model it wrote it from."""

    family: str
    model: Any
    path: Path
    config: dict[str, Any]
    weights: dict[str, torch.Tensor]

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """The specifications in the file's header."""
        stored = header.read(self.path / "model.safetensors").tensors
        return {tensor.spec.name: tensor.spec for tensor in stored}

    def ties(self) -> tying.Ties:
        """Return the tie groups of the checkpoint as it was saved."""
        return tying.find(self.config, self.tensors, path=self.path)

    def tie(
        self, config: dict[str, Any], weights: dict[str, torch.Tensor], **options: bool
    ) -> tuple[tying.Decision, dict[str, Any], dict[str, torch.Tensor]]:
        """Return the decision on this content, and the content it leads to."""
        ties = tying.find(config, specs(weights), path=self.path)
        same = {pair: torch.equal(weights[pair[0]], weights[pair[1]]) for pair in ties.pairs}
        decision = tying.decide(ties, same=same, **options)
        result = dict(weights)
        for source, name in decision.copies:
            assert name not in result
            result[name] = result[source].clone()
        for source, name in decision.renames:
            assert name not in result
            result[name] = result.pop(source)
        for name in decision.drops:
            del result[name]
        return decision, configuration.written(config, decision.writes), result

    def load(
        self, folder: Path, config: dict[str, Any], weights: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return the state that transformers loads from this content; nothing may be missing."""
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        tensors = {name: value.contiguous() for name, value in weights.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        model, info = type(self.model).from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"], info["missing_keys"]
        assert not info["unexpected_keys"], info["unexpected_keys"]
        assert not info["mismatched_keys"], info["mismatched_keys"]
        state: dict[str, torch.Tensor] = model.state_dict()
        return state


def build(family: str) -> Any:
    """Return a random model of the family; every parameter gets values of its own."""
    name, config_name, options = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config_name)(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.02)
    return model.eval()


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Saved]:
    """A saved tiny model of each family in turn."""
    path = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    model = build(request.param)
    model.save_pretrained(path)
    return Saved(
        family=request.param,
        model=model,
        path=path,
        config=json.loads((path / "config.json").read_text()),
        weights=load_file(path / "model.safetensors"),
    )
