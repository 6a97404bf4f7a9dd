"""`ckptd verify-remote`: what was published, tampered with in every way, and found out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationDelete, HfApi

from ckptd.hub import audit
from ckptd.hub.local.server import Running
from ckptd.hub.local.traffic import Fault
from tests.cli.conftest import Call

REPO = "acme/demo"


@pytest.fixture
def api(hub: Running) -> HfApi:
    return HfApi(endpoint=hub.url, token=hub.token)


@pytest.fixture
def published(
    ckptd: Call,
    hub: Running,
    checkpoint: Path,
    definition: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """A model that ckptd published a moment ago; its name for the command."""
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setenv("CKPTD_HUB_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    (checkpoint / "merges.txt").write_text("a b")
    result = ckptd("run", checkpoint, "-p", definition)
    assert result.code == 0, result.err
    return REPO


def _shard(api: HfApi) -> str:
    return next(n for n in api.list_repo_files(REPO) if n.endswith(".safetensors"))


def _replace(api: HfApi, name: str, content: bytes) -> None:
    api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=REPO)


@pytest.mark.parametrize("options", [(), ("--deep",)])
def test_untouched(options: tuple[str, ...], ckptd: Call, published: str, api: HfApi) -> None:
    """A model as it was made passes; every file but card, record and git's own is recorded."""
    result = ckptd("verify-remote", published, *options, "--json")
    value = result.value
    assert (result.code, value["ok"], value["differences"]) == (0, True, [])
    names = set(api.list_repo_files(REPO))
    assert {f["name"] for f in value["files"]} == names - {
        "README.md", "ckptd.json", ".gitattributes",
    }  # fmt: skip
    assert value["source"]["step"] == 20
    assert value["commit"] == api.repo_info(REPO).sha


def test_revision(ckptd: Call, published: str, api: HfApi) -> None:
    """A tag is checked as it was, whatever became of the branch."""
    api.create_commit(REPO, [CommitOperationDelete(path_in_repo="config.json")], commit_message="x")
    assert ckptd("verify-remote", published).code == 5
    assert ckptd("verify-remote", f"{published}@step-20").code == 0


def test_absent_file(ckptd: Call, published: str, api: HfApi) -> None:
    """A file that is gone is named."""
    shard = _shard(api)
    api.create_commit(REPO, [CommitOperationDelete(path_in_repo=shard)], commit_message="x")
    result = ckptd("verify-remote", published)
    assert result.code == 5
    assert f"differs: {shard}: absent" in result.out


def test_other_weights(ckptd: Call, published: str, api: HfApi, hub: Running) -> None:
    """Large files are told apart by the tree alone: other bytes of the same size are found."""
    shard = _shard(api)
    path = api.hf_hub_download(REPO, shard)
    content = bytearray(Path(path).read_bytes())
    content[-1] ^= 1
    _replace(api, shard, bytes(content))
    hub.ledger.clear()
    result = ckptd("verify-remote", published, "--json")
    (difference,) = result.value["differences"]
    assert (result.code, difference["name"], difference["what"]) == (5, shard, "sha256")
    assert not hub.ledger.find("GET", shard)


def test_other_config(ckptd: Call, published: str, api: HfApi) -> None:
    """Small files are read: one byte changed at the same size is found."""
    text = Path(api.hf_hub_download(REPO, "config.json")).read_text()
    _replace(api, "config.json", text.replace("llama", "lLama").encode())
    (difference,) = ckptd("verify-remote", published, "--json").value["differences"]
    assert (difference["name"], difference["what"]) == ("config.json", "sha256")


def test_other_size(ckptd: Call, published: str, api: HfApi) -> None:
    """A size that differs is told in bytes."""
    _replace(api, "merges.txt", b"a b c")
    result = ckptd("verify-remote", published)
    assert "differs: merges.txt: size (expected 3 bytes, found 5)" in result.out


def test_weights_that_nobody_recorded(ckptd: Call, published: str, api: HfApi) -> None:
    """A weight file that a reader would load instead is a difference; other files are not."""
    _replace(api, "notes.md", b"hello")
    _replace(api, "pytorch_model.bin", b"evil")
    (difference,) = ckptd("verify-remote", published, "--json").value["differences"]
    assert (difference["name"], difference["what"]) == ("pytorch_model.bin", "not recorded")


def test_deep_finds_what_storage_corrupted(
    ckptd: Call, published: str, api: HfApi, hub: Running
) -> None:
    """Bytes that rotted below the Hub's own records are found by --deep, and only by it."""
    shard = _shard(api)
    sha256 = next(
        f.lfs.sha256 for f in api.list_repo_tree(REPO) if f.path == shard and f.lfs is not None
    )
    for stored in hub.root.rglob(f"*{sha256}*"):
        stored.chmod(0o644)
        content = bytearray(stored.read_bytes())
        content[-1] ^= 1
        stored.write_bytes(content)
    assert ckptd("verify-remote", published).code == 0
    result = ckptd("verify-remote", published, "--deep")
    assert result.code == 5
    assert f"differs: {shard}: sha256" in result.out


def test_a_download_that_breaks_goes_on(
    ckptd: Call, published: str, api: HfApi, hub: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection lost in the middle of a large file is taken up again."""
    monkeypatch.setattr(audit, "PAUSE_S", 0.0)
    shard, cut = _shard(api), []

    def faults(request):  # type: ignore[no-untyped-def]
        if shard in request.url.path and not cut:
            cut.append(request.headers.get("range"))
            return Fault.CUT_ANSWER
        return None

    hub.faults = faults
    assert ckptd("verify-remote", published, "--deep").code == 0
    assert cut == [None]


def test_a_model_of_others(ckptd: Call, published: str, api: HfApi) -> None:
    """A model without a record, or with one that is none, fails and says so."""
    _replace(api, "ckptd.json", json.dumps({"weights": 3}).encode())
    result = ckptd("verify-remote", published)
    assert (result.code, "no record of ckptd" in result.err) == (5, True)
    api.create_commit(REPO, [CommitOperationDelete(path_in_repo="ckptd.json")], commit_message="x")
    result = ckptd("verify-remote", published, "--json")
    assert (result.code, result.value["error"]["code"]) == (5, "CheckFailed")


@pytest.mark.parametrize("model", ["llama", "a/b/c", "a/b@", "/b"])
def test_wrong_name(model: str, ckptd: Call) -> None:
    """What names no model is a usage error."""
    assert ckptd("verify-remote", model).code == 2
