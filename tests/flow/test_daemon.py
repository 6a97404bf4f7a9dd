"""The daemon from outside: folders appear, models stand on the Hub, whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import HfApi, snapshot_download
from safetensors.numpy import load_file

from ckptd.jobs.database import Database
from ckptd.jobs.job import State
from ckptd.jobs.store import Verdict
from tests.flow.conftest import Deployment, write_checkpoint


def _api(node: Deployment) -> HfApi:
    return HfApi(endpoint=node.hub.url, token=node.hub.token)


def _download(node: Deployment, revision: str, target: Path) -> Path:
    path = snapshot_download(
        "ckptd/run",
        revision=revision,
        local_dir=target,
        endpoint=node.hub.url,
        token=node.hub.token,
    )
    return Path(path)


def test_each_checkpoint_is_published_with_tag_card_and_provenance(
    node: Deployment, tmp_path: Path
) -> None:
    """Two checkpoints give two commits, in order, each tagged, tied and sharded as asked."""
    node.define()
    node.start()
    expected = {}
    for step in (10, 20):
        expected[step] = write_checkpoint(node.runs / "run" / f"checkpoint-{step}", step)
    jobs = node.wait_for_ended(2)

    assert [job.state for job in jobs] == [State.PUBLISHED] * 2
    assert len(node.commits()) == 2
    for step, job in zip((10, 20), jobs, strict=True):
        folder = _download(node, f"step-{step}", tmp_path / f"download-{step}")
        found: dict[str, np.ndarray] = {}
        for shard in folder.glob("*.safetensors"):
            found |= load_file(shard)
        assert set(found) == set(expected[step]) - {"lm_head.weight"}
        assert all(np.array_equal(found[name], expected[step][name]) for name in found)
        assert not (folder / "optimizer.pt").exists()
        assert (folder / "tokenizer.json").exists()
        assert "ckptd" in (folder / "README.md").read_text()
        provenance = json.loads((folder / "ckptd.json").read_text())
        assert provenance["source"]["digest"] == job.spec.content_digest
        assert {w["name"] for w in provenance["weights"]} == {
            shard.name for shard in folder.glob("*.safetensors")
        }
    assert node.stop() == 0
    node.wait_for(node.clean)


def test_rotation_while_a_job_waits_or_runs_does_not_matter(node: Deployment) -> None:
    """A checkpoint deleted as soon as it was seen is published all the same."""
    node.define(settle="1h")
    node.start()
    folder = node.runs / "run" / "checkpoint-10"
    write_checkpoint(folder, 10)
    node.wait_for(node.is_pinned)
    shutil.rmtree(folder)
    (job,) = node.wait_for_ended(1)
    assert job.state is State.PUBLISHED
    assert len(node.commits()) == 1


def test_a_pull_request_is_opened_once_and_tagged(node: Deployment) -> None:
    """create_pr makes a draft, commits to its ref and opens it; main stays as it was."""
    node.define(push="  create_pr: true")
    node.start()
    write_checkpoint(node.runs / "run" / "checkpoint-10", 10)
    (job,) = node.wait_for_ended(1)

    assert job.outcome is not None
    assert job.outcome.pr_num is not None
    (discussion,) = _api(node).get_repo_discussions("ckptd/run")
    assert (discussion.status, discussion.is_pull_request) == ("open", True)
    refs = _api(node).list_repo_refs("ckptd/run", include_pull_requests=True)
    assert refs.tags[0].target_commit == job.outcome.commit
    assert not node.commits()


@pytest.mark.parametrize("victim", ["daemon", "runner"])
def test_killed_at_any_moment_it_ends_in_exactly_one_commit(
    node: Deployment, victim: str, tmp_path: Path
) -> None:
    """SIGKILL at several moments of a job: one commit, right bytes, nothing left behind."""
    node.define()
    stages = ["repo", "preupload", "batch", "commit"]
    killed: list[str] = []
    node.start()

    def faults(request):  # type: ignore[no-untyped-def]
        for stage in stages:
            if stage in request.url.path and stage not in killed:
                killed.append(stage)
                if victim == "daemon":
                    assert node.process is not None
                    node.process.kill()
                else:
                    for pid in node.runner_pids():
                        os.kill(pid, signal.SIGKILL)
        return

    node.hub.faults = faults
    tensors = write_checkpoint(node.runs / "run" / "checkpoint-10", 10)

    def done() -> bool:
        if node.process is not None and node.process.poll() is not None:
            node.process.wait()
            node.start()
        jobs = node.jobs() if (node.state / "jobs.sqlite3").exists() else ()
        return bool(jobs) and all(job.state.terminal for job in jobs)

    node.wait_for(done, seconds=90)
    node.hub.faults = None

    (job,) = node.jobs()
    assert job.state is State.PUBLISHED
    assert "commit" in killed
    assert len(node.commits()) == 1
    folder = _download(node, "step-10", tmp_path / "download")
    found: dict[str, np.ndarray] = {}
    for shard in folder.glob("*.safetensors"):
        found |= load_file(shard)
    assert all(np.array_equal(found[name], tensors[name]) for name in found)
    node.wait_for(node.clean)


def test_sigterm_gives_the_job_back_and_the_next_start_finishes_it(node: Deployment) -> None:
    """An orderly stop in the middle of an upload loses nothing and blames nobody."""
    node.define()
    node.start(CKPTD_STOP_GRACE="0s")
    stopped: list[int] = []

    def stall(request):  # type: ignore[no-untyped-def]
        if "preupload" in request.url.path and not stopped:
            stopped.append(1)
            assert node.process is not None
            node.process.send_signal(signal.SIGTERM)
        return

    node.hub.faults = stall
    write_checkpoint(node.runs / "run" / "checkpoint-10", 10)
    node.wait_for(lambda: stopped)
    assert node.process is not None
    assert node.process.wait(20) == 0
    (job,) = node.jobs()
    assert job.state is State.QUEUED
    assert job.failures == 0
    node.start()
    (job,) = node.wait_for_ended(1)
    assert job.state is State.PUBLISHED
    assert len(node.commits()) == 1


def test_the_same_content_is_published_once(node: Deployment) -> None:
    """A restart, a touched file and a copy of the folder make no second commit."""
    node.define()
    node.start()
    folder = node.runs / "run" / "checkpoint-10"
    write_checkpoint(folder, 10)
    node.wait_for_ended(1)
    node.stop()
    node.start()
    os.utime(folder / "tokenizer.json")
    node.wait_for(lambda: "checkpoint known" in node.log_path.read_text())
    shutil.copytree(folder, node.runs / "run" / "checkpoint-copy")
    node.wait_for(lambda: node.log_path.read_text().count("checkpoint known") == 2)
    assert len(node.jobs()) == 1
    assert len(node.commits()) == 1


@pytest.mark.parametrize("tag", ["null", '"step-{step}"'])
def test_new_content_in_the_same_folder_is_a_new_job(node: Deployment, tag: str) -> None:
    """A resumed run that rewrites checkpoint-10 gets a second commit; a tag is never moved for it."""
    node.define(tag=tag)
    node.start()
    folder = node.runs / "run" / "checkpoint-10"
    write_checkpoint(folder, 10)
    node.wait_for_ended(1)
    write_checkpoint(folder, 10, seed=99)
    first, second = node.wait_for_ended(2)
    assert first.spec.content_digest != second.spec.content_digest
    if tag == "null":
        assert second.state is State.PUBLISHED
        assert len(node.commits()) == 2
    else:
        assert second.state is State.FAILED
        assert "git tag step-10 exists" in (second.reason or "")
        assert len(node.commits()) == 1


def test_an_incomplete_checkpoint_waits_and_a_broken_one_is_refused(node: Deployment) -> None:
    """No trainer_state.json: waiting, with the reason. A truncated shard: refused by name."""
    node.define()
    node.start()
    waiting, broken = (node.runs / "run" / f"checkpoint-{n}" for n in (1, 2))
    write_checkpoint(waiting, 1)
    (waiting / "trainer_state.json").unlink()
    write_checkpoint(broken, 2)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])

    def verdicts() -> dict[str, Verdict]:
        return {Path(s.source_path).name: s.verdict for s in node.sightings()}

    node.wait_for(
        lambda: verdicts() == {"checkpoint-1": Verdict.INCOMPLETE, "checkpoint-2": Verdict.REFUSED}
    )
    reasons = {Path(s.source_path).name: s.reason or "" for s in node.sightings()}
    assert "trainer_state.json" in reasons["checkpoint-1"]
    assert "truncated" in reasons["checkpoint-2"]
    assert str(weights) in reasons["checkpoint-2"]
    assert ".ckptd" not in str(reasons)
    assert not node.jobs()

    (waiting / "trainer_state.json").write_text(json.dumps({"global_step": 1}))
    (job,) = node.wait_for_ended(1)
    assert job.state is State.PUBLISHED


def test_a_failed_job_names_the_checkpoint_and_not_its_pin(node: Deployment) -> None:
    """The pin is gone when somebody reads the reason: it names the folder that the trainer wrote."""
    node.define(stages="  - resize: {to: 10}\n")
    node.start()
    folder = node.runs / "run" / "checkpoint-1"
    write_checkpoint(folder, 1)
    (job,) = node.wait_for_ended(1)
    assert job.state is State.REFUSED
    assert str(folder) in (job.reason or "")
    assert ".ckptd" not in (job.reason or "")
    assert ".ckptd" not in node.log_path.read_text().partition("job refused")[2]


def test_a_runner_that_died_while_it_waited_costs_no_job_a_try(node: Deployment) -> None:
    """Killed between jobs (out of memory, by hand), it is replaced before the next job begins."""
    node.define()
    node.start()
    before = node.wait_for(node.runner_pids)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    write_checkpoint(node.runs / "run" / "checkpoint-1", 1)
    (job,) = node.wait_for_ended(1)
    assert (job.state, job.attempt, job.failures) == (State.PUBLISHED, 1, 0)


def test_definitions_are_reloaded_and_a_broken_one_keeps_the_last_good(node: Deployment) -> None:
    """A definition that appears is used; when it breaks, the one before stays."""
    node.start()
    node.define()
    node.wait_for(lambda: "definition loaded" in node.log_path.read_text())
    (node.definitions / "publish.yaml").write_text("pipeline: publish\nstagse: []\n")
    node.wait_for(lambda: "definition broken" in node.log_path.read_text())
    write_checkpoint(node.runs / "run" / "checkpoint-10", 10)
    (job,) = node.wait_for_ended(1)
    assert job.state is State.PUBLISHED


def test_a_bad_token_waits_for_a_person_and_publishes_nothing(node: Deployment) -> None:
    """401 leaves the job waiting with the reason; with a good token it goes on."""
    node.define()
    node.start(HF_TOKEN="hf_nobody")
    write_checkpoint(node.runs / "run" / "checkpoint-10", 10)
    (job,) = node.wait_for(lambda: [job for job in node.jobs() if job.state is State.WAITING])
    assert "token" in (job.reason or "")
    assert "hf_nobody" not in node.log_path.read_text()
    node.stop()
    node.start()
    with Database(node.state / "jobs.sqlite3") as database:
        database.retry(job.job_id, now=job.updated_at + 1)
    (job,) = node.wait_for_ended(1)
    assert job.state is State.PUBLISHED


def test_a_name_that_is_no_text_does_not_end_the_daemon(node: Deployment) -> None:
    """A file whose name is not UTF-8 inside a checkpoint leaves the daemon at work."""
    node.define()
    node.start()
    folder = node.runs / "run" / "checkpoint-10"
    folder.mkdir(parents=True)
    node.wait_for(lambda: "checkpoint seen" in node.log_path.read_text())
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.lock")).write_bytes(b"")
    write_checkpoint(node.runs / "run" / "checkpoint-20", 20)
    jobs = node.wait_for_ended(1)
    assert jobs[0].state is State.PUBLISHED
    assert node.process is not None
    assert node.process.poll() is None


def test_a_corrected_definition_takes_up_what_failed_under_the_wrong_one(
    node: Deployment,
) -> None:
    """A footprint limit that was too low is raised, and the checkpoint is published after all."""
    node.define(stages="  - footprint: {max: 10}\n")
    node.start()
    write_checkpoint(node.runs / "run" / "checkpoint-10", 10)
    (failed,) = node.wait_for_ended(1)
    assert failed.state is State.FAILED
    node.define(stages="  - footprint: {max: 1GB}\n")
    jobs = node.wait_for_ended(2)
    assert jobs[1].state is State.PUBLISHED


def test_a_daemon_leaves_the_pins_of_another_one_alone(node: Deployment, tmp_path: Path) -> None:
    """A second daemon that starts on the same root does not take the first one's pins away."""
    node.define(settle="1h")
    node.start()
    write_checkpoint(node.runs / "run" / "checkpoint-10", 10)
    pins = node.runs / ".ckptd" / "live"
    node.wait_for(lambda: list(pins.glob("*/trainer_state.json")))
    first, node.process, state = node.process, None, node.state
    node.state = tmp_path / "other-state"
    node.start()
    node.wait_for(lambda: len(list(pins.glob("*/trainer_state.json"))) == 2)
    assert node.stop() == 0
    node.process, node.state = first, state
    node.kill()
    assert list(pins.glob("*/trainer_state.json"))


def test_a_folder_of_many_checkpoints_does_not_hold_up_the_start(node: Deployment) -> None:
    """More of them than the watcher's stream holds are found at the first scan: the daemon starts."""
    for step in range(1, 131):
        folder = node.runs / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    node.define()
    node.start()
    write_checkpoint(node.runs / "run" / "checkpoint-131", 131)
    (job,) = node.wait_for_ended(1)
    assert job.state is State.PUBLISHED
