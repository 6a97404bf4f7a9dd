"""Shards: divided and named as the Hub's own client does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given
from hypothesis import strategies as st

from ckptd.plan import shards


def _ours(sizes: list[int], limit: int) -> dict[str, list[str]]:
    groups = shards.by_size({f"t{number}": size for number, size in enumerate(sizes)}, limit)
    return dict(zip(shards.file_names(len(groups)), groups, strict=True))


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30), limit=st.integers(1, 60))
def test_the_division_is_the_clients(sizes: list[int], limit: int) -> None:
    """The same tensors in the same order and limit give the same files as huggingface_hub."""
    state = {f"t{n}": torch.zeros(size, dtype=torch.uint8) for n, size in enumerate(sizes)}
    theirs = split_torch_state_dict_into_shards(
        state, max_shard_size=limit, filename_pattern="model{suffix}.safetensors"
    )
    assert _ours(sizes, limit) == theirs.filename_to_tensors


@given(sizes=st.lists(st.integers(0, 40), max_size=30), limit=st.integers(1, 60))
def test_no_file_is_over_the_limit_but_for_one_tensor(sizes: list[int], limit: int) -> None:
    """Every tensor is in one file, in order; only a file of a single tensor may be larger."""
    named = {f"t{number}": size for number, size in enumerate(sizes)}
    groups = shards.by_size(named, limit)
    for group in groups:
        assert len(group) == 1 or sum(named[name] for name in group) <= limit
        assert group == sorted(group, key=list(named).index)
    assert sorted(name for group in groups for name in group) == sorted(named)


@pytest.mark.parametrize("limit", [1000, 4096, 4097, 10_001, 1_000_000])
def test_the_names_are_those_of_save_pretrained(limit: int, tmp_path: Path) -> None:
    """A model saved by transformers and one divided by us have the same files."""
    config = transformers.LlamaConfig(
        vocab_size=33, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size=limit)
    sizes = [tensor.nbytes for tensor in model.state_dict().values()]
    assert sorted(_ours(sizes, limit)) == sorted(p.name for p in tmp_path.glob("*.safetensors"))


def test_without_a_limit_the_sources_division_stays() -> None:
    """Files that have lost all their tensors are gone, and the rest is numbered anew."""
    assert shards.by_home({"a": "x", "b": "z", "c": "z"}) == [["a"], ["b", "c"]]
    assert shards.file_names(2)[1] == "model-00002-of-00002.safetensors"
    assert shards.file_names(1) == ["model.safetensors"]


def test_a_variant_stands_in_every_name() -> None:
    """After the stem of weight files, before the last suffix of the index."""
    assert shards.file_names(1, variant="fp16") == ["model.fp16.safetensors"]
    assert shards.file_names(2, variant="fp16")[0] == "model.fp16-00001-of-00002.safetensors"
    assert shards.index_name() == "model.safetensors.index.json"
    assert shards.index_name(variant="fp16") == "model.safetensors.index.fp16.json"
    assert shards.file_names(1, stem="adapter_model") == ["adapter_model.safetensors"]


def test_names_belong_to_one_variant() -> None:
    """A save knows the names of its own variant, and no others."""
    own = [*shards.file_names(1), *shards.file_names(3), shards.index_name()]
    variant = [*shards.file_names(1, variant="a"), *shards.file_names(3, variant="a")]
    variant.append(shards.index_name(variant="a"))
    assert all(shards.is_weight_name(name) for name in own)
    assert not any(shards.is_weight_name(name) for name in variant)
    assert all(shards.is_weight_name(name, variant="a") for name in variant)
    assert not any(shards.is_weight_name(name, variant="a") for name in own)
    assert not shards.is_weight_name("model.safetensors.bak")
