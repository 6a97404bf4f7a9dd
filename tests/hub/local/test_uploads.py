"""Content on its way in: LFS whole and in parts, checked while it streams."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from ckptd.hub.local import server
from ckptd.hub.local.options import Choices

REPO = "acme/run"


def upload_link(hub: server.Running, content: bytes) -> dict[str, dict[str, str]]:
    sha256 = hashlib.sha256(content).hexdigest()
    answer = httpx2.post(
        f"{hub.url}/{REPO}.git/info/lfs/objects/batch",
        json={"operation": "upload", "objects": [{"oid": sha256, "size": len(content)}]},
        headers={"Authorization": f"Bearer {hub.token}"},
    )
    return answer.json()["objects"][0]["actions"]


def stored(hub: server.Running) -> list[str]:
    return sorted(path.name for path in (hub.root / "blobs").rglob("*") if path.is_file())


def test_preupload_then_commit_sends_content_once(api: HfApi, hub, repo: str, tmp_path: Path):
    """preupload_lfs_files of each shard, then one commit: every byte passes once."""
    shards = []
    for number in range(3):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(os.urandom(200_000))
        shards.append(CommitOperationAdd(path.name, str(path)))
        api.preupload_lfs_files(repo, [shards[-1]])
    api.create_commit(repo, shards, commit_message="all")
    puts = hub.ledger.find("PUT")
    assert [entry.bytes_in for entry in puts] == [200_000] * 3
    assert len(hub.ledger.find("POST", "/commit/")) == 1
    assert not list((hub.root / "incoming").iterdir())


def test_content_that_is_there_is_not_sent_again(api: HfApi, hub, repo: str, add):
    """A fresh operation with known content finds no upload action."""
    api.preupload_lfs_files(repo, [add("a.bin", b"\0" * 999)])
    hub.ledger.clear()
    api.preupload_lfs_files(repo, [add("b.bin", b"\0" * 999)])
    assert not hub.ledger.find("PUT")


@pytest.mark.parametrize(
    ("body", "says"),
    [(b"other bytes", "BadDigest"), (b"right", "IncompleteBody"), (b"right bytes+", "More than")],
)
def test_wrong_content_is_refused_and_not_kept(hub, repo: str, body: bytes, says: str):
    """Another sha256, too few or too many bytes: 400 with the reason, and nothing stays."""
    before = stored(hub)
    link = upload_link(hub, b"right bytes")["upload"]["href"]
    answer = httpx2.put(link, content=body)
    assert answer.status_code == 400
    assert says in answer.json()["error"]
    assert stored(hub) == before
    assert not list((hub.root / "incoming").iterdir())


def test_a_corrupted_file_raises_in_the_client(api: HfApi, repo: str, tmp_path: Path):
    """A file that changes after it was hashed cannot be uploaded."""
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"\0" * 1000)
    operation = CommitOperationAdd("w.safetensors", str(path))
    assert operation.upload_info.sha256
    path.write_bytes(b"\1" * 1000)
    with pytest.raises(RuntimeError, match="uploading") as caught:
        api.create_commit(repo, [operation], commit_message="x")
    assert "BadDigest" in str(caught.value.__cause__)


@pytest.mark.parametrize("change", ["signature=0", "expires=1", "size=99"])
def test_forged_and_old_links_are_refused(hub, repo: str, change: str):
    """A link is good for exactly one content, and not for ever."""
    link = upload_link(hub, b"x")["upload"]["href"]
    name = change.partition("=")[0]
    forged = "&".join(change if part.startswith(name) else part for part in link.split("&"))
    assert forged != link
    assert httpx2.put(forged, content=b"x").status_code == 403


def test_large_objects_come_in_parts(tmp_path: Path, hub_tokens):
    """Over the threshold the client sends parts, and the whole is hashed before it is kept."""
    weights = os.urandom(2_500_000)
    choices = Choices(multipart_over_bytes=1_000_000)
    with server.running(root=tmp_path / "h", tokens=hub_tokens, choices=choices) as hub:
        api = HfApi(endpoint=hub.url, token=hub.token)
        api.create_repo(REPO)
        ops = [CommitOperationAdd("w.bin", weights), CommitOperationAdd("s.bin", b"\0")]
        api.create_commit(REPO, ops, commit_message="x")
        assert Path(api.hf_hub_download(REPO, "w.bin")).read_bytes() == weights
        parts = hub.ledger.find("PUT", "/lfs/uploads/")
        assert [entry.bytes_in for entry in parts] == [1_000_000, 1_000_000, 500_000]


def test_parts_of_something_else_are_refused(tmp_path: Path, hub_tokens):
    """Parts whose whole is not the announced content leave nothing behind."""
    choices = Choices(multipart_over_bytes=10)
    with server.running(root=tmp_path / "h", tokens=hub_tokens, choices=choices) as hub:
        HfApi(endpoint=hub.url, token=hub.token).create_repo(REPO)
        content = b"0123456789abcdef"
        answer = httpx2.post(
            f"{hub.url}/{REPO}.git/info/lfs/objects/batch",
            json={
                "operation": "upload",
                "transfers": ["multipart"],
                "objects": [{"oid": hashlib.sha256(content).hexdigest(), "size": 16}],
            },
            headers={"Authorization": f"Bearer {hub.token}"},
        )
        action = answer.json()["objects"][0]["actions"]["upload"]
        assert httpx2.put(action["header"]["00001"], content=b"short").status_code == 400
        for number, piece in (("00001", b"x" * 10), ("00002", b"y" * 6)):
            assert httpx2.put(action["header"][number], content=piece).headers["ETag"]
        done = httpx2.post(action["href"], json={"oid": "", "parts": []})
        assert done.status_code == 400
        assert not list((hub.root / "incoming").iterdir())


def test_gitattributes_and_samples_decide_the_way(hub, api: HfApi, repo: str, add):
    """Pattern, size and content send a file over LFS; text and empty files travel in the commit."""
    api.create_commit(
        repo,
        [
            add("w.safetensors", b"text"),
            add("binary", b"\0"),
            add("note.txt", "grüße".encode()),
            add("big.txt", b"x" * (10 * 1024 * 1024 + 1)),
            add("empty.bin", b""),
        ],
        commit_message="x",
    )
    lfs = {item.path for item in api.list_repo_tree(repo) if item.lfs is not None}
    assert lfs == {"w.safetensors", "binary", "big.txt"}


def test_gitignore_is_followed(api: HfApi, repo: str, add):
    """A file that .gitignore names is left out of the commit."""
    api.create_commit(repo, [add(".gitignore", b"*.log\n!keep.log\n")], commit_message="a")
    api.create_commit(repo, [add("x.log"), add("keep.log"), add("y.json")], commit_message="b")
    assert {"x.log", "keep.log", "y.json"} & set(api.list_repo_files(repo)) == {
        "keep.log",
        "y.json",
    }
