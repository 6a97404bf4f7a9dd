"""Checkpoints that frameworks wrote: bit for bit their own consolidation, and no broken one taken."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptd.checkpoint import checkpoint, content, layouts, pin
from ckptd.checkpoint.checkpoint import open_checkpoint
from ckptd.checkpoint.completeness import Complete
from ckptd.checkpoint.listing import list_files
from ckptd.checkpoint.pin import PinMethod
from ckptd.errors import CheckpointIncomplete
from tests.checkpoint.consolidate.conftest import DATA, REFERENCE, judge, told, values

LAYOUT = {"dcp_plain": "dcp", "deepspeed_z3": "deepspeed", "lightning_ckpt": "lightning"}
Real = Callable[[str], Path]


@pytest.mark.parametrize("name", sorted(LAYOUT))
def test_the_weights_are_those_of_the_frameworks_own_consolidation(name: str, real: Real) -> None:
    """Names, dtypes, shapes, bytes; the config is found in the run's folder."""
    source = open_checkpoint(real(name))
    assert source.layout == LAYOUT[name]
    assert source.config_path.parent.name == "run"
    assert told(values(source)) == REFERENCE[name]


@pytest.mark.parametrize("name", sorted(LAYOUT))
def test_a_whole_checkpoint_is_complete(name: str, real: Real) -> None:
    """No false alarm, and the layout is told with a reason."""
    verdict = judge(real(name))
    assert isinstance(verdict, Complete), verdict
    assert verdict.layout == LAYOUT[name]


@pytest.mark.parametrize("name", sorted(LAYOUT))
@pytest.mark.parametrize("how", ["delete", "cut", "halve", "empty"])
def test_no_damaged_checkpoint_is_complete(name: str, how: str, real: Real) -> None:
    """Any file of it gone, one byte short, half or empty; only a missing `latest` is no loss."""
    path = real(name)
    for file in list_files(path).files:
        target = path / file.relpath
        data = target.read_bytes()
        if how == "delete":
            target.unlink()
        else:
            target.write_bytes(data[: {"cut": -1, "halve": len(data) // 2, "empty": 0}[how]])
        if file.relpath != "latest":
            assert not isinstance(judge(path), Complete), file.relpath
        target.write_bytes(data)
    assert isinstance(judge(path), Complete)


def test_a_single_file_is_a_checkpoint(real: Real) -> None:
    """Lightning's file, named itself: the same tensors, its step, its name."""
    path = real("lightning_ckpt") / "last.ckpt"
    (path.parent / "other.ckpt").write_bytes(b"never looked at")
    shutil.copy(DATA / "config.json", path.parent)
    source = open_checkpoint(path)
    assert told(values(source)) == REFERENCE["lightning_ckpt"]
    assert (source.step, source.name) == (8, "last.ckpt")
    assert isinstance(judge(path), Complete)


def test_without_a_config_the_refusal_says_what_gives_one(real: Real) -> None:
    """In the run's folder, or `assets`; then it is taken from there, tokenizer and all."""
    path = real("dcp_plain")
    config = path.parent / "config.json"
    elsewhere = path.parent / "base"
    elsewhere.mkdir()
    shutil.move(config, elsewhere)
    (elsewhere / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointIncomplete, match="config") as caught:
        open_checkpoint(path)
    assert "--assets" in str(caught.value.hint)
    assert "assets" in str(judge(path))
    source = open_checkpoint(path, assets=elsewhere)
    assert [file.relpath for file in source.side_files] == ["tokenizer.json"]
    assert isinstance(judge(path, assets=elsewhere), Complete)


def test_only_known_files_of_the_runs_folder_travel(real: Real) -> None:
    """The tokenizer beside the checkpoints is the model's, notes and links are not."""
    path = real("deepspeed_z3")
    for name in ("tokenizer.json", "notes.md", "secrets.json"):
        (path.parent / name).write_text("{}")
    (path.parent / "vocab.json").symlink_to("/etc/hostname")
    source = open_checkpoint(path)
    assert [file.relpath for file in source.side_files] == ["tokenizer.json"]


@pytest.mark.parametrize("name", sorted(LAYOUT))
@pytest.mark.parametrize("method", list(PinMethod))
def test_a_pin_holds_what_is_read_and_is_the_same_checkpoint(
    name: str, method: PinMethod, real: Real, tmp_path: Path
) -> None:
    """Weights that are named like the trainer's state are pinned, too; the digest is the same."""
    path = real(name)
    (path / "rng_state_0.pth").write_bytes(b"x")
    pinned = tmp_path / "pin"
    try:
        pin.refresh(path, list_files(path), pinned, method)
    except OSError:
        pytest.skip(f"no {method} here")
    (path / "rng_state_0.pth").unlink()
    assert not (pinned / "rng_state_0.pth").exists()
    assert isinstance(judge(pinned, folder=path, seen=list_files(path)), Complete)
    ours, theirs = open_checkpoint(pinned, folder=path), open_checkpoint(path)
    assert told(values(ours)) == REFERENCE[name]
    digests = [content.digest(checkpoint.identifying_files(one)) for one in (ours, theirs)]
    assert digests[0] == digests[1]


def test_the_digest_is_of_exactly_the_files_read(real: Real) -> None:
    """The optimizer's own files do not change what the checkpoint is; a shard does."""
    path = real("dcp_plain")
    before = content.digest(checkpoint.identifying_files(open_checkpoint(path)))
    (path / "optimizer_0").mkdir()
    (path / "optimizer_0" / ".metadata").write_bytes(b"anything")
    (path / "optimizer_0" / "__0_0.distcp").write_bytes(b"anything")
    assert content.digest(checkpoint.identifying_files(open_checkpoint(path))) == before
    assert not pin.wanted("optimizer_0/__0_0.distcp", layouts.FAMILIES["dcp"])
    assert pin.wanted("pytorch_model_fsdp_0/__0_0.distcp", layouts.FAMILIES["dcp"])
    assert not pin.wanted("global_step3/mp_rank_00_model_states.pt")
