"""The daemon against a Hub that refuses, limits, fills up or is shared, until all is well again."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse

from ckptd.hub.local.server import Running
from ckptd.jobs.job import Job, State
from tests.flow.conftest import Deployment, write_checkpoint

NO_TAG = "null"


def refusal(status: int, text: str, **headers: str) -> JSONResponse:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return JSONResponse({"error": text}, status, named)


def waiting(node: Deployment, state: State = State.WAITING) -> list[Job]:
    return [job for job in node.jobs() if job.state is state]


def secret_file(path: Path, text: str) -> Path:
    """Put a token where only this user can read it, in one step."""
    new = path.with_suffix(".new")
    new.touch(0o600)
    new.write_text(text)
    return new.rename(path)


def test_a_token_that_expires_holds_only_its_own_jobs_and_needs_no_restart(
    node: Deployment,
) -> None:
    """401 in the middle: that job waits with the reason, others go on; a new token wakes it up."""
    token = secret_file(node.root / "token", node.hub.token)
    expired = True

    def hook(request: Request) -> Any:
        if expired and request.method == "POST" and "ckptd/one/commit" in request.url.path:
            return refusal(401, "Invalid credentials in Authorization header")
        return None

    node.hub.faults = hook
    node.define()
    node.start(HF_TOKEN="", HF_TOKEN_PATH=str(token))
    write_checkpoint(node.runs / "one" / "checkpoint-10", 10)
    (job,) = node.wait_for(lambda: waiting(node))
    assert "Invalid credentials" in (job.reason or "")
    assert "HF_TOKEN_PATH" in (job.reason or "")
    write_checkpoint(node.runs / "two" / "checkpoint-10", 10, seed=11)
    node.wait_for(lambda: waiting(node, State.PUBLISHED))
    assert [found.spec.run for found in waiting(node)] == ["one"]

    expired = False
    secret_file(token, node.hub.token)
    began = time.monotonic()
    jobs = node.wait_for_ended(2)
    assert [found.state for found in jobs] == [State.PUBLISHED] * 2
    assert time.monotonic() - began < 60  # the pause of a waiting job is ten minutes
    assert len(node.commits("ckptd/one")) == 1


def test_a_token_file_that_others_can_read_is_refused_until_it_is_closed(
    node: Deployment,
) -> None:
    """The job waits and says which command mends it; then it goes on by itself."""
    token = secret_file(node.root / "token", node.hub.token)
    token.chmod(0o644)
    node.define()
    node.start(HF_TOKEN="", HF_TOKEN_PATH=str(token))
    write_checkpoint(node.runs / "run" / "checkpoint-10", 10)
    (job,) = node.wait_for(lambda: waiting(node))
    assert f"{token} is open to others (mode 0644)" in (job.reason or "")
    assert f"chmod 600 {token}" in (job.reason or "")
    assert not node.hub.ledger.find("POST")
    token.chmod(0o600)
    (job,) = node.wait_for_ended(1)
    assert job.state is State.PUBLISHED


def test_a_full_account_waits_and_goes_on_when_there_is_room(node: Deployment) -> None:
    """No room: waits in clear words, nothing on the branch; with room, one commit."""
    full = True

    def hook(request: Request) -> Any:
        if full and request.url.path.endswith("/objects/batch"):
            return refusal(403, "Private repository storage limit reached")
        return None

    node.hub.faults = hook
    node.define()
    node.start(CKPTD_WAIT_INTERVAL="1s")
    write_checkpoint(node.runs / "run" / "checkpoint-10", 10)
    (job,) = node.wait_for(lambda: waiting(node))
    assert "storage or plan is used up" in (job.reason or "")
    assert not node.commits()
    full = False
    (job,) = node.wait_for_ended(1)
    assert job.state is State.PUBLISHED
    assert len(node.commits()) == 1


def test_a_wait_that_the_hub_asks_for_is_counted_down(node: Deployment) -> None:
    """429 with Retry-After: the status shows the seconds that are left, fewer each time."""
    node.hub.faults = lambda request: (
        refusal(429, "slow down", Retry_After="100") if "/commit/" in request.url.path else None
    )
    node.define()
    node.start()
    write_checkpoint(node.runs / "run" / "checkpoint-10", 10)
    left: list[int] = []

    def counted() -> bool:
        path = node.state / "status.json"
        jobs = json.loads(path.read_text())["jobs"] if path.exists() else []
        for job in jobs:
            found = re.match(r"waiting (\d+) s for the Hub: .*slow down", job["note"] or "")
            if found and int(found[1]) not in left:
                left.append(int(found[1]))
        return len(left) >= 3

    node.wait_for(counted)
    assert left == sorted(left, reverse=True)
    assert 90 <= left[-1] <= left[0] <= 101
    assert '"waiting for the Hub"' in node.log_path.read_text()


def test_a_commit_that_holds_other_bytes_is_never_called_published(node: Deployment) -> None:
    """The Hub lists another sha256 than was sent: failed, with the file's name."""
    committed = False

    def hook(request: Request) -> Any:
        nonlocal committed
        committed = committed or "/commit/" in request.url.path
        if committed and "/tree/" in request.url.path:
            lie = {"type": "file", "path": "model.safetensors", "oid": "0" * 40, "size": 1}
            return JSONResponse([lie])
        return None

    node.hub.faults = hook
    node.define(stages="  - tie\n", tag=NO_TAG)
    node.start()
    write_checkpoint(node.runs / "run" / "checkpoint-10", 10)
    (job,) = node.wait_for_ended(1)
    assert job.state is State.FAILED
    assert "model.safetensors has 1 bytes" in (job.reason or "")


def test_the_upload_limit_of_the_settings_holds(node: Deployment) -> None:
    """upload_limit: the bytes of a job take at least as long as it says, several shards at once."""
    node.define(stages="  - tie\n  - reshard: {max_shard_size: 300KB}\n")
    node.start(CKPTD_UPLOAD_LIMIT="1MB/s")
    write_checkpoint(node.runs / "run" / "checkpoint-10", 10, rows=1200, layers=60)
    (job,) = node.wait_for_ended(1)
    assert job.state is State.PUBLISHED
    puts = node.hub.ledger.find("PUT")
    assert len(puts) > 3
    sent = sum(entry.bytes_in for entry in puts)
    assert job.outcome is not None
    assert job.outcome.duration_s > 0.9 * sent / 1_000_000 > 1


@pytest.fixture
def other(tmp_path: Path, hub: Running) -> Iterator[Deployment]:
    """A second daemon with a state folder of its own, against the same Hub."""
    root = tmp_path / "other"
    root.mkdir()
    deployment = Deployment(root, hub)
    yield deployment
    if deployment.process is not None and deployment.process.poll() is None:
        deployment.kill()


def test_two_daemons_on_one_folder_make_one_commit(node: Deployment, other: Deployment) -> None:
    """Both see the same checkpoint: one publishes it, the other says that it was there."""
    other.runs = node.runs
    for daemon in (node, other):
        daemon.define()
        daemon.start()
    write_checkpoint(node.runs / "run" / "checkpoint-10", 10)
    jobs = [*node.wait_for_ended(1), *other.wait_for_ended(1)]
    assert [job.state for job in jobs] == [State.PUBLISHED] * 2
    reasons = sorted(job.reason or "" for job in jobs)
    assert reasons == ["", "the Hub held exactly these files already"]
    assert len(node.commits()) == 1
    commits = {job.outcome.commit for job in jobs if job.outcome is not None}
    assert len(commits) == 1


def test_two_daemons_on_one_repo_make_a_commit_each(node: Deployment, other: Deployment) -> None:
    """Different checkpoints to one branch at the same time: both land whole, one after the other."""
    for daemon in (node, other):
        daemon.define()
        daemon.start()
    write_checkpoint(node.runs / "run" / "checkpoint-10", 10)
    write_checkpoint(other.runs / "run" / "checkpoint-20", 20)
    jobs = [*node.wait_for_ended(1), *other.wait_for_ended(1)]
    assert [job.state for job in jobs] == [State.PUBLISHED] * 2
    assert [job.reason for job in jobs] == [None, None]
    assert len(node.commits()) == 2


def test_a_daemon_says_which_other_has_its_state(node: Deployment) -> None:
    """Two daemons on one state folder: the second ends at once, with the exit code of a setting."""
    node.define()
    node.start()
    first, node.process = node.process, None
    node.launch()
    assert node.process is not None
    assert node.process.wait(30) == 78
    assert "another ckptd daemon uses this state folder" in node.log_path.read_text()
    node.process = first
