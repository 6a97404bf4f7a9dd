"""Stage `reshard` from end to end, with `save_pretrained` of the loaded model as the judge."""

from __future__ import annotations

import json
import re

import pytest
import torch

from tests.pipeline.stages.conftest import FAMILIES, planned, run, weights_of

INDEX = "model.safetensors.index.json"
LARGEST = 99 * 32 * 4
"""Bytes of an embedding, the largest tensor of the tiny models."""


def names(path) -> list[str]:
    return sorted(file.name for file in path.glob("*.safetensors*"))


@pytest.mark.parametrize("limit", [4000, LARGEST, LARGEST + 1, 30_000, 10**9])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bart", "gemma3"])
def test_files_and_index_are_those_of_save_pretrained(name, limit, family, tmp_path) -> None:
    """Names, number, total size and parameters, and the place of each tensor."""
    saved = family(name)
    model = saved.load(saved.path)  # a loaded model is saved in the order of names, as files are
    model.save_pretrained(tmp_path / "theirs", max_shard_size=limit)
    run(saved.path, f"- reshard: {{max_shard_size: {limit}}}", tmp_path / "ours")
    assert names(tmp_path / "ours") == names(tmp_path / "theirs")
    if limit < 10**9:
        ours, theirs = (json.loads((tmp_path / p / INDEX).read_text()) for p in ("ours", "theirs"))
        assert ours["weight_map"] == theirs["weight_map"]
        assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
        buffers = {n for n, _ in saved.model.named_buffers()} & saved.weights.keys()
        extra = sum(saved.weights[n].numel() for n in buffers)
        parameters = theirs["metadata"]["total_parameters"] + extra
        assert ours["metadata"]["total_parameters"] == parameters


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_divided_model_loads_as_it_was(name, family, tmp_path) -> None:
    """Many files: no key missing, no bit changed, the same logits."""
    saved = family(name)
    outcome = run(saved.path, "- reshard: {max_shard_size: 9KB}", tmp_path / "out")
    assert outcome.num_shards == len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    out = weights_of(tmp_path / "out")
    assert out.keys() == saved.weights.keys()
    assert all(torch.equal(out[key], value) for key, value in saved.weights.items())
    loaded = saved.load(tmp_path / "out")
    assert torch.equal(saved.logits(loaded), saved.logits(saved.model))


@pytest.mark.parametrize("limit", ["12672", "13KB", "12.5KiB", "20000", "0.1MB"])
def test_no_file_holds_more_than_the_limit(limit, family, tmp_path) -> None:
    """The limit counts tensor bytes, exactly, in any unit."""
    run(family("llama").path, f"- reshard: {{max_shard_size: {limit}}}", tmp_path / "out")
    number, unit = re.fullmatch(r"([\d.]+)(\D*)", limit).groups()
    allowed = float(number) * {"": 1, "KB": 1000, "KiB": 1024, "MB": 10**6}[unit]
    plan = planned(tmp_path / "out", "- tie")
    sizes = [sum(spec.nbytes for spec in shard.tensors) for shard in plan.shards]
    assert max(sizes) <= allowed


def test_a_tensor_over_the_limit_has_a_file_of_its_own(family, tmp_path) -> None:
    """It is not divided, and the report names it."""
    outcome = run(family("llama").path, "- reshard: {max_shard_size: 10KB}", tmp_path / "out")
    index = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    large = ["lm_head.weight", "model.embed_tokens.weight"]
    assert sorted(outcome.reports["reshard"]["oversized_tensors"]) == large
    for tensor in large:
        assert [n for n, file in index.items() if file == index[tensor]] == [tensor]


def test_a_divided_model_becomes_one_file_again(family, tmp_path) -> None:
    """Back and forth: no index and no shard is left over, and each tensor is as it was."""
    saved = family("llama")
    run(saved.path, "- reshard: {max_shard_size: 9KB}", tmp_path / "many")
    run(tmp_path / "many", "- reshard: {max_shard_size: 5GB}", tmp_path / "one")
    assert names(tmp_path / "one") == ["model.safetensors"]
    out = weights_of(tmp_path / "one")
    assert all(torch.equal(out[key], value) for key, value in saved.weights.items())


def test_without_the_stage_the_division_stays(family, tmp_path) -> None:
    """A model is published in the files that the trainer made."""
    run(family("llama").path, "- reshard: {max_shard_size: 9KB}", tmp_path / "many")
    run(tmp_path / "many", "- tie", tmp_path / "again")
    assert names(tmp_path / "again") == names(tmp_path / "many")
    maps = [json.loads((tmp_path / p / INDEX).read_text())["weight_map"] for p in ("many", "again")]
    assert maps[0] == maps[1]
