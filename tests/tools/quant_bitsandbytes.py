"""Make the checkpoints of bitsandbytes in tests/data/quant with the real library.

Run by hand, in an environment with bitsandbytes 0.50.2, transformers 5.24 and accelerate:

    python tests/tools/quant_bitsandbytes.py tests/data/quant

Most folders are tiny random models that transformers quantizes on loading and saves again; their
`reference.safetensors` is what the library's own dequantization of each module gives, in the
checkpoint's dtype, transposed back for Conv1D modules. `bnb_blocks` is made weight by weight with
`quantize_4bit`: every block size, odd lengths, experts as transformers 4 named them and as one
tensor of three axes, an embedding, and no word of it in config.json.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from bitsandbytes import functional
from safetensors.torch import save_file
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from transformers.pytorch_utils import Conv1D

NESTED = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}
LLAMA = transformers.LlamaConfig(
    hidden_size=64,
    intermediate_size=86,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=32,
)
GPT2 = transformers.GPT2Config(n_embd=48, n_layer=1, n_head=2, vocab_size=32, n_positions=16)
ENCODER_DECODER = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
    transformers.BertConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=32,
        max_position_embeddings=16,
    ),
    transformers.GPT2Config(
        n_embd=32,
        n_layer=1,
        n_head=2,
        vocab_size=32,
        n_positions=16,
        add_cross_attention=True,
        is_decoder=True,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model and how transformers quantizes it."""

    name: str
    config: Any
    quantization: dict[str, Any]
    dtype: torch.dtype = torch.bfloat16
    model_class: Any = transformers.AutoModelForCausalLM
    saving: dict[str, Any] = field(default_factory=dict)


MODELS = (
    Model(
        name="bnb_nf4_nested", config=LLAMA, quantization=NESTED, saving={"max_shard_size": "9KB"}
    ),
    Model(
        name="bnb_fp4_storage",
        config=LLAMA,
        quantization={
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "fp4",
            "bnb_4bit_quant_storage": torch.bfloat16,
        },
        dtype=torch.float16,
    ),
    Model(name="bnb_int8", config=LLAMA, quantization={"load_in_8bit": True}, dtype=torch.float16),
    Model(name="bnb_gpt2_nf4", config=GPT2, quantization=NESTED),
    Model(name="bnb_gpt2_int8", config=GPT2, quantization={"load_in_8bit": True}),
    Model(
        name="bnb_encoder_decoder",
        config=ENCODER_DECODER,
        quantization=NESTED,
        model_class=transformers.EncoderDecoderModel,
    ),
)


def make(model: Model, folder: Path) -> None:
    """Quantize and save `model` into `folder`, with the library's own values beside it."""
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    plain = getattr(model.model_class, "from_config", model.model_class)(model.config)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_()
    with tempfile.TemporaryDirectory() as source:
        plain.to(model.dtype).save_pretrained(source)
        quantized = model.model_class.from_pretrained(
            source,
            quantization_config=transformers.BitsAndBytesConfig(**model.quantization),
            dtype=model.dtype,
            device_map="cpu",
        )
    quantized.save_pretrained(folder, **model.saving)
    save_file(reference(quantized, model.dtype), folder / "reference.safetensors")
    (folder / "generation_config.json").unlink(missing_ok=True)


def reference(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return each quantized weight as the library dequantizes it, as the plain model has it."""
    values = {}
    for name, module in model.named_modules():
        if not isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            continue
        value = dequantize_bnb_weight(module.weight, getattr(module, "state", None))
        value = value.T if module.source_cls is Conv1D else value
        values[name + ".weight"] = value.detach().to(dtype).contiguous()
    return values


def make_blocks(folder: Path) -> None:
    """Write weights of all block sizes and shapes into `folder`, a model without quant_method."""
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {"model.norm.weight": torch.ones(8)}
    values: dict[str, torch.Tensor] = {}

    def add(name: str, shape: tuple[int, ...], dtype: torch.dtype, **settings: Any) -> None:
        spread = torch.rand(shape[:1] + (1,) * (len(shape) - 1)).exp()
        packed, state = functional.quantize_4bit(
            (torch.randn(shape) * spread).to(dtype), **settings
        )
        tensors[name] = packed
        for key, value in state.as_dict(packed=True).items():
            tensors[f"{name}.{key}"] = value
        values[name] = functional.dequantize_4bit(packed, state)

    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for place, block in enumerate((32, 64, 128, 256, 512, 1024, 2048, 4096)):
        nested, kind = bool(place % 2), ("nf4", "fp4")[place // 2 % 2]
        settings = {"blocksize": block, "quant_type": kind, "compress_statistics": nested}
        add(f"model.blocks.{block}.weight", (5, 86), dtypes[place % 3], **settings)
    nf4 = {"quant_type": "nf4"}
    for length in (1, 33, 257):
        add(f"model.odd.{length}.weight", (1, length), torch.float16, **nf4)
    add("model.odd.rows.weight", (33, 7), torch.bfloat16, quant_type="fp4")
    add("model.embed_tokens.weight", (40, 64), torch.bfloat16, compress_statistics=True, **nf4)
    experts = "model.layers.0.mlp.experts"
    for expert in range(3):
        add(f"{experts}.{expert}.gate_proj.weight", (12, 24), torch.bfloat16, **nf4)
    add(f"{experts}.gate_up_proj", (3, 10, 15), torch.bfloat16, compress_statistics=True, **nf4)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(values, folder / "reference.safetensors")


def main() -> None:
    """Write all folders under the one that is named."""
    root = Path(sys.argv[1])
    for model in MODELS:
        make(model, root / model.name)
    make_blocks(root / "bnb_blocks")


if __name__ == "__main__":
    main()
