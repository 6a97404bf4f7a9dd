"""Plans: every output byte has one place and one origin, decided from headers alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptd.checkpoint import checkpoint, header
from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import FileStamp
from ckptd.plan import draft as drafts
from ckptd.plan import expression, plan
from ckptd.plan.draft import Draft
from ckptd.plan.nodes import Grown, NewRows
from ckptd.plan.plan import Computed, Plan, Run, ShardPlan


def _parsed(shard: ShardPlan) -> header.Header:
    """Read the planned header back, as of a file of the planned size."""
    stamp = FileStamp(ino=1, nbytes=shard.nbytes, mtime_ns=0)
    return header.parse(shard.head[8:], path=Path(shard.name), stamp=stamp)


def _draft(make_source: Any, *shards: dict[str, torch.Tensor], **changes: Any) -> Draft:
    return dataclasses.replace(drafts.from_checkpoint(make_source(*shards)), **changes)


def _check_consistent(made: Plan) -> None:
    for shard in made.shards:
        parsed = _parsed(shard)
        assert {tensor.spec for tensor in parsed.tensors} == set(shard.tensors)
        cursor = len(shard.head)
        for part in shard.segments:
            assert part.offset == cursor
            assert part.nbytes > 0
            cursor += part.nbytes
        assert cursor == shard.nbytes
        for tensor in parsed.tensors:
            assert tensor.extent.offset % tensor.spec.dtype.alignment == 0


MIXED = {
    "bytes": torch.arange(3, dtype=torch.uint8),
    "scalar": torch.tensor(5, dtype=torch.int64),
    "empty": torch.zeros(0, 7),
    "half": torch.ones(5, dtype=torch.float16),
    "double": torch.ones(1, 3, dtype=torch.float64),
    "flag": torch.tensor([True]),
    "wide": torch.ones(3, dtype=torch.complex64),
}


@pytest.mark.parametrize("limit", [None, 1, 10, 30, 10_000])
def test_segments_fill_each_file_exactly(limit: int | None, make_source: Any) -> None:
    """Header and segments cover the file without gap, and every tensor is aligned to its dtype.

    Mixed dtypes, scalars and empty tensors included.
    """
    _check_consistent(plan.make(_draft(make_source, MIXED, max_shard_bytes=limit)))


def test_neighbours_become_one_run(make_source: Any) -> None:
    """Tensors that lie side by side on both sides are copied in one go, across many names."""
    tensors = {f"{n:02d}": torch.full((4,), float(n)) for n in range(20)}
    made = plan.make(_draft(make_source, tensors))
    assert [len(shard.segments) for shard in made.shards] == [1]


def test_a_dropped_tensor_divides_a_run(make_source: Any) -> None:
    """What is no longer wanted is not copied along."""
    whole = _draft(make_source, {f"{n}": torch.full((4,), float(n)) for n in range(5)})
    made = plan.make(
        dataclasses.replace(whole, tensors={n: v for n, v in whole.tensors.items() if n != "2"})
    )
    runs = made.shards[0].segments
    assert [part.nbytes for part in runs] == [32, 32]
    _check_consistent(made)


def test_tensors_of_two_files_join_in_one(make_source: Any) -> None:
    """Resharding upwards takes one run from each source file."""
    made = plan.make(
        _draft(make_source, {"a": torch.ones(4)}, {"b": torch.ones(8)}, max_shard_bytes=1000)
    )
    (shard,) = made.shards
    assert [part.nbytes for part in shard.segments] == [16, 32]
    assert len(made.sources) == 2
    assert not made.indexes
    _check_consistent(made)


def test_the_data_lies_where_ranges_can_be_cloned(make_source: Any) -> None:
    """The longest run begins at the same place within a 4096-byte block as in its source."""
    tensors = {f"{n}": torch.zeros(3000 + 2 * n) for n in range(9)}
    made = plan.make(_draft(make_source, tensors, max_shard_bytes=40_000))
    assert len(made.shards) > 1
    for shard in made.shards:
        run = max(shard.segments, key=lambda part: part.nbytes)
        assert isinstance(run, Run)
        assert (run.source.offset - run.offset) % 4096 == 0


def test_growing_is_a_run_and_a_small_computed_part(make_source: Any) -> None:
    """Old rows are copied as they are; only the new ones are computed."""
    start = _draft(make_source, {"w": torch.ones(10, 4, dtype=torch.bfloat16)})
    old = start.tensors["w"]
    new = Grown(old, (6, 4), 0, 0, NewRows.MEAN, 0.02, 0)
    made = plan.make(dataclasses.replace(start, tensors={"w": expression.concat([old, new])}))
    run, computed = made.shards[0].segments
    assert isinstance(run, Run)
    assert isinstance(computed, Computed)
    assert (run.nbytes, computed.nbytes) == (80, 48)
    assert made.needs_torch
    assert (made.computed_bytes, made.read_bytes) == (48, 80 + 80)
    _check_consistent(made)


def test_the_index_says_sizes_and_places(make_source: Any) -> None:
    """total_size counts tensor bytes, total_parameters elements, weight_map names every tensor."""
    made = plan.make(
        _draft(make_source, {"a": torch.ones(4), "c": torch.ones(2)}, {"b": torch.ones(8).half()})
    )
    assert json.loads(made.indexes["model.safetensors.index.json"]) == {
        "metadata": {"total_parameters": 14, "total_size": 40},
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
            "c": "model-00001-of-00002.safetensors",
        },
    }
    assert made.output_bytes == sum(shard.nbytes for shard in made.shards)


def test_an_unchanged_config_keeps_its_bytes(make_source: Any) -> None:
    """config.json is rewritten only where a stage changed a value."""
    start = _draft(make_source, {"a": torch.ones(4)})
    assert plan.make(start).config == start.config_path.read_bytes()
    changed = plan.make(dataclasses.replace(start, config={"model_type": "ä"}))
    assert changed.config == '{\n  "model_type": "ä"\n}\n'.encode()


def test_the_digest_tells_plans_apart(make_source: Any, tmp_path: Path) -> None:
    """The same plan over a moved source has the same digest; any difference gives another one."""
    start = _draft(make_source, {"a": torch.ones(4, 4), "b": torch.ones(4)})
    old = start.tensors["a"]

    def grown(seed: int = 0, std: float = 0.1, method: NewRows = NewRows.MEAN) -> Draft:
        new = Grown(old, (2, 4), 0, 0, method, std, seed)
        return dataclasses.replace(
            start, tensors={"a": expression.concat([old, new]), "b": start.tensors["b"]}
        )

    variants = [
        start,
        dataclasses.replace(start, max_shard_bytes=16),
        dataclasses.replace(start, config={}),
        dataclasses.replace(start, tensors={"a": expression.cast(old, Dtype.F16)}),
        dataclasses.replace(start, tensors={"a": old}),
        dataclasses.replace(start, tensors={"x": old}, home={"x": "model.safetensors"}),
        grown(),
        grown(seed=1),
        grown(std=0.2),
        grown(method=NewRows.NORMAL),
    ]
    digests = [plan.make(variant).digest for variant in variants]
    assert len(set(digests)) == len(variants)
    assert digests == [plan.make(variant).digest for variant in variants]

    (tmp_path / "source").rename(tmp_path / "moved")
    moved = drafts.from_checkpoint(checkpoint.open_checkpoint(tmp_path / "moved"))
    assert plan.make(moved).digest == digests[0]


def test_planning_reads_no_tensor_byte(make_source: Any) -> None:
    """With the tensors' bytes gone from the disk the plan is the same."""
    start = _draft(make_source, {"a": torch.ones(4)}, {"b": torch.ones(4)})
    before = plan.make(start).digest
    for path in {part.path for v in start.tensors.values() for part in expression.readings(v)}:
        path.unlink()
    assert plan.make(start).digest == before
