"""A push, against a real Hub on loopback, with faults on the wire."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants

from ckptd import errors
from ckptd.aio import backoff
from ckptd.hub import client, push, session
from ckptd.hub.publisher import Happening, HubEvent, LocalFile, Publisher, Target

REPO = "acme/run"
TARGET = Target(repo_id=REPO, commit_message="run at step 100", card_tags=("ckptd",))


@dataclass
class Bench:
    """One Hub, one client, the wire between them, and files to push."""

    api: HfApi
    hub: client.HubClient
    wire: Any
    folder: Path
    events: list[HubEvent] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def publisher(self, target: Target = TARGET, push_id: str = "p1", **patience: Any) -> Publisher:
        return Publisher(
            target=target,
            push_id=push_id,
            hub=self.hub,
            report=self.events.append,
            patience=backoff.Backoff(**patience),
            clock=backoff.Time(now_s=lambda: sum(self.waits), sleep=self._sleep, draw=lambda: 0.5),
        )

    async def _sleep(self, seconds: float) -> None:
        self.waits.append(seconds)

    def file(self, name: str, content: bytes | None = None, *, seed: str = "") -> LocalFile:
        data = content if content is not None else (name + seed).encode() * 40_000
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        return LocalFile(path=path, path_in_repo=name, nbytes=len(data), sha256=digest)

    def files(self, seed: str = "") -> list[LocalFile]:
        return [
            self.file("config.json", b"{}" + seed.encode()),
            self.file("tokenizer_config.json", b"{}"),
            self.file("model-00001-of-00002.safetensors", seed=seed),
            self.file("model-00002-of-00002.safetensors", seed=seed),
            self.file("model.safetensors.index.json", b'{"a": 1}'),
        ]

    async def push(
        self, files: list[LocalFile], target: Target = TARGET, push_id: str = "p1", **patience: Any
    ) -> push.Publication:
        publisher = self.publisher(target, push_id, **patience)
        await publisher.open()
        for file in files:
            await publisher.upload(file)
        return await publisher.commit(files)

    def foreign(self, revision: str = "main", **contents: bytes) -> str:
        operations = [
            CommitOperationAdd(name.replace("__", "."), data) for name, data in contents.items()
        ]
        done = self.api.create_commit(REPO, operations, commit_message="theirs", revision=revision)
        return done.oid

    def commits(self, revision: str = "main") -> list[str]:
        return [item.title for item in self.api.list_repo_commits(REPO, revision=revision)]

    def paths(self, revision: str = "main") -> set[str]:
        tree = self.api.list_repo_tree(REPO, recursive=True, revision=revision)
        return {item.path for item in tree} - {".gitattributes"}

    def read(self, name: str, revision: str = "main") -> str:
        url = f"{self.api.endpoint}/{REPO}/resolve/{revision.replace('/', '%2F')}/{name}"
        headers = self.api._build_hf_headers()
        return httpx2.get(url, headers=headers, follow_redirects=True).text

    def happened(self, what: Happening) -> list[HubEvent]:
        return [event for event in self.events if event.happening is what]


@pytest.fixture
def bench(hub: Any, wire: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    api = HfApi(endpoint=hub.url, token=hub.token)
    made = client.HubClient(endpoint=hub.url, token=hub.token)
    return Bench(api=api, hub=made, wire=wire, folder=tmp_path / "files")


async def test_one_commit_holds_exactly_the_files(bench: Bench) -> None:
    """A first push makes the repo as asked and one commit with every file, byte for byte."""
    files = bench.files()
    done = await bench.push(files, replace(TARGET, private=True, commit_description="why"))
    info = bench.api.repo_info(REPO, files_metadata=True)
    assert info.private is True
    assert info.sha == done.commit
    assert done.created
    assert bench.commits().count("run at step 100") == 1
    assert bench.paths() == {file.path_in_repo for file in files} | {"README.md"}
    message = bench.api.list_repo_commits(REPO)[0].message
    assert message.splitlines()[0] == "why"
    assert push.carries(message, "p1")
    sent = {file.path_in_repo: file for file in files}
    for there in info.siblings or []:
        if there.rfilename in sent and there.lfs is not None:
            assert there.lfs.sha256 == sent[there.rfilename].sha256
    assert bench.wire.count("POST", "/commit/") == 1


async def test_the_branch_is_made_when_absent(bench: Bench) -> None:
    """A revision that does not exist starts at main, and main is not touched."""
    done = await bench.push(bench.files(), replace(TARGET, revision="step-100"))
    assert done.revision == "step-100"
    assert "run at step 100" in bench.commits("step-100")
    assert "run at step 100" not in bench.commits("main")


async def test_uploads_run_side_by_side(bench: Bench) -> None:
    """Two uploads are on the wire at the same time: each waits there for the other."""
    meeting = threading.Barrier(2, timeout=10)
    bench.wire.on("PUT", "", bench.wire.after(meeting.wait), times=2)
    publisher = bench.publisher()
    await publisher.open()
    files = bench.files()
    async with anyio.create_task_group() as uploads:
        for file in files:
            uploads.start_soon(publisher.upload, file)
    assert bench.wire.count("PUT") == 2
    await publisher.commit(files)


async def test_small_files_ask_once(bench: Bench) -> None:
    """Files that travel inside the commit cost one request together, not one each."""
    publisher = bench.publisher()
    await publisher.open()
    files = [bench.file(f"part{i}.json", b"{}") for i in range(9)]
    for file in files:
        await publisher.upload(file)
    await publisher.commit(files)
    assert bench.wire.count("POST", "/preupload/") == 1


async def test_upload_progress_reaches_the_size(bench: Bench) -> None:
    """Each large file is reported as uploaded once, with its size."""
    await bench.push(bench.files())
    done = {event.path_in_repo: event.nbytes for event in bench.happened(Happening.UPLOADED)}
    assert done["model-00001-of-00002.safetensors"] == 32 * 40_000
    assert len(bench.happened(Happening.UPLOADED)) == len(bench.files())


async def test_the_same_push_again_makes_no_commit(bench: Bench) -> None:
    """The push id is found in the commit list, even under later commits of others."""
    first = await bench.push(bench.files())
    bench.foreign(notes__txt=b"hello")
    again = await bench.push(bench.files())
    assert (again.commit, again.created) == (first.commit, False)
    assert bench.wire.count("POST", "/commit/") == 2  # ours, theirs


async def test_the_same_files_by_another_push_make_no_commit(bench: Bench) -> None:
    """A revision that holds exactly these files is left alone, and may be tagged."""
    first = await bench.push(bench.files())
    again = await bench.push(bench.files(), replace(TARGET, git_tag="t"), push_id="p2")
    assert (again.commit, again.created) == (first.commit, False)
    assert bench.commits().count("run at step 100") == 1
    assert {tag.name: tag.target_commit for tag in bench.api.list_repo_refs(REPO).tags} == {
        "t": first.commit
    }


async def test_stale_weights_go_and_foreign_files_stay(bench: Bench) -> None:
    """One commit replaces three shards by two: no old shard or index stays, nothing else goes."""
    bench.api.create_repo(REPO)
    bench.foreign(
        **{
            "model-00001-of-00003__safetensors": b"old",
            "model-00003-of-00003__safetensors": b"old",
            "model__safetensors": b"old",
            "pytorch_model__bin": b"old",
            "pytorch_model__bin__index__json": b"{}",
            "model__fp16__safetensors": b"variant",
            "onnx/model__safetensors": b"elsewhere",
            "adapter_model__safetensors": b"adapter",
            "notes__txt": b"notes",
        }
    )
    files = bench.files()
    await bench.push(files)
    assert bench.paths() - {"onnx"} == {file.path_in_repo for file in files} | {
        "README.md",
        "model.fp16.safetensors",
        "onnx/model.safetensors",
        "adapter_model.safetensors",
        "notes.txt",
    }
    assert bench.commits()[0] == "run at step 100"


async def test_the_card_keeps_its_body(bench: Bench) -> None:
    """Tags join those of the card on the Hub; every other byte stays; the local card does not win."""
    text = "---\nlicense: mit # ours\ntags:\n- x\nlibrary_name: timm\n---\n# Hello\n\ntext  \n"
    bench.api.create_repo(REPO)
    bench.foreign(README__md=text.encode())
    files = [*bench.files(), bench.file("README.md", b"the trainer's card")]
    await bench.push(files, replace(TARGET, card_tags=("ckptd", "x")))
    assert bench.read("README.md") == text.replace("- x\n", "- x\n- ckptd\n")


async def test_a_local_card_fills_an_empty_place(bench: Bench) -> None:
    """Where the revision has no card, the one among the files is published, with the tags."""
    await bench.push([*bench.files(), bench.file("README.md", b"# From the run\n")])
    assert bench.read("README.md").endswith("---\n# From the run\n")
    assert "- ckptd" in bench.read("README.md")


async def test_a_broken_card_is_refused_before_the_upload(bench: Bench) -> None:
    """Front matter that is not YAML is named, and nothing is sent."""
    bench.api.create_repo(REPO)
    bench.wire.on("POST", "/validate-yaml", bench.wire.refuse(200), times=1)
    bench.foreign(README__md=b"---\ntags: [x\n---\nbody")
    bench.wire.seen.clear()
    with pytest.raises(errors.HubRejected, match=r"acme/run: main: README\.md.*not valid YAML"):
        await bench.publisher().open()
    assert bench.wire.count("(POST|PUT)", "(preupload|commit|objects)") == 0


async def test_a_lost_commit_answer_is_no_second_commit(bench: Bench) -> None:
    """The commit landed, the connection broke: it is found by its push id."""
    bench.wire.on("POST", "/commit/", bench.wire.lose_answer)
    done = await bench.push(bench.files())
    assert done.created
    assert bench.wire.count("POST", "/commit/") == 1
    assert bench.commits().count("run at step 100") == 1
    assert bench.api.repo_info(REPO).sha == done.commit


async def test_a_lost_answer_and_a_kill_are_no_second_commit(bench: Bench) -> None:
    """The next life of a push that was killed while committing finds the commit."""
    bench.wire.on("POST", "/commit/", bench.wire.lose_answer)
    bench.wire.on("GET", "/commits/", bench.wire.never_arrive, times=9)
    publisher, files = bench.publisher(attempts=1), bench.files()
    await publisher.open()
    with pytest.raises(errors.HubUnavailable):
        await publisher.commit(files)
    bench.wire.faults.clear()
    done = await bench.push(files)
    assert bench.commits().count("run at step 100") == 1
    assert done.commit == bench.api.repo_info(REPO).sha


async def test_a_commit_that_never_arrived_is_repeated(bench: Bench) -> None:
    """A refused connection and a 503 are followed by another try, after growing waits."""
    bench.wire.on("POST", "/commit/", bench.wire.never_arrive)
    bench.wire.on("POST", "/commit/", bench.wire.refuse(503))
    await bench.push(bench.files())
    assert bench.commits().count("run at step 100") == 1
    assert len(bench.waits) == 2
    assert bench.waits[0] < bench.waits[1]


async def test_somebody_elses_commit_in_between_is_kept(bench: Bench) -> None:
    """412: the commit is made again on the new head, with the foreign file and card edit in it."""
    bench.api.create_repo(REPO)
    theirs = b"---\nlicense: mit\n---\nTheir words\n"
    race = bench.wire.after(lambda: bench.foreign(notes__txt=b"theirs", README__md=theirs))
    bench.wire.on("POST", "/commit/", race)
    done = await bench.push(bench.files())
    assert bench.commits()[:2] == ["run at step 100", "theirs"]
    assert bench.read("notes.txt") == "theirs"
    assert bench.read("README.md").endswith("Their words\n")
    assert "- ckptd" in bench.read("README.md")
    assert done.created
    assert len(bench.happened(Happening.REBASED)) == 1


async def test_a_foreign_change_of_our_file_is_overwritten(bench: Bench) -> None:
    """A file that was the same at upload time and is changed by others is sent nevertheless."""
    first = bench.files()
    await bench.push(first)
    race = bench.wire.after(lambda: bench.foreign(tokenizer_config__json=b"other"))
    bench.wire.on("POST", "/commit/", race)
    await bench.push(bench.files(seed="2"), push_id="p2")
    assert bench.read("tokenizer_config.json") == "{}"


async def test_endless_races_end(bench: Bench) -> None:
    """A revision that moves at every try gives up with a conflict that says so."""
    bench.api.create_repo(REPO)
    number = iter(range(1000))

    def race(request: httpx2.Request, forward: Callable[[], httpx2.Response]) -> httpx2.Response:
        if b'"theirs"' not in request.content:
            bench.foreign(notes__txt=str(next(number)).encode())
        return forward()

    bench.wire.on("POST", "/commit/", race, times=1000)
    with pytest.raises(errors.HubConflict, match="moved 11 times"):
        await bench.push(bench.files())
    assert "run at step 100" not in bench.commits()


async def test_a_rate_limit_is_waited_out(bench: Bench) -> None:
    """429 with Retry-After: waited at least that long, told before, and then committed."""
    bench.wire.on("POST", "/commit/", bench.wire.refuse(429, Retry_After="7"))
    await bench.push(bench.files())
    assert len(bench.waits) == 1
    assert 7 <= bench.waits[0] < 8
    told = bench.happened(Happening.WAITING)
    assert told[0].wait_s == bench.waits[0]
    assert bench.commits().count("run at step 100") == 1


async def test_a_rate_limit_during_the_upload_is_waited_out(bench: Bench) -> None:
    """The client's own uncapped sleep is not entered: ckptd waits, where it can be seen."""
    bench.wire.on("POST", "/objects/batch", bench.wire.refuse(429, RateLimit='"api";r=0;t=3000'))
    await bench.push(bench.files(), total_s=1000)
    assert 300 <= bench.waits[0] < 301


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, errors.HubUnauthorized), (403, errors.HubForbidden), (402, errors.HubFull)],
)
async def test_final_answers_are_not_repeated(
    bench: Bench, status: int, kind: type[errors.HubError]
) -> None:
    """A refusal of the commit surfaces at once, names repo and revision, and leaves no commit."""
    bench.wire.on("POST", "/commit/", bench.wire.refuse(status, "because"))
    with pytest.raises(kind, match=r"acme/run: committing to main: because"):
        await bench.push(bench.files())
    assert bench.waits == []
    assert "run at step 100" not in bench.commits()


async def test_a_bad_token_is_known_first(bench: Bench, hub: Any) -> None:
    """Nothing is made or sent with a token that the Hub does not know."""
    bench.hub = client.HubClient(endpoint=hub.url, token="hf_wrongwrongwrong")
    with pytest.raises(errors.HubUnauthorized) as caught:
        await bench.publisher().open()
    assert "HF_TOKEN" in str(caught.value)
    assert "hf_wrong" not in str(caught.value)
    assert bench.wire.count("POST") == 0


async def test_the_tag_points_at_the_commit(bench: Bench) -> None:
    """The git tag stands on exactly the commit that was made, also when its answer is lost."""
    bench.wire.on("POST", "/tag/", bench.wire.lose_answer)
    done = await bench.push(bench.files(), replace(TARGET, git_tag="step-100"))
    assert done.git_tag == "step-100"
    tags = {tag.name: tag.target_commit for tag in bench.api.list_repo_refs(REPO).tags}
    assert tags == {"step-100": done.commit}


async def test_a_tag_on_the_head_is_refused_before_other_content_is_committed(
    bench: Bench,
) -> None:
    """New content under a tag that is taken makes no commit: nothing is published by halves."""
    target = replace(TARGET, git_tag="step-100")
    first = await bench.push(bench.files(), target)
    with pytest.raises(errors.HubRejected, match="git tag step-100 exists"):
        await bench.push(bench.files(seed="other"), target, push_id="p2")
    assert bench.api.list_repo_commits(REPO)[0].commit_id == first.commit


async def test_a_tag_on_another_commit_is_refused_before_the_upload(bench: Bench) -> None:
    """ckptd moves no tags, and says so before anything is sent."""
    bench.api.create_repo(REPO)
    bench.api.create_tag(REPO, tag="v1")
    bench.foreign(notes__txt=b"x")
    bench.wire.seen.clear()
    with pytest.raises(errors.HubRejected, match="git tag v1 exists"):
        await bench.publisher(replace(TARGET, git_tag="v1")).open()
    assert bench.wire.count("POST", "preupload") == 0


async def test_a_public_repo_takes_no_private_push(bench: Bench) -> None:
    """private: true never publishes into a repo that everybody can read."""
    bench.api.create_repo(REPO, private=False)
    with pytest.raises(errors.HubRejected, match="the repo is public"):
        await bench.publisher(replace(TARGET, private=True)).open()


async def test_a_file_that_is_rewritten_is_not_committed(bench: Bench) -> None:
    """A file touched while it is on the wire voids the upload."""
    file = bench.file("model.safetensors")
    data = file.path.read_bytes()
    bench.wire.on("PUT", "", bench.wire.after(lambda: file.path.write_bytes(data)))
    publisher = bench.publisher()
    await publisher.open()
    with pytest.raises(errors.SourceChanged, match=r"model\.safetensors"):
        await publisher.upload(file)


async def test_a_failing_upload_inside_commit_keeps_its_class(bench: Bench) -> None:
    """Files that `commit` uploads itself fail with our error, not with a group of errors."""
    files = bench.files()[:3]
    publisher = bench.publisher()
    await publisher.open()
    files[2].path.write_bytes(b"short")
    with pytest.raises(errors.SourceChanged):
        await publisher.commit(files)
    assert bench.wire.count("POST", "/commit/") == 0


@pytest.mark.parametrize("how", ["shorter", "gone"])
async def test_a_file_that_is_not_what_was_said_is_not_sent(bench: Bench, how: str) -> None:
    """Size and presence are checked before the first byte."""
    file = bench.file("model.safetensors")
    publisher = bench.publisher()
    await publisher.open()
    if how == "gone":
        file.path.unlink()
    else:
        file.path.write_bytes(b"short")
    with pytest.raises(errors.SourceChanged):
        await publisher.upload(file)
    assert bench.wire.count("PUT") == 0


async def test_collected_uploads_are_sent_again(bench: Bench) -> None:
    """When the Hub has dropped uploads before the commit, they are sent from disk once more."""
    text = "LFS pointer pointed to a file that does not exist"
    bench.wire.on("POST", "/commit/", bench.wire.refuse(400, text))
    await bench.push(bench.files())
    assert bench.wire.count("POST", "/objects/batch") == 4
    assert bench.commits().count("run at step 100") == 1


async def test_uploads_are_not_repeated_after_a_restart(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second life sends no byte of a file that the Hub has, and does not hash it again."""
    publisher, files = bench.publisher(), bench.files()
    await publisher.open()
    for file in files:
        await publisher.upload(file)
    puts = bench.wire.count("PUT")
    monkeypatch.setattr("huggingface_hub.lfs.sha_fileobj", None)
    await bench.push(files)
    assert bench.wire.count("PUT") == puts == 2


async def test_a_gitignore_drops_nothing(bench: Bench) -> None:
    """A rule in the repo's .gitignore does not take a weight file out of the push."""
    bench.api.create_repo(REPO)
    bench.foreign(__gitignore=b"*.safetensors\n*.json\n")
    files = bench.files()
    await bench.push(files)
    assert bench.paths() >= {file.path_in_repo for file in files}


async def test_a_tree_that_differs_is_named(bench: Bench) -> None:
    """What the Hub holds is compared with what was sent: the differing file is in the error."""
    files = bench.files()
    publisher = bench.publisher()
    await publisher.open()
    bench.wire.on("POST", "/commit/", _then_tree_lies(bench))
    with pytest.raises(
        errors.CheckFailed, match=r"model-00001-of-00002\.safetensors has sha256 00"
    ):
        await publisher.commit(files)


def _then_tree_lies(bench: Bench) -> Any:
    def lie(request: httpx2.Request, forward: Callable[[], httpx2.Response]) -> httpx2.Response:
        items = forward().json()
        for item in items:
            if item["path"] == "model-00001-of-00002.safetensors":
                item["lfs"]["oid"] = "0" * 64
        return httpx2.Response(200, json=items, request=request)

    def act(request: httpx2.Request, forward: Callable[[], httpx2.Response]) -> httpx2.Response:
        bench.wire.on("GET", "/tree/", lie)
        return forward()

    return act


async def test_a_pull_request_is_a_draft_until_its_commit(bench: Bench) -> None:
    """Draft first, one commit on its ref, then open; main stays as it was."""
    statuses: list[str] = []

    def look() -> None:
        statuses.append(bench.api.get_discussion_details(REPO, 1).status)

    bench.wire.on("POST", "/commit/refs", bench.wire.after(look))
    done = await bench.push(bench.files(), replace(TARGET, create_pr=True))
    assert statuses == ["draft"]
    assert (done.pr_num, done.revision) == (1, "refs/pr/1")
    assert bench.api.get_discussion_details(REPO, 1).status == "open"
    assert bench.commits("refs/pr/1").count("run at step 100") == 1
    assert "run at step 100" not in bench.commits("main")
    assert done.pr_url == f"{bench.api.endpoint}/{REPO}/discussions/1"


PR = replace(TARGET, create_pr=True)


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/discussions$"), ("POST", "/commit/"), ("POST", "/discussions/1/status")],
)
async def test_a_lost_answer_is_no_second_pull_request(
    bench: Bench, method: str, path: str
) -> None:
    """Whichever answer of the pull request's making is lost, there is one, with one commit, open."""
    bench.wire.on(method, path, bench.wire.lose_answer)
    done = await bench.push(bench.files(), PR)
    prs = list(bench.api.get_repo_discussions(REPO))
    assert [(pr.num, pr.status) for pr in prs] == [(1, "open")]
    assert bench.commits("refs/pr/1").count("run at step 100") == 1
    assert done.pr_num == 1


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/discussions$"), ("POST", "/commit/"), ("POST", "/discussions/1/status")],
)
async def test_a_killed_pull_request_is_finished(bench: Bench, method: str, path: str) -> None:
    """A push that ends in the middle is taken up: one pull request, one commit, open."""

    def killed(request: httpx2.Request, forward: Callable[[], httpx2.Response]) -> httpx2.Response:
        forward()
        raise ZeroDivisionError

    bench.wire.on(method, path, killed)
    with pytest.raises(ZeroDivisionError):
        await bench.push(bench.files(), PR)
    done = await bench.push(bench.files(), PR)
    prs = list(bench.api.get_repo_discussions(REPO))
    assert [(pr.num, pr.status) for pr in prs] == [(1, "open")]
    assert bench.commits("refs/pr/1").count("run at step 100") == 1
    assert done.commit == bench.api.repo_info(REPO, revision="refs/pr/1").sha


@pytest.mark.parametrize("path", ["/repos/create", "/branch/", "/commit/", "/tag/", "/preupload/"])
async def test_a_killed_push_is_finished(bench: Bench, path: str) -> None:
    """A push that ends right after any of its writes is taken up: one commit, tagged, on its branch."""

    def killed(request: httpx2.Request, forward: Callable[[], httpx2.Response]) -> httpx2.Response:
        forward()
        raise ZeroDivisionError

    target = replace(TARGET, revision="step-100", git_tag="v100")
    bench.wire.on("POST", path, killed)
    with pytest.raises((ZeroDivisionError, ExceptionGroup)):
        await bench.push(bench.files(), target)
    done = await bench.push(bench.files(), target)
    assert bench.commits("step-100").count("run at step 100") == 1
    tags = {tag.name: tag.target_commit for tag in bench.api.list_repo_refs(REPO).tags}
    assert tags == {"v100": done.commit}


async def test_two_pushes_at_once_both_land(bench: Bench) -> None:
    """Two writers of one branch: the Hub's parent check picks an order, and neither is lost."""
    bench.api.create_repo(REPO)
    one = replace(TARGET, commit_message="first")
    two = replace(TARGET, commit_message="second")
    both_ready = threading.Barrier(2, timeout=10)
    bench.wire.on("POST", "/commit/", bench.wire.after(both_ready.wait), times=2)
    async with anyio.create_task_group() as group:
        group.start_soon(bench.push, [bench.file("a.json", b"1")], one, "p1")
        group.start_soon(bench.push, [bench.file("b.json", b"2")], two, "p2")
    assert sorted(bench.commits()[:2]) == ["first", "second"]
    assert bench.paths() == {"a.json", "b.json", "README.md"}


async def test_no_tags_make_no_card(bench: Bench) -> None:
    """Without tags a push adds no README.md of its own."""
    files = bench.files()
    await bench.push(files, replace(TARGET, card_tags=()))
    assert bench.paths() == {file.path_in_repo for file in files}


async def test_two_pushes_are_two_pull_requests(bench: Bench) -> None:
    """Another push with the same title gets a pull request of its own."""
    first = await bench.push(bench.files(), PR)
    second = await bench.push(bench.files(seed="2"), PR, push_id="p2")
    assert (first.pr_num, second.pr_num) == (1, 2)


async def test_files_that_are_there_need_no_pull_request(bench: Bench) -> None:
    """When main holds exactly these files, no pull request is made."""
    await bench.push(bench.files())
    done = await bench.push(bench.files(), PR, push_id="p2")
    assert (done.created, done.pr_num) == (False, None)
    assert list(bench.api.get_repo_discussions(REPO)) == []


async def test_a_pull_request_against_a_branch_is_refused(bench: Bench) -> None:
    """The Hub makes pull requests against main; anything else is said before the first request."""
    with pytest.raises(errors.HubRejected, match="not against dev"):
        await bench.publisher(replace(PR, revision="dev")).open()
    assert bench.wire.seen == []


async def test_a_hub_without_xet_gets_lfs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no Xet token is served, uploads go over LFS, and that is told."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    bench.wire.on("GET", "/xet-write-token/", bench.wire.refuse(404))
    await bench.push(bench.files())
    assert not session.uses_xet()
    assert len(bench.happened(Happening.XET_OFF)) == 1
    assert bench.wire.count("PUT") == 2


async def test_an_upload_that_xet_gives_up_goes_over_lfs(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After hf_xet's own retries the file is sent over LFS, and so are all later ones."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)

    def broken(**_: Any) -> None:
        raise ConnectionError("the storage hung up")

    monkeypatch.setattr("huggingface_hub._commit_api._upload_xet_files", broken)
    await bench.push(bench.files())
    assert [event.text for event in bench.happened(Happening.XET_OFF)] != []
    assert bench.wire.count("PUT") == 2
    assert bench.commits().count("run at step 100") == 1


@pytest.mark.parametrize("create_pr", [False, True])
async def test_xet_publishes_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, create_pr: bool
) -> None:
    """Over Xet: the same one commit, the same sha256, progress up to the size, no LFS upload."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    # hf_xet remembers what it sent to any Hub of this name: new content for every run.
    files = bench.files(seed=os.urandom(8).hex())
    done = await bench.push(files, replace(TARGET, create_pr=create_pr))
    assert bench.happened(Happening.XET_OFF) == []
    assert bench.wire.count("PUT") == 0
    assert bench.commits(done.revision).count("run at step 100") == 1
    sent = {file.path_in_repo: file.sha256 for file in files}
    for item in bench.api.list_repo_tree(REPO, revision=done.revision):
        lfs = getattr(item, "lfs", None)
        assert lfs is None or lfs.sha256 == sent[item.path]
