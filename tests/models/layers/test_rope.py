"""Rotary frequencies and their application against transformers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3

from ckptd.models.layers import rope

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
LISTS = {
    "short_factor": [1.0 + 0.1 * i for i in range(16)],
    "long_factor": [2.0 + 0.3 * i for i in range(16)],
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "base": {"rope_type": "default", "rope_theta": 500_000.0},
    "linear": {"rope_type": "linear", "factor": 8.0},
    "partial": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.25},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": YARN,
    "yarn-betas": YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False},
    "yarn-scales": YARN | {"mscale": 0.7, "mscale_all_dim": 1.1},
    "yarn-given": YARN | {"attention_factor": 1.25},
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 64, **LISTS},
    "longrope-factor": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 64,
        "factor": 16.0,
        **LISTS,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def _config(name: str) -> Any:
    return transformers.LlamaConfig(**SIZES, rope_parameters=dict(PARAMETERS[name]))


@pytest.mark.parametrize("seq_len", [None, 16, 1000])
@pytest.mark.parametrize("name", PARAMETERS)
def test_frequencies(name: str, seq_len: int | None) -> None:
    """Frequencies and scale are those of transformers, to the bit but for llama3's ramp."""
    config = _config(name)
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        reference = modeling_llama.LlamaRotaryEmbedding.compute_default_rope_parameters
        expected, scale = reference(config)
    else:
        expected, scale = ROPE_INIT_FUNCTIONS[kind](config, None, seq_len=seq_len)
    found, found_scale = rope.inverse_frequencies(config, seq_len=seq_len)
    assert found.dtype == torch.float32
    assert found_scale == pytest.approx(scale)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["default", "yarn", "longrope", "dynamic"])
def test_cosine_and_sine(name: str, dtype: torch.dtype) -> None:
    """Cosine and sine equal transformers' for short and long inputs, in any order of lengths."""
    config = _config(name)
    theirs, ours = modeling_llama.LlamaRotaryEmbedding(config), rope.RotaryEmbedding(config)
    x = torch.zeros(1, dtype=dtype)
    for length in (20, 300, 70, 30, 400):
        positions = torch.arange(length)[None]
        for found, expected in zip(ours(x, positions), theirs(x, positions), strict=True):
            assert found.dtype == dtype
            torch.testing.assert_close(found, expected)


def test_each_kind_of_layer_has_its_own() -> None:
    """Settings by kind of layer give buffers by kind, not saved, float32 whatever the default."""
    config = transformers.Gemma3TextConfig(head_dim=16, num_hidden_layers=6)
    torch.set_default_dtype(torch.bfloat16)
    try:
        ours = rope.RotaryEmbedding(config)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {name: buffer.dtype for name, buffer in ours.named_buffers()} == {
        f"{kind}_attention_{name}": torch.float32
        for kind in ("full", "sliding")
        for name in ("inv_freq", "original_inv_freq")
    }
    assert not ours.state_dict()
    x, positions = torch.zeros(1), torch.arange(5)[None]
    full, sliding = (ours(x, positions, f"{k}_attention")[0] for k in ("full", "sliding"))
    assert not torch.equal(full, sliding)


def test_buffers_come_back_from_the_meta_device() -> None:
    """A module made without storage gets its buffers by `reset_buffers`."""
    with torch.device("meta"):
        ours = rope.RotaryEmbedding(_config("llama3"))
    assert ours.inv_freq.is_meta
    ours.reset_buffers("cpu")
    assert torch.equal(ours.inv_freq, rope.inverse_frequencies(_config("llama3"))[0])


@pytest.mark.parametrize(("module", "share"), [(modeling_llama, 1.0), (modeling_phi3, 0.5)])
def test_application(module: Any, share: float) -> None:
    """Queries and keys are turned as transformers turns them; channels beyond the share stay."""
    query, key = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16)
    cos, sin = torch.randn(2, 2, 5, int(16 * share)).unbind()
    expected = module.apply_rotary_pos_emb(query, key, cos, sin)
    for found, wanted in zip(rope.apply_rotary(query, key, cos, sin), expected, strict=True):
        assert torch.equal(found, wanted)


def test_an_unknown_type_is_refused() -> None:
    """An unknown `rope_type` is refused with the known ones."""
    config = SimpleNamespace(rope_parameters={"rope_type": "spiral"}, **SIZES)
    with pytest.raises(ValueError, match="'spiral'; known are default, linear"):
        rope.inverse_frequencies(config)
