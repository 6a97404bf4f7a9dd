"""What is known of an adapter's base without its weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ckptd import errors
from ckptd.checkpoint import checkpoint
from ckptd.checkpoint.checkpoint import Checkpoint
from ckptd.hub import card
from ckptd.pipeline import bases, definition, origins, target

AWAY = "http://127.0.0.1:1"
README = "---\nlicense: other\nlicense_name: x\nlicense_link: LICENSE\npipeline_tag: any\n---\n"


def _adapter(path: Path, base: str | None, **said: object) -> Checkpoint:
    path.mkdir(parents=True)
    save_file({"x.lora_A.weight": np.zeros((1, 2), np.float32)}, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": base} | said
    (path / "adapter_config.json").write_text(json.dumps(config))
    return checkpoint.open_checkpoint(path)


def _base(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "README.md").write_text(README)
    return path


def _push(text: str) -> definition.Push:
    return definition.Push(repo_id=text)


def test_a_base_in_a_folder(tmp_path: Path) -> None:
    """Its model_type and its license are read there; without a name on the Hub none is claimed."""
    _base(tmp_path / "runs" / "base")
    source = _adapter(tmp_path / "runs" / "a" / "ckpt", "base")
    origin = origins.of(source, beside=source.path)
    assert origin is not None
    assert origin.repo_id is None
    assert origins.model_type(_push("a/{model_type}"), source, origin, endpoint=AWAY) == "llama"
    facts = origins.card_facts(source, origin, merged=False, endpoint=AWAY, online=True)
    assert facts.base_model is None
    assert dict(facts.borrowed) == {"license": "other", "license_name": "x", "pipeline_tag": "any"}


def test_a_folder_of_the_hubs_cache(tmp_path: Path) -> None:
    """It is known as its repo, and a link to its license leads there."""
    commit = "0123456789" * 4
    folder = _base(tmp_path / "hub" / "models--acme--base" / "snapshots" / commit)
    source = _adapter(tmp_path / "ckpt", str(folder))
    origin = origins.of(source, beside=source.path)
    assert origin is not None
    assert (origin.repo_id, origin.revision) == ("acme/base", commit)
    facts = origins.card_facts(source, origin, merged=True, endpoint=AWAY, online=True)
    assert (facts.base_model, facts.relation) == ("acme/base", "finetune")
    assert dict(facts.borrowed)["license_link"].endswith("/acme/base/blob/main/LICENSE")


def test_a_merged_models_license_is_the_adapters_own(tmp_path: Path) -> None:
    """Where the trainer's card has one, nothing of the base's is mixed into it."""
    _base(tmp_path / "base")
    source = _adapter(tmp_path / "ckpt", str(tmp_path / "base"))
    (source.path / "README.md").write_text("---\nlicense: mit\nlibrary_name: peft\n---\n")
    origin = origins.of(source, beside=source.path)
    facts = origins.card_facts(source, origin, merged=True, endpoint=AWAY, online=True)
    assert dict(facts.borrowed) == {"license": "mit", "pipeline_tag": "any"}


def test_the_hub_is_asked_only_where_it_must_be(tmp_path: Path) -> None:
    """For a placeholder that is used and for a push; one that is away is a failure that may pass."""
    source = _adapter(tmp_path / "ckpt", "acme/base", revision="v2")
    origin = origins.of(source, beside=source.path)
    assert origin == origins.Origin(folder=None, repo_id="acme/base", revision="v2")
    assert origins.model_type(_push("a/{run}"), source, origin, endpoint=AWAY) is None
    facts = origins.card_facts(source, origin, merged=False, endpoint=AWAY, online=False)
    assert facts == card.Facts(base_model="acme/base", relation="adapter")
    with pytest.raises(errors.HubUnavailable):
        origins.model_type(_push("a/{model_type}"), source, origin, endpoint=AWAY)
    with pytest.raises(errors.HubUnavailable):
        origins.card_facts(source, origin, merged=False, endpoint=AWAY, online=True)


def test_a_definitions_base_is_the_one(tmp_path: Path) -> None:
    """What an adapter is merged into is told, by the name that the adapter knows it under."""
    folder = _base(tmp_path / "elsewhere")
    source = _adapter(tmp_path / "ckpt", "acme/base")
    place = bases.Place(folder=folder)
    origin = origins.of(source, beside=source.path, place=place)
    assert origin is not None
    assert (origin.folder, origin.repo_id) == (folder, "acme/base")
    commit = "0123456789" * 4
    place = bases.Place(repo_id="other/base", commit=commit)
    origin = origins.of(source, beside=source.path, place=place)
    assert origin == origins.Origin(folder=None, repo_id="other/base", revision=commit)


@pytest.mark.parametrize("base", [None, "/nowhere/at/all"])
def test_no_model_type_is_a_refusal_with_advice(base: str | None, tmp_path: Path) -> None:
    """A placeholder without a value says which one, where, and what gives it."""
    source = _adapter(tmp_path / "ckpt", base)
    push = _push("acme/{model_type}")
    origin = origins.of(source, beside=source.path)
    assert origin is None
    kind = origins.model_type(push, source, origin, endpoint=AWAY)
    with pytest.raises(errors.CheckpointUnsupported, match=r"model_type.*merge: \{base"):
        target.resolve(push, source, run="run", digest=None, model_type=kind)


def test_a_whole_model_has_no_origin(tmp_path: Path) -> None:
    """Its model_type is its own, and nothing is completed in its card."""
    folder = _base(tmp_path / "model")
    save_file({"w": np.zeros(2, np.float32)}, folder / "model.safetensors")
    source = checkpoint.open_checkpoint(folder)
    assert origins.of(source, beside=folder) is None
    assert origins.model_type(_push("a/b"), source, None, endpoint=AWAY) == "llama"
    facts = origins.card_facts(source, None, merged=False, endpoint=AWAY, online=True)
    assert facts == card.NOTHING
