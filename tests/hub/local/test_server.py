"""Running the Hub: in a task group, beside signals, over restarts and kills."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import anyio
import httpx2
import pytest
from huggingface_hub import HfApi
from starlette.requests import Request

from ckptd import errors
from ckptd.hub.local import accounts, server
from ckptd.hub.local.traffic import Fault

ENDLESS = """
import os, sys
from pathlib import Path
from ckptd.hub.local import server
import anyio, functools
anyio.run(functools.partial(
    server.serve, root=Path(sys.argv[1]),
    ready=lambda hub: print(hub.url, hub.token, flush=True)))
"""


async def test_serve_starts_in_a_task_group_and_stops_when_cancelled(tmp_path: Path):
    """start() returns the address, requests work, cancelling ends it and frees port and folder."""
    signals = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    for _ in range(2):
        with anyio.fail_after(10):
            async with anyio.create_task_group() as group:

                async def serve(*, task_status: anyio.abc.TaskStatus[server.Running]) -> None:
                    await server.serve(root=tmp_path / "hub", task_status=task_status)

                hub = await group.start(serve)
                assert (
                    signal.getsignal(signal.SIGTERM),
                    signal.getsignal(signal.SIGINT),
                ) == signals
                async with httpx2.AsyncClient() as client:
                    answer = await client.get(f"{hub.url}/api/models")
                    assert answer.json() == []
                group.cancel_scope.cancel()


async def test_open_streams_do_not_hold_the_shutdown(tmp_path: Path):
    """A stalled request delays the stop by STOP_S at most."""
    with anyio.fail_after(server.STOP_S + 5):
        async with anyio.create_task_group() as group:
            seen = anyio.Event()

            def stall(_: Request) -> Fault:
                seen.set()
                return Fault.STALL

            async def serve(*, task_status: anyio.abc.TaskStatus[server.Running]) -> None:
                await server.serve(root=tmp_path / "hub", faults=stall, task_status=task_status)

            async def ask(url: str) -> None:
                async with httpx2.AsyncClient(timeout=None) as client:
                    with pytest.raises(httpx2.TransportError):
                        await client.get(url)

            hub = await group.start(serve)
            async with anyio.create_task_group() as asking:
                asking.start_soon(ask, hub.url)
                await seen.wait()
                group.cancel_scope.cancel()


def test_a_folder_is_served_once(hub):
    """A second Hub on the same folder is refused and says so."""
    with pytest.raises(errors.StorageFailed, match="another Hub"), server.running(root=hub.root):
        pass


def test_a_taken_port_is_a_usage_error(hub, tmp_path: Path):
    """The port of another server gives an error with a hint, before anything is made."""
    port = httpx2.URL(hub.url).port
    taken = server.running(root=tmp_path / "x", port=port or 0)
    with pytest.raises(errors.UsageError, match="cannot listen"), taken:
        pass
    assert not (tmp_path / "x").exists()


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path):
    """What cannot be a folder is StorageFailed with the path."""
    (tmp_path / "file").touch()
    with pytest.raises(errors.StorageFailed, match="file"), server.running(root=tmp_path / "file"):
        pass


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path):
    """Pointed at a folder that is no Hub's, it refuses and touches nothing."""
    (tmp_path / "incoming").mkdir()
    (tmp_path / "incoming" / "thesis.txt").touch()
    taken = server.running(root=tmp_path)
    with pytest.raises(errors.StorageFailed, match="holds no Hub"), taken:
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["incoming", "thesis.txt"]


@pytest.mark.parametrize("name", ["repos/models/acme/run/repo.json", "accounts.json"])
def test_broken_state_is_named(tmp_path: Path, name: str):
    """A state file that is not ours gives its path, and the folder is free again after."""
    root = tmp_path / "hub"
    with server.running(root=root) as hub:
        HfApi(endpoint=hub.url, token=hub.token).create_repo("acme/run")
    (root / name).write_text("{}" if name.startswith("repos") else "[]")
    for _ in range(2):
        with pytest.raises(errors.StorageFailed, match=name), server.running(root=root):
            pass


def test_it_binds_loopback(hub):
    """Nobody else is offered anything unless asked for."""
    assert httpx2.URL(hub.url).host == "127.0.0.1"


def test_a_restart_keeps_everything(tmp_path: Path, hub_tokens, add):
    """Repos, files, branches, tags, pull requests and visibility are there after a restart."""
    root = tmp_path / "hub"
    with server.running(root=root, tokens=hub_tokens) as hub:
        api = HfApi(endpoint=hub.url, token=hub.token)
        api.create_repo("acme/run", private=True)
        made = api.create_commit(
            "acme/run", [add("w.bin", b"\0abc"), add("c.json")], commit_message="a"
        )
        api.create_tag("acme/run", tag="t", revision=made.oid)
        api.create_commit("acme/run", [add("p.json")], commit_message="pull", create_pr=True)
        api.move_repo("acme/run", "acme/moved")
    with server.running(root=root, tokens=hub_tokens) as hub:
        api = HfApi(endpoint=hub.url, token=hub.token)
        refs = api.list_repo_refs("acme/moved", include_pull_requests=True)
        assert api.repo_info("acme/moved").private
        assert refs.tags[0].target_commit == api.repo_info("acme/moved").sha == made.oid
        assert len(refs.pull_requests or []) == 1
        assert Path(api.hf_hub_download("acme/moved", "w.bin")).read_bytes() == b"\0abc"


def test_the_first_start_makes_a_token_that_only_its_owner_reads(tmp_path: Path):
    """Without accounts a write token is made, kept with mode 0600, and the same next time."""
    with server.running(root=tmp_path / "hub") as hub:
        token = hub.token
        assert HfApi(endpoint=hub.url, token=token).whoami()["name"] == "ckptd"
    assert (tmp_path / "hub" / accounts.FILE_NAME).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "hub" / "secret").stat().st_mode & 0o777 == 0o600
    with server.running(root=tmp_path / "hub") as hub:
        assert hub.token == token


def test_nothing_acknowledged_is_lost_by_kill_9(tmp_path: Path):
    """Killed while commits come in: each acknowledged one is there, whole, and the Hub starts."""
    acknowledged: list[str] = []
    for round_ in range(2):
        argv = [sys.executable, "-c", ENDLESS, str(tmp_path / "hub")]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                url, token = process.stdout.readline().split()
                HfApi(endpoint=url, token=token).create_repo("acme/run", exist_ok=True)
                enough = threading.Event()
                client = threading.Thread(
                    target=_commit_until_killed, args=(url, token, round_, acknowledged, enough)
                )
                client.start()
                went_on = enough.wait(60)
            finally:
                process.kill()  # whatever happened: leaving the outer block waits for its end
            client.join()
            assert went_on
    with server.running(root=tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.url, token=hub.token)
        titles = {commit.title for commit in api.list_repo_commits("acme/run")}
        assert set(acknowledged) <= titles
        for name in acknowledged:
            assert Path(api.hf_hub_download("acme/run", name)).read_text() == name
        assert not list((hub.root / "incoming").iterdir())


def _commit_until_killed(
    url: str, token: str, round_: int, acknowledged: list[str], enough: threading.Event
) -> None:
    """Commit one file after the other, noting each that the Hub confirmed."""
    headers = {"Authorization": f"Bearer {token}"}
    with httpx2.Client(headers=headers, timeout=60) as client:  # a disk may stall for seconds
        for number in range(10_000):
            name = f"{round_}-{number}"
            file = {"path": name, "content": base64.b64encode(name.encode()).decode()}
            lines = [
                {"key": "header", "value": {"summary": name}},
                {"key": "file", "value": file},
            ]
            body = "\n".join(map(json.dumps, lines))
            try:
                answer = client.post(f"{url}/api/models/acme/run/commit/main", content=body)
            except httpx2.TransportError:
                return
            assert answer.status_code == 200
            acknowledged.append(name)
            if number == 4:
                enough.set()
