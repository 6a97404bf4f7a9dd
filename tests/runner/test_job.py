"""One whole job: what it leaves alone, what it leaves behind, and how it goes on after a failure."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import stat

import numpy as np
import pytest
from safetensors.numpy import save_file

from ckptd import errors
from ckptd.checkpoint import checkpoint, content, listing
from ckptd.jobs import progress
from ckptd.jobs.job import State
from tests.runner.conftest import (
    CONFIG,
    SIDE_FILES,
    TRAINER_FILES,
    contents,
    tensors,
    weights,
)

NUM_SHARDS = 10
COMPUTED = "- resize: {to: 80}\n- cast: {dtype: bfloat16}\n- reshard: {max_shard_size: 3KB}"


def test_the_output_is_a_whole_model(bench) -> None:
    """Weights, index, config, everything that travels and the provenance; no trainer state."""
    outcome = bench.run()
    found = contents(bench.out)
    shards = {f"model-{n:05d}-of-{NUM_SHARDS:05d}.safetensors" for n in range(1, NUM_SHARDS + 1)}
    small = {"config.json", "ckptd.json", "model.safetensors.index.json", *SIDE_FILES}
    assert found.keys() == shards | small
    assert not found.keys() & set(TRAINER_FILES)
    assert all(found[name].decode() == text for name, text in SIDE_FILES.items())
    assert outcome.num_files == len(found)
    assert outcome.num_shards == NUM_SHARDS
    made = weights(bench.out)
    assert all(np.array_equal(made[name], value) for name, value in tensors().items())


def test_the_source_is_never_touched(bench) -> None:
    """Names, contents, inodes, sizes, times and modes are what they were, the folder's too."""

    def state():
        every = [bench.source, *sorted(bench.source.rglob("*"))]
        return [
            (str(p), s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_mode, s.st_nlink)
            for p in every
            for s in (p.stat(),)
        ], contents(bench.source)

    before = state()
    bench.run()
    bench.run(COMPUTED)
    assert state() == before


@pytest.mark.parametrize("stages", ["- tie\n- reshard: {max_shard_size: 4KB}", COMPUTED])
def test_a_second_run_gives_the_same_bytes(stages, bench) -> None:
    """Every file, ckptd.json included, is byte for byte the same: no time, no host, no path."""
    bench.run(stages)
    first = contents(bench.out)
    other = bench.root / "elsewhere"
    bench.run(stages, output_path=other, work_path=bench.root / "w2", num_threads=3)
    assert contents(other) == first
    assert not any(str(bench.root).encode() in raw for raw in first.values())


def test_provenance_says_where_the_model_comes_from(bench) -> None:
    """ckptd.json names source, pipeline, stage reports and files."""
    outcome = bench.run()
    value = json.loads((bench.out / "ckptd.json").read_text())
    assert value["source"]["name"] == "checkpoint-7"
    assert value["source"]["step"] == 7
    assert [stage["stage"] for stage in value["pipeline"]["stages"]] == ["tie", "reshard"]
    assert [weight["name"] for weight in value["weights"]] == sorted(
        path.name for path in bench.out.glob("*.safetensors")
    )
    recorded = {f["name"]: (f["nbytes"], f["sha256"]) for f in value["files"]}
    assert recorded == {
        name: (len(raw), hashlib.sha256(raw).hexdigest())
        for name, raw in contents(bench.out).items()
        if not name.endswith(".safetensors") and name not in {"ckptd.json", "README.md"}
    }
    assert value["total_size"] == sum(array.nbytes for array in tensors().values())
    assert outcome.reports["job"] == {"reused_shards": 0}


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_file_modes_come_from_the_umask(mask, bench) -> None:
    """Other users can read what the umask lets them read."""
    before = os.umask(mask)
    try:
        bench.run()
    finally:
        os.umask(before)
    for path in bench.out.rglob("*"):
        wanted = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == wanted & ~mask, path


@pytest.mark.parametrize("stages", ["- tie\n- reshard: {max_shard_size: 4KB}", COMPUTED])
@pytest.mark.parametrize("count", [1, 4])
def test_after_a_failure_finished_files_are_not_made_again(stages, count, bench) -> None:
    """The next attempt writes what is missing and no more, and ends in the same bytes."""
    whole = bench.run(stages, output_path=bench.root / "whole", work_path=bench.root / "w2")
    bench.fail_after(count, stages)
    assert not bench.out.exists()
    out = bench.staging / "out"
    kept = {path.name: path.stat() for path in out.glob("[!.]*.safetensors")}
    assert len(kept) >= count
    outcome = bench.run(stages)
    reused = outcome.reports["job"]["reused_shards"]
    assert count <= reused <= len(kept)
    missing = whole.written_bytes - sum(found.st_size for found in kept.values())
    assert outcome.written_bytes <= missing + (len(kept) - reused) * 10_000
    assert contents(bench.out) == contents(bench.root / "whole")
    same = [n for n, found in kept.items() if (bench.out / n).stat().st_ino == found.st_ino]
    assert len(same) >= reused


def test_reused_files_are_told_and_the_counters_add_up(bench) -> None:
    """At the end as many bytes are done as there were to do, what was reused included."""
    bench.fail_after(3, COMPUTED)
    bench.reports.clear()
    outcome = bench.run(COMPUTED)
    told = [event for event in bench.reports if isinstance(event, progress.ShardFinished)]
    assert sum(event.reused for event in told) == outcome.reports["job"]["reused_shards"] >= 3
    last = [event for event in bench.reports if isinstance(event, progress.BytesMoved)][-1]
    for counter in (last.counters.computed, last.counters.written):
        assert counter.done_bytes == counter.total_bytes
    assert last.counters.read.total_bytes >= 0


def test_another_plan_starts_over(bench) -> None:
    """Files of another division are never taken for this one's."""
    bench.fail_after(3)
    outcome = bench.run("- tie\n- reshard: {max_shard_size: 8KB}")
    assert outcome.reports["job"]["reused_shards"] == 0
    assert outcome.num_shards == 5
    assert len(list(bench.out.glob("*.safetensors"))) == 5


def test_a_file_that_was_changed_since_is_made_again(bench) -> None:
    """A finished file that is not what the ledger says does not count."""
    bench.fail_after(4)
    out = bench.staging / "out"
    victim = min(out.glob("[!.]*.safetensors"))
    raw = bytearray(victim.read_bytes())
    raw[-1] ^= 1
    victim.write_bytes(raw)
    bench.run()
    made = weights(bench.out)
    assert all(np.array_equal(made[name], value) for name, value in tensors().items())


def test_side_files_of_an_earlier_attempt_do_not_stay(bench) -> None:
    """A file that the source no longer has is not in the output of the next attempt."""
    bench.fail_after(NUM_SHARDS)
    (bench.staging / "out" / "old_notes.txt").write_text("from an earlier attempt")
    (bench.staging / "out" / "old").mkdir()
    bench.run()
    assert not (bench.out / "old_notes.txt").exists()
    assert not (bench.out / "old").exists()


def test_a_folder_that_is_not_what_was_identified_is_refused(bench) -> None:
    """Its fingerprint is compared before anything is read."""
    fingerprint = listing.list_files(bench.source).fingerprint_id
    bench.run(fingerprint=fingerprint)
    (bench.source / "README.md").write_text("# Another one\n")
    with pytest.raises(errors.SourceChanged):
        bench.run(fingerprint=fingerprint)


@pytest.mark.parametrize("stages", ["- tie\n- reshard: {max_shard_size: 4KB}", COMPUTED])
def test_weights_that_are_written_anew_meanwhile_void_the_job(stages, bench) -> None:
    """The trainer saves again while the job runs: nothing is published, and the error says why."""

    def report(event: progress.Report) -> None:
        bench.reports.append(event)
        if sum(isinstance(each, progress.ShardFinished) for each in bench.reports) == 2:
            other = {name: value + 1 for name, value in tensors().items()}
            save_file(other, bench.source / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(errors.SourceChanged, match=r"model\.safetensors"):
        bench.run(stages, report=report)
    assert not bench.out.exists()


@pytest.mark.parametrize("text", [None, "# Another card, and longer\n"])
def test_a_side_file_that_changes_meanwhile_voids_the_job(text, bench) -> None:
    """A card that vanished or grew between planning and writing is a changed source."""

    def report(event: progress.Report) -> None:
        if isinstance(event, progress.ShardFinished):
            path = bench.source / "README.md"
            path.unlink(missing_ok=True) if text is None else path.write_text(text)

    with pytest.raises(errors.SourceChanged, match=r"README\.md"):
        bench.run(report=report)
    assert not bench.out.exists()


def test_an_output_that_is_there_is_replaced_whole(bench) -> None:
    """Old files are gone, new ones there, and nothing is left beside the folder."""
    bench.run()
    (bench.out / "stale.safetensors").write_bytes(b"old")
    bench.run("- tie")
    assert [path.name for path in bench.out.glob("*.safetensors*")] == ["model.safetensors"]
    assert sorted(p.name for p in bench.root.iterdir()) == ["out", "runs", "work"]


def test_a_failure_leaves_the_old_output(bench) -> None:
    """What stood in the output folder is there until the new model is whole."""
    bench.run()
    before = contents(bench.out)
    bench.fail_after(1, "- tie\n- reshard: {max_shard_size: 8KB}")
    assert contents(bench.out) == before


def test_without_a_push_the_outcome_says_so(bench) -> None:
    """Held, with the reason and the folder."""
    outcome = bench.run()
    assert outcome.state is State.HELD
    assert outcome.reason == "the definition has no push"
    assert outcome.output_path == str(bench.out)
    inside = bench.run(output_path=None)
    assert inside.output_path == str(bench.staging / "out")


def test_a_refusal_writes_nothing(bench) -> None:
    """What headers show fails before the staging folder is made."""
    (bench.source / "config.json").write_text(json.dumps(CONFIG | {"architectures": ["X"]}))
    with pytest.raises(errors.CheckpointRefused):
        bench.run("- resize: {to: 8}")
    assert not bench.staging.exists()
    assert not bench.out.exists()


def test_the_bytes_told_are_the_bytes_moved(bench) -> None:
    """Read, computed and written bytes of a verbatim and of a computed job."""
    verbatim = bench.run()
    tensor_bytes = sum(array.nbytes for array in tensors().values())
    files = sum(path.stat().st_size for path in bench.out.glob("*.safetensors"))
    assert (verbatim.read_bytes, verbatim.computed_bytes) == (tensor_bytes, 0)
    assert verbatim.written_bytes == files
    computed = bench.run("- cast: {dtype: float16}")
    assert computed.computed_bytes * 2 == computed.read_bytes == tensor_bytes


def test_work_is_a_value(bench) -> None:
    """A job is described by an immutable value, so that it can be tried again."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        bench.work().run = "other"


def test_after_a_restart_of_the_machine_the_source_is_hashed_again(bench) -> None:
    """Names, sizes and times are right, the bytes are zeros: the job is void, not published."""
    source = checkpoint.open_checkpoint(bench.source)
    digest = content.digest(checkpoint.identifying_files(source))
    fingerprint = listing.list_files(bench.source).fingerprint_id
    known = {"content_digest": digest, "fingerprint": fingerprint, "is_digest_durable": False}
    assert bench.run(**known).state is State.HELD

    weights_path = bench.source / "model.safetensors"
    before = weights_path.stat()
    with weights_path.open("r+b") as file:
        file.seek(before.st_size - 100)
        file.write(bytes(100))
    os.utime(weights_path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert listing.list_files(bench.source).fingerprint_id == fingerprint
    with pytest.raises(errors.SourceChanged, match=r"expected sha256:"):
        bench.run(**known)
