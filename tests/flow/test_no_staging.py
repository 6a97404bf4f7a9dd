"""`staging: none`: what goes to the Hub without lying on a disk is what would have lain there."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from huggingface_hub import HfApi, constants, snapshot_download
from safetensors.numpy import save_file
from starlette.requests import Request
from starlette.responses import JSONResponse

from ckptd import errors
from ckptd.aio.backoff import Backoff
from ckptd.checkpoint import checkpoint, content, listing
from ckptd.hub.local import server
from ckptd.hub.local.options import Choices
from ckptd.hub.local.server import Running
from ckptd.hub.local.traffic import Fault
from ckptd.jobs import progress
from ckptd.jobs.job import Outcome, State
from ckptd.pipeline import definition
from ckptd.plan import blocks, transfer
from ckptd.runner import job
from tests.conftest import TOKENS
from tests.flow.conftest import Deployment, write_checkpoint

VERBATIM = "- tie\n- reshard: {max_shard_size: 60KB}"
RESIZED = "- resize: {to: 530}\n- reshard: {max_shard_size: 20KB}"
DEQUANTIZED = "- dequantize: {dtype: bfloat16}\n- reshard: {max_shard_size: 60KB}"
QUANTIZED_PATH = Path(__file__).parents[1] / "data" / "quant" / "fp8_block_ragged"
SMALL_NAMES = {"config.json", "ckptd.json", "model.safetensors.index.json", "tokenizer.json"}


class Publisher:
    """Jobs on one checkpoint against one Hub, in this process."""

    def __init__(self, root: Path, source: Path, hub: Running) -> None:
        self.root = root
        self.source = source
        self.hub = hub
        self.reports: list[progress.Report] = []

    def work_path(self, repo: str) -> Path:
        """Where the job of a repo stages."""
        return self.root / "work" / repo

    def run(
        self,
        stages: str,
        *,
        staging: str = "none",
        repo: str = "run",
        lines: str = "",
        report: Callable[[progress.Report], None] | None = None,
        **changes: Any,
    ) -> Outcome:
        """Publish to `ckptd/<repo>`; a failure is raised as itself, not in a group."""
        work = self._work(stages, staging, repo, lines, **changes)
        told = report or self.reports.append
        try:
            return anyio.run(functools.partial(job.execute, work, report=told))
        except* errors.CkptdError as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            raise error from None

    def _work(self, stages: str, staging: str, repo: str, more: str, **changes: Any) -> job.Work:
        lines = "".join(f"  {line}\n" for line in stages.splitlines())
        wanted = definition.parse_definition(
            f"pipeline: test\nstages:\n{lines}push:\n  repo_id: ckptd/{repo}\n{more}"
            f"staging: {staging}\n",
            "test.yaml",
        )
        opened = checkpoint.open_checkpoint(self.source)
        given: dict[str, Any] = {
            "checkpoint_path": self.source,
            "name": self.source.name,
            "run": "run",
            "layout": "auto",
            "definition": wanted,
            "content_digest": content.digest(checkpoint.identifying_files(opened)),
            "fingerprint": listing.list_files(self.source).fingerprint_id,
            "pipeline_digest": definition.pipeline_digest(wanted),
            "work_path": self.work_path(repo),
            "output_path": None,
            "push": True,
            "endpoint": self.hub.url,
            "within": None,
            "byte_budget": 16 << 20,
            "num_threads": 2,
            "staging": staging,
            "hub_patience": Backoff(attempts=3, first_s=0.01, longest_s=0.02),
        }
        return job.Work(**(given | changes))

    def published(self, repo: str = "run") -> dict[str, bytes]:
        """Every file on the Hub, but for the one that names the repo's attributes."""
        folder = self.root / "downloads" / repo
        shutil.rmtree(folder, ignore_errors=True)
        snapshot_download(
            f"ckptd/{repo}", local_dir=folder, endpoint=self.hub.url, token=self.hub.token
        )
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != ".gitattributes" and ".cache" not in path.parts
        }

    def finished(self) -> list[progress.ShardFinished]:
        """The shards that were told."""
        return [each for each in self.reports if isinstance(each, progress.ShardFinished)]

    def sent(self) -> list[str]:
        """The sha256 of each whole object that went over LFS."""
        found = self.hub.ledger.find("PUT", "/lfs/")
        return [entry.path.rsplit("/", 1)[-1] for entry in found if entry.status == 200]


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny tensors fill many buffers and blocks."""
    monkeypatch.setattr(transfer, "BUFFER_BYTES", 10_000)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 16_384)
    monkeypatch.setattr(blocks, "_SMALL_RUN_BYTES", 3000)


@pytest.fixture(autouse=True)
def over_lfs(monkeypatch: pytest.MonkeyPatch, hub: Running) -> None:
    """LFS, unless a test says otherwise; the token is the Hub's."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", hub.token)


@pytest.fixture
def publisher(tmp_path: Path, hub: Running) -> Publisher:
    """A small Llama to publish."""
    source = tmp_path / "runs" / "checkpoint-7"
    write_checkpoint(source, 7, layers=8)
    return Publisher(tmp_path, source, hub)


def _use_quantized(publisher: Publisher) -> None:
    shutil.rmtree(publisher.source)
    ignored = shutil.ignore_patterns("reference*")
    shutil.copytree(QUANTIZED_PATH, publisher.source, ignore=ignored)


@pytest.mark.parametrize("way", ["lfs", "xet", "parts"])
@pytest.mark.parametrize("stages", [VERBATIM, RESIZED, DEQUANTIZED], ids=["tie", "resize", "fp8"])
def test_the_hub_gets_what_it_gets_from_a_disk(
    stages: str, way: str, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file is byte for byte the same; weights come to lie in no folder of ours."""
    if stages is DEQUANTIZED:
        _use_quantized(publisher)
    if way == "xet":
        pytest.importorskip("hf_xet")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with _hub_of(publisher, way):
        seen = _watch_work(publisher, monkeypatch)
        first = publisher.run(stages, repo="streamed")
        assert seen() <= SMALL_NAMES | {"README.md"}
        second = publisher.run(stages, staging="disk", repo="staged")
        assert first.state is second.state is State.PUBLISHED
        streamed, staged = publisher.published("streamed"), publisher.published("staged")
        ours = [name for name in streamed if name.endswith(".safetensors")]
        assert len(ours) == first.num_shards > 1
        cards = streamed.pop("README.md", b""), staged.pop("README.md", b"")
        assert streamed == staged
        assert cards[0].replace(b"streamed", b"staged") == cards[1]
        assert (first.computed_bytes, first.written_bytes) == (second.computed_bytes, 0)
        if way == "xet":
            assert not publisher.hub.ledger.find("PUT", "/lfs/")
        if way == "parts":
            assert len(publisher.hub.ledger.find("PUT", "/lfs/")) > 2 * first.num_shards


@contextlib.contextmanager
def _hub_of(publisher: Publisher, way: str) -> Iterator[None]:
    """Let the job have a Hub that takes large objects in parts."""
    if way != "parts":
        yield
        return
    root, choices = publisher.root / "parts", Choices(multipart_over_bytes=20_000)
    with server.running(root=root, tokens=TOKENS, choices=choices) as hub:
        publisher.hub = hub
        yield


def _watch_work(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[str]]:
    """Return what says which names were ever opened for writing in the staging folders."""
    opened: set[str] = set()
    real = os.open

    def watching(path: Any, flags: int, *args: Any, **more: Any) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(publisher.root / "work")):
            opened.add(Path(path).name.removeprefix(".ckptd-"))
        return real(path, flags, *args, **more)

    monkeypatch.setattr(os, "open", watching)
    return lambda: opened - {"ledger.jsonl"}


def test_a_pull_request_gets_it_too(publisher: Publisher) -> None:
    """Its weights come from where they lay; main has none of them, and the tag stands on its commit."""
    outcome = publisher.run(VERBATIM, lines="  create_pr: true\n  git_tag: step-7\n")
    api = HfApi(endpoint=publisher.hub.url, token=publisher.hub.token)
    assert outcome.pr_num is not None
    proposed = api.list_repo_files("ckptd/run", revision=f"refs/pr/{outcome.pr_num}")
    shards = [name for name in proposed if name.endswith(".safetensors")]
    assert len(shards) == outcome.num_shards
    assert not set(shards) & set(api.list_repo_files("ckptd/run"))
    assert [tag.target_commit for tag in api.list_repo_refs("ckptd/run").tags] == [outcome.commit]
    assert outcome.written_bytes == 0


def test_an_upload_limit_holds(publisher: Publisher) -> None:
    """Bytes that lie nowhere leave no faster than others: the read waits for the link."""
    nbytes = sum(path.stat().st_size for path in publisher.source.glob("*.safetensors"))
    began = time.monotonic()
    publisher.run(VERBATIM, upload_limit=nbytes)
    assert time.monotonic() - began > 0.5  # a second, less what may leave at once


def test_a_part_that_fails_is_read_again(publisher: Publisher) -> None:
    """A storage that takes half a body, or answers 500, gets the same part once more."""
    with _hub_of(publisher, "parts"):
        failures = iter([Fault.BREAK_BODY, JSONResponse({"error": "busy"}, 500), Fault.DROP])
        count = 0

        def hook(request: Request) -> Any:
            nonlocal count
            if request.method == "PUT" and "/lfs/" in request.url.path:
                count += 1
                if count % 3 == 2:
                    return next(failures, None)
            return None

        publisher.hub.faults = hook
        outcome = publisher.run(RESIZED)
        assert outcome.state is State.PUBLISHED
        assert next(failures, None) is None
        files = publisher.published()
        recorded = json.loads(files["ckptd.json"])["weights"]
        assert {each["name"]: each["sha256"] for each in recorded} == {
            name: hashlib.sha256(raw).hexdigest()
            for name, raw in files.items()
            if name.endswith(".safetensors")
        }


@pytest.mark.parametrize("way", ["lfs", "xet"])
def test_the_next_attempt_sends_what_is_missing(
    way: str, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards that the Hub has are neither read nor sent again; the others are, once."""
    if way == "xet":
        pytest.importorskip("hf_xet")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    publisher.hub.faults = lambda request: (
        JSONResponse({"error": "no more"}, 400)
        if "ckptd/run/preupload" in request.url.path and publisher.finished()
        else None
    )
    with pytest.raises(errors.HubRejected):
        publisher.run(RESIZED)
    publisher.hub.faults = None
    kept = sum(each.nbytes for each in publisher.finished())
    sent = publisher.sent()
    publisher.reports.clear()
    outcome = publisher.run(RESIZED)
    assert len(publisher.sent()) == len(set(publisher.sent())) > len(sent) or way == "xet"
    reused = outcome.reports["job"]["reused_shards"]
    assert 1 <= reused < outcome.num_shards
    assert sum(each.reused for each in publisher.finished()) == reused
    last = [each for each in publisher.reports if isinstance(each, progress.BytesMoved)][-1]
    for counter in (last.counters.read, last.counters.computed, last.counters.written):
        assert counter.done_bytes == counter.total_bytes
    whole = publisher.run(RESIZED, staging="disk", repo="whole")
    assert outcome.read_bytes < whole.read_bytes - kept // 2
    streamed, staged = publisher.published(), publisher.published("whole")
    streamed.pop("README.md", None), staged.pop("README.md", None)
    assert streamed == staged


@pytest.mark.parametrize("way", ["lfs", "xet"])
def test_what_the_hub_has_lost_is_sent_again(
    way: str, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All was sent, the commit was not made, and the Hub knows nothing of it: it gets all of it."""
    if way == "xet":
        pytest.importorskip("hf_xet")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    publisher.hub.faults = lambda request: (
        JSONResponse({"error": "no"}, 400) if "/commit/" in request.url.path else None
    )
    with pytest.raises(errors.HubRejected):
        publisher.run(RESIZED)
    sent = len(publisher.finished())
    with server.running(root=publisher.root / "other", tokens=TOKENS) as other:
        publisher.hub = other
        outcome = publisher.run(RESIZED)
        assert outcome.state is State.PUBLISHED
        assert len(publisher.published()) > sent == outcome.num_shards


def test_a_digest_is_not_taken_twice(publisher: Publisher) -> None:
    """What was hashed before the link broke is read once more, to be sent, and not twice."""
    broken = True

    def hook(request: Request) -> Any:
        if broken and request.method == "PUT" and "/lfs/" in request.url.path:
            return JSONResponse({"error": "no"}, 403)
        return None

    publisher.hub.faults = hook
    with pytest.raises(errors.HubError):
        publisher.run(VERBATIM)
    broken = False
    ledger = [
        json.loads(line)
        for line in (publisher.work_path("run") / "ledger.jsonl").read_text().splitlines()
    ]
    hashed = {line["hashed"]: line["sha256"] for line in ledger if "hashed" in line}
    assert hashed
    assert not any("sent" in line for line in ledger)
    publisher.run(VERBATIM)
    files = publisher.published()
    assert {name: hashlib.sha256(files[name]).hexdigest() for name in hashed} == hashed


def test_a_source_that_changes_voids_the_job(publisher: Publisher) -> None:
    """Weights that are written anew meanwhile are not published, and the error names them."""
    changed = False

    def hook(request: Request) -> Any:
        nonlocal changed
        if request.method == "PUT" and "/lfs/" in request.url.path and not changed:
            changed = True
            path = publisher.source / "model.safetensors"
            save_file({"other": np.zeros(9, np.float32)}, path, metadata={"format": "pt"})
        return None

    publisher.hub.faults = hook
    with pytest.raises(errors.SourceChanged, match=r"model\.safetensors"):
        publisher.run(VERBATIM)
    assert changed
    assert not publisher.hub.ledger.find("POST", "/commit/")


def test_a_value_that_does_not_fit_fails_the_job_by_its_tensor(publisher: Publisher) -> None:
    """A failure of the computation is raised as itself, at once, and not as one of the Hub's."""
    path = publisher.source / "model.safetensors"
    large = {"model.norm.weight": np.full(64, 1e30, np.float32)}
    save_file(large, path, metadata={"format": "pt"})
    with pytest.raises(errors.CheckFailed, match=r"model\.norm\.weight"):
        publisher.run("- cast: {dtype: float16}")
    assert not publisher.hub.ledger.find("POST", "/commit/")


def test_a_job_that_holds_its_push_makes_nothing(publisher: Publisher) -> None:
    """Held while it was planned: no weights anywhere, and the reason says so."""
    outcome = publisher.run("- footprint: {max: 1KB, on_exceed: hold_push}")
    assert outcome.state is State.HELD
    assert "nothing was made" in (outcome.reason or "")
    assert outcome.output_path is None
    assert not publisher.hub.ledger.find("PUT", "/lfs/")


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"output_path": Path("/tmp/out")}, "output folder"), ({"push": False}, "nothing is pushed")],
)
def test_what_needs_the_files_contradicts_it(
    changes: dict[str, Any], why: str, publisher: Publisher
) -> None:
    """An output folder, or no push: a usage error, before anything is read."""
    with pytest.raises(errors.UsageError, match=why):
        publisher.run(VERBATIM, **changes)
    assert not publisher.work_path("run").exists()


@pytest.mark.parametrize("victim", ["daemon", "runner"])
def test_killed_half_way_the_daemon_goes_on_with_what_is_missing(
    victim: str, node: Deployment
) -> None:
    """SIGKILL while shards are on their way: one commit, and no shard is sent twice."""
    killed = False
    puts: list[str] = []

    def hook(request: Request) -> Any:
        nonlocal killed
        if request.method == "PUT" and "/lfs/" in request.url.path:
            puts.append(request.url.path)
            if len(puts) == 6 and not killed:
                killed = True
                pids = node.runner_pids()
                assert node.process is not None
                os.kill(node.process.pid if victim == "daemon" else pids[0], 9)
                return Fault.DROP
        return None

    node.hub.faults = hook
    node.define(stages="  - tie\n  - reshard: {max_shard_size: 20KB}\n", push="staging: none\n")
    node.start()
    write_checkpoint(node.runs / "run" / "checkpoint-5", 5, layers=12)
    node.wait_for(lambda: killed)
    if victim == "daemon":
        assert node.process is not None
        node.process.wait()
        done = {each.path for each in node.hub.ledger.find("PUT", "/lfs/") if each.status == 200}
        node.start()
    else:
        done = set()
    (ended,) = node.wait_for_ended(1)
    assert ended.state is State.PUBLISHED
    assert len(node.commits()) == 1
    sent = [each.path for each in node.hub.ledger.find("PUT", "/lfs/") if each.status == 200]
    assert len(sent) == len(set(sent)) > 6
    assert done <= set(sent)
    assert ended.outcome is not None
    assert ended.outcome.reports["job"]["reused_shards"] >= 1
    assert not [*node.state.rglob("*.safetensors")]
    assert node.stop() == 0
    node.wait_for(node.clean)
