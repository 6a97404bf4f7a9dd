"""Tiny models with adapters made by PEFT itself, and what its own merge makes of them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import peft
import torch
import transformers
from safetensors.torch import load_file

from ckptd.jobs import progress
from ckptd.jobs.job import Outcome
from ckptd.pipeline import definition
from ckptd.runner import job

COMMON: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


ALL_LINEAR: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}


def make(kind: str, **changes: Any) -> Any:
    """Return a tiny model of a family, its values fixed by a seed."""
    torch.manual_seed(0)
    if kind == "gpt2":
        small = {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**(small | changes)))
    if kind == "opt":
        config = transformers.OPTConfig(
            vocab_size=60, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32, word_embed_proj_dim=16, **changes,
        )  # fmt: skip
        return transformers.OPTForCausalLM(config)
    if kind == "vit":
        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
            image_size=8, patch_size=4, num_labels=1, **changes,
        )  # fmt: skip
        return transformers.ViTForImageClassification(config)
    if kind == "qwen3":
        config = transformers.Qwen3Config(**(COMMON | {"head_dim": 8} | changes))
        return transformers.Qwen3ForCausalLM(config)
    if kind == "qwen3_moe":
        experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
        config = transformers.Qwen3MoeConfig(**(COMMON | experts | {"head_dim": 8} | changes))
        return transformers.Qwen3MoeForCausalLM(config)
    if kind == "gpt_oss":
        experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8}
        config = transformers.GptOssConfig(**(COMMON | experts | changes))
        return transformers.GptOssForCausalLM(config)
    if kind == "mixtral":
        experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
        config = transformers.MixtralConfig(**(COMMON | experts | changes))
        return transformers.MixtralForCausalLM(config)
    if kind in RENAMED:
        return RENAMED[kind]()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(COMMON | changes)))


SMALL = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
}  # fmt: skip


def _llava() -> Any:
    seen = transformers.CLIPVisionConfig(image_size=8, patch_size=4, **SMALL)
    text = transformers.LlamaConfig(**COMMON)
    config = transformers.LlavaConfig(vision_config=seen, text_config=text, image_token_index=5)
    return transformers.LlavaForConditionalGeneration(config)


def _qwen2_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    seen = {"embed_dim": 16, "hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(
        vision_config=seen | {"mlp_ratio": 2}, text_config=COMMON | {"rope_parameters": rope}
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def _gemma3() -> Any:
    seen = SMALL | {"image_size": 8, "patch_size": 4}
    config = transformers.Gemma3Config(
        vision_config=seen, text_config=COMMON | {"head_dim": 8}, mm_tokens_per_image=1
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def _vit() -> Any:
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **SMALL)
    return transformers.ViTForImageClassification(config)


def _gpt_neox() -> Any:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(vocab_size=60, **SMALL))


def _nomic_bert() -> Any:
    config = transformers.NomicBertConfig(vocab_size=60, **SMALL)
    return transformers.NomicBertForMaskedLM(config)


def _bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=60, **SMALL))


def _deepseek_v3() -> Any:
    heads = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    ranks = {"q_lora_rank": 4, "kv_lora_rank": 4, "num_key_value_heads": 2}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    groups = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    config = transformers.DeepseekV3Config(**(COMMON | heads | ranks | experts | groups))
    return transformers.DeepseekV3ForCausalLM(config)


RENAMED: dict[str, Callable[[], Any]] = {
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
    "gemma3": _gemma3,
    "vit_renamed": _vit,
    "gpt_neox": _gpt_neox,
    "nomic_bert": _nomic_bert,
    "deepseek_v3": _deepseek_v3,
    "bert": _bert,
}
"""Models whose tensors have other names in memory than in files, or are divided otherwise."""


def save_base(model: Any, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save the base model."""
    model.to(dtype).save_pretrained(path)
    return path


def adapt(
    base: Path,
    config: Any,
    path: Path,
    *,
    resize: int | None = None,
    kind: Any = transformers.AutoModelForCausalLM,
) -> Any:
    """Return the base with an adapter of random values, which is saved at `path`."""
    model = kind.from_pretrained(base)
    if resize is not None:
        model.resize_token_embeddings(resize, mean_resizing=False)
    return trained(model, config, path)


def trained(model: Any, config: Any, path: Path) -> Any:
    """Return the model with an adapter of random values, which is saved at `path`."""
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if value.requires_grad and "ranknum" not in name:  # AdaLoRA never saves that one
                value.add_(torch.randn_like(value) * 0.2)
    adapted.save_pretrained(path)
    return adapted


def merge(
    adapter: Path,
    out: Path,
    stages: str = "- merge",
    report: Callable[[progress.Report], None] = lambda _: None,
    **changes: Any,
) -> Outcome:
    """Take an adapter through `stages`; a failure is raised as itself."""
    lines = "".join(f"  {line}\n" for line in stages.splitlines())
    wanted = definition.parse_definition(f"pipeline: test\nstages:\n{lines}", "test.yaml")
    given: dict[str, Any] = {
        "checkpoint_path": adapter,
        "name": adapter.name,
        "run": "run",
        "layout": "auto",
        "definition": wanted,
        "content_digest": None,
        "fingerprint": None,
        "pipeline_digest": definition.pipeline_digest(wanted),
        "work_path": out.with_name(f"{out.name}-work"),
        "output_path": out,
        "push": False,
        "endpoint": None,
        "within": None,
        "byte_budget": 16 << 20,
        "num_threads": 1,
    }
    work = job.Work(**(given | changes))
    try:
        return anyio.run(functools.partial(job.execute, work, report=report))
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def config(folder: Path) -> dict[str, Any]:
    """Return the folder's config.json."""
    value: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return value


def merged_by_peft(adapted: Any, path: Path) -> dict[str, torch.Tensor]:
    """Return what PEFT's own merge saves, computed in float64."""
    merged = adapted.double().merge_and_unload()
    merged.save_pretrained(path)
    return weights(path)


def require_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Require float32 tensors that are the exact ones to 1e-6."""
    assert found.keys() == expected.keys()
    for key, exact in expected.items():
        error = (found[key].double() - exact).abs()
        assert (error <= 1e-6 * (1 + exact.abs())).all(), (key, float(error.max()))


def small(tmp_path: Path, **changes: Any) -> Path:
    """Return a small adapter on a small base, whose configuration is changed."""
    base = save_base(make("llama"), tmp_path / "base")
    wanted = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapt(base, wanted, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return tmp_path / "adapter"
