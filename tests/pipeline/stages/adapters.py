"""Tiny models with adapters made by PEFT itself, and what its own merge makes of them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import anyio
import peft
import torch
import transformers
from safetensors.torch import load_file

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
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(COMMON | changes)))


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
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for value in adapted.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value) * 0.2)
    adapted.save_pretrained(path)
    return adapted


def merge(adapter: Path, out: Path, stages: str = "- merge", **changes: Any) -> Outcome:
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
        return anyio.run(functools.partial(job.execute, work, report=lambda _: None))
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
