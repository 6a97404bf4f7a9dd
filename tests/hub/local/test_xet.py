"""Xet: the real client with hf_xet in processes of their own, since it decides at import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi

from ckptd.hub.local import refusal, server, xet
from ckptd.hub.local.options import Choices

CLIENT = """
import json, os, sys
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, HfApi, snapshot_download
url, token, seed, folder = sys.argv[1:]
api = HfApi(endpoint=url, token=token)
api.create_repo("acme/run", exist_ok=True)
ops = []
for number in range(2):
    path = os.path.join(folder, f"{seed}-{number}.safetensors")
    with open(path, "wb") as file:
        file.write(bytes(range(256)) * 2000 + os.urandom(1_500_000))
    op = CommitOperationAdd(os.path.basename(path), path)
    api.preupload_lfs_files("acme/run", [op])
    ops.append(op)
made = api.create_commit("acme/run", ops, commit_message=seed)
root = snapshot_download("acme/run", endpoint=url, token=token, revision=made.oid)
for op in ops:
    name = op.path_in_repo
    with open(os.path.join(folder, name), "rb") as a, open(os.path.join(root, name), "rb") as b:
        assert a.read() == b.read(), name
items = {item.path: item.xet_hash for item in api.list_repo_tree("acme/run", revision=made.oid)}
api.create_repo("acme/copy", exist_ok=True)
copy = CommitOperationCopy(ops[0].path_in_repo, "c.safetensors", src_repo_id="acme/run",
                           src_repo_type="model")
api.create_commit("acme/copy", [copy], commit_message="copy")
print(json.dumps(items))
"""


def client(hub: server.Running, seed: str, folder: Path) -> dict[str, str | None]:
    """Run the client with Xet on, and return what it printed: path -> Xet hash."""
    folder.mkdir()
    env = os.environ | {"HF_HUB_DISABLE_XET": "0", "HF_HOME": str(folder / "home")}
    argv = [sys.executable, "-c", CLIENT, hub.url, hub.token, seed, str(folder)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_two_clients_upload_and_download_over_xet_at_once(hub, tmp_path: Path):
    """preupload, commit, snapshot and copy over Xet, two processes together, all bytes equal."""
    with ThreadPoolExecutor() as pool:
        both = list(pool.map(lambda seed: client(hub, seed, tmp_path / seed), ("one", "two")))
    items = both[0] | both[1]
    assert all(items[f"{seed}-{n}.safetensors"] for seed in ("one", "two") for n in (0, 1))
    assert hub.ledger.find("POST", "/cas/v1/xorbs/")
    assert not hub.ledger.find("PUT", "/lfs/")


def test_what_came_over_xet_leaves_without_it(hub, tmp_path: Path):
    """A client without Xet, and a Range, get the bytes that a Xet client sent; restart included."""
    client(hub, "one", tmp_path / "one")
    api = HfApi(endpoint=hub.url, token=hub.token)
    sent = (tmp_path / "one" / "one-0.safetensors").read_bytes()
    assert Path(api.hf_hub_download("acme/run", "one-0.safetensors")).read_bytes() == sent
    answer = httpx2.get(
        f"{hub.url}/acme/run/resolve/main/one-0.safetensors", headers={"Range": "bytes=10-19"}
    )
    assert (answer.status_code, answer.content) == (206, sent[10:20])


def test_reconstructions_survive_a_restart(tmp_path: Path, hub_tokens):
    """Shards are read again at the next start."""
    root = tmp_path / "hub"
    with server.running(root=root, tokens=hub_tokens) as hub:
        client(hub, "one", tmp_path / "one")
    with server.running(root=root, tokens=hub_tokens) as hub:
        api = HfApi(endpoint=hub.url, token=hub.token)
        got = Path(api.hf_hub_download("acme/run", "one-1.safetensors")).read_bytes()
        assert got == (tmp_path / "one" / "one-1.safetensors").read_bytes()


def test_xet_can_be_off(tmp_path: Path, hub_tokens, add):
    """Without Xet the token is a 404 that says what to do, and LFS works."""
    with server.running(root=tmp_path / "h", tokens=hub_tokens, choices=Choices(xet=False)) as hub:
        api = HfApi(endpoint=hub.url, token=hub.token)
        api.create_repo("acme/run")
        api.create_commit("acme/run", [add("a.bin", b"\0")], commit_message="a")
        answer = httpx2.get(
            f"{hub.url}/api/models/acme/run/xet-write-token/main",
            headers={"Authorization": f"Bearer {hub.token}"},
        )
        assert answer.status_code == 404
        assert "HF_HUB_DISABLE_XET" in answer.json()["error"]


def test_the_store_needs_its_own_token(hub, api: HfApi, repo: str):
    """A Hub token is not a Xet token, and one for reading may not write."""
    token = httpx2.get(f"{hub.url}/api/models/{repo}/xet-read-token/main").json()["accessToken"]
    url = f"{hub.url}/cas/v1/shards"
    for bearer in (token, hub.token, "read.9999999999.0", "write.9999999999"):
        answer = httpx2.post(url, content=b"", headers={"Authorization": f"Bearer {bearer}"})
        assert answer.status_code == 401


@pytest.mark.parametrize("content", [b"", b"x" * 200, b"HFRepoMetaData\0" + bytes(33)])
def test_a_broken_shard_is_refused(content: bytes):
    """Whatever is not a whole shard is a refusal, never another exception."""
    with pytest.raises(refusal.Refused):
        list(xet.read_shard(content))


@pytest.mark.parametrize("content", [b"", b"\0", b"\0\xff\xff\xff\0\0\0\0abc"])
def test_a_broken_xorb_is_refused(tmp_path: Path, content: bytes):
    """A xorb must consist of whole chunks."""
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(refusal.Refused):
        xet.chunk_offsets(path)
