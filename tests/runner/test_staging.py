"""The ledger of a staging folder: what counts as finished, and what never does."""

from __future__ import annotations

import hashlib
import json
import os

import pytest

from ckptd import errors
from ckptd.checkpoint import checkpoint
from ckptd.pipeline import compose
from ckptd.plan.stream import FinishedShard
from ckptd.runner.staging import Sent, Staging, has_work
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
    (head,) = map(json.loads, (staging.work_path / "ledger.jsonl").read_text().splitlines())
    assert head["plan"] == plan.digest


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


@pytest.fixture
def hashed(staging, plan) -> Staging:
    """The same, with the sha256 of every file noted, as a job that pushes leaves it."""
    for shard in plan.shards:
        staging.announce(_finished(staging, shard))
        staging.record(_finished(staging, shard))
    return staging


def _finished(staging, shard):
    path = staging.out_path / shard.name
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return FinishedShard(name=shard.name, path=path, nbytes=shard.nbytes, sha256=sha256)


def _zero_the_data(path, shard) -> None:
    """Leave what a file system may after a power loss: length and first page, then zeros."""
    content = path.read_bytes()[: len(shard.head)]
    stat = path.stat()
    with path.open("r+b") as file:
        file.write(content + bytes(shard.nbytes - len(content)))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_killed_between_a_files_name_and_its_line_it_is_kept(hashed, plan) -> None:
    """The sha256 was noted before: the file is compared with it, not made again."""
    ledger = hashed.work_path / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-1]))
    before = [(hashed.out_path / shard.name).stat().st_ino for shard in plan.shards]
    found = hashed.resume(plan, hashed=True)
    assert [found[shard.name].path.stat().st_ino for shard in plan.shards] == before


@pytest.mark.parametrize("lines", [1, 2])
def test_a_zeroed_file_does_not_count(lines, hashed, plan) -> None:
    """Size, header and time may be right: neither with its line nor without it is it taken."""
    ledger = hashed.work_path / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-1]))
    shard = plan.shards[-1]
    if lines == 2:
        hashed.record(_finished(hashed, shard))
    _zero_the_data(hashed.out_path / shard.name, shard)
    assert shard.name not in hashed.resume(plan, hashed=True)
    assert not (hashed.out_path / shard.name).exists()


def test_after_a_restart_of_the_machine_every_file_is_compared(hashed, plan) -> None:
    """Stamps prove nothing then: bytes that the disk lost show in the sha256, all others are kept."""
    after = Staging(hashed.work_path, boot_id="another")
    assert len(after.resume(plan, hashed=True)) == len(plan.shards)

    ledger = hashed.work_path / "ledger.jsonl"
    shard = plan.shards[4]
    _zero_the_data(hashed.out_path / shard.name, shard)
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    stat = (hashed.out_path / shard.name).stat()
    for line in lines:  # the stamp that a file system gives back with the old metadata
        if line.get("shard") == shard.name:
            line.update(mtime_ns=stat.st_mtime_ns, ctime_ns=stat.st_ctime_ns)
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = Staging(hashed.work_path, boot_id="a third").resume(plan, hashed=True)
    assert found.keys() == {other.name for other in plan.shards} - {shard.name}


def test_after_a_restart_of_the_machine_a_file_without_a_hash_is_made_again(staging, plan) -> None:
    """Nothing can show that it is what was written."""
    assert Staging(staging.work_path, boot_id="another").resume(plan, hashed=False) == {}


@pytest.mark.parametrize("size", [0, 8])
def test_an_empty_file_under_its_name_does_not_count(size, hashed, plan) -> None:
    """What a file system without ordered data leaves of a file that was renamed."""
    shard = plan.shards[0]
    (hashed.out_path / shard.name).write_bytes(bytes(size))
    assert shard.name not in hashed.resume(plan, hashed=True)


def test_what_was_sent_is_recalled(plan, tmp_path) -> None:
    """Each file with its last sha256, and whether the Hub has it; a torn line is forgotten."""
    staging = Staging(tmp_path / "work")
    assert staging.recall(plan) == {}
    names = [shard.name for shard in plan.shards]
    for name, is_sent in ((names[0], False), (names[1], False), (names[0], True)):
        staging.note(name, Sent(sha256="ab" * 32, is_sent=is_sent))
    path = staging.work_path / "ledger.jsonl"
    path.write_bytes(path.read_bytes() + b'{"sent": "torn')
    expected = {
        names[0]: Sent(sha256="ab" * 32, is_sent=True),
        names[1]: Sent(sha256="ab" * 32, is_sent=False),
    }
    assert staging.recall(plan) == expected
    staging.note(names[2], Sent(sha256="cd" * 32, is_sent=False))
    assert staging.recall(plan).keys() == {*names[:3]}


def test_another_plan_recalls_nothing(plan, bench, tmp_path) -> None:
    """What was sent under another plan is not this one's."""
    staging = Staging(tmp_path / "work")
    staging.recall(plan)
    staging.note(plan.shards[0].name, Sent(sha256="ab" * 32, is_sent=True))
    stages = bench.work("- reshard: {max_shard_size: 8KB}").definition.stages
    other = compose.from_headers(checkpoint.open_checkpoint(bench.source), stages)
    assert staging.recall(other) == {}
    assert staging.recall(plan) == {}


def test_files_of_the_disk_give_their_digests_and_go(staging, plan) -> None:
    """A job that goes on without staging keeps what was hashed, and leaves no weights behind."""
    shard = plan.shards[2]
    path = staging.out_path / shard.name
    staging.record(FinishedShard(name=shard.name, path=path, nbytes=shard.nbytes, sha256="ab" * 32))
    assert staging.recall(plan) == {shard.name: Sent(sha256="ab" * 32, is_sent=False)}
    assert not list(staging.out_path.iterdir())


def test_a_folder_has_work_once_something_is_noted(plan, tmp_path) -> None:
    """A ledger that only names the plan is nothing to go on from."""
    staging = Staging(tmp_path / "work")
    assert not has_work(staging.work_path)
    staging.recall(plan)
    assert not has_work(staging.work_path)
    staging.note(plan.shards[0].name, Sent(sha256="ab" * 32, is_sent=False))
    assert has_work(staging.work_path)
