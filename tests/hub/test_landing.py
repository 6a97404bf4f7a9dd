"""One commit on a ref where many others commit: before, between and after ours."""

from __future__ import annotations

from collections.abc import Callable

import httpx2
import pytest

from ckptd import errors
from ckptd.hub.push import Happening
from tests.hub.conftest import Wire
from tests.hub.test_faults import REPO, TITLE, Node
from tests.hub.test_faults import node as node

MANY = 205
"""More commits than four pages of the list."""


def storm(node: Node, count: int) -> None:
    """Make commits of somebody else, each with another file."""
    for number in range(count):
        node.foreign(f"theirs {number}", notes__txt=str(number).encode())


def races(node: Node, files: list[dict[str, bytes]]) -> Callable[..., httpx2.Response]:
    """Return an act that makes one commit of somebody else before each of ours, while there are any."""
    left = list(files)

    def act(request: httpx2.Request, forward: Callable[[], httpx2.Response]) -> httpx2.Response:
        if b'"theirs"' not in request.content and left:
            node.foreign(**left.pop(0))
        return forward()

    return act


async def test_our_commit_is_found_below_a_storm_of_others(node: Node) -> None:
    """However many commits lie on top of ours, and whatever they changed: found, not made again."""
    files = node.files()
    first = await node.push(files)
    storm(node, MANY)
    node.foreign(config__json=b'{"theirs": 1}')
    again = await node.push(files)
    assert (again.commit, again.created) == (first.commit, False)
    assert node.titles().count(TITLE) == 1


async def test_a_history_is_read_once(node: Node, wire: Wire) -> None:
    """A push looks at what is new since the last one, and finds an older one all the same."""
    first = await node.push(node.files("a"), push_id="a")
    storm(node, MANY)
    await node.push(node.files("b"), push_id="b")
    wire.seen.clear()
    await node.push(node.files("c"), push_id="c")
    assert wire.count("GET", "/commits/") == 1
    again = await node.push(node.files("a"), push_id="a")
    assert (again.commit, again.created) == (first.commit, False)
    node.api.super_squash_history(REPO)
    last = await node.push(node.files("d"), push_id="d")
    assert last.created
    assert node.titles().count(TITLE) == 1


async def test_a_storm_of_others_during_the_push_keeps_their_weights(node: Node) -> None:
    """Among hundreds of commits during our uploads one has weights: they stay, old ones go."""
    node.api.create_repo(REPO)
    node.foreign("old", model__safetensors=b"old")
    publisher, files = node.publisher(), node.files()
    await publisher.open()
    for file in files:
        await publisher.upload(file)
    node.foreign(pytorch_model__bin=b"theirs")
    storm(node, 60)
    node.hub.ledger.clear()
    await publisher.commit(files)
    assert node.paths() == {file.path_in_repo for file in files} | {
        "pytorch_model.bin",
        "notes.txt",
    }
    assert len(node.hub.ledger.find("GET", "/tree/")) < 8


async def test_weights_of_many_pushes_during_ours_are_kept_where_they_are_too_many(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where telling whose is whose would cost too much, everything that is new stays."""
    monkeypatch.setattr("ckptd.hub.landing.MOST_COMPARED", 3)
    node.api.create_repo(REPO)
    node.foreign("old", model__safetensors=b"old")
    publisher, files = node.publisher(), node.files()
    await publisher.open()
    for number in range(3):
        ours = f"step {number}\n\nckptd-push-id: {number}"
        node.foreign(ours, pytorch_model__bin=str(number).encode())
        node.foreign(notes__txt=str(number).encode())
    await publisher.commit(files)
    assert "pytorch_model.bin" in node.paths()
    assert "model.safetensors" not in node.paths()


async def test_a_history_that_is_squashed_meanwhile_loses_nobodys_weights(node: Node) -> None:
    """Rewritten during the push: what is not known to be old is kept, and ours lands once."""
    node.api.create_repo(REPO)
    publisher, files = node.publisher(), node.files()
    await publisher.open()
    node.foreign(pytorch_model__bin=b"theirs")
    node.api.super_squash_history(REPO)
    await publisher.commit(files)
    assert "pytorch_model.bin" in node.paths()
    assert node.titles().count(TITLE) == 1


async def test_each_of_many_rebases_keeps_what_others_committed(node: Node, wire: Wire) -> None:
    """Nine times overtaken: one commit of ours on top, with all nine files of others below it."""
    node.api.create_repo(REPO)
    theirs = [{f"adapter_{number}__txt": b"x"} for number in range(8)]
    wire.on("POST", "/commit/", races(node, [*theirs, {"pytorch_model__bin": b"x"}]), times=99)
    files = node.files()
    done = await node.push(files)
    assert done.created
    assert len(node.happened(Happening.REBASED)) == 9
    names = {f"adapter_{number}.txt" for number in range(8)} | {"pytorch_model.bin"}
    assert node.paths() == {file.path_in_repo for file in files} | names
    assert node.titles()[:2] == [TITLE, "theirs"]


async def test_a_ref_that_always_moves_is_come_back_to_later(node: Node, wire: Wire) -> None:
    """After ten rebases the job is to be tried later, and the text says who is faster and what helps."""
    node.api.create_repo(REPO)
    theirs = [{"notes__txt": str(number).encode()} for number in range(99)]
    wire.on("POST", "/commit/", races(node, theirs), times=999)
    with pytest.raises(errors.HubConflict, match="main moved 11 times") as caught:
        await node.push()
    assert caught.value.retry is errors.Retry.LATER
    assert "revision of its own" in str(caught.value.hint)
    assert node.titles().count(TITLE) == 0
