"""Tiny random models of transformers, and ours with the same configuration and weights."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("llama", SMALL | {"num_key_value_heads": 2}),
    "BertForMaskedLM": ("bert", SMALL),
    "GPT2LMHeadModel": ("gpt2", {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "GPTNeoXForCausalLM": ("gpt_neox", SMALL),
    "T5ForConditionalGeneration": (
        "t5",
        {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
}


def theirs(name: str, **overrides: Any) -> Any:
    """Return a random model of transformers."""
    model_type, values = CLASSES[name]
    config = transformers.AutoConfig.for_model(model_type, **(values | overrides))
    torch.manual_seed(0)
    return getattr(transformers, name)(config).eval()


def state_of(original: Any) -> dict[str, torch.Tensor]:
    """Return the state of a model of transformers under the names its files have."""
    renamed = {"lm_head.weight": "embed_out.weight"} if "NeoX" in type(original).__name__ else {}
    return {renamed.get(name, name): value for name, value in original.state_dict().items()}


def ours(name: str, original: Any = None, **overrides: Any) -> Any:
    """Return our model; with the weights of `original` where one is given."""
    model_type, values = CLASSES[name]
    module = importlib.import_module(f"ckptd.models.native.{model_type}")
    config_name = type(original.config).__name__ if original is not None else None
    config_class = (
        getattr(module, config_name) if config_name else getattr(module, name).config_class
    )
    torch.manual_seed(0)
    model = getattr(module, name)(config_class(**(values | overrides))).eval()
    if original is not None:
        with tempfile.TemporaryDirectory() as folder:
            original.save_pretrained(folder)
            state = safetensors.torch.load_file(Path(folder) / "model.safetensors")
        found = model.load_state_dict(state, strict=False)
        assert not found.unexpected_keys
        assert set(found.missing_keys) <= set(model.all_tied_weights_keys)
    return model
