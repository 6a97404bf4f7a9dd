"""GGUF models as checkpoints: which files, which config, what is told."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from ckptd.checkpoint import checkpoint, completeness, gguf_files, listing
from ckptd.checkpoint.checkpoint import Checkpoint, open_checkpoint
from ckptd.errors import CheckpointCorrupt, CheckpointIncomplete, CheckpointUnsupported
from tests.checkpoint.gguf_file import LLAMA, Entry, encode, floats, llama

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "from": "folder"}


def write(path: Path, *more: Entry, **metadata: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode({**LLAMA, **metadata}, llama(*more)))
    return path


def split(folder: Path) -> Path:
    """Write a model in two parts and return the first."""
    for place, entries in enumerate((llama(), [floats("output_norm.weight", 32)])):
        numbers = {"split.no": place, "split.count": 2}
        metadata = {**LLAMA, **numbers} if place == 0 else numbers
        (folder / f"m-{place + 1:05d}-of-00002.gguf").write_bytes(encode(metadata, entries))
    return folder / "m-00001-of-00002.gguf"


def test_a_file_is_a_checkpoint(tmp_path: Path) -> None:
    """A single file opens with its tensors, a config from its metadata, and advice."""
    path = write(tmp_path / "model-Q4.gguf")
    opened = open_checkpoint(path)
    assert (opened.layout, opened.name) == ("gguf", "model-Q4")
    assert opened.config["model_type"] == "llama"
    assert opened.config["tie_word_embeddings"] is True
    assert opened.config["quantization_config"] == {"quant_method": "gguf"}
    assert opened.config_path == path
    assert list(opened.stamps) == [path]
    assert checkpoint.identifying_files(opened) == [(path.name, path)]
    notes = " ".join(opened.notes)
    assert "made from the metadata of model-Q4.gguf" in notes
    assert "tokenizer.json" in notes


def test_a_folder_with_one_model_is_the_same(tmp_path: Path) -> None:
    """The folder gives the config and side files; a vision projector beside it is left alone."""
    write(tmp_path / "model.gguf")
    write(tmp_path / "mmproj-model-f16.gguf")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "tokenizer.json").write_text("{}")
    opened = open_checkpoint(tmp_path)
    assert opened.config["from"] == "folder"
    assert [file.relpath for file in opened.side_files] == ["tokenizer.json"]
    assert opened.notes == ("mmproj-model-f16.gguf (vision) was left alone",)
    assert set(opened.stamps) == {tmp_path / "model.gguf"}


def test_beside_a_file_only_known_names_count(tmp_path: Path) -> None:
    """A file among unrelated ones takes config and tokenizer along, and nothing else."""
    path = write(tmp_path / "model.gguf")
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(json.dumps(CONFIG))
    (tmp_path / "letters.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"another model")
    opened = open_checkpoint(path)
    assert opened.config["from"] == "folder"
    assert [file.relpath for file in opened.side_files] == ["tokenizer_config.json"]


def test_assets_give_what_is_missing(tmp_path: Path) -> None:
    """The config and the tokenizer of the assets folder are taken where the model has none."""
    path = write(tmp_path / "model.gguf")
    assets = tmp_path / "assets"
    assets.mkdir()
    (assets / "config.json").write_text(json.dumps(CONFIG))
    (assets / "tokenizer.json").write_text("{}")
    opened = open_checkpoint(path, assets=assets)
    assert opened.config["from"] == "folder"
    assert [file.relpath for file in opened.side_files] == ["tokenizer.json"]
    assert opened.notes == ()


@pytest.mark.parametrize("by_file", [False, True])
def test_a_split_model_is_whole(tmp_path: Path, by_file: bool) -> None:
    """All parts are read, by the folder or by the first of them."""
    first = split(tmp_path)
    opened = open_checkpoint(first if by_file else tmp_path)
    assert len(opened.stamps) == 2
    assert len(opened.tensors) == 4
    assert opened.config["model_type"] == "llama"


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    """Without its second part a split model is incomplete, and waits where it is watched."""
    first = split(tmp_path)
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    for path in (tmp_path, first):
        with pytest.raises(CheckpointIncomplete, match=r"m-00002-of-00002\.gguf"):
            open_checkpoint(path)
    facts = completeness.examine(tmp_path, listing.list_files(tmp_path))
    verdict = completeness.verdict(facts, quiet_s=100, settle_s=1)
    assert isinstance(verdict, completeness.Waiting)


def test_a_part_of_another_split_is_refused(tmp_path: Path) -> None:
    """A part whose header says another number or count than its name does not belong here."""
    split(tmp_path)
    wrong = encode({"split.no": 1, "split.count": 3}, [floats("output_norm.weight", 32)])
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(wrong)
    with pytest.raises(CheckpointCorrupt, match="expected part 1 of 2, found part 1 of 3"):
        open_checkpoint(tmp_path)


def test_several_models_are_a_choice(tmp_path: Path) -> None:
    """A folder with the model in two types is refused with advice; each file alone opens."""
    for kind in ("Q4_K_M", "Q8_0"):
        write(tmp_path / f"model-{kind}.gguf")
    with pytest.raises(CheckpointUnsupported, match=r"2 GGUF models.*name one of these files"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path / "model-Q8_0.gguf").name == "model-Q8_0"


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"general.architecture": "clip"}, "vision part"),
        ({"general.type": "adapter"}, "adapter without its base"),
        ({"general.type": "imatrix"}, "importance matrix"),
        ({"general.type": "vocab"}, "vocabulary"),
    ],
)
def test_what_is_no_model_is_named(tmp_path: Path, metadata: Any, said: str) -> None:
    """Projectors, adapters and other files of the same container are unsupported by name."""
    with pytest.raises(CheckpointUnsupported, match=said):
        open_checkpoint(write(tmp_path / "file.gguf", **metadata))


def test_only_a_projector_is_no_model(tmp_path: Path) -> None:
    """A folder with nothing but a projector has no model."""
    write(tmp_path / "mmproj.gguf")
    with pytest.raises(CheckpointIncomplete, match="no GGUF model"):
        open_checkpoint(tmp_path)


def test_an_unknown_architecture_needs_a_config(tmp_path: Path) -> None:
    """Where no config can be made, one must be given; then the model opens."""
    path = write(tmp_path / "model.gguf", **{"general.architecture": "mamba"})
    with pytest.raises(CheckpointUnsupported, match=r"'mamba'.*--assets"):
        open_checkpoint(path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert open_checkpoint(path).config["from"] == "folder"


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    """A key that the config needs and the metadata lacks, or has as text, is named."""
    for key, value in (("llama.block_count", "many"), ("llama.embedding_length", [1, 2])):
        path = write(tmp_path / "model.gguf", **{key: value})
        with pytest.raises(CheckpointCorrupt, match=f"no number {key}"):
            open_checkpoint(path)


def _with_factors(path: Path, factors: list[float]) -> Checkpoint:
    raw = struct.pack(f"<{len(factors)}f", *factors)
    rope = Entry("rope_freqs.weight", (len(factors),), 0, raw)
    return open_checkpoint(write(path, rope, **{"llama.rope.freq_base": 500000.0}))


def test_factors_that_no_settings_give_are_refused(tmp_path: Path) -> None:
    """Rotary factors are turned into settings that give them again, or refused; ones are none."""
    path = tmp_path / "model.gguf"
    assert "rope_scaling" not in _with_factors(path, [1.0] * 8).config
    with pytest.raises(CheckpointUnsupported, match="no known settings"):
        _with_factors(path, [1.0, 2.0, 3.0, 1.0])
    with pytest.raises(CheckpointCorrupt, match="no positive numbers"):
        _with_factors(path, [1.0, float("nan")])


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"type": "none"}, None),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 2.0, "original_context_length": 64},
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
        ),
    ],
)
def test_scaling_in_the_metadata_reaches_the_config(
    tmp_path: Path, metadata: dict[str, Any], expected: Any
) -> None:
    """Linear and YaRN scaling are said as config.json says them."""
    keys = {f"llama.rope.scaling.{key}": value for key, value in metadata.items()}
    opened = open_checkpoint(write(tmp_path / "model.gguf", **keys))
    assert opened.config.get("rope_scaling") == expected


def test_the_verdict_on_a_quiet_file_is_complete(tmp_path: Path) -> None:
    """A whole file is complete, a truncated one broken; by its folder and by its path."""
    path = write(tmp_path / "model.gguf")
    for place in (tmp_path, path):
        facts = completeness.examine(place, listing.list_files(place))
        found = completeness.verdict(facts, quiet_s=100, settle_s=1)
        assert found == completeness.Complete(layout="gguf", reason="model.gguf is there")
    path.write_bytes(path.read_bytes()[:-40])
    facts = completeness.examine(tmp_path, listing.list_files(tmp_path))
    assert isinstance(completeness.verdict(facts, quiet_s=100, settle_s=1), completeness.Broken)


def test_a_file_of_a_model_cache_has_what_lies_beside_it(tmp_path: Path) -> None:
    """A cache's snapshot is made of links: a person who names its file gets them, the daemon not."""
    snapshot, blobs = tmp_path / "snapshots", tmp_path / "blobs"
    snapshot.mkdir()
    blobs.mkdir()
    for name in ("model.gguf", "config.json"):
        (blobs / name).write_bytes(b"{}")
        (snapshot / name).symlink_to(blobs / name)
    named = gguf_files.beside(snapshot / "model.gguf", within=Path("/"))
    watched = gguf_files.beside(snapshot / "model.gguf")
    assert [file.relpath for file in named.files] == ["config.json", "model.gguf"]
    assert [file.relpath for file in watched.files] == ["model.gguf"]
