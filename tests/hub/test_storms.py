"""Pushes through a storm of random faults, with cuts and new beginnings: one commit, whole, each time."""

from __future__ import annotations

import asyncio
import functools
import os
import random
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from huggingface_hub import constants
from starlette.requests import Request
from starlette.responses import JSONResponse

from ckptd import errors
from ckptd.hub.local.store import Store
from ckptd.hub.local.traffic import Fault
from ckptd.hub.publisher import LocalFile, Publication, Target
from tests.hub.test_faults import REPO, TARGET, TITLE, Node

NUM_STORMS = int(os.environ.get("CKPTD_TEST_STORMS", "4"))
"""More of them as an optional long run."""
STALLS = {Fault.STALL, Fault.STALL_BODY, Fault.STALL_ANSWER}
"""They cost a time-out each; other tests have them."""
FAULTS: list[Any] = [429, 500, 502, 503, 504, *(fault for fault in Fault if fault not in STALLS)]
LONGEST_ROW = 3
"""Faults in a row of one kind of request: fewer than a push has tries."""


class Storm:
    """Fails requests at random, loses what was uploaded, and ends the life of the push."""

    def __init__(self, files: list[LocalFile], store: Store, dice: random.Random) -> None:
        self.files = files
        self.store = store
        self.dice = dice
        self.rows: Counter[str] = Counter()
        self.end: Callable[[], object] = lambda: None

    def __call__(self, request: Request) -> Any:
        path = request.scope["path"]
        kind = f"{request.method} {path.split('/objects')[0]}"
        if self.dice.random() < 0.02:
            self.end()
        if "/commit/" in path and self.dice.random() < 0.1:  # what no commit refers to is collected
            lost = self.dice.choice([file.sha256 or "" for file in self.files])
            self.store.blobs.path(lost).unlink(missing_ok=True)
        if self.dice.random() > 0.25 or self.rows[kind] >= LONGEST_ROW:
            self.rows[kind] = 0
            return None
        self.rows[kind] += 1
        fault = self.dice.choice(FAULTS)
        return JSONResponse({"error": "storm"}, fault) if isinstance(fault, int) else fault


@pytest.fixture
def node(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    """A machine whose client uploads over LFS and does not really sleep."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    awake = types.SimpleNamespace(sleep=lambda _: None)
    monkeypatch.setattr("huggingface_hub.utils._http.time", awake)
    return Node(hub=hub, folder=tmp_path / "files")


async def weather(node: Node, seed: int, target: Target) -> Publication:
    """Push through a storm until it is done, beginning anew after every end and every failure."""
    storm = gather(node, seed)
    loop = asyncio.get_running_loop()
    with anyio.fail_after(120):
        for _ in range(60):
            with anyio.CancelScope() as life:
                storm.end = functools.partial(loop.call_soon_threadsafe, life.cancel)
                done = await attempt(node, storm.files, target)
                if done is not None:
                    return done
    raise AssertionError("never done")


def gather(node: Node, seed: int) -> Storm:
    """Let the storm of this number begin."""
    storm = Storm(node.files(seed=str(seed)), node.hub.store, random.Random(seed))
    node.hub.faults = storm
    return storm


async def attempt(node: Node, files: list[LocalFile], target: Target) -> Publication | None:
    """Push once; None where that failed in a way that is tried again."""
    try:
        return await node.push(files, target, "p1")
    except (errors.HubUnavailable, errors.HubConflict):
        return None
    except ExceptionGroup as caught:
        if caught.split((errors.HubUnavailable, errors.HubConflict))[1] is not None:
            raise
        return None


@pytest.mark.parametrize("seed", range(NUM_STORMS))
async def test_a_push_through_a_storm_lands_once(node: Node, seed: int) -> None:
    """Random errors, lost answers, broken bodies, kills: one commit with its tag, and every byte."""
    done = await weather(node, seed, replace(TARGET, git_tag="v1", revision="step-1"))
    node.hub.faults = None
    assert node.titles("step-1").count(TITLE) == 1
    assert node.tags() == {"v1": done.commit}
    assert node.whole("step-1")


@pytest.mark.parametrize("seed", range(NUM_STORMS))
async def test_a_pull_request_through_a_storm_is_one(node: Node, seed: int) -> None:
    """The same for a pull request: one, open, with one commit."""
    done = await weather(node, seed, replace(TARGET, create_pr=True))
    node.hub.faults = None
    assert [pr.status for pr in node.api.get_repo_discussions(REPO)] == ["open"]
    assert node.titles(done.revision).count(TITLE) == 1
    assert node.whole(done.revision)


@pytest.mark.parametrize("seed", range(NUM_STORMS))
async def test_two_daemons_in_one_storm_make_one_commit(node: Node, seed: int) -> None:
    """Both have the same work at the same time: one commit with its tag, and both know it."""
    files = gather(node, seed).files
    target = replace(TARGET, git_tag="v1")
    commits: list[str] = []

    async def daemon() -> None:
        done = None
        while done is None:
            done = await attempt(node, files, target)
        commits.append(done.commit)

    with anyio.fail_after(120):
        async with anyio.create_task_group() as group:
            group.start_soon(daemon)
            group.start_soon(daemon)
    node.hub.faults = None
    assert node.titles().count(TITLE) == 1
    assert {*commits} == {*node.tags().values()} == {commits[0]}
    assert node.whole()
