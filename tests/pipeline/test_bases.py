"""Bases: which one an adapter is merged into, and what identifies it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import HfApi
from safetensors.numpy import save_file

from ckptd import errors
from ckptd.checkpoint import checkpoint
from ckptd.checkpoint.checkpoint import Checkpoint
from ckptd.hub.local import server
from ckptd.hub.local.server import Running
from ckptd.pipeline import bases, definition


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
