"""Bases: which one an adapter is merged into, and what identifies it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors.numpy import save_file

from ckptd import errors
from ckptd.checkpoint import checkpoint
from ckptd.checkpoint.checkpoint import Checkpoint
from ckptd.hub.local import server
from ckptd.hub.local.server import Running
from ckptd.jobs import progress
from ckptd.pipeline import bases, definition
from ckptd.telemetry.status import Counter, Phase
from tests.pipeline.stages import adapters


def _model(path: Path, value: float = 1.0) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    save_file({"model.norm.weight": np.full(3, value, np.float32)}, path / "model.safetensors")
    (path / "config.json").write_text('{"model_type": "llama"}')
    return path


def _adapter(path: Path, **said: object) -> Checkpoint:
    path.mkdir(parents=True)
    weights = {"base_model.model.model.norm.weight": np.zeros(3, np.float32)}
    save_file(weights, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | said))
    return checkpoint.open_checkpoint(path)


def _stages(base: str | None = None) -> list[definition.StageCall]:
    merge = "- merge" if base is None else f"- merge: {{base: {base}}}"
    return definition.parse_definition(f"pipeline: t\nstages:\n  {merge}\n", "t").stages


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A Hub on loopback, and a cache of its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with server.running(root=tmp_path / "hub") as running:
        monkeypatch.setenv("HF_TOKEN", running.token)
        yield running


def test_folders(tmp_path: Path) -> None:
    """The definition's base wins over the adapter's; relative ones are beside the run or above."""
    _model(tmp_path / "runs" / "base")
    other = _model(tmp_path / "other")
    source = _adapter(tmp_path / "runs" / "a" / "ckpt", base_model_name_or_path="base")
    found = bases.locate(_stages(), source, beside=source.path, endpoint=None)
    assert found == bases.Place(folder=tmp_path / "runs" / "base")
    found = bases.locate(_stages(str(other)), source, beside=source.path, endpoint=None)
    assert found == bases.Place(folder=other)
    pinned = bases.locate(_stages(), source, beside=Path("/"), endpoint=None, pinned=str(other))
    assert pinned == found
    reshard = definition.parse_definition("pipeline: t\nstages: [reshard]\n", "t").stages
    assert bases.locate(reshard, source, beside=source.path, endpoint=None) is None


def test_nothing_is_named(tmp_path: Path) -> None:
    """An adapter that names no base, and names that can be no repo."""
    source = _adapter(tmp_path / "ckpt")
    with pytest.raises(errors.CheckpointIncomplete, match="names no base"):
        bases.locate(_stages(), source, beside=source.path, endpoint=None)
    for text in ("/nowhere/at/all", "../nowhere", "a/b/c"):
        with pytest.raises(errors.CheckpointIncomplete, match="is not there"):
            bases.locate(_stages(text), source, beside=source.path, endpoint=None)


def test_a_folders_digest(tmp_path: Path) -> None:
    """It follows the content, not the place; a folder rewritten since is refused."""
    one, same = _model(tmp_path / "one"), _model(tmp_path / "same")
    digests = bases.Digests()
    place = bases.Place(folder=one)
    first, state = digests.of(place), bases.fingerprint(place)
    assert digests.of(bases.Place(folder=same)) == first
    assert bases.open_base(place, endpoint=None, expected=state).name == "one"
    _model(one, 2.0)
    assert digests.of(place) != first
    with pytest.raises(errors.SourceChanged):
        bases.open_base(place, endpoint=None, expected=state)


def test_a_repo_at_a_commit(hub: Running, tmp_path: Path) -> None:
    """A branch is looked up once; its files come at that commit, without what nobody needs."""
    model = _model(tmp_path / "model")
    (model / "pytorch_model.bin").write_bytes(b"pickled")
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo("ckptd/base", private=True)
    commit = api.upload_folder(repo_id="ckptd/base", folder_path=model).oid
    source = _adapter(tmp_path / "ckpt", base_model_name_or_path="ckptd/base")
    place = bases.locate(_stages(), source, beside=source.path, endpoint=hub.url)
    assert place == bases.Place(repo_id="ckptd/base", commit=commit)
    base = bases.open_base(place, endpoint=hub.url)
    assert (base.name, base.digest) == (f"ckptd/base@{commit}", commit)
    assert base.source.tensors.keys() == {"model.norm.weight"}
    assert not (base.source.path / "pytorch_model.bin").exists()
    named = bases.locate(
        _stages(f"ckptd/base@{commit}"), source, beside=source.path, endpoint="http://127.0.0.1:1"
    )
    assert named == place


@pytest.mark.parametrize("text", ["ckptd/absent", "ckptd/base@absent"])
def test_what_the_hub_does_not_have(text: str, hub: Running, tmp_path: Path) -> None:
    """A repo or a revision that is not there is the Hub's refusal, in our words."""
    HfApi(endpoint=hub.url, token=hub.token).create_repo("ckptd/base", private=True)
    source = _adapter(tmp_path / "ckpt")
    with pytest.raises(errors.HubNotFound, match=text.partition("@")[0]):
        bases.locate(_stages(text), source, beside=source.path, endpoint=hub.url)


def test_a_hub_that_is_away(tmp_path: Path) -> None:
    """No connection is a failure that may pass."""
    source = _adapter(tmp_path / "ckpt")
    with pytest.raises(errors.HubUnavailable):
        bases.locate(
            _stages("ckptd/base"), source, beside=source.path, endpoint="http://127.0.0.1:1"
        )


def test_the_bytes_of_a_download(hub: Running, tmp_path: Path) -> None:
    """They are told up to the whole of what is not in the cache; what is there is not fetched again."""
    model = _model(tmp_path / "model")
    save_file({"model.norm.weight": np.ones(400_000, np.float32)}, model / "model.safetensors")
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo("ckptd/base", private=True)
    commit = api.upload_folder(repo_id="ckptd/base", folder_path=model).oid
    place = bases.Place(repo_id="ckptd/base", commit=commit)
    total = sum(path.stat().st_size for path in model.iterdir())
    told: list[tuple[int, int]] = []
    bases.open_base(place, endpoint=hub.url, report=lambda *now: told.append(now))
    assert told[0] == (0, total)
    assert max(told) == (total, total)
    told.clear()
    bases.open_base(place, endpoint=hub.url, report=lambda *now: told.append(now))
    assert told == []


def test_a_repo_without_safetensors(hub: Running, tmp_path: Path) -> None:
    """Its pickled weights are fetched, and read; of a repo that has both they are not."""
    whole = adapters.make("llama")
    model = adapters.save_base(whole, tmp_path / "model")
    (model / "model.safetensors").unlink()
    torch.save(whole.state_dict(), model / "pytorch_model.bin")
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo("ckptd/base", private=True)
    commit = api.upload_folder(repo_id="ckptd/base", folder_path=model).oid
    place = bases.Place(repo_id="ckptd/base", commit=commit)
    base = bases.open_base(place, endpoint=hub.url)
    assert base.source.layout == "pickled"
    assert base.source.tensors.keys() == whole.state_dict().keys()


def test_a_download_that_was_cut_off(
    hub: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails as one that may pass, and files that were whole are not fetched again."""
    model = _model(tmp_path / "model")
    (model / "tokenizer.json").write_text("x" * 3_000_000)
    save_file({"model.norm.weight": np.ones(9_000_000, np.float32)}, model / "model.safetensors")
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo("ckptd/base", private=True)
    commit = api.upload_folder(repo_id="ckptd/base", folder_path=model).oid
    place = bases.Place(repo_id="ckptd/base", commit=commit)
    real = httpx2.Response.iter_bytes
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    cut_off: list[int] = []

    def cut(response: httpx2.Response, chunk_size: int | None = None) -> Iterator[bytes]:
        for chunk in real(response, 1 << 20):
            if sum(cut_off) > 20 << 20:
                raise httpx2.RemoteProtocolError("cut off")
            cut_off.append(len(chunk))
            yield chunk

    with monkeypatch.context() as patched:
        patched.setattr(httpx2.Response, "iter_bytes", cut)
        patched.setattr("time.sleep", lambda s: None)
        with pytest.raises(errors.HubUnavailable):
            bases.open_base(place, endpoint=hub.url)
    (model / "tokenizer.json").unlink()
    left = sum(path.stat().st_size for path in model.iterdir() if path.suffix == ".safetensors")
    told: list[tuple[int, int]] = []
    base = bases.open_base(place, endpoint=hub.url, report=lambda *now: told.append(now))
    assert base.source.tensors.keys() == {"model.norm.weight"}
    assert (base.source.path / "tokenizer.json").stat().st_size == 3_000_000
    assert max(told) == (left, left)


def test_without_a_network(hub: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE: the branch's commit and its files are those of the cache, or it is refused."""
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo("ckptd/base", private=True)
    commit = api.upload_folder(repo_id="ckptd/base", folder_path=_model(tmp_path / "model")).oid
    source = _adapter(tmp_path / "ckpt", base_model_name_or_path="ckptd/base")
    snapshot_download("ckptd/base", endpoint=hub.url, token=hub.token)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    place = bases.locate(_stages(), source, beside=source.path, endpoint="http://127.0.0.1:1")
    assert place is not None
    assert place.commit == commit
    base = bases.open_base(place, endpoint="http://127.0.0.1:1")
    assert base.source.tensors.keys() == {"model.norm.weight"}
    with pytest.raises(errors.HubRejected, match="HF_HUB_OFFLINE"):
        bases.locate(_stages("ckptd/other"), source, beside=source.path, endpoint=None)
    absent = bases.Place(repo_id="ckptd/base", commit="0" * 40)
    with pytest.raises(errors.HubRejected, match="HF_HUB_OFFLINE"):
        bases.open_base(absent, endpoint=None)


def test_a_base_that_is_not_open(
    hub: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that may not read it is told so, with what to do; the job waits."""
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo("ckptd/base", private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_token_of_nobody")
    source = _adapter(tmp_path / "ckpt")
    with pytest.raises(errors.HubUnauthorized, match="accept its terms") as caught:
        bases.locate(_stages("ckptd/base"), source, beside=source.path, endpoint=hub.url)
    assert "hf_wrong" not in str(caught.value)


def test_a_folder_of_the_hubs_cache_is_known_as_its_repo(hub: Running, tmp_path: Path) -> None:
    """Its name is that of repo and commit, not of the machine's folder."""
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo("ckptd/base", private=True)
    commit = api.upload_folder(repo_id="ckptd/base", folder_path=_model(tmp_path / "model")).oid
    folder = Path(snapshot_download("ckptd/base", endpoint=hub.url, token=hub.token))
    assert bases.cached_repo(folder) == ("ckptd/base", commit)
    assert bases.Place(folder=folder).name == f"ckptd/base@{commit}"
    assert bases.cached_repo(tmp_path / "model") is None
    assert bases.place_of(f"ckptd/base@{commit}") == bases.Place(
        repo_id="ckptd/base", commit=commit
    )
    assert bases.place_of(str(folder)) == bases.Place(folder=folder)


def test_a_job_tells_how_far_its_base_is(hub: Running, tmp_path: Path) -> None:
    """Fetching is a phase of its own, with its bytes, and comes before the work is planned."""
    model = _model(tmp_path / "model")
    save_file({"model.norm.weight": np.ones(900_000, np.float32)}, model / "model.safetensors")
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo("ckptd/base", private=True)
    commit = api.upload_folder(repo_id="ckptd/base", folder_path=model).oid
    total = sum(path.stat().st_size for path in model.iterdir())
    adapter = _adapter(tmp_path / "ckpt", base_model_name_or_path="ckptd/base").path
    weights = {"base_model.model.model.norm.weight": np.zeros(900_000, np.float32)}
    save_file(weights, adapter / "adapter_model.safetensors")
    told: list[progress.Report] = []
    adapters.merge(adapter, tmp_path / "out", report=told.append, endpoint=hub.url)
    phases = [one.phase for one in told if isinstance(one, progress.PhaseChanged)]
    assert phases[:3] == [Phase.PLANNING, Phase.FETCHING, Phase.PLANNING]
    counters = [one.counters for one in told if isinstance(one, progress.BytesMoved)]
    assert Counter(done_bytes=total, total_bytes=total) in [one.fetched for one in counters]
    said = json.loads((tmp_path / "out" / "ckptd.json").read_text())
    assert said["source"]["base"] == {"name": f"ckptd/base@{commit}", "digest": commit}
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()
