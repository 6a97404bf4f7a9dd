"""A quantized layer and writing it as a checkpoint, once or many times: for benchmarks."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ckptd.checkpoint import ggml
from tests.checkpoint import gguf_file

Tensors = dict[str, torch.Tensor]

NAME = "model.layers.{}.mlp.gate_proj"
GGUF_NAME = "blk.{}.ffn_gate.weight"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Tensors by their names after the module's, and what stands beside them.

    `metadata` is the header's, where `{}` in a key is the module's name. `ggml` is the type of a
    GGUF layer by number, whose only tensor is its blocks, one row a row of the weight.
    """

    tensors: Tensors
    quantization: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=lambda: {"format": "pt"})
    ggml: int | None = None

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def write(folder: Path, layer: Layer, *, copies: int = 1, shard_layers: int | None = None) -> None:
    """Write a checkpoint of `copies` equal layers, `shard_layers` a file, one file by default."""
    folder.mkdir(parents=True)
    if layer.ggml is not None:
        _write_gguf(folder / "model.gguf", layer, copies)
        return
    key = "quantization_config" if "quant_method" in layer.quantization else "quantization"
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16",
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": copies,
        key: layer.quantization,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    size = shard_layers or copies
    count = -(-copies // size)
    weight_map: dict[str, str] = {}
    for shard in range(count):
        name = f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
        name = "model.safetensors" if count == 1 else name
        held = range(shard * size, min((shard + 1) * size, copies))
        part = {
            _full(number, own): tensor for number in held for own, tensor in layer.tensors.items()
        }
        _save(part, folder / name, _metadata(layer, held))
        weight_map |= dict.fromkeys(part, name)
    if count > 1:
        value = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(value))


def _full(number: int, own: str) -> str:
    if own.startswith("gate_up_proj"):
        return f"model.layers.{number}.mlp.experts.{own}"
    return f"{NAME.format(number)}.{own}"


def _metadata(layer: Layer, held: range) -> dict[str, str]:
    """Return the header's metadata of the layers `held`; torchao also lists its weights."""
    said = {
        key.format(NAME.format(number)): value
        for number in held
        for key, value in layer.metadata.items()
    }
    if layer.quantization.get("quant_method") == "torchao":
        said["tensor_names"] = json.dumps(list(said))
    return said


def _save(tensors: Tensors, path: Path, metadata: dict[str, str]) -> None:
    """Save, although layers share their memory: safetensors wants tensors of their own."""
    owned = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(owned, path, metadata=metadata)


def _write_gguf(path: Path, layer: Layer, copies: int) -> None:
    """Write blocks as `copies` gates of a Llama: the head as tests do, then the blocks."""
    assert layer.ggml is not None
    (blocks,) = layer.tensors.values()
    rows, row_bytes = blocks.shape
    kind = ggml.TYPES[layer.ggml]
    columns = row_bytes // kind.block_bytes * kind.elements
    size = -(-blocks.nbytes // gguf_file.ALIGNMENT) * gguf_file.ALIGNMENT
    words = gguf_file.floats("token_embd.weight", 8, columns)
    entries = [words] + [
        gguf_file.Entry(
            GGUF_NAME.format(number),
            (rows, columns),
            layer.ggml,
            b"",
            len(words.data) + number * size,
        )
        for number in range(copies)
    ]
    told = gguf_file.LLAMA | {
        "llama.block_count": copies,
        "llama.embedding_length": columns,
        "llama.feed_forward_length": rows,
    }
    with path.open("wb") as file:
        file.write(gguf_file.encode(told, entries))
        for _ in range(copies):
            file.write(blocks.numpy().data)
            file.write(bytes(size - blocks.nbytes))
