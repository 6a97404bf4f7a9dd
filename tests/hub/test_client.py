"""The adapter: one call, our values, our errors, and no endless waits."""

from __future__ import annotations

import hashlib
import logging
import socket
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest
from huggingface_hub import HfApi, constants

from ckptd import errors
from ckptd.hub import client, push, session

REPO = "acme/run"


@pytest.fixture
def lfs(hub: Any, monkeypatch: pytest.MonkeyPatch) -> client.HubClient:
    """A client that uploads over LFS and whose library does not really sleep."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    awake = types.SimpleNamespace(sleep=lambda _: None)
    monkeypatch.setattr("huggingface_hub.utils._http.time", awake)
    return client.HubClient(endpoint=hub.url, token=hub.token)


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def shard(tmp_path: Path) -> push.LocalFile:
    data = b"weights" * 50_000
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    return push.LocalFile(
        path=path,
        path_in_repo=path.name,
        nbytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )


async def upload(made: client.HubClient, file: push.LocalFile, meter: session.Meter) -> None:
    await made.upload([file], repo_id=REPO, revision="main", create_pr=False, meter=meter)


async def test_a_silent_server_is_given_up(silent: str) -> None:
    """A server that takes the request and never answers ends in a time-out, not in a hang."""
    timeouts = session.Timeouts(read_s=0.1)
    made = client.HubClient(endpoint=silent, token="hf_x", timeouts=timeouts)
    with anyio.fail_after(10), pytest.raises(errors.HubUnavailable, match="ReadTimeout"):
        await made.repo(REPO)


async def test_a_cancelled_call_ends_at_once(silent: str) -> None:
    """Cancellation does not wait for a server that does not answer."""
    timeouts = session.Timeouts(read_s=1.0)
    made = client.HubClient(endpoint=silent, token="hf_x", timeouts=timeouts)
    with anyio.fail_after(0.9), anyio.move_on_after(0.05) as scope:
        await made.repo(REPO)
    assert scope.cancelled_caught


async def test_nobody_listening_is_unavailable() -> None:
    """A refused connection is temporary and says where to look."""
    made = client.HubClient(endpoint="http://127.0.0.1:9", token="hf_x")
    with pytest.raises(errors.HubUnavailable, match="HF_ENDPOINT"):
        await made.whoami()


async def test_what_is_absent_is_not_found(lfs: client.HubClient) -> None:
    """Repo, revision and file: each says what was looked for."""
    with pytest.raises(errors.HubNotFound, match="looking up the repo"):
        await lfs.repo("acme/none")
    await lfs.create_repo(REPO, private=True)
    with pytest.raises(errors.HubNotFound, match="looking up revision dev"):
        await lfs.head(REPO, "dev")
    with pytest.raises(errors.HubNotFound, match=r"reading README\.md of main"):
        await lfs.read(REPO, "main", "README.md")


async def test_an_impossible_name_is_rejected(lfs: client.HubClient) -> None:
    """A repo_id that the library refuses is a final no with its reason."""
    with pytest.raises(errors.HubRejected, match="a//b"):
        await lfs.repo("a//b")


async def test_a_busy_namespace_does_not_spin(lfs: client.HubClient, wire: Any) -> None:
    """The 409 on which the library would ask again without a pause surfaces after one request."""
    text = "Cannot create repo: another conflicting operation is in progress"
    wire.on("POST", "/repos/create", wire.refuse(409, text), times=1000)
    with pytest.raises(errors.HubConflict):
        await lfs.create_repo(REPO, private=None)
    assert wire.count("POST", "/repos/create") == 1


async def test_a_repo_that_is_there_is_left_to_the_library(lfs: client.HubClient, hub: Any) -> None:
    """Code of others in this process that says `exist_ok` gets no error; the client gets one."""
    api = HfApi(endpoint=hub.url, token=hub.token)
    urls = [api.create_repo(REPO, exist_ok=True) for _ in range(2)]
    assert urls[0] == urls[1]
    with pytest.raises(errors.HubConflict):
        await lfs.create_repo(REPO, private=None)


@pytest.mark.parametrize("status", [429, 503])
async def test_reads_are_not_repeated_inside(lfs: client.HubClient, wire: Any, status: int) -> None:
    """A temporary answer surfaces at once with the wait it asks for: ckptd does the waiting."""
    wire.on("GET", "/tree/", wire.refuse(status, Retry_After="3600"), times=9)
    with pytest.raises(errors.HubUnavailable) as caught:
        await lfs.tree(REPO, "main")
    assert caught.value.retry_after_s == 3600
    assert wire.count("GET", "/tree/") == 1


async def test_a_long_wait_asked_by_storage_surfaces(
    lfs: client.HubClient, wire: Any, shard: push.LocalFile
) -> None:
    """Storage that asks for an hour does not keep a thread asleep for an hour."""
    await lfs.create_repo(REPO, private=True)
    wire.on("PUT", "", wire.refuse(503, Retry_After="3600"))
    with pytest.raises(errors.HubUnavailable) as caught:
        await upload(lfs, shard, lambda _: None)
    assert caught.value.retry_after_s == 3600
    assert wire.count("PUT") == 1


async def test_retries_of_storage_are_logged_without_signatures(
    lfs: client.HubClient, wire: Any, shard: push.LocalFile, caplog: pytest.LogCaptureFixture
) -> None:
    """What the library says about a repeated PUT names no signed link: it lets anybody write."""
    await lfs.create_repo(REPO, private=True)
    wire.on("PUT", "", wire.refuse(500))
    monitored = logging.getLogger("huggingface_hub")
    monitored.addHandler(caplog.handler)
    try:
        await upload(lfs, shard, lambda _: None)
    finally:
        monitored.removeHandler(caplog.handler)
    assert wire.count("PUT") == 2
    assert "/lfs/objects/" in caplog.text
    assert "signature=" not in caplog.text


async def test_sent_bytes_are_counted_once(
    lfs: client.HubClient, wire: Any, shard: push.LocalFile
) -> None:
    """The meter ends at the file's size, also when a broken connection makes it start over."""

    def breaks(request: httpx2.Request, forward: Callable[[], httpx2.Response]) -> httpx2.Response:
        next(iter(request.stream))
        raise httpx2.WriteError("broken pipe", request=request)

    await lfs.create_repo(REPO, private=True)
    wire.on("PUT", "", breaks)
    steps: list[int] = []
    await upload(lfs, shard, steps.append)
    assert wire.count("PUT") == 2
    assert min(steps) < 0
    assert sum(steps) == shard.nbytes


async def test_an_answer_that_is_no_json_is_named(lfs: client.HubClient, wire: Any) -> None:
    """A login page in between is not taken for a Hub."""

    def page(request: httpx2.Request, forward: Callable[[], httpx2.Response]) -> httpx2.Response:
        return httpx2.Response(200, html="<html>", request=request)

    wire.on("GET", "/api/models/", page)
    with pytest.raises(errors.HubUnavailable, match="not a JSON answer"):
        await lfs.repo(REPO)
