"""The ledger of a staging folder: what counts as finished, and what never does."""

from __future__ import annotations

import json

import pytest

from ckptd import errors
from ckptd.checkpoint import checkpoint
from ckptd.pipeline import compose
from ckptd.plan.stream import FinishedShard
from ckptd.runner.staging import Staging
from tests.runner.conftest import SHARDED


@pytest.fixture
def plan(bench):
    """The plan of ten files."""
    wanted = bench.work(SHARDED).definition
    return compose.from_headers(checkpoint.open_checkpoint(bench.source), wanted.stages)


@pytest.fixture
def staging(bench, plan) -> Staging:
    """A staging folder in which every file is finished, as a whole job leaves it."""
    bench.run(output_path=None)
    return Staging(bench.staging)


def test_an_empty_folder_has_nothing_finished(plan, tmp_path) -> None:
    """The first attempt begins with an empty output folder and a ledger of the plan."""
    staging = Staging(tmp_path / "new" / "deep")
    assert staging.resume(plan, hashed=False) == {}
    assert list(staging.out_path.iterdir()) == []
    assert json.loads((staging.work_path / "ledger.jsonl").read_text()) == {"plan": plan.digest}


def test_finished_files_are_found_again(staging, plan) -> None:
    """All ten, with their sizes."""
    found = staging.resume(plan, hashed=False)
    assert [found[shard.name].nbytes for shard in plan.shards] == [s.nbytes for s in plan.shards]


def test_files_without_a_hash_do_not_count_where_one_is_wanted(staging, plan) -> None:
    """A run without a push hashes nothing; the push after it makes the files anew."""
    assert staging.resume(plan, hashed=True) == {}
    assert not list(staging.out_path.iterdir())


def test_a_hash_survives_the_ledger(staging, plan) -> None:
    """What was hashed once is not hashed again."""
    shard = plan.shards[2]
    path = staging.out_path / shard.name
    staging.record(FinishedShard(name=shard.name, path=path, nbytes=shard.nbytes, sha256="ab" * 32))
    assert [f.sha256 for f in staging.resume(plan, hashed=True).values()] == ["ab" * 32]


@pytest.mark.parametrize(
    "tail", [b'{"shard": "model-000', b"\x00\x00\x00\xff", b"[1, 2]\n", b"7\n"]
)
def test_a_torn_last_line_costs_no_more_than_its_file(tail, staging, plan) -> None:
    """Whatever the crash left at the end of the ledger, the lines before it count."""
    ledger = staging.work_path / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes() + tail)
    assert len(staging.resume(plan, hashed=False)) == len(plan.shards)


def test_what_is_noted_behind_a_torn_line_counts(staging, plan) -> None:
    """The attempt after a crash notes its files so that the one after that finds them."""
    ledger = staging.work_path / "ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    found = staging.resume(plan, hashed=False)
    (missing,) = (shard for shard in plan.shards if shard.name not in found)
    staging.record(
        FinishedShard(
            name=missing.name,
            path=_copy_of(staging, missing),
            nbytes=missing.nbytes,
            sha256=None,
        )
    )
    assert len(staging.resume(plan, hashed=False)) == len(plan.shards)


def _copy_of(staging, shard):
    """Make a file that has the header of `shard`; the rest of it is not looked at."""
    path = staging.out_path / shard.name
    path.write_bytes(shard.head + bytes(shard.nbytes - len(shard.head)))
    return path


@pytest.mark.parametrize("content", [b"", b"not json\n", b"[]\n", b'{"plan": "sha256:00"}\n'])
def test_a_ledger_of_another_plan_counts_for_nothing(content, staging, plan) -> None:
    """The folder is emptied: no file of it can be trusted."""
    (staging.work_path / "ledger.jsonl").write_bytes(content)
    assert staging.resume(plan, hashed=False) == {}
    assert not list(staging.out_path.iterdir())


def test_what_is_no_finished_file_is_removed(staging, plan) -> None:
    """Temporary files, side files and strangers go; finished weights stay."""
    for name in (".ckptd-model.safetensors", "config.json", "stranger.bin"):
        (staging.out_path / name).write_text("x")
    (staging.out_path / "assets").mkdir(exist_ok=True)
    staging.resume(plan, hashed=False)
    assert {path.name for path in staging.out_path.iterdir()} == {s.name for s in plan.shards}


def test_a_truncated_file_does_not_count(staging, plan) -> None:
    """Its size is not the plan's."""
    name = plan.shards[3].name
    with (staging.out_path / name).open("r+b") as file:
        file.truncate(100)
    found = staging.resume(plan, hashed=False)
    assert found.keys() == {shard.name for shard in plan.shards} - {name}
    assert not (staging.out_path / name).exists()


def test_a_ledger_that_cannot_be_written_is_our_error(staging, plan) -> None:
    """The folder went away: named, with the path."""
    staging.remove()
    shard = plan.shards[0]
    staging.out_path.mkdir(parents=True)
    path = staging.out_path / shard.name
    path.write_bytes(b"x")
    with pytest.raises(errors.StorageFailed, match=r"ledger\.jsonl"):
        staging.record(FinishedShard(name=shard.name, path=path, nbytes=1, sha256=None))


def test_removing_twice_is_as_good_as_once(staging) -> None:
    """Nothing is left, and nothing fails."""
    staging.remove()
    staging.remove()
    assert not staging.work_path.exists()
