"""A push against a Hub that misbehaves on a real socket, or is changed by others meanwhile."""

from __future__ import annotations

import functools
import hashlib
import secrets
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.utils import _xet
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ckptd import errors
from ckptd.aio import backoff
from ckptd.hub import client, session
from ckptd.hub.local import server
from ckptd.hub.local.options import Choices
from ckptd.hub.local.traffic import Fault, Slow
from ckptd.hub.publisher import Happening, HubEvent, LocalFile, Publication, Publisher, Target

REPO = "acme/run"
TITLE = "run at step 100"
TARGET = Target(repo_id=REPO, commit_message=TITLE, card_tags=("ckptd",))
SHARD = "model-00001-of-00002.safetensors"
Hook = Callable[[Request], Any]


@dataclass
class Node:
    """One machine with files to push, and the Hub that it pushes to."""

    hub: Any
    folder: Path
    events: list[HubEvent] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def api(self) -> HfApi:
        return HfApi(endpoint=self.hub.url, token=self.hub.token)

    def file(self, name: str, content: bytes) -> LocalFile:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        return LocalFile(path=path, path_in_repo=name, nbytes=len(content), sha256=digest)

    def files(self, seed: str = "") -> list[LocalFile]:
        return [
            self.file("config.json", b"{}" + seed.encode()),
            self.file(SHARD, b"one" + seed.encode() * 3 + bytes(70_000)),
            self.file("model-00002-of-00002.safetensors", b"two" + seed.encode() + bytes(70_000)),
            self.file("model.safetensors.index.json", b"{}"),
        ]

    def publisher(self, target: Target = TARGET, push_id: str = "p1", **patience: Any) -> Publisher:
        options = {"endpoint": self.hub.url, "token": self.hub.token} | self.options
        return Publisher(
            target=target,
            push_id=push_id,
            hub=client.HubClient(**options),
            report=self.events.append,
            patience=backoff.Backoff(**patience),
            clock=backoff.Time(now_s=lambda: sum(self.waits), sleep=self._sleep, draw=lambda: 0.5),
        )

    async def _sleep(self, seconds: float) -> None:
        self.waits.append(seconds)

    async def push(
        self,
        files: list[LocalFile] | None = None,
        target: Target = TARGET,
        push_id: str = "p1",
        **patience: Any,
    ) -> Publication:
        files = files if files is not None else self.files()
        publisher = self.publisher(target, push_id, **patience)
        await publisher.open()
        async with anyio.create_task_group() as group:
            for file in files:
                group.start_soon(publisher.upload, file)
        return await publisher.commit(files)

    def titles(self, revision: str = "main", repo: str = REPO) -> list[str]:
        return [item.title for item in self.api.list_repo_commits(repo, revision=revision)]

    def paths(self, revision: str = "main") -> set[str]:
        tree = self.api.list_repo_tree(REPO, recursive=True, revision=revision)
        return {item.path for item in tree} - {".gitattributes", "README.md"}

    def tags(self) -> dict[str, str]:
        return {tag.name: tag.target_commit for tag in self.api.list_repo_refs(REPO).tags}

    def foreign(self, text: str = "theirs", **contents: bytes | None) -> str:
        operations = [
            CommitOperationDelete(name.replace("__", "."))
            if data is None
            else CommitOperationAdd(name.replace("__", "."), data)
            for name, data in contents.items()
        ]
        return self.api.create_commit(REPO, operations, commit_message=text).oid

    def happened(self, what: Happening) -> list[str]:
        return [event.text for event in self.events if event.happening is what]

    def whole(self, revision: str = "main", repo: str = REPO) -> bool:
        """Whether the weights on the Hub are those on this disk."""
        tree = self.api.list_repo_tree(repo, revision=revision)
        there = {item.path: item.lfs.sha256 for item in tree if getattr(item, "lfs", None)}
        return there == {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in self.folder.glob("*.safetensors")
        }


@pytest.fixture
def node(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    """A machine whose client uploads over LFS and does not really sleep."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    awake = types.SimpleNamespace(sleep=lambda _: None)
    monkeypatch.setattr("huggingface_hub.utils._http.time", awake)
    return Node(hub=hub, folder=tmp_path / "files")


def at(method: str, part: str, *answers: Any, then: Any = None) -> Hook:
    """Return a fault hook: the next requests that match get these answers, and later ones `then`."""
    left = list(answers)

    def hook(request: Request) -> Any:
        if request.method != method or part not in request.scope["path"]:
            return None
        return left.pop(0) if left else then

    return hook


def refusal(status: int, text: str = "no", **headers: str) -> Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return JSONResponse({"error": text}, status, named)


# Answers that are lost, connections that break --------------------------------------------------


@pytest.mark.parametrize(
    ("method", "part"),
    [
        ("POST", "/repos/create"),
        ("POST", "/branch/"),
        ("POST", "/preupload/"),
        ("POST", "/objects/batch"),
        ("PUT", "/lfs/objects"),
        ("POST", "/lfs-verify"),
        ("POST", "/commit/"),
        ("POST", "/tag/"),
    ],
)
@pytest.mark.parametrize("fault", [Fault.LOSE_ANSWER, Fault.CUT_ANSWER, Fault.DROP])
async def test_nothing_is_doubled_by_a_broken_connection(
    node: Node, method: str, part: str, fault: Fault
) -> None:
    """Whichever request breaks, done or not: one repo, one branch, one commit, one tag on it."""
    node.hub.faults = at(method, part, fault)
    target = replace(TARGET, revision="step-100", git_tag="v100")
    done = await node.push(target=target)
    assert node.titles("step-100").count(TITLE) == 1
    assert node.tags() == {"v100": done.commit}
    assert node.whole("step-100")
    refs = node.api.list_repo_refs(REPO)
    assert sorted(branch.name for branch in refs.branches) == ["main", "step-100"]


@pytest.mark.parametrize("part", ["/discussions", "/commit/refs%2Fpr%2F1", "/discussions/1/status"])
@pytest.mark.parametrize("fault", [Fault.LOSE_ANSWER, Fault.CUT_ANSWER, Fault.DROP])
async def test_no_second_pull_request_by_a_broken_connection(
    node: Node, part: str, fault: Fault
) -> None:
    """Making, filling and opening a pull request: whichever breaks, there is one, whole and open."""
    node.hub.faults = at("POST", part, fault)
    done = await node.push(target=replace(TARGET, create_pr=True))
    prs = list(node.api.get_repo_discussions(REPO))
    assert [(pr.num, pr.status) for pr in prs] == [(1, "open")]
    assert node.titles(done.revision).count(TITLE) == 1


REQUESTS = [
    ("GET", "/whoami-v2"),
    ("GET", "/api/models/acme/run"),
    ("POST", "/repos/create"),
    ("POST", "/branch/"),
    ("GET", "/refs"),
    ("POST", "/validate-yaml"),
    ("GET", "/resolve/"),
    ("POST", "/preupload/"),
    ("POST", "/objects/batch"),
    ("PUT", "/lfs/"),
    ("POST", "/lfs-verify"),
    ("GET", "/commits/"),
    ("GET", "/tree/"),
    ("POST", "/commit/"),
    ("POST", "/tag/"),
]


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
@pytest.mark.parametrize(("method", "part"), REQUESTS)
async def test_errors_of_the_server_pass(node: Node, method: str, part: str, status: int) -> None:
    """A 429 or 5xx of any request a push makes is followed by another try; the push lands once."""
    answered: list[str] = []
    hook = at(method, part, refusal(status), refusal(status))

    def noted(request: Request) -> Any:
        answer = hook(request)
        answered.extend([request.scope["path"]] if answer is not None else [])
        return answer

    node.hub.faults = noted
    done = await node.push(target=replace(TARGET, revision="step-100", git_tag="v100"))
    assert len(answered) == 2
    assert node.titles("step-100").count(TITLE) == 1
    assert node.tags() == {"v100": done.commit}


@pytest.mark.parametrize("fault", [Fault.BREAK_BODY, Fault.STALL_BODY, Fault.STALL_ANSWER])
async def test_an_upload_that_breaks_or_stalls_half_way_is_sent_again(
    node: Node, fault: Fault
) -> None:
    """Half a file and then nothing, or a reset: given up by the time-out, sent again, whole."""
    big = node.file("model.safetensors", b"big" + bytes(24_000_000))
    part = "/lfs-verify" if fault is Fault.STALL_ANSWER else "/lfs/objects"
    node.hub.faults = at("POST" if fault is Fault.STALL_ANSWER else "PUT", part, fault)
    node.options["timeouts"] = session.Timeouts(read_s=0.5, write_s=0.5)
    with anyio.fail_after(60):
        await node.push([big])
    assert node.whole()


@pytest.mark.parametrize("part", ["/commit/", "/tree/", "/whoami-v2"])
async def test_an_answer_that_stops_half_way_is_given_up(node: Node, part: str) -> None:
    """Headers, half a body, silence: the time-out ends it, and nothing is done twice."""
    method = "POST" if part == "/commit/" else "GET"
    node.hub.faults = at(method, part, Fault.STALL_ANSWER)
    node.options["timeouts"] = session.Timeouts(read_s=0.5, work_s=0.5)
    with anyio.fail_after(60):
        await node.push()
    assert node.titles().count(TITLE) == 1


async def test_a_slow_link_that_moves_is_not_given_up(node: Node) -> None:
    """An upload that takes several times the time-out passes in one try, as long as bytes move."""
    big = node.file("model.safetensors", b"big" + bytes(24_000_000))
    slow = Slow(pause=functools.partial(anyio.sleep, 0.03))
    node.hub.faults = at("PUT", "/lfs/objects", slow)
    node.options["timeouts"] = session.Timeouts(read_s=1.5, write_s=1.5)
    await node.push([big])
    (sent,) = node.hub.ledger.find("PUT")
    assert sent.seconds > 1.5
    assert node.whole()


# Waits that the Hub asks for --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "waited_s"),
    [
        ({"Retry_After": "7"}, 7),
        (
            {
                "Date": "Tue, 01 Jan 2030 12:00:00 GMT",
                "Retry_After": "Tue, 01 Jan 2030 12:00:40 GMT",
            },
            40,
        ),
        ({"RateLimit": '"api";r=0;t=55'}, 55),
        ({"Retry_After": "360000"}, 300),
    ],
)
@pytest.mark.parametrize("part", ["/preupload/", "/commit/", "/objects/batch"])
async def test_a_rate_limit_is_honoured_up_to_a_cap_and_told(
    node: Node, part: str, headers: dict[str, str], waited_s: int
) -> None:
    """Seconds, a date or RateLimit: waited so long, five minutes at most, and said beforehand."""
    node.hub.faults = at("POST", part, refusal(429, "slow down", **headers))
    await node.push()
    assert len(node.waits) == 1
    assert waited_s <= node.waits[0] < waited_s + 1
    assert [event.wait_s for event in node.events if event.wait_s] == node.waits
    assert node.titles().count(TITLE) == 1


async def test_storage_that_asks_for_a_long_wait_is_waited_for_in_the_open(node: Node) -> None:
    """A 429 on the bytes themselves is not slept over inside the client."""
    node.hub.faults = at("PUT", "/lfs/objects", refusal(429, Retry_After="60"))
    await node.push()
    assert 60 <= node.waits[0] < 61


# Tokens, permissions, room ----------------------------------------------------------------------


@pytest.mark.parametrize("part", ["/preupload/", "/objects/batch", "/commit/", "/tag/"])
async def test_a_token_that_expires_is_read_anew(
    node: Node, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """401 in the middle, and a new token in the file: the push goes on with it, at once."""
    path, new = tmp_path / "token", tmp_path / "new"
    for file, text in ((path, "hf_expires0000"), (new, node.hub.token)):
        file.touch(0o600)
        file.write_text(text)
    monkeypatch.setenv("HF_TOKEN_PATH", str(path))
    node.options["token"] = None
    expired = False

    def hook(request: Request) -> Response | None:
        nonlocal expired
        if request.method == "POST" and part in request.scope["path"] and not expired:
            new.rename(path)
            expired = True
        old = "hf_expires0000" in request.headers.get("authorization", "")
        if old and not expired:  # what a Hub does that knows both tokens
            headers = [
                (k, f"Bearer {node.hub.token}".encode() if k == b"authorization" else v)
                for k, v in request.scope["headers"]
            ]
            request.scope["headers"][:] = headers
        return None

    node.hub.faults = hook
    await node.push(target=replace(TARGET, git_tag="v1"))
    assert expired
    assert node.titles().count(TITLE) == 1


async def test_a_token_that_expires_without_a_new_one_waits(node: Node) -> None:
    """401 in the middle surfaces as a wait for a person, with nothing on the branch."""
    node.hub.faults = at("POST", "/commit/", then=refusal(401, "Invalid credentials"))
    with pytest.raises(errors.HubUnauthorized) as caught:
        await node.push()
    assert caught.value.retry is errors.Retry.WAIT
    assert TITLE not in node.titles()


def _full_object(request: Request) -> Response | None:
    if "/objects/batch" not in request.scope["path"]:
        return None
    problem = {"oid": "0" * 64, "size": 1, "error": {"code": 507, "message": "no room left"}}
    return JSONResponse({"transfer": "basic", "objects": [problem]})


@pytest.mark.parametrize(
    "hook",
    [
        at("POST", "/objects/batch", then=refusal(403, "Private storage limit reached")),
        at("POST", "/commit/", then=refusal(403, "You exceeded your storage quota")),
        at("PUT", "/lfs/objects", then=refusal(507, "Insufficient Storage")),
        at("POST", "/repos/create", then=refusal(402, "Upgrade your plan for private repos")),
        _full_object,
    ],
    ids=["403 batch", "403 commit", "507 bytes", "402 repo", "object"],
)
async def test_a_full_account_waits_in_clear_words(node: Node, hook: Hook) -> None:
    """However the Hub says that there is no room, the job waits for a person who is told so."""
    node.hub.faults = hook
    with pytest.raises((errors.HubFull, ExceptionGroup)) as caught:
        await node.push()
    error = caught.value
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, errors.HubFull)
    assert error.retry is errors.Retry.WAIT
    assert "storage or plan is used up" in str(error)
    assert TITLE not in (node.titles() if node.api.repo_exists(REPO) else [])


async def test_a_gated_repo_is_a_permission(node: Node) -> None:
    """403 GatedRepo: waits for access, before anything is sent."""
    node.api.create_repo(REPO)
    gated = refusal(403, "Access to this repo is gated", X_Error_Code="GatedRepo")
    node.hub.faults = at("GET", "/resolve/", then=gated)
    with pytest.raises(errors.HubForbidden, match="gated"):
        await node.publisher().open()
    assert node.hub.ledger.find("PUT") == []


# Content that is lost or damaged on the way -----------------------------------------------------


async def test_uploads_that_the_hub_collected_are_sent_once_more(node: Node, wire: Any) -> None:
    """A preuploaded file that is gone before the commit is sent again from disk, the others not."""
    files = node.files()
    collected = node.hub.store.blobs.path(files[1].sha256)
    wire.on("POST", "/commit/", wire.after(collected.unlink))
    await node.push(files)
    puts = Counter(entry.path for entry in node.hub.ledger.find("PUT"))
    assert sorted(puts.values()) == [1, 2]
    assert puts[f"/lfs/objects/{files[1].sha256}"] == 2
    assert node.whole()
    assert node.titles().count(TITLE) == 1


async def test_bytes_that_arrive_damaged_are_sent_again(node: Node) -> None:
    """Storage says that the sum is wrong: the file is whole here, so it is sent again."""
    node.hub.faults = at(
        "PUT", "/lfs/objects", refusal(400, "BadDigest"), refusal(400, "BadDigest")
    )
    await node.push()
    assert len(node.happened(Happening.SENT_AGAIN)) == 2
    assert node.whole()


@pytest.mark.parametrize("status", [400, 404, 422])
async def test_an_upload_that_is_not_confirmed_is_sent_again(node: Node, status: int) -> None:
    """The Hub, asked whether a file has arrived, says no: sent again, not taken for a lost repo."""
    node.hub.faults = at("POST", "/lfs-verify", refusal(status, "Object not found"))
    await node.push()
    assert len(node.happened(Happening.SENT_AGAIN)) == 1
    assert node.happened(Happening.BEGUN_AGAIN) == []


async def test_a_link_that_always_damages_is_named(node: Node) -> None:
    """Three damaged arrivals of a whole file: not for ever, and not this push's fault."""
    node.hub.faults = at("PUT", "/lfs/objects", then=refusal(400, "BadDigest"))
    (_, shard, *_) = node.files()
    publisher = node.publisher(attempts=1)
    await publisher.open()
    with pytest.raises(errors.HubUnavailable, match="arrived damaged 3 times"):
        await publisher.upload(shard)
    assert len(node.hub.ledger.find("PUT")) == 3


async def test_a_file_that_is_damaged_here_is_not_blamed_on_the_link(node: Node) -> None:
    """Same size, other bytes than its sha256: the file is named, and nothing is sent for ever."""
    (_, shard, *_) = node.files()
    wrong = replace(shard, sha256="0" * 64)
    publisher = node.publisher()
    await publisher.open()
    with pytest.raises(errors.SourceChanged, match=SHARD):
        await publisher.upload(wrong)
    assert len(node.hub.ledger.find("PUT")) == 1


# Xet --------------------------------------------------------------------------------------------


@pytest.fixture
def xet(node: Node, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    """The node with hf_xet in use, its patience short and its memory of other Hubs empty."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "10ms")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("HF_XET_CLIENT_READ_TIMEOUT", "1s")
    monkeypatch.setattr(_xet._GLOBAL_XET_HOLDER, "_session", None)
    yield node
    _xet._GLOBAL_XET_HOLDER._session = None


@pytest.mark.parametrize(
    ("method", "part", "answer"),
    [
        ("POST", "/xorbs/", 500),
        ("POST", "/xorbs/", 403),
        ("POST", "/xorbs/", 400),
        ("POST", "/shards", 500),
        ("POST", "/xorbs/", Fault.DROP),
        ("POST", "/xorbs/", Fault.STALL),
        ("POST", "/shards", Fault.LOSE_ANSWER),
    ],
)
async def test_xet_storage_that_fails_is_gone_round(
    xet: Node, method: str, part: str, answer: Any
) -> None:
    """However the Xet storage fails: after hf_xet's own tries the files go over LFS, and it is said."""
    failing = refusal(answer) if isinstance(answer, int) else answer
    xet.hub.faults = at(method, part, then=failing)
    with anyio.fail_after(60):
        await xet.push(xet.files(seed=secrets.token_hex(8)))
    assert len(xet.happened(Happening.XET_OFF)) == 1
    assert xet.whole()
    assert xet.titles().count(TITLE) == 1
    assert not session.uses_xet()


async def test_xet_content_that_is_gone_though_believed_there_goes_over_lfs(xet: Node) -> None:
    """The commit is refused, and again after the files were offered anew: hf_xet sends nothing."""
    files = xet.files(seed=secrets.token_hex(8))
    gone = refusal(400, "LFS pointer pointed to a file that does not exist")
    answers = [gone, gone]

    def hook(request: Request) -> Response | None:
        if "/commit/" not in request.scope["path"] or not answers:
            return None
        for file in files:
            xet.hub.store.blobs.path(file.sha256 or "").unlink(missing_ok=True)
        return answers.pop()

    xet.hub.faults = hook
    await xet.push(files)
    assert xet.happened(Happening.XET_OFF) == ["the Xet storage does not keep what it confirmed"]
    assert len(xet.hub.ledger.find("PUT")) == 2
    assert xet.whole()
    assert xet.titles().count(TITLE) == 1


async def test_an_xet_token_that_is_refused_surfaces(xet: Node) -> None:
    """403 on the Xet token means no write access: known before anything is sent."""
    xet.hub.faults = at("GET", "/xet-write-token/", then=refusal(403, "no write access"))
    with pytest.raises(errors.HubForbidden, match="no write access"):
        await xet.push()
    assert xet.hub.ledger.find("POST", "/xorbs/") == []


@pytest.fixture
def parted(node: Node, tmp_path: Path, hub_tokens: Any) -> Iterator[Node]:
    """The node before a Hub that takes large files in parts."""
    choices = Choices(multipart_over_bytes=1_000_000)
    with server.running(root=tmp_path / "parts", tokens=hub_tokens, choices=choices) as node.hub:
        yield node


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        ("PUT", 500),
        ("PUT", Fault.BREAK_BODY),
        ("PUT", Fault.LOSE_ANSWER),
        ("POST", 503),
        ("POST", Fault.LOSE_ANSWER),
        ("POST", 400),
    ],
)
async def test_a_part_or_its_completion_that_fails_is_sent_again(
    parted: Node, method: str, answer: Any
) -> None:
    """Uploads in parts: one that breaks, or a completion that is refused or lost, ends whole."""
    big = parted.file("model.safetensors", bytes(range(256)) * 14_000)
    failing = refusal(answer) if isinstance(answer, int) else answer
    parted.hub.faults = at(method, "/lfs/uploads/", failing)
    await parted.push([big])
    assert len(parted.hub.ledger.find("PUT", "/lfs/uploads/")) >= 4
    assert parted.whole()


# Others at work on the same repo ----------------------------------------------------------------


async def test_weights_that_somebody_pushes_meanwhile_are_kept(node: Node, wire: Any) -> None:
    """412: of the weights beside ours only those that were there before go; theirs stay, and why."""
    node.api.create_repo(REPO)
    node.foreign("old", **{"model-00001-of-00003__safetensors": b"old", "model__safetensors": b"o"})
    race = functools.partial(node.foreign, pytorch_model__bin=b"theirs", notes__txt=b"x")
    wire.on("POST", "/commit/", wire.after(race))
    files = node.files()
    await node.push(files)
    assert node.titles()[:2] == [TITLE, "theirs"]
    kept = {"pytorch_model.bin", "notes.txt"}
    assert node.paths() == {file.path_in_repo for file in files} | kept
    assert "pytorch_model.bin" in node.happened(Happening.KEPT)[0]


async def test_weights_that_appear_during_the_uploads_are_kept(node: Node) -> None:
    """What others push between our first look and our commit stays too, without any 412."""
    publisher, files = node.publisher(), node.files()
    node.api.create_repo(REPO)
    await publisher.open()
    for file in files:
        await publisher.upload(file)
    node.foreign(pytorch_model__bin=b"theirs")
    await publisher.commit(files)
    assert "pytorch_model.bin" in node.paths()


async def test_stale_weights_of_another_job_of_ours_go(node: Node, wire: Any) -> None:
    """412 by another push of ckptd: its weights are replaced, for ours is the later one."""
    node.api.create_repo(REPO)
    other = [node.file("other/model.safetensors", b"other" * 9)]
    theirs = [replace(other[0], path_in_repo="model.safetensors")]
    publisher, files = node.publisher(push_id="p2"), node.files()
    await publisher.open()
    await node.push(theirs, push_id="p1")
    await publisher.commit(files)
    assert node.paths() == {file.path_in_repo for file in files}


async def test_two_processes_with_the_same_push_make_one_commit(node: Node, wire: Any) -> None:
    """Two daemons that saw the same content: one commits, the other finds that and says so."""
    both = threading.Barrier(2, timeout=20)
    wire.on("POST", "/commit/", wire.after(both.wait), times=2)
    done: list[Publication] = []

    async def push() -> None:
        done.append(await node.push(files))

    node.api.create_repo(REPO)
    files = node.files()
    async with anyio.create_task_group() as group:
        group.start_soon(push)
        group.start_soon(push)
    assert sorted(one.created for one in done) == [False, True]
    assert done[0].commit == done[1].commit
    assert node.titles().count(TITLE) == 1


@pytest.mark.parametrize("again", [True, False], ids=["recreated", "deleted"])
@pytest.mark.parametrize(("method", "part"), [("POST", "/objects/batch"), ("POST", "/commit/")])
async def test_a_repo_that_is_deleted_meanwhile_is_filled_anew(
    node: Node, wire: Any, method: str, part: str, *, again: bool
) -> None:
    """Deleted, or deleted and made again, during the push: one whole commit stands in the end."""

    def delete() -> None:
        node.api.delete_repo(REPO)
        if again:  # unless the push's other upload has made it meanwhile
            node.api.create_repo(REPO, exist_ok=True)

    wire.on(method, part, wire.after(delete))
    await node.push()
    assert node.titles().count(TITLE) == 1
    assert node.whole()


async def test_a_repo_that_is_always_deleted_ends_in_words(node: Node, wire: Any) -> None:
    """Somebody who deletes the repo at every try wins in the end, and is not fought for ever."""
    wire.on("POST", "/commit/", wire.after(lambda: node.api.delete_repo(REPO)), times=9)
    with pytest.raises(errors.HubNotFound, match=REPO):
        await node.push()


@pytest.mark.parametrize("part", ["/preupload/", "/commit/"])
async def test_a_branch_that_is_deleted_meanwhile_is_made_anew(
    node: Node, wire: Any, part: str
) -> None:
    """The branch goes away during the push: it is made again from main, and gets its commit."""
    delete = functools.partial(node.api.delete_branch, REPO, branch="step-100")
    wire.on("POST", part, wire.after(delete))
    await node.push(target=replace(TARGET, revision="step-100"))
    assert node.titles("step-100").count(TITLE) == 1
    assert len(node.happened(Happening.BEGUN_AGAIN)) == 1


async def test_a_tag_that_is_taken_meanwhile_is_not_moved(node: Node, wire: Any) -> None:
    """Between our commit and our tag somebody took the name: said, with where it points."""
    first: list[str] = []

    def take() -> None:
        first.append(node.api.list_repo_commits(REPO)[-1].commit_id)
        node.api.create_tag(REPO, tag="v1", revision=first[0])

    wire.on("POST", "/tag/", wire.after(take))
    with pytest.raises(errors.HubRejected, match="git tag v1 exists"):
        await node.push(target=replace(TARGET, git_tag="v1"))
    assert node.tags() == {"v1": first[0]}
    assert node.titles().count(TITLE) == 1


@pytest.mark.parametrize("after_commit", [False, True])
async def test_a_pull_request_that_is_closed_meanwhile_is_said(
    node: Node, wire: Any, *, after_commit: bool
) -> None:
    """A person who closes the pull request is not overruled, and the job does not claim success."""

    def close(request: Any, forward: Any) -> Any:
        answer = forward() if after_commit else None
        node.api.change_discussion_status(REPO, 1, "closed")
        return answer or forward()

    wire.on("POST", "/commit/", close)
    with pytest.raises(errors.HubRejected, match="#1 of this push was closed"):
        await node.push(target=replace(TARGET, create_pr=True))
    assert node.api.get_discussion_details(REPO, 1).status == "closed"


async def test_a_pull_request_that_is_merged_meanwhile_is_published(node: Node, wire: Any) -> None:
    """Merged by a person before we open it: the push has succeeded."""

    def merge() -> None:
        node.api.change_discussion_status(REPO, 1, "open")
        node.api.merge_pull_request(REPO, 1)

    wire.on("POST", "/discussions/1/status", wire.after(merge))
    done = await node.push(target=replace(TARGET, create_pr=True))
    assert done.pr_num == 1
    assert node.api.get_discussion_details(REPO, 1).status == "merged"
    assert node.whole()


def _moved(old: str, new: str) -> Hook:
    def hook(request: Request) -> Response | None:
        path = request.scope["path"]
        if f"/{old}" not in path:
            return None
        query = request.scope["query_string"].decode()
        where = path.replace(f"/{old}", f"/{new}") + (f"?{query}" if query else "")
        return Response(status_code=307, headers={"Location": where})

    return hook


async def test_a_renamed_repo_is_followed(node: Node) -> None:
    """307 to the new name: the push goes there, says so, and its result names it."""
    node.api.create_repo(REPO)
    node.api.move_repo(REPO, "acme/renamed")
    node.hub.faults = _moved(REPO, "acme/renamed")
    done = await node.push(target=replace(TARGET, git_tag="v1", revision="step-1"))
    assert done.repo_id == "acme/renamed"
    assert node.happened(Happening.REPO_MOVED) == ["acme/renamed"]
    assert node.titles("step-1", repo="acme/renamed").count(TITLE) == 1
    assert node.whole("step-1", repo="acme/renamed")


@pytest.mark.parametrize("part", ["/objects/batch", "/commit/"])
async def test_a_repo_that_is_renamed_meanwhile_is_followed(
    node: Node, wire: Any, part: str
) -> None:
    """Renamed in the middle of a push: the redirects carry the rest of it."""

    def move() -> None:
        node.api.move_repo(REPO, "acme/renamed")
        node.hub.faults = _moved(REPO, "acme/renamed")

    wire.on("POST", part, wire.after(move))
    await node.push()
    assert node.titles(repo="acme/renamed").count(TITLE) == 1
    assert node.whole(repo="acme/renamed")


# Hubs that do it another way --------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 404, 405, 501])
async def test_a_hub_without_xet_may_say_so_in_any_way(
    node: Node, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """Whatever a Hub answers to a request for an Xet token that it does not know: LFS."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    node.hub.faults = at("GET", "/xet-write-token/", then=refusal(status))
    await node.push()
    assert node.waits == []
    assert node.whole()


async def test_the_push_id_is_found_on_a_later_page(
    node: Node, tmp_path: Path, hub_tokens: Any
) -> None:
    """A Hub that lists few commits at a time makes no second commit."""
    choices = Choices(commits_page=2)
    with server.running(root=tmp_path / "paged", tokens=hub_tokens, choices=choices) as node.hub:
        first = await node.push()
        for number in range(5):
            node.foreign(notes__txt=str(number).encode())
        again = await node.push()
    assert (again.commit, again.created) == (first.commit, False)


async def test_descriptions_may_be_absent_from_the_list(node: Node) -> None:
    """A list of commits without `message` is no reason to fail."""
    node.api.create_repo(REPO)
    head = node.api.repo_info(REPO).sha
    bare = [{"id": head, "title": "initial", "authors": [], "date": "2030-01-01T00:00:00.000Z"}]
    node.hub.faults = at("GET", "/commits/", JSONResponse(bare))
    await node.push()
    assert node.titles().count(TITLE) == 1
