"""Reading: tree, paths-info, downloads and ranges, with the real client."""

from __future__ import annotations

import os
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from ckptd.hub.local import server
from ckptd.hub.local.options import Choices


def test_the_tree_comes_in_pages(tmp_path: Path, add, hub_tokens):
    """More entries than one page are followed by Link headers, expanded or not."""
    choices = Choices(tree_page=20)
    with server.running(root=tmp_path / "h", tokens=hub_tokens, choices=choices) as hub:
        api = HfApi(endpoint=hub.url, token=hub.token)
        api.create_repo("acme/run")
        ops = [add(f"d{n % 3}/f{n}.json", b"%d" % n) for n in range(30)]
        api.create_commit("acme/run", ops, commit_message="many")
        plain = [item.path for item in api.list_repo_tree("acme/run", recursive=True)]
        hub.ledger.clear()
        expanded = list(api.list_repo_tree("acme/run", recursive=True, expand=True))
        assert [item.path for item in expanded] == plain
        assert len(plain) == 30 + 3 + 1
        assert len(hub.ledger.find("GET", "/tree/")) == 34
        assert {item.last_commit.title for item in expanded} == {"many", "initial commit"}


def test_a_folder_lists_its_children(api: HfApi, repo: str, add):
    """Without recursive a folder gives its files and folders; a missing one is EntryNotFound."""
    api.create_commit(repo, [add("a/x.json"), add("a/b/y.json")], commit_message="a")
    assert [item.path for item in api.list_repo_tree(repo, "a")] == ["a/b", "a/x.json"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(repo, "nope"))


def test_paths_info_tells_what_is_there(api: HfApi, repo: str, add):
    """Files and folders are described, the missing left out, the last commit named on demand."""
    oid = api.create_commit(repo, [add("a/x.bin", b"\0")], commit_message="a").oid
    api.create_commit(repo, [add("other.json")], commit_message="b")
    found = api.get_paths_info(repo, ["a", "a/x.bin", "nope"], expand=True)
    assert [item.path for item in found] == ["a", "a/x.bin"]
    assert [item.last_commit.oid for item in found] == [oid, oid]


def test_downloads_are_byte_equal(api: HfApi, repo: str, add, tmp_path: Path):
    """hf_hub_download and snapshot_download give back what was committed, by any revision."""
    weights = os.urandom(3_000_000)
    oid = api.create_commit(
        repo, [add("a b/w%2F.safetensors", weights), add("config.json", b"{}")], commit_message="a"
    ).oid
    api.create_branch(repo, branch="x/y")
    api.create_commit(repo, [add("config.json", b"[]")], commit_message="b")
    single = api.hf_hub_download(repo, "a b/w%2F.safetensors", revision="x/y")
    folder = snapshot_download(repo, endpoint=api.endpoint, token=api.token, revision=oid)
    assert Path(single).read_bytes() == weights
    assert (Path(folder) / "config.json").read_bytes() == b"{}"
    assert Path(api.hf_hub_download(repo, "config.json", local_dir=tmp_path)).read_bytes() == b"[]"


def test_a_download_resumes(api: HfApi, hub, repo: str, add, tmp_path: Path):
    """A broken download goes on with a Range, and only the rest is sent."""
    from huggingface_hub.file_download import http_get

    weights = os.urandom(1_000_000)
    api.create_commit(repo, [add("w.bin", weights)], commit_message="a")
    target = tmp_path / "w"
    target.write_bytes(weights[:900_000])
    hub.ledger.clear()
    with target.open("ab") as file:
        http_get(f"{hub.url}/{repo}/resolve/main/w.bin", file, resume_size=900_000, headers={})
    assert target.read_bytes() == weights
    assert [entry.bytes_out for entry in hub.ledger.find("GET")] == [100_000]
    assert hub.ledger.find("GET")[0].status == 206


def test_ranges_follow_the_standard(hub, api: HfApi, repo: str, add):
    """First bytes, last bytes, past the end: 206, 206, 416."""
    api.create_commit(repo, [add("w.bin", b"\0" + b"x" * 99)], commit_message="a")
    url = f"{hub.url}/{repo}/resolve/main/w.bin"
    first, last, past = (
        httpx2.get(url, headers={"Range": f"bytes={span}"}) for span in ("0-9", "-5", "100-")
    )
    assert (first.status_code, first.headers["Content-Range"]) == (206, "bytes 0-9/100")
    assert (last.content, past.status_code) == (b"xxxxx", 416)


def test_head_tells_what_the_cache_needs(hub, api: HfApi, repo: str, add):
    """HEAD has commit, ETag (sha256 for LFS), size; a missing file's 404 has the commit too."""
    oid = api.create_commit(repo, [add("w.bin", b"\0"), add("c.json")], commit_message="a").oid
    lfs, regular, missing = (
        httpx2.head(f"{hub.url}/{repo}/resolve/main/{name}") for name in ("w.bin", "c.json", "no")
    )
    assert (
        lfs.headers["X-Linked-Etag"].strip('"') == api.get_paths_info(repo, "w.bin")[0].lfs.sha256
    )
    assert (lfs.headers["Content-Length"], lfs.headers["X-Linked-Size"]) == ("1", "1")
    assert "X-Linked-Etag" not in regular.headers
    assert {answer.headers["X-Repo-Commit"] for answer in (lfs, regular, missing)} == {oid}
    assert (missing.status_code, missing.headers["X-Error-Code"]) == (404, "EntryNotFound")


def test_file_exists_tells_absent_from_hidden(api: HfApi, repo: str, add):
    """file_exists is True, False for another file, another revision and another repo."""
    api.create_commit(repo, [add("c.json")], commit_message="a")
    assert api.file_exists(repo, "c.json")
    assert not api.file_exists(repo, "d.json")
    assert not api.file_exists(repo, "c.json", revision="nope")
    assert not api.file_exists("acme/nope", "c.json")


def test_a_stranger_file_cannot_act_in_a_browser(hub, api: HfApi, repo: str, add):
    """HTML in a repo is sent as bytes that a browser neither sniffs nor runs."""
    api.create_commit(repo, [add("x.html", b"<script>1</script>")], commit_message="a")
    answer = httpx2.get(f"{hub.url}/{repo}/resolve/main/x.html")
    assert answer.headers["Content-Type"] == "application/octet-stream"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "sandbox" in answer.headers["Content-Security-Policy"]


def test_a_folder_is_no_file(api: HfApi, repo: str, add):
    """Downloading a folder is EntryNotFound."""
    api.create_commit(repo, [add("a/x.json")], commit_message="a")
    with pytest.raises((EntryNotFoundError, HfHubHTTPError)):
        api.hf_hub_download(repo, "a")
