"""The ledger and the fault hook: what tests of ckptd lean on."""

from __future__ import annotations

import threading

import httpx2
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from structlog.testing import capture_logs

from ckptd.hub.local.traffic import Fault


def on(method: str, contains: str, fault: Response | Fault, times: int = 1):
    """Return a hook that fails the first matching requests."""
    left = [times]

    def hook(request: Request) -> Response | Fault | None:
        if request.method == method and contains in request.url.path and left[0]:
            left[0] -= 1
            return fault
        return None

    return hook


def test_every_request_stands_in_the_ledger(hub, api: HfApi, repo: str, add):
    """Method, path as sent, query, status and body sizes, in order, as soon as answered."""
    hub.ledger.clear()
    api.create_commit(repo, [add("w.bin", b"\0" * 5000)], commit_message="a", create_pr=True)
    entries = list(hub.ledger)
    assert [(e.method, e.path.rsplit("/", 2)[-2], e.status) for e in entries] == [
        ("POST", "preupload", 200),
        ("POST", "objects", 200),
        ("PUT", "objects", 200),
        ("POST", "run", 200),
        ("POST", "commit", 200),
    ]
    assert entries[2].bytes_in == 5000
    assert entries[4].query == "create_pr=1"
    assert hub.ledger.bytes_in >= 5000


@pytest.mark.parametrize("status", [401, 403, 404, 409, 412, 500])
def test_an_injected_answer_reaches_the_client(hub, api: HfApi, repo: str, add, status: int):
    """A Response in place of the work: the client raises it, and nothing was done."""
    body = JSONResponse({"error": "injected"}, status, {"X-Error-Message": "injected"})
    hub.faults = on("POST", "/commit/", body)
    with pytest.raises(HfHubHTTPError, match="injected") as caught:
        api.create_commit(repo, [add("a.json")], commit_message="a")
    assert caught.value.response.status_code == status
    assert caught.value.request_id
    assert len(api.list_repo_commits(repo)) == 1


def test_a_rate_limit_is_waited_for_by_the_client(hub, api: HfApi, repo: str, add):
    """429 with Retry-After on an upload: the client comes again and succeeds."""
    hub.faults = on("PUT", "/lfs/", Response(status_code=429, headers={"Retry-After": "0"}))
    api.create_commit(repo, [add("w.bin", b"\0" * 300_000)], commit_message="a")
    assert [entry.status for entry in hub.ledger.find("PUT")] == [429, 200]


def test_a_dropped_request_did_nothing(hub, api: HfApi, repo: str, add):
    """DROP closes the connection before the work."""
    hub.faults = on("POST", "/commit/", Fault.DROP)
    with pytest.raises(httpx2.TransportError):
        api.create_commit(repo, [add("a.json")], commit_message="a")
    assert len(api.list_repo_commits(repo)) == 1


def test_a_lost_answer_left_its_commit(hub, api: HfApi, repo: str, add):
    """LOSE_ANSWER does the work and closes the connection without a byte of the answer."""
    hub.faults = on("POST", "/commit/", Fault.LOSE_ANSWER)
    with pytest.raises(httpx2.TransportError):
        api.create_commit(repo, [add("a.json")], commit_message="a")
    assert [commit.title for commit in api.list_repo_commits(repo)] == ["a", "initial commit"]
    assert hub.ledger.find("POST", "/commit/")[0].status == 200


def test_a_stalled_request_times_out_in_the_client(hub, repo: str):
    """STALL never answers; the Hub goes on serving others, and stops without waiting for it."""
    hub.faults = on("GET", "/refs", Fault.STALL)
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.get(f"{hub.url}/api/models/{repo}/refs", timeout=0.1)
    assert httpx2.get(f"{hub.url}/api/models/{repo}/refs").status_code == 200


def test_an_unexpected_error_is_a_readable_500(hub, repo: str, monkeypatch):
    """A bug in the Hub costs one request, with an id to find it by."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(type(hub.store), "ids", broken)
    with capture_logs() as logs:
        answer = httpx2.get(f"{hub.url}/api/models")
    assert isinstance(logs[0]["exc_info"], ZeroDivisionError)
    assert (answer.status_code, answer.json()) == (500, {"error": "Internal error"})
    assert answer.headers["X-Request-Id"]
    assert httpx2.get(f"{hub.url}/api/models/{repo}").status_code == 200


def test_a_full_disk_is_507(hub, api: HfApi, repo: str, monkeypatch):
    """ENOSPC while storing becomes 507 with the reason."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(hub.store), "write_commit", full)
    with capture_logs(), pytest.raises(HfHubHTTPError, match="No space left") as caught:
        api.super_squash_history(repo)
    assert caught.value.response.status_code == 507


def test_parallel_commits_all_land(api: HfApi, repo: str, add):
    """Commits without a parent from many threads serialise; each path is there in the end."""
    names = [f"{n}.json" for n in range(6)]
    threads = [
        threading.Thread(
            target=api.create_commit, args=(repo, [add(name)]), kwargs={"commit_message": name}
        )
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(names) <= set(api.list_repo_files(repo))
    assert len(api.list_repo_commits(repo)) == 7
