"""Pins in the life of a daemon: short lives, rewriting in place, limits, definitions that go."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download
from safetensors.numpy import load_file

from ckptd.checkpoint.completeness import Complete
from ckptd.checkpoint.listing import list_files
from ckptd.checkpoint.open_files import OpenFiles
from ckptd.checkpoint.signs.file_set import FileSet
from ckptd.jobs.database import Database
from ckptd.jobs.job import Job, State
from ckptd.jobs.store import Verdict
from ckptd.pipeline.definition import Watch
from ckptd.service import judging
from ckptd.service.judging import Candidate, Judgement, Lost
from ckptd.service.pins import Pins
from ckptd.telemetry.status import DaemonStatus
from ckptd.watch import scan
from tests.flow.conftest import Deployment, write_checkpoint

LIVES_S = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5)


def _status(node: Deployment) -> DaemonStatus:
    return DaemonStatus.from_json((node.state / "status.json").read_bytes())


def _check_published(node: Deployment, job: Job, tensors: dict[str, Any], target: Path) -> None:
    """Every tensor, config and tokenizer of the checkpoint is under its tag."""
    folder = Path(
        snapshot_download(
            "ckptd/run",
            revision=f"step-{job.spec.step}",
            local_dir=target,
            endpoint=node.hub.url,
            token=node.hub.token,
        )
    )
    found: dict[str, np.ndarray] = {}
    for shard in folder.glob("*.safetensors"):
        found |= load_file(shard)
    assert set(found) == set(tensors) - {"lm_head.weight"}
    assert all(np.array_equal(found[name], tensors[name]) for name in found)
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"


def test_a_checkpoint_of_any_lifetime_is_published_whole_or_vanishes(
    node: Deployment, tmp_path: Path
) -> None:
    """Deleted 1 to 500 ms after it was written: all of it on the Hub, or vanished with advice."""
    node.define(settle="1s")
    node.start()
    run = node.runs / "run"
    tensors = {0: write_checkpoint(run / "checkpoint-0", 0, rows=64)}  # what is whole in this run
    node.wait_for_ended(1)
    for step, life_s in enumerate(LIVES_S * 2, start=1):
        tensors[step] = write_checkpoint(run / f"checkpoint-{step}", step, rows=64)
        time.sleep(life_s)  # the trainer's own time: its rotation
        shutil.rmtree(run / f"checkpoint-{step}")

    def ended() -> bool:
        verdicts = [sighting.verdict for sighting in node.sightings()]
        all_told = len(verdicts) == len(tensors) and {*verdicts} <= {
            Verdict.TAKEN,
            Verdict.VANISHED,
        }
        return all_told and all(job.state.terminal for job in node.jobs())

    node.wait_for(ended, seconds=120)
    jobs = node.jobs()
    assert [job.state for job in jobs] == [State.PUBLISHED] * len(jobs)
    assert len(jobs) > 1, "not even those that lived for half a second were caught"
    for job in jobs:
        assert job.spec.step is not None
        _check_published(node, job, tensors[job.spec.step], tmp_path / f"at-{job.spec.step}")
    vanished = [s for s in node.sightings() if s.verdict is Verdict.VANISHED]
    assert all("save_total_limit" in (sighting.reason or "") for sighting in vanished)
    assert len(jobs) + len(vanished) == len(tensors)
    shutil.rmtree(run)
    node.wait_for(node.clean)


def test_half_of_a_checkpoint_never_passes_for_one(node: Deployment) -> None:
    """Found while its deletion was under way, marker and weights still there: vanished."""
    node.define(settle="1h")
    run = node.runs / "run"
    write_checkpoint(run / "checkpoint-1", 1)
    (run / "checkpoint-1" / "tokenizer.json").unlink()
    stat = (run / "checkpoint-1").stat()
    os.utime(run / "checkpoint-1", ns=(stat.st_atime_ns, stat.st_mtime_ns + 50_000_000))
    node.start()
    node.wait_for(lambda: list((node.runs / ".ckptd" / "live").glob("*/trainer_state.json")))
    shutil.rmtree(run / "checkpoint-1")
    (sighting,) = node.wait_for(node.sightings)
    assert sighting.verdict is Verdict.VANISHED
    assert "save_total_limit" in (sighting.reason or "")
    assert not node.jobs()


def test_weights_rewritten_in_place_void_the_job(node: Deployment) -> None:
    """Queued, then the trainer writes into the same inode: vanished with the file's change."""
    node.define(stages="  - footprint: {max: 1GB}\n")
    node.start(HF_TOKEN="hf_nobody")
    folder = node.runs / "run" / "checkpoint-10"
    write_checkpoint(folder, 10)
    (job,) = node.wait_for(lambda: [job for job in node.jobs() if job.state is State.WAITING])
    weights = folder / "model.safetensors"
    pinned = Path(job.spec.pinned_path) / "model.safetensors"
    if not weights.samefile(pinned):  # a filesystem with reflinks: nothing to void
        return
    with weights.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 10}))
    node.stop()
    node.start()
    with Database(node.state / "jobs.sqlite3") as database:
        database.retry(job.job_id, now=job.updated_at + 1)
    jobs = node.wait_for_ended(2)
    by_id = {job.job_id: job for job in jobs}
    assert by_id[job.job_id].state is State.VANISHED
    assert "model.safetensors rewritten in place" in (by_id[job.job_id].reason or "")
    (other,) = [found for found in jobs if found.job_id != job.job_id]
    assert other.state is State.PUBLISHED


def test_over_the_limit_the_oldest_pin_goes_and_its_job_says_so(node: Deployment) -> None:
    """Only what the trainer has deleted counts; what is dropped is vanished with the setting's name."""
    node.define()
    node.start(HF_TOKEN="hf_nobody", CKPTD_PIN_LIMIT="500KB", CKPTD_WAIT_INTERVAL="1h")
    run = node.runs / "run"
    for step in (1, 2):
        write_checkpoint(run / f"checkpoint-{step}", step)
    node.wait_for(lambda: len(node.jobs()) == 2)
    node.wait_for(lambda: _status(node).pins.num_pins == 2)
    assert all(not job.state.terminal for job in node.jobs())
    for step in (1, 2):
        shutil.rmtree(run / f"checkpoint-{step}")
    first, second = node.wait_for(
        lambda: node.jobs() if node.jobs()[0].state is State.VANISHED else (), seconds=90
    )
    assert "pin_limit" in (first.reason or "")
    assert not Path(first.spec.pinned_path).exists()
    assert Path(second.spec.pinned_path).exists()
    assert not second.state.terminal


def test_pins_of_a_definition_that_is_gone_are_dropped(node: Deployment) -> None:
    """Renamed: the old name's live pin goes and its checkpoint says why; the new name has its own."""
    path = node.define(settle="1h")
    node.start()
    write_checkpoint(node.runs / "run" / "checkpoint-10", 10)
    pins = node.runs / ".ckptd" / "live"
    node.wait_for(lambda: list(pins.glob("*/trainer_state.json")))
    node.kill()
    path.write_text(path.read_text().replace("pipeline: publish", "pipeline: other"))
    node.start()
    node.wait_for(lambda: [s for s in node.sightings() if s.pipeline == "publish"])
    (told,) = [s for s in node.sightings() if s.pipeline == "publish"]
    assert told.verdict is Verdict.SKIPPED
    assert "definition was changed" in (told.reason or "")
    origins = [
        json.loads(note.read_text())["pipeline"] for note in pins.glob("*/.ckptd-origin.json")
    ]
    assert origins == ["other"]


def test_what_can_only_be_held_open_survives_rotation_too(node: Deployment, tmp_path: Path) -> None:
    """No pins below the root: files are held, copied when the trainer has deleted them, published."""
    node.define(settle="1h")
    (node.runs / ".ckptd").write_text("a file where the pins would be")
    node.start()
    folder = node.runs / "run" / "checkpoint-10"
    tensors = write_checkpoint(folder, 10)
    base = node.state / "pins"
    node.wait_for(node.is_pinned)
    assert '"method": "open files"' in node.log_path.read_text()
    assert not list(base.glob("*/live/*/model.safetensors"))
    shutil.rmtree(folder)
    (job,) = node.wait_for_ended(1)
    assert job.state is State.PUBLISHED
    _check_published(node, job, tensors, tmp_path / "download")
    node.wait_for(lambda: not list(base.glob("*/live/*")) and not list(base.glob("*/pins/*")))


def test_a_checkpoint_made_anew_under_its_name_is_another_one(node: Deployment) -> None:
    """Deleted and written again at once, by a resumed run: both are published, neither is a mixture."""
    node.define(settle="2s", tag="null")
    node.start()
    folder = node.runs / "run" / "checkpoint-10"
    write_checkpoint(folder, 10, seed=1)
    node.wait_for(node.is_pinned)
    shutil.rmtree(folder)
    write_checkpoint(folder, 10, seed=2)
    first, second = node.wait_for_ended(2)
    assert [first.state, second.state] == [State.PUBLISHED] * 2
    assert first.spec.content_digest != second.spec.content_digest


def test_config_and_tokenizer_of_the_run_are_pinned_too(node: Deployment, tmp_path: Path) -> None:
    """They lie beside the checkpoints and go with them: what was there at the save is published."""
    node.define(settle="1h")
    node.start()
    run = node.runs / "run"
    made = tmp_path / "made"
    tensors = write_checkpoint(made, 10)
    run.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.move(made / name, run / name)
    shutil.copytree(made, run / "checkpoint-10")
    node.wait_for(node.is_pinned)
    shutil.rmtree(run / "checkpoint-10")
    (run / "config.json").write_text("{}")
    (job,) = node.wait_for_ended(1)
    assert job.state is State.PUBLISHED
    _check_published(node, job, tensors, tmp_path / "download")


def _judged(root: Path, name: str, before: FileSet | None) -> Judgement:
    """Pin a checkpoint at one look at which its folder is as young as its last file; it goes."""
    source = root / "run" / name
    write_checkpoint(source, int(name.rpartition("-")[2]), rows=64)
    ahead_ns = time.time_ns() + 10**12
    for path in (*source.iterdir(), source):
        os.utime(path, ns=(ahead_ns, ahead_ns))
    watch = Watch(path=f"{root}/*/checkpoint-*")
    pins = Pins(
        owner="me",
        pipeline="p",
        place=scan.parse(watch.path),
        state_path=root / "state",
        held=OpenFiles(),
    )
    live_path = pins.live_path(source, root)
    assert live_path is not None
    assert pins.refresh_early(live_path, source), "a second look would make it certain"
    candidate = Candidate(
        path=source, seen=list_files(source), pin_path=live_path, quiet_since=0.0, gone=True
    )
    shutil.rmtree(source)
    return judging.judge(candidate, pins=pins, watch=watch, assets=None, before=before)


def test_what_may_be_half_deleted_is_believed_only_by_comparison(tmp_path: Path) -> None:
    """The first of a run is lost; one that has what the run's last accepted one had is complete."""
    first = _judged(tmp_path, "checkpoint-1", None)
    assert isinstance(first.verdict, Lost)
    assert "half deleted" in (first.verdict.why or "")
    second = _judged(tmp_path, "checkpoint-2", first.file_set)
    assert isinstance(second.verdict, Complete)
    assert first.file_set is not None
    more = {**first.file_set.published, "vocab.json": 2}
    richer = dataclasses.replace(first.file_set, published=more)
    third = _judged(tmp_path, "checkpoint-3", richer)
    assert isinstance(third.verdict, Lost)
    assert "vocab.json" in (third.verdict.why or "")
