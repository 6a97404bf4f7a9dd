"""Make the GGUF checkpoints of tests/data/quant: real files of llama.cpp, with their values.

    python quant_gguf.py LLAMA_CPP LIBGGML OUT

`LLAMA_CPP` is a source tree of llama.cpp: its converter writes the files of the architectures, from
models of transformers with random weights. `LIBGGML` is a shared library with ggml's own
quantizers (`ggml_quantize_chunk`): they write one tensor of every block type.

Reference values come from `gguf.quants.dequantize` of that tree. For the architectures they are
made the other way round, without any mapping of names: each tensor of the transformers model is
quantized and dequantized as it is there, which the converted file must give again, for rows are
quantized each on its own. Experts of gpt-oss are random MXFP4 codes in transformers' own layout, and
their values what transformers makes of them. Norms that a converter shifts are `(w + 1) - 1` in float32. Types that
gguf-py cannot dequantize (Q1_0, Q2_0) have ggml's `dequantize_row_*`.

Made with llama.cpp of llama-cpp-python 0.3.36 (gguf 0.19.0), ggml of xllamacpp 2026.10, torch 2.13,
transformers 5.24, tokenizers 0.23.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 128
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PLAIN_NAMES = (
    "mlp.gate.weight",
    "_moe.gate.weight",
    "shared_expert_gate.weight",
    "wpe.weight",
    "router.weight",
    "_proj_bias",
)
"""Matrices that the converter never quantizes: routers, positions and biases of experts."""
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "LlamaConfig",
        {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 64,
            "rope_parameters": LLAMA3,
            "attention_bias": True,
        },
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 2, **EXPERTS}),
    "qwen2moe": (
        "Qwen2MoeConfig",
        {
            "num_experts": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            **EXPERTS,
        },
    ),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32, "n_ctx": 32},
    ),
    "gptoss": ("GptOssConfig", {"head_dim": 16, "num_local_experts": 2, **EXPERTS}),
}


def main(tree: Path, library: Path, out: Path) -> None:
    """Write every case into a folder of its own below `out`."""
    sys.path[:0] = [str(tree), str(tree / "gguf-py")]
    torch.set_num_threads(1)
    _types(library, out / "gguf_types")
    for name in CONFIGS:
        _architecture(name, out / f"gguf_{name}")


def _architecture(name: str, folder: Path) -> None:
    """Write a model in Q8_0 as the converter does, its config, and what its tensors are then."""
    folder.mkdir(parents=True, exist_ok=True)
    kind, changes = CONFIGS[name]
    sizes = {"vocab_size": VOCABULARY} if name == "gpt2" else SIZES
    config = getattr(transformers, kind)(**(sizes | changes))
    with tempfile.TemporaryDirectory() as made:
        model = transformers.AutoModelForCausalLM.from_config(config)
        _randomize(model)
        model.save_pretrained(made)
        packed = _packed_experts(Path(made)) if name == "gptoss" else {}
        _tokenizer(made)
        _convert(Path(made), folder / "model.gguf")
        stored = load_file(Path(made) / "model.safetensors")
    shifted = name.startswith("gemma")
    values = {
        key: _expected(key, value, shifted=shifted)
        for key, value in stored.items()
        if not key.endswith(("_blocks", "_scales"))
    }
    _save(values | packed, folder)


def _save(values: dict[str, torch.Tensor], folder: Path) -> None:
    path = folder / "reference.safetensors"
    save_file({name: value.contiguous() for name, value in values.items()}, path)
    path.chmod(0o644)


def _packed_experts(folder: Path) -> dict[str, torch.Tensor]:
    """Put random MXFP4 codes in the place of a model's experts; return the weights they mean."""
    mxfp4 = importlib.import_module("transformers.integrations.mxfp4")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(5)
    values = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32)
        blocks = torch.randint(0, 256, (*shape, 16), generator=generator).to(torch.uint8)
        scales = torch.randint(118, 125, shape, generator=generator).to(torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        made = mxfp4.convert_moe_packed_tensors(blocks, scales)
        values[name] = (made.float() + 0.0).contiguous()  # ggml's whole numbers have no -0
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    return values


def _expected(name: str, value: torch.Tensor, *, shifted: bool) -> torch.Tensor:
    gguf = importlib.import_module("gguf")
    if value.ndim == 1 or name.endswith(PLAIN_NAMES):
        return (value + 1) - 1 if shifted and name.endswith("norm.weight") else value
    conv1d = ".h." in name
    rows = (value.T if conv1d else value).contiguous().numpy()
    kind = gguf.GGMLQuantizationType.Q8_0
    back = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(rows, kind), kind))
    return back.T if conv1d else back


def _randomize(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator) * 0.1
        value.copy_(noise + 1 if "norm" in name or "ln_" in name else noise)


def _tokenizer(folder: str) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 8,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())[:90],
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def _convert(source: Path, target: Path) -> None:
    """Run the converter; only its vocabulary step is replaced, which knows published ones alone."""
    conversion = importlib.import_module("conversion")
    conversion.load_all_models()
    base = importlib.import_module("conversion.base")
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    for model in _subclasses(base.TextModel):
        if "set_vocab" in model.__dict__:
            model.set_vocab = lambda self: self._set_vocab_gpt2()
    arguments = sys.argv
    sys.argv = ["convert", str(source), "--outfile", str(target), "--outtype", "q8_0"]
    try:
        importlib.import_module("convert_hf_to_gguf").main()
    finally:
        sys.argv = arguments


def _subclasses(kind: type) -> list[Any]:
    return [one for direct in kind.__subclasses__() for one in (direct, *_subclasses(direct))]


def _types(library: Path, folder: Path) -> None:
    """Write one tensor of every block type, some plain ones, and all their values."""
    gguf = importlib.import_module("gguf")
    folder.mkdir(parents=True, exist_ok=True)
    ggml = ctypes.CDLL(str(library))
    generator = np.random.default_rng(11)
    kinds = [
        (kind, sizes)
        for kind, sizes in gguf.GGML_QUANT_SIZES.items()
        if sizes[0] > 1 and kind.name not in ("Q8_1", "Q8_K")  # never in files
    ]
    writer = gguf.GGUFWriter(folder / "model.gguf", "qwen2")
    _describe(writer, len(kinds))
    values = {}
    for layer, (kind, _) in enumerate(kinds):
        rows = (generator.standard_normal((3, 256)) * 0.3).astype(np.float32)
        raw = _quantized(ggml, kind, rows)
        writer.add_tensor(f"blk.{layer}.ffn_down.weight", raw, raw_dtype=kind)
        values[f"model.layers.{layer}.mlp.down_proj.weight"] = _dequantized(ggml, kind, raw)
    writer.add_tensor("token_embd.weight", generator.standard_normal((5, 256)).astype(np.float16))
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    _save(values, folder)


def _describe(writer: Any, layers: int) -> None:
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-6)


def _quantized(ggml: ctypes.CDLL, kind: Any, rows: np.ndarray) -> np.ndarray:
    elements, block_bytes = importlib.import_module("gguf").GGML_QUANT_SIZES[kind]
    out = np.zeros((rows.shape[0], rows.shape[1] // elements * block_bytes), np.uint8)
    importance = np.ascontiguousarray((rows**2).mean(0) + 1e-3, np.float32)
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    ggml.ggml_quantize_chunk(
        int(kind), rows.ctypes.data, out.ctypes.data, 0, *rows.shape, importance.ctypes.data
    )
    return out


def _dequantized(ggml: ctypes.CDLL, kind: Any, raw: np.ndarray) -> torch.Tensor:
    try:
        return torch.from_numpy(importlib.import_module("gguf").quants.dequantize(raw, kind))
    except NotImplementedError:
        out = np.empty((raw.shape[0], 256), np.float32)
        function = getattr(ggml, f"dequantize_row_{kind.name.lower()}")
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        function(raw.ctypes.data, out.ctypes.data, out.size)
        return torch.from_numpy(out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
