"""The publisher without an event loop: uploads go on behind the caller's back, failures reach it."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants

from ckptd import errors
from ckptd.hub.blocking import BlockingPublisher
from ckptd.hub.push import LocalFile, Target

TARGET = Target(repo_id="acme/run", commit_message="one push")


def weights(folder: Path, number: int) -> LocalFile:
    path = folder / f"model-0000{number}-of-00002.safetensors"
    path.write_bytes(bytes([number]) * 100_000)
    return LocalFile(path=path, path_in_repo=path.name, nbytes=100_000)


@pytest.fixture(autouse=True)
def over_lfs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


def publisher(hub: Any, target: Target = TARGET, **options: Any) -> BlockingPublisher:
    given = {"endpoint": hub.url, "token": hub.token} | options
    return BlockingPublisher(target=target, push_id="p1", **given)


def test_upload_returns_before_the_file_is_sent(hub: Any, wire: Any, tmp_path: Path) -> None:
    """The caller goes on while the Hub still waits for the bytes; the commit waits for them."""
    may_go = threading.Event()
    wire.on("PUT", "", wire.after(lambda: may_go.wait(20)), times=2)
    with publisher(hub) as opened:
        opened.upload(weights(tmp_path, 1))
        opened.upload(weights(tmp_path, 2))
        may_go.set()
        made = opened.commit()
    api = HfApi(endpoint=hub.url, token=hub.token)
    assert made.commit == api.repo_info("acme/run").sha
    assert wire.count("POST", "/commit/") == 1
    assert wire.count("PUT") == 2


def test_a_failed_upload_is_raised_by_the_next_one(hub: Any, tmp_path: Path) -> None:
    """The caller stops making files that nobody will commit."""
    wrong = replace(weights(tmp_path, 1), nbytes=7)
    with publisher(hub) as opened:
        opened.upload(wrong)
        opened._uploads[wrong].exception()
        with pytest.raises(errors.SourceChanged):
            opened.upload(weights(tmp_path, 2))


def test_a_failed_upload_is_raised_by_the_commit(hub: Any, wire: Any, tmp_path: Path) -> None:
    """And no commit is tried."""
    with publisher(hub) as opened:
        opened.upload(replace(weights(tmp_path, 1), nbytes=7))
        with pytest.raises(errors.SourceChanged):
            opened.commit()
    assert wire.count("POST", "/commit/") == 0


def test_leaving_with_an_error_commits_nothing(hub: Any, wire: Any, tmp_path: Path) -> None:
    """The caller's own error passes through, and what was uploaded is not committed."""
    file = weights(tmp_path, 1)

    def push() -> None:
        with publisher(hub) as opened:
            opened.upload(file)
            opened._uploads[file].result()
            raise KeyError

    with pytest.raises(KeyError):
        push()
    assert wire.count("POST", "/commit/") == 0


def test_opening_fails_before_anything_is_sent(hub: Any, wire: Any) -> None:
    """A wrong token is known when the block is entered."""
    with pytest.raises(errors.HubUnauthorized), publisher(hub, token="hf_" + "x" * 34):
        raise AssertionError("not entered")
    assert wire.count("PUT") == 0


def test_a_name_without_a_namespace_is_completed(hub: Any) -> None:
    """The repo is the account's own."""
    with publisher(hub, replace(TARGET, repo_id="mine")) as opened:
        assert opened.target.repo_id == "ckptd/mine"


def test_visibility_is_for_new_repos_only(hub: Any) -> None:
    """An existing public repo is pushed to although private was asked for, as documented."""
    HfApi(endpoint=hub.url, token=hub.token).create_repo("acme/run")
    with publisher(hub, replace(TARGET, private=True)) as opened:
        assert opened.target.private is None
    with publisher(hub, replace(TARGET, repo_id="acme/new", private=True)):
        pass
    assert HfApi(endpoint=hub.url, token=hub.token).repo_info("acme/new").private is True
