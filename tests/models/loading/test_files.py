"""Which files from_pretrained reads, in folders and through the Hub's cache, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file

from ckptd.models.config.config_source import Source
from ckptd.models.loading import files, loading
from tests.models.tiny import TinyBody, TinyConfig, tiny_saved, tiny_state

BOTH = "output_loading_info"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder that holds a TinyBody."""
    return tiny_saved(tmp_path / "tiny", tiny_state())


def sharded(folder: Path, state: dict[str, torch.Tensor], infix: str = "") -> Path:
    names = sorted(state)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    weight_map = {}
    folder.mkdir(parents=True, exist_ok=True)
    for number, half in enumerate(halves, start=1):
        file = f"model{infix}-{number:05}-of-00002.safetensors"
        tiny_saved(folder, {name: state[name] for name in half}, file)
        weight_map |= dict.fromkeys(half, file)
    index = folder / f"model.safetensors.index{infix}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("infix", ["", ".fp16"])
def test_shards_and_variants_are_found(tmp_path: Path, infix: str) -> None:
    """A set of shards and its index, plain or of a variant, in a folder or below it."""
    state = tiny_state()
    sharded(tmp_path / "below", state, infix)
    where = {"subfolder": "below", "variant": infix.lstrip(".") or None}
    model, info = TinyBody.from_pretrained(tmp_path, **where, **{BOTH: True})
    assert not any(info.values())
    assert torch.equal(model.embed.weight, state["embed.weight"])


def test_a_variant_stands_beside_the_plain_weights(tmp_path: Path) -> None:
    """Each is found by its name, and one that is not there is an OSError that says what is."""
    state = tiny_state()
    tiny_saved(tmp_path, state)
    tiny_saved(tmp_path, {name: t + 1 for name, t in state.items()}, "model.fp16.safetensors")
    plain = TinyBody.from_pretrained(tmp_path)
    variant = TinyBody.from_pretrained(tmp_path, variant="fp16")
    assert torch.equal(plain.embed.weight + 1, variant.embed.weight)
    with pytest.raises(OSError, match="leave `variant` out"):
        TinyBody.from_pretrained(tmp_path, variant="ema")


@pytest.mark.parametrize("newest", ["single", "shards"])
def test_the_newer_of_two_sets_is_loaded(tmp_path: Path, newest: str) -> None:
    """What an earlier save left behind does not win, whichever kind it is."""
    state = tiny_state()
    tiny_saved(tmp_path, {name: t + (newest == "single") for name, t in state.items()})
    sharded(tmp_path, {name: t + (newest == "shards") for name, t in state.items()})
    old, new = (2, 10**18), (1, 2 * 10**18)
    for path in tmp_path.iterdir():
        is_single = path.name == "model.safetensors"
        stamp = (new if is_single == (newest == "single") else old)[1]
        os.utime(path, ns=(stamp, stamp))
    model = TinyBody.from_pretrained(tmp_path)
    assert torch.equal(model.embed.weight, state["embed.weight"] + 1)


def test_the_file_that_the_configuration_names_is_loaded(tmp_path: Path) -> None:
    """transformers_weights wins, and may not lead outside the folder."""
    state = tiny_state()
    tiny_saved(tmp_path, {name: t + 1 for name, t in state.items()})
    tiny_saved(tmp_path, state, "other.safetensors", transformers_weights="other.safetensors")
    assert torch.equal(TinyBody.from_pretrained(tmp_path).embed.weight, state["embed.weight"])
    for bad in ("../x.safetensors", "/etc/x.safetensors", "weights.bin"):
        (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": bad}))
        with pytest.raises(ValueError, match="transformers_weights"):
            TinyBody.from_pretrained(tmp_path)


def test_a_weight_file_can_be_named_itself(tiny: Path) -> None:
    """The configuration is then the one beside it."""
    model = TinyBody.from_pretrained(tiny / "model.safetensors")
    assert torch.equal(model.embed.weight, load_file(tiny / "model.safetensors")["embed.weight"])


def _truncated(folder: Path) -> str:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 3)
    return "truncated"


def _no_header(folder: Path) -> str:
    (folder / "model.safetensors").write_bytes(b"\x09\0\0\0\0\0\0\0not json!")
    return "model.safetensors"


def _missing_shard(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    sharded(folder, tiny_state())
    (folder / "model-00002-of-00002.safetensors").unlink()
    return "model-00002-of-00002.safetensors"


def _only_pickles(folder: Path) -> str:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return r"pytorch_model\.bin.*pickled"


def _nothing(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return "no weights"


def _no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "config.json"


def _no_folder(folder: Path) -> str:
    shutil.rmtree(folder)
    return "does not exist"


@pytest.mark.parametrize(
    "harm",
    [_truncated, _no_header, _missing_shard, _only_pickles, _nothing, _no_config, _no_folder],
)
def test_files_that_are_not_whole_are_an_oserror_that_names_them(
    tiny: Path, harm: Callable[[Path], str]
) -> None:
    """The documented exception type, with the file and what is wrong with it."""
    expected = harm(tiny)
    with pytest.raises(OSError, match=expected):
        TinyBody.from_pretrained(tiny)


def test_pickles_are_refused_by_name(tiny: Path) -> None:
    """use_safetensors=False asks for what is never read."""
    with pytest.raises(OSError, match="pickled"):
        TinyBody.from_pretrained(tiny, use_safetensors=False)


def test_a_file_that_is_replaced_while_it_is_read_is_an_oserror(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No half of an old and half of a new checkpoint, and no SIGBUS."""
    build = loading._built

    def replacing(*args: Any) -> Any:
        tiny_saved(tiny, {"x": torch.zeros(1)})
        return build(*args)

    monkeypatch.setattr(loading, "_built", replacing)
    with pytest.raises(OSError, match="changed while it was read"):
        TinyBody.from_pretrained(tiny)


def test_a_loaded_model_is_independent_of_its_files(tiny: Path) -> None:
    """Truncating the file afterwards changes nothing: it is not mapped."""
    model = TinyBody.from_pretrained(tiny)
    before = model.embed.weight.clone()
    os.truncate(tiny / "model.safetensors", 0)
    assert torch.equal(model.embed.weight, before)


# The Hub

REPO = "ckptd/tiny"


@pytest.fixture
def repo(hub: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> HfApi:
    """A client of a loopback Hub that has a TinyBody in `REPO`."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo(REPO)
    (tiny / "README.md").write_text("---\nlicense: mit\n---\n")
    (tiny / "extra.txt").write_text("not needed")
    api.upload_folder(repo_id=REPO, folder_path=tiny)
    return api


@pytest.fixture
def cache(tmp_path: Path) -> dict[str, Any]:
    """Arguments that keep downloads of this test to itself."""
    return {"cache_dir": tmp_path / "cache"}


def downloaded(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("models--*/snapshots/*/**/*") if path.is_symlink()}


def test_a_repository_is_loaded_through_the_cache(
    repo: HfApi, hub: Any, tiny: Path, cache: dict[str, Any]
) -> None:
    """Only the files needed are fetched, once: afterwards no connection is needed."""
    model, info = TinyBody.from_pretrained(REPO, **cache, **{BOTH: True})
    stored = load_file(tiny / "model.safetensors")
    assert not any(info.values())
    assert torch.equal(model.embed.weight, stored["embed.weight"])
    assert model.name_or_path == REPO
    assert downloaded(cache["cache_dir"]) == {"config.json", "model.safetensors"}
    requests = len(hub.ledger.find())
    again = TinyBody.from_pretrained(REPO, local_files_only=True, **cache)
    assert torch.equal(again.embed.weight, stored["embed.weight"])
    assert len(hub.ledger.find()) == requests


def test_a_sharded_repository_is_fetched_whole(
    repo: HfApi, tmp_path: Path, cache: dict[str, Any]
) -> None:
    """The index and each of its shards come from the same commit."""
    folder = sharded(tmp_path / "sharded", tiny_state())
    repo.create_repo("ckptd/sharded")
    repo.upload_folder(repo_id="ckptd/sharded", folder_path=folder, path_in_repo="below")
    model = TinyBody.from_pretrained("ckptd/sharded", subfolder="below", **cache)
    assert torch.equal(model.embed.weight, tiny_state()["embed.weight"])
    assert len(list(cache["cache_dir"].glob("models--*/snapshots/*"))) == 1
    assert downloaded(cache["cache_dir"]) == {path.name for path in folder.iterdir()}


def test_documents_beside_the_weights_are_found_when_asked_for(
    repo: HfApi, tiny: Path, cache: dict[str, Any]
) -> None:
    """In a folder and in a repository; nothing is fetched before, and absence is None."""
    (tiny / "quantize_config.json").write_text('{"bits": 4}')
    repo.upload_file(
        repo_id=REPO, path_or_fileobj=b'{"bits": 4}', path_in_repo="quantize_config.json"
    )
    for name in (str(tiny), REPO):
        source = files.pinned(name, Source(**cache))
        found = files.read(name, source, files.Wanted())
        assert "quantize_config.json" not in downloaded(cache["cache_dir"])
        assert found.document("hf_quant_config.json") is None
        assert found.document("quantize_config.json") == {"bits": 4}
    offline = Source(**cache, local_files_only=True, revision=source.revision)
    assert files.read(REPO, offline, files.Wanted()).document("quant_config.json") is None


def test_a_pull_request_can_be_tried(repo: HfApi, tmp_path: Path, cache: dict[str, Any]) -> None:
    """`revision` takes refs/pr/N and commits."""
    other = tiny_saved(tmp_path / "other", {name: t + 1 for name, t in tiny_state().items()})
    change = repo.upload_folder(repo_id=REPO, folder_path=other, create_pr=True)
    main = TinyBody.from_pretrained(REPO, **cache)
    for revision in (f"refs/pr/{change.pr_num}", change.oid):
        model = TinyBody.from_pretrained(REPO, revision=revision, **cache)
        assert torch.equal(model.embed.weight, main.embed.weight + 1)


def test_what_the_hub_does_not_have_is_an_oserror_that_says_what(
    repo: HfApi, tmp_path: Path, cache: dict[str, Any]
) -> None:
    """Repo, revision, variant, weights, or a cache that lacks them: named, with what to do."""
    with pytest.raises(OSError, match=r"ckptd/absent.*token"):
        TinyBody.from_pretrained("ckptd/absent", **cache)
    with pytest.raises(OSError, match=r"no revision 'v9'"):
        TinyBody.from_pretrained(REPO, revision="v9", **cache)
    with pytest.raises(OSError, match=r"model\.fp16\.safetensors"):
        TinyBody.from_pretrained(REPO, variant="fp16", **cache)
    with pytest.raises(OSError, match=r"not in the cache"):
        TinyBody.from_pretrained(REPO, local_files_only=True, cache_dir=tmp_path / "empty")
    TinyConfig.from_pretrained(REPO, cache_dir=tmp_path / "half")
    with pytest.raises(OSError, match=r"model\.safetensors.*not in the cache"):
        TinyBody.from_pretrained(REPO, local_files_only=True, cache_dir=tmp_path / "half")


def test_a_repository_of_pickles_is_refused(
    repo: HfApi, tmp_path: Path, cache: dict[str, Any]
) -> None:
    """The pickle is named, the way to convert it, and it is not downloaded."""
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"x" * 100)
    repo.create_repo("ckptd/pickled")
    repo.upload_folder(repo_id="ckptd/pickled", folder_path=folder)
    with pytest.raises(OSError, match=r"only pytorch_model\.bin.*convert"):
        TinyBody.from_pretrained("ckptd/pickled", **cache)
    assert downloaded(cache["cache_dir"]) == {"config.json"}
