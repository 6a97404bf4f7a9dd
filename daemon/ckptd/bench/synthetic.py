"""Synthetic checkpoints to measure with: Llama-like, real or sparse, without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ckptd.checkpoint import header, index
from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import TensorSpec
from ckptd.plan import shards

SHARD_BYTES = 1_000_000_000
HIDDEN, INNER, ROWS = 2048, 8192, 32_000
_PATTERN_BYTES = 32 << 20


def llama_specs(total_bytes: int) -> list[TensorSpec]:
    """Return the tensors of a Llama-like bf16 model of about `total_bytes`, head and all."""
    specs = [_spec("model.embed_tokens.weight", ROWS, HIDDEN)]
    size = 2 * specs[0].nbytes
    layer = 0
    while size < total_bytes:
        block = list(_layer(layer))
        specs += block
        size += sum(spec.nbytes for spec in block)
        layer += 1
    return [*specs, _spec("model.norm.weight", HIDDEN), _spec("lm_head.weight", ROWS, HIDDEN)]


def moe_specs(count: int) -> list[TensorSpec]:
    """Return `count` small tensors, as a mixture of many experts has them."""
    return [
        _spec(f"model.layers.{n // 384}.mlp.experts.{n % 384 // 3}.{'abc'[n % 3]}", 16, 16)
        for n in range(count)
    ]


def giant_specs(count: int = 100_000) -> list[TensorSpec]:
    """Return `count` tensors of a mixture of experts: a trillion parameters, if not told otherwise."""
    layers = [f"model.layers.{n // 1536}.mlp.experts.{n % 1536 // 4}" for n in range(count - 3)]
    kinds = ("gate_proj.weight", "up_proj.weight", "down_proj.weight", "input_layernorm.weight")
    shapes = ((2560, 5120), (2560, 5120), (5120, 2560), (5120,))
    return [
        _spec("model.embed_tokens.weight", 163_840, 5120),
        *(_spec(f"{name}.{kinds[n % 4]}", *shapes[n % 4]) for n, name in enumerate(layers)),
        _spec("model.norm.weight", 5120),
        _spec("lm_head.weight", 163_840, 5120),
    ]


def write(folder: Path, specs: list[TensorSpec], *, sparse: bool, shard_bytes: int) -> None:
    """Write a checkpoint of `specs`; sparse files have real headers and no tensor blocks."""
    folder.mkdir(parents=True, exist_ok=True)
    groups = shards.by_size({s.name: s.nbytes for s in specs}, shard_bytes)
    by_name = {spec.name: spec for spec in specs}
    pattern = _pattern()
    weight_map: dict[str, str] = {}
    for name, names in zip(shards.file_names(len(groups)), groups, strict=True):
        group = [by_name[tensor] for tensor in names]
        weight_map |= {spec.name: name for spec in group}
        size = sum(spec.nbytes for spec in group)
        with (folder / name).open("wb") as file:
            file.write(header.encode(group, metadata={"format": "pt"}))
            if sparse:
                os.truncate(file.fileno(), file.tell() + size)
            for start in range(0, 0 if sparse else size, len(pattern)):
                file.write(pattern[: min(len(pattern), size - start)])
    total = sum(spec.nbytes for spec in specs)
    encoded = index.encode(weight_map, total_size=total, total_parameters=total // 2)
    if len(groups) > 1:
        (folder / "model.safetensors.index.json").write_bytes(encoded)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": ROWS,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _layer(number: int) -> Iterator[TensorSpec]:
    prefix = f"model.layers.{number}."
    for name in ("q_proj", "o_proj"):
        yield _spec(f"{prefix}self_attn.{name}.weight", HIDDEN, HIDDEN)
    for name in ("k_proj", "v_proj"):
        yield _spec(f"{prefix}self_attn.{name}.weight", HIDDEN // 4, HIDDEN)
    for name in ("gate_proj", "up_proj"):
        yield _spec(f"{prefix}mlp.{name}.weight", INNER, HIDDEN)
    yield _spec(f"{prefix}mlp.down_proj.weight", HIDDEN, INNER)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield _spec(f"{prefix}{name}.weight", HIDDEN)


def _spec(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, Dtype.BF16, shape)


def _pattern() -> bytes:
    """Normal weights as bfloat16 bytes: the upper halves of float32 values."""
    values = np.random.default_rng(0).standard_normal(_PATTERN_BYTES // 2, dtype=np.float32)
    return (values * np.float32(0.02)).view(np.uint32).__rshift__(16).astype(np.uint16).tobytes()
