"""A token that anybody would know again, through whole jobs with every kind of failure: it is nowhere."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ckptd.hub.local import server
from ckptd.hub.local.accounts import EVERYWHERE, Account
from ckptd.hub.local.server import Running
from ckptd.jobs.job import State
from tests.flow.conftest import Deployment, write_checkpoint

TOKEN = "Sentinel+7f3a/9c.Zq-NotShapedLikeAToken=="
"""Of no form that a pattern would find; its characters are escaped in URLs."""
TRACES = [
    TOKEN.encode(),
    b"Sentinel",
    quote(TOKEN, safe="").encode(),
    base64.b64encode(TOKEN.encode()).rstrip(b"=")[:-2],
    TOKEN.encode("utf-16-le"),
]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Running]:
    """A Hub that knows this one token."""
    account = Account(name="ckptd", role="write", orgs=(EVERYWHERE,))
    with server.running(root=tmp_path / "hub", tokens={TOKEN: account}) as running:
        yield running


def traces_in(root: Path) -> list[str]:
    """Return the files below `root` that tell the token, in any form."""
    found = []
    for path in root.rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            found += [f"{path}: {trace!r}" for trace in TRACES if trace in content]
    return found


def processes(node: Deployment) -> list[int]:
    assert node.process is not None
    return [node.process.pid, *node.runner_pids()]


def proc(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


@pytest.fixture
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The token in a file of its own, outside of everything that is searched."""
    path = tmp_path_factory.mktemp("secret") / "token"
    path.touch(0o600)
    path.write_text(TOKEN)
    return path


def echo(status: int) -> Response:
    """A refusal by a server that repeats what it was sent, in its text and in a link."""
    text = f"bad header 'Authorization: Bearer {TOKEN}' or {TOKEN} in https://x/y?token={TOKEN}"
    return JSONResponse({"error": text}, status, {"X-Error-Message": text})


def broken(request: Request) -> Response | None:
    """Answer each run's own way to fail; in every answer stands the token."""
    path = request.url.path
    refused = {"unauthorized": 401, "forbidden": 403, "rejected": 400, "limited": 429}
    for run, status in refused.items():
        if f"ckptd/{run}/commit" in path:
            return echo(status)
    if "ckptd/nonsense/tree" in path:
        return JSONResponse([{"type": "file", "path": TOKEN, "oid": TOKEN, "size": TOKEN}])
    return None


RUNS = ["good", "unauthorized", "forbidden", "rejected", "limited", "nonsense"]


def test_the_token_is_nowhere_after_jobs_that_fail_in_every_way(
    node: Deployment, token_file: Path
) -> None:
    """State, staging, logs, rows, status, command lines and environments: no trace of the token."""
    node.hub.faults = broken
    node.define()
    environment = {"HF_TOKEN": "", "HF_TOKEN_PATH": str(token_file), "CKPTD_SLOTS": "2"}
    node.start(CKPTD_LOG_LEVEL="debug", CKPTD_RETRY_BASE="1h", CKPTD_RETRY_CAP="1h", **environment)
    for step, run in enumerate(RUNS):
        write_checkpoint(node.runs / run / f"checkpoint-{step}", step)
    settled = {State.PUBLISHED, State.FAILED, State.WAITING, State.RETRYING}
    seen: set[bytes] = set()

    def over() -> bool:
        for pid in processes(node):
            seen.update(proc(pid, name) for name in ("cmdline", "environ", "comm"))
        jobs = node.jobs()
        ended = [job for job in jobs if job.state in settled]
        busy = [job for job in jobs if job.state is State.RUNNING]
        # The one that waits long for the Hub inside its try may be left there.
        return len(ended) >= len(RUNS) - 1 and len(ended) + len(busy) == len(RUNS)

    node.wait_for(over, seconds=150)
    states = {job.spec.run: job.state for job in node.jobs()}
    assert states["good"] is State.PUBLISHED
    assert states["unauthorized"] is states["forbidden"] is State.WAITING
    assert states["rejected"] is states["nonsense"] is State.FAILED
    assert any(b"ckptd.runner" in text for text in seen)
    assert any(b"HF_TOKEN_PATH" in text for text in seen)
    assert not [text for text in seen if any(trace in text for trace in TRACES)]
    assert node.process is not None
    for pid in processes(node):
        assert re.search(rb"Max core file size +[01] +[01] ", proc(pid, "limits"))
    for pid in node.runner_pids():
        with contextlib.suppress(ProcessLookupError):  # one of them may just have ended
            os.kill(pid, signal.SIGABRT)  # what a crash in native code does
    command = [sys.executable, "-m", "ckptd.cli.main", "jobs", "ls", "--all", "--json"]
    env = {**os.environ, "CKPTD_STATE_DIR": str(node.state)}
    told = subprocess.run(command, env=env, capture_output=True, check=False)
    assert not [trace for trace in TRACES if trace in told.stdout + told.stderr]
    node.stop()
    assert b"[hidden]" in node.log_path.read_bytes()  # it was there to be hidden
    assert traces_in(node.root) == []


def test_the_logs_and_caches_of_xet_tell_no_token(node: Deployment, token_file: Path) -> None:
    """hf_xet in use, with its own log at its most talkative."""
    pytest.importorskip("hf_xet")
    node.define()
    node.start(
        HF_TOKEN="",
        HF_TOKEN_PATH=str(token_file),
        HF_HUB_DISABLE_XET="0",
        HF_XET_LOG_LEVEL="trace",
        RUST_LOG="trace",
    )
    write_checkpoint(node.runs / "run" / "checkpoint-1", 1, seed=os.getpid())
    (job,) = node.wait_for_ended(1)
    assert job.state is State.PUBLISHED
    assert node.hub.ledger.find("POST", "/xorbs/")
    node.stop()
    assert traces_in(node.root) == []


def test_a_command_tells_no_token_either(node: Deployment) -> None:
    """`ckptd run` with the token in its environment, an error that repeats it, and the traceback."""
    node.hub.faults = lambda request: echo(400) if "/commit/" in request.url.path else None
    pipeline = node.define()
    folder = node.runs / "run" / "checkpoint-1"
    write_checkpoint(folder, 1)
    env = {
        **os.environ,
        "HF_ENDPOINT": node.hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(node.root / "hf"),
        "CKPTD_STATE_DIR": str(node.state),
        "CKPTD_DEBUG": "1",
    }
    command = [sys.executable, "-c", "from ckptd.cli.main import main; main()"]
    command += ["run", str(folder), "-p", str(pipeline)]
    done = subprocess.run(command, env=env, capture_output=True, check=False)
    assert done.returncode == 6
    assert b"bad header" in done.stderr
    assert not [trace for trace in TRACES if trace in done.stdout + done.stderr]
    assert traces_in(node.root) == []


def test_a_redirect_elsewhere_does_not_carry_the_token(node: Deployment, tmp_path: Path) -> None:
    """307 to another host: the request may follow, the token stays here."""
    got: list[str] = []

    def listen(request: Request) -> Any:
        got.append(request.headers.get("authorization", ""))
        return echo(404)

    with server.running(root=tmp_path / "elsewhere", tokens={}, faults=listen) as elsewhere:
        away = elsewhere.url.replace("127.0.0.1", "localhost")
        node.hub.faults = lambda request: (
            Response(status_code=307, headers={"Location": f"{away}{request.url.path}"})
            if "/api/models/" in request.url.path
            else None
        )
        node.define()
        node.start()
        write_checkpoint(node.runs / "run" / "checkpoint-10", 10)
        node.wait_for(lambda: got)
        node.kill()
    assert set(got) == {""}


def test_what_the_daemon_writes_is_closed_to_others(node: Deployment) -> None:
    """The state folder, and the Hub's with its private repos, may be entered by this user only."""
    node.state.mkdir(mode=0o755)
    node.define()
    node.start()
    assert node.state.stat().st_mode & 0o777 == 0o700
    assert node.hub.root.stat().st_mode & 0o777 == 0o700
    assert not [path for path in node.root.rglob("*") if path.is_socket()]
