"""Opening a folder: what is there is found, what is wrong is refused by name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from ckptd.checkpoint.checkpoint import check_unchanged, open_checkpoint
from ckptd.errors import (
    CheckpointCorrupt,
    CheckpointIncomplete,
    CheckpointUnsupported,
    CheckpointVanished,
    SourceChanged,
)

INDEX = "model.safetensors.index.json"


def _edit_index(folder: Path, change: Any) -> None:
    value = json.loads((folder / INDEX).read_text())
    change(value)
    (folder / INDEX).write_text(json.dumps(value))


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_every_tensor_is_found_with_its_bytes(shards: int, make_folder: Any, arrays: Any) -> None:
    """Names, shapes and bytes are those that were saved, single or sharded."""
    opened = open_checkpoint(make_folder(shards=shards))
    assert set(opened.tensors) == set(arrays)
    for name, tensor in opened.tensors.items():
        raw = tensor.extent.path.read_bytes()
        begin = tensor.extent.offset
        assert raw[begin : begin + tensor.extent.nbytes] == arrays[name].tobytes()
    assert opened.tensor_bytes == sum(array.nbytes for array in arrays.values())


def test_side_files_travel_and_trainer_state_stays(make_folder: Any) -> None:
    """Tokenizer, template and code travel; optimizer, scheduler, rng and arguments do not."""
    folder = make_folder("checkpoint-7", step=7)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "merges.txt"):
        (folder / name).write_text("{}")
    (folder / "rng_state_0.pth").write_bytes(b"x")
    (folder / "weird.dat").write_bytes(b"x")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("x")

    opened = open_checkpoint(folder)

    assert {file.relpath for file in opened.side_files} == {
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "additional_chat_templates/tool.jinja",
    }
    assert opened.left_out == ("weird.dat",)
    assert (opened.layout, opened.step) == ("hf-trainer", 7)


def test_an_adapters_config_goes_with_no_whole_model(make_folder: Any, tmp_path: Path) -> None:
    """torchtune leaves it beside merged weights: loaders would look for the adapter then."""
    folder, assets = make_folder("epoch_0"), tmp_path / "assets"
    assets.mkdir()
    for name in ("adapter_config.json", "reference/adapter_config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (assets / "adapter_config.json").write_text("{}")
    opened = open_checkpoint(folder, assets=assets)
    assert not opened.side_files
    assert opened.left_out == ("adapter_config.json", "reference/adapter_config.json")


def test_assets_give_what_the_trainer_left_out(make_folder: Any, tmp_path: Path) -> None:
    """config.json and tokenizer come from the assets folder; what the checkpoint has wins."""
    folder, assets = make_folder(), tmp_path / "assets"
    assets.mkdir()
    shutil.move(folder / "config.json", assets / "config.json")
    (assets / "tokenizer.json").write_text("assets")
    (assets / "vocab.txt").write_text("assets")
    (folder / "vocab.txt").write_text("own")

    opened = open_checkpoint(folder, assets=assets)

    assert opened.config["model_type"] == "llama"
    assert {f.relpath: f.path.read_text() for f in opened.side_files} == {
        "tokenizer.json": "assets",
        "vocab.txt": "own",
    }


@pytest.mark.parametrize(
    "shard", ["../../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "x"]
)
def test_an_index_that_leaves_the_folder_is_refused(shard: str, make_folder: Any) -> None:
    """A weight_map may name files beside the index only."""
    folder = make_folder(shards=2)
    _edit_index(folder, lambda v: v["weight_map"].update({"lm_head.weight": shard}))
    with pytest.raises(CheckpointCorrupt, match="beside the index") as caught:
        open_checkpoint(folder)
    assert caught.value.tensor == "lm_head.weight"


def test_a_link_out_of_the_folder_is_not_followed(make_folder: Any, tmp_path: Path) -> None:
    """A weight file that is a link to elsewhere counts as absent, unless a person allows it."""
    folder = make_folder()
    shutil.move(folder / "model.safetensors", tmp_path / "secret.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(CheckpointIncomplete):
        open_checkpoint(folder)
    assert open_checkpoint(folder, within=tmp_path).tensors


def test_a_missing_shard_is_named(make_folder: Any) -> None:
    """The message says which shard, and how many of how many are there."""
    folder = make_folder(shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointIncomplete, match=r"model-00002-of-00003.*expected 3.*found 2"):
        open_checkpoint(folder)


def test_a_tensor_in_two_shards_is_refused(make_folder: Any) -> None:
    """Duplicate names across shards are refused with both shards."""
    folder = make_folder(shards=2)
    first, second = sorted(folder.glob("*.safetensors"))
    shutil.copy(first, second)
    _edit_index(folder, lambda v: None)
    with pytest.raises(CheckpointCorrupt, match=r"two shards|disagree"):
        open_checkpoint(folder)


def test_an_index_that_names_an_absent_tensor_is_refused(make_folder: Any) -> None:
    """The index may not promise what its shard does not hold."""
    folder = make_folder(shards=2)
    _edit_index(
        folder, lambda v: v["weight_map"].update({"ghost": "model-00001-of-00002.safetensors"})
    )
    with pytest.raises(CheckpointCorrupt, match="ghost"):
        open_checkpoint(folder)


def test_the_newer_of_two_sets_of_weights_wins(make_folder: Any, arrays: Any) -> None:
    """A single file left over beside newer shards is ignored, and the other way round."""
    folder = make_folder(shards=2)
    stale = folder / "model.safetensors"
    shutil.copy(folder / "model-00001-of-00002.safetensors", stale)
    os.utime(stale, (1, 1))
    opened = open_checkpoint(folder)
    assert set(opened.tensors) == set(arrays)
    assert opened.notes

    os.utime(stale)
    os.utime(folder / INDEX, (1, 1))
    assert set(open_checkpoint(folder).tensors) < set(arrays)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.fp16.safetensors", "variant"),
    ],
)
def test_weights_of_another_kind_are_refused_by_name(
    name: str, words: str, make_folder: Any
) -> None:
    """The refusal names the file and says what to do."""
    folder = make_folder()
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(CheckpointUnsupported, match=words) as caught:
        open_checkpoint(folder)
    assert caught.value.hint
    assert caught.value.path.name == name


@pytest.mark.parametrize(
    ("break_it", "error"),
    [
        (lambda f: (f / "config.json").unlink(), CheckpointIncomplete),
        (lambda f: (f / "config.json").write_text("{"), CheckpointCorrupt),
        (lambda f: (f / "config.json").write_text("[]"), CheckpointCorrupt),
        (lambda f: (f / "config.json").write_text('{"model_type": ["llama"]}'), CheckpointCorrupt),
        (lambda f: shutil.rmtree(f), CheckpointIncomplete),
        (lambda f: [p.unlink() for p in f.iterdir()], CheckpointIncomplete),
    ],
)
def test_a_folder_without_its_essentials_is_refused(
    break_it: Any, error: type[Exception], make_folder: Any
) -> None:
    """No config, a broken config, an empty folder, no folder: each says so."""
    folder = make_folder()
    break_it(folder)
    with pytest.raises(error, match=str(folder)):
        open_checkpoint(folder)


def test_a_changed_source_shows_in_its_stamps(make_folder: Any) -> None:
    """Rewriting a weight file in place or deleting it is noticed."""
    folder = make_folder()
    opened = open_checkpoint(folder)
    check_unchanged(opened.stamps)
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(SourceChanged, match=r"model\.safetensors"):
        check_unchanged(opened.stamps)
    (folder / "model.safetensors").unlink()
    with pytest.raises(SourceChanged, match="No such file"):
        check_unchanged(opened.stamps)


def test_a_config_that_is_a_link_out_of_the_folder_is_not_read(
    make_folder: Any, tmp_path: Path
) -> None:
    """Not only weights: no file of the folder may lead elsewhere, or secrets could be published."""
    folder = make_folder()
    shutil.move(folder / "config.json", tmp_path / "secret.json")
    (folder / "config.json").symlink_to(tmp_path / "secret.json")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointIncomplete, match=r"config\.json"):
        open_checkpoint(folder)
    assert not open_checkpoint(folder, within=tmp_path).config.get("absent")


def test_assets_may_be_links(make_folder: Any, tmp_path: Path) -> None:
    """A snapshot of a model cache, whose files are links to blobs elsewhere, serves as assets."""
    folder, assets = make_folder(), tmp_path / "cache" / "snapshot"
    assets.mkdir(parents=True)
    shutil.move(folder / "config.json", tmp_path / "blob1")
    (tmp_path / "blob2").write_text("{}")
    (assets / "config.json").symlink_to(tmp_path / "blob1")
    (assets / "tokenizer.json").symlink_to(tmp_path / "blob2")
    opened = open_checkpoint(folder, assets=assets, within=folder)
    assert [file.relpath for file in opened.side_files] == ["tokenizer.json"]


def test_absent_assets_are_named(make_folder: Any, tmp_path: Path) -> None:
    """A wrong `assets` folder is an error about that folder."""
    with pytest.raises(CheckpointIncomplete, match="assets") as caught:
        open_checkpoint(make_folder(), assets=tmp_path / "nowhere")
    assert caught.value.path == tmp_path / "nowhere"


@pytest.mark.parametrize(
    ("failure", "error"),
    [(PermissionError, CheckpointUnsupported), (FileNotFoundError, CheckpointVanished)],
)
def test_a_weight_file_that_cannot_be_opened_is_our_error(
    failure: type[OSError], error: type[Exception], make_folder: Any, monkeypatch: Any
) -> None:
    """Mode 0600 of another user and a rotation in the wrong moment are named as what they are."""
    folder = make_folder()

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        raise failure(1, "no", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(error):
        open_checkpoint(folder)


def test_shards_newer_than_a_single_file_wait_for_their_index(make_folder: Any) -> None:
    """A save in shards over an older single file is not read as the old one before its index."""
    folder = make_folder(shards=2)
    (folder / INDEX).unlink()
    with pytest.raises(CheckpointIncomplete, match="index"):
        open_checkpoint(folder)
    single = folder / "model.safetensors"
    shutil.copy(folder / "model-00001-of-00002.safetensors", single)
    os.utime(single, (1, 1))
    with pytest.raises(CheckpointIncomplete, match="index"):
        open_checkpoint(folder)
    os.utime(single)
    for shard in folder.glob("model-*.safetensors"):
        os.utime(shard, (1, 1))
    assert open_checkpoint(folder).tensors


def test_trainer_state_is_not_taken_for_pickled_weights(make_folder: Any) -> None:
    """A folder with optimizer.pt and no weights lacks weights; it does not hold pickled ones."""
    folder = make_folder(step=3)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointIncomplete, match="no weights"):
        open_checkpoint(folder)


def test_half_characters_in_json_are_refused(make_folder: Any) -> None:
    """Text that no output could be written from is refused where it is read."""
    folder = make_folder()
    (folder / "config.json").write_text('{"model_type": "a\\ud800"}')
    with pytest.raises(CheckpointCorrupt, match="character"):
        open_checkpoint(folder)
    (folder / "config.json").write_text('{"model_type": "\\ud83d\\ude00"}')
    assert open_checkpoint(folder).config["model_type"] == "\U0001f600"


def test_file_names_that_are_no_text_are_left_out(make_folder: Any) -> None:
    """Such a name cannot stand in a repo; it is reported in a form that can be printed."""
    folder = make_folder()
    (folder / "\udcff.json").write_text("{}")
    opened = open_checkpoint(folder)
    assert not opened.side_files
    assert opened.left_out == ("\\udcff.json",)
