"""Completeness: never before the last write, always after it, and broken is said to be broken."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.checkpoint import completeness
from ckptd.checkpoint.completeness import Broken, Complete, Facts, Verdict, Waiting
from ckptd.checkpoint.listing import list_files
from ckptd.errors import CheckpointCorrupt, CheckpointIncomplete
from tests.checkpoint import saved_files

SETTLE_S = 10.0


def _judge(path: Path, quiet_s: float = math.inf, **options: Any) -> Verdict:
    facts = completeness.examine(path, list_files(path), **options)
    return completeness.verdict(facts, quiet_s=quiet_s, settle_s=SETTLE_S)


@pytest.fixture
def saved(make_folder: Any) -> Path:
    """A whole Trainer checkpoint."""
    folder: Path = make_folder("checkpoint-2", step=2)
    return folder


def test_a_half_deleted_checkpoint_is_not_complete(saved: Path) -> None:
    """During rotation the marker outlives the weights."""
    (saved / "model.safetensors").unlink()
    assert isinstance(_judge(saved), Waiting)


def test_a_pin_without_training_arguments_is_judged_by_the_trainers_folder(
    saved: Path, tmp_path: Path
) -> None:
    """The layout is told by what the trainer has, not by the part of it that is pinned."""
    (saved / "trainer_state.json").unlink()
    pinned = tmp_path / "pin"
    pinned.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy2(saved / name, pinned)
    verdict = _judge(pinned, folder=saved, seen=list_files(saved))
    assert isinstance(verdict, Waiting)
    assert "trainer_state.json" in verdict.why


@pytest.mark.parametrize(
    "name",
    [
        ".tmp4LeFwu", "x.part", ".incomplete", "sub/.tmpX", ".nfs01", "model.lock", ".metadata.tmp",
        ".model.safetensors.aB3dE5", "model.safetensors.6eF4a1Bc", "x.orbax-checkpoint-tmp/y",
    ],
)  # fmt: skip
def test_a_write_in_progress_is_a_veto(name: str, saved: Path) -> None:
    """As long as a half-written file is there that is not older than the save, nothing is complete."""
    (saved / name).parent.mkdir(exist_ok=True)
    (saved / name).write_bytes(b"x")
    verdict = _judge(saved)
    assert isinstance(verdict, Waiting)
    assert name in verdict.why


@pytest.mark.parametrize(
    "name", [".env.sample", "model.card.json", "weights.json.backup", ".x.cfg"]
)
def test_a_name_that_only_looks_like_a_temporary_file_is_none(name: str, saved: Path) -> None:
    """No veto by a file that nobody writes."""
    (saved / name).write_bytes(b"{}")
    assert isinstance(_judge(saved), Complete)


def test_a_temporary_file_of_a_killed_save_does_not_block_the_next(saved: Path) -> None:
    """Older than the file that ended the save: left over; waited out, and not for ever."""
    (saved / ".tmp4LeFwu").write_bytes(b"x")
    os.utime(saved / ".tmp4LeFwu", (1, 1))
    assert isinstance(_judge(saved, quiet_s=SETTLE_S), Waiting)
    assert isinstance(_judge(saved, quiet_s=completeness.PATIENCE_S), Complete)


@pytest.mark.parametrize(
    "name", ["tmp-checkpoint-2", "checkpoint-2-tmp", "2.orbax-checkpoint-tmp", "x-unfinished"]
)
def test_a_folder_whose_name_says_that_it_is_not_finished_is_not(name: str, saved: Path) -> None:
    """Until it is renamed."""
    assert isinstance(_judge(saved.rename(saved.parent / name), layout="hf"), Waiting)


@pytest.mark.parametrize("marker", ["checkpoint-2-unfinished", "run-unfinished"])
def test_a_marker_beside_the_checkpoint_says_that_it_is_unfinished(
    marker: str, saved: Path
) -> None:
    """NeMo's, without the suffix of the checkpoint's own name; it holds as long as it is there."""
    if marker.startswith("run"):
        saved = saved.rename(saved.parent / "run.ckpt")
    (saved.parent / marker).touch()
    os.utime(saved.parent / marker, (1, 1))
    assert isinstance(_judge(saved, layout="hf"), Waiting)
    (saved.parent / marker).unlink()
    assert isinstance(_judge(saved, layout="hf"), Complete)


def test_weights_that_were_rewritten_after_the_marker_need_a_long_quiet(saved: Path) -> None:
    """A few seconds newer than trainer_state.json: the settle period is not enough, a minute is."""
    newest_s = (saved / "model.safetensors").stat().st_mtime
    os.utime(saved / "trainer_state.json", (newest_s - 30, newest_s - 30))
    assert isinstance(_judge(saved, quiet_s=SETTLE_S), Waiting)
    verdict = _judge(saved, quiet_s=completeness.PATIENCE_S)
    assert isinstance(verdict, Complete)
    assert verdict.doubts == ("trainer_state.json is older than the weights",)


def test_a_value_head_that_was_taken_out_after_the_marker_is_waited_for_and_no_longer(
    saved: Path,
) -> None:
    """LLaMA-Factory rewrites large weights for minutes after the Trainer has ended its save."""
    shutil.copy(saved / "model.safetensors", saved / "value_head.safetensors")
    newest_s = (saved / "model.safetensors").stat().st_mtime
    os.utime(saved / "trainer_state.json", (newest_s - 900, newest_s - 900))
    assert isinstance(_judge(saved, quiet_s=SETTLE_S), Waiting)
    assert isinstance(_judge(saved, quiet_s=completeness.PATIENCE_S), Complete)


def test_a_marker_of_an_earlier_save_never_ends_this_one(saved: Path) -> None:
    """Older than all weights by more than a trainer takes to rewrite them."""
    os.utime(saved / "trainer_state.json", (1, 1))
    verdict = _judge(saved)
    assert isinstance(verdict, Waiting)
    assert "trainer_state.json is older" in verdict.why


def test_shards_of_two_saves_are_never_one_checkpoint(make_folder: Any) -> None:
    """An index between old shards and new ones: the save was killed; no quiet mends it."""
    folder = make_folder(shards=3)
    for name, at in (("00001", 100), ("00002", 5000), ("00003", 5001)):
        os.utime(folder / f"model-{name}-of-00003.safetensors", (at, at))
    os.utime(folder / "model.safetensors.index.json", (101, 101))
    verdict = _judge(folder)
    assert isinstance(verdict, Waiting)
    assert "two saves" in verdict.why


def test_a_truncated_shard_is_broken(saved: Path) -> None:
    """Quiet and wrong is not waited for; the error names the file."""
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    verdict = _judge(saved)
    assert isinstance(verdict, Broken)
    assert verdict.error.path.name == "model.safetensors"
    assert isinstance(_judge(saved, quiet_s=0), Waiting)


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_a_sharded_save_waits_for_every_shard_and_its_index(step: int, make_folder: Any) -> None:
    """Whatever of the set is missing, the folder is not complete; with all of it, it is."""
    folder = make_folder(shards=3)
    names = sorted(p.name for p in folder.glob("model*"))
    assert isinstance(_judge(folder), Complete)
    (folder / names[step]).unlink()
    assert isinstance(_judge(folder), Waiting)


def test_a_done_file_takes_the_markers_place(saved: Path) -> None:
    """Where a definition names one, its presence decides; a glob may name it."""
    (saved / "trainer_state.json").unlink()
    assert isinstance(_judge(saved, done_file="DONE*"), Waiting)
    (saved / "DONE-2").write_bytes(b"")
    assert isinstance(_judge(saved, done_file="DONE*"), Complete)


def test_a_config_may_come_from_the_assets(saved: Path, tmp_path: Path) -> None:
    """A folder without config.json waits, unless the definition's assets have one."""
    assets = tmp_path / "assets"
    assets.mkdir()
    shutil.move(saved / "config.json", assets / "config.json")
    assert isinstance(_judge(saved), Waiting)
    assert isinstance(_judge(saved, assets=assets), Complete)


def test_a_done_file_of_an_earlier_save_does_not_end_this_one(saved: Path) -> None:
    """It must be newer than the weights, as every last file."""
    (saved / "DONE").write_bytes(b"")
    os.utime(saved / "DONE", (1, 1))
    assert isinstance(_judge(saved, done_file="DONE"), Waiting)
    os.utime(saved / "DONE")
    assert isinstance(_judge(saved, quiet_s=SETTLE_S, done_file="DONE"), Complete)


def _at_step(saved: Path, step: int) -> Path:
    path = saved.parent / f"checkpoint-{step}"
    shutil.copytree(saved, path)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


@pytest.mark.parametrize("name", ["optimizer.pt", "tokenizer.json", "generation_config.json"])
def test_a_file_that_the_checkpoint_before_had_is_waited_for_and_not_for_ever(
    name: str, saved: Path
) -> None:
    """The reason names it and the checkpoint; after a minute its own structure decides."""
    (saved / name).write_text("{}")
    later = _at_step(saved, 4)
    before = completeness.examine(saved, list_files(saved)).file_set
    assert isinstance(_judge(later, SETTLE_S, before=before), Complete)
    (later / name).unlink()
    verdict = _judge(later, SETTLE_S, before=before)
    assert isinstance(verdict, Waiting)
    assert name in verdict.why
    assert "checkpoint-2" in verdict.why
    assert isinstance(_judge(later, completeness.PATIENCE_S, before=before), Complete)


def test_what_is_gone_is_not_complete_while_in_doubt(saved: Path) -> None:
    """Nobody can wait for more: without what the checkpoint before had it is lost, not published."""
    later = _at_step(saved, 4)
    (saved / "tokenizer.json").write_text("{}")
    before = completeness.examine(saved, list_files(saved)).file_set
    facts = completeness.examine(later, list_files(later), before=before)
    verdict = completeness.verdict(facts, quiet_s=math.inf, settle_s=SETTLE_S, gone=True)
    assert isinstance(verdict, Waiting)


@pytest.mark.parametrize("name", ["final", "checkpoint-best"])
def test_folders_that_are_not_of_one_run_are_not_compared(name: str, saved: Path) -> None:
    """The final model has no optimizer: nothing of that is waited for."""
    before = completeness.examine(saved, list_files(saved)).file_set
    (saved / "optimizer.pt").unlink()
    other = saved.rename(saved.parent / name)
    assert isinstance(_judge(other, SETTLE_S, before=before), Complete)


def test_steps_in_the_names_of_files_are_not_compared(saved: Path) -> None:
    """A file named by its step has its counterpart in the next checkpoint."""
    later = _at_step(saved, 4)
    for folder, step in ((saved, 2), (later, 4)):
        (folder / f"global_step{step}").mkdir()
        (folder / f"global_step{step}" / "notes.md").write_text("x")
    before = completeness.examine(saved, list_files(saved)).file_set
    assert isinstance(_judge(later, SETTLE_S, before=before), Complete)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b'{"version": '),
        ("generation_config.json", b""),
        ("chat_template.jinja", b""),
        ("tokenizer.model", b"\x0a\x10short"),
    ],
)
def test_a_side_file_that_is_not_whole_is_named(name: str, content: bytes, saved: Path) -> None:
    """What travels with the weights must be whole as far as its content can tell."""
    (saved / name).write_bytes(content)
    verdict = _judge(saved)
    assert isinstance(verdict, Broken)
    assert verdict.error.path.name == name


@pytest.mark.parametrize("content", [b"\x0a\x05whole\x10\x01", b"IQ== 0\nIg== 1\n"])
def test_whole_tokenizer_models_pass(content: bytes, saved: Path) -> None:
    """Sentencepiece's protocol buffer, and tiktoken's list, which bears the same name."""
    (saved / "tokenizer.model").write_bytes(content)
    assert isinstance(_judge(saved), Complete)


def test_a_tokenizer_without_its_vocabulary_is_waited_for_and_not_for_ever(saved: Path) -> None:
    """Its config is written first; some tokenizers have no vocabulary at all."""
    (saved / "tokenizer_config.json").write_text("{}")
    assert isinstance(_judge(saved, SETTLE_S), Waiting)
    assert isinstance(_judge(saved, completeness.PATIENCE_S), Complete)
    (saved / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert isinstance(_judge(saved, SETTLE_S), Complete)


def test_a_background_saver_that_lags_behind_is_waited_for(saved: Path) -> None:
    """Flash checkpoint: trainer_state.json is there before the weights are; its tracker knows."""
    tracker = saved.parent / "dlrover_latest.txt"
    tracker.write_text("1")
    verdict = _judge(saved, SETTLE_S)
    assert isinstance(verdict, Waiting)
    assert "dlrover_latest.txt" in verdict.why
    tracker.write_text("2")
    assert isinstance(_judge(saved, SETTLE_S), Complete)


def test_a_tracker_that_is_a_link_is_not_followed(saved: Path) -> None:
    """No link leads out of the run's folder, not even to read a number."""
    (saved.parent / "elsewhere").write_text("1")
    (saved.parent / "dlrover_latest.txt").symlink_to("elsewhere")
    assert isinstance(_judge(saved, SETTLE_S), Complete)


@pytest.mark.parametrize("stage", [2, 3])
def test_latest_is_no_proof_that_all_ranks_have_written(stage: int, tmp_path: Path) -> None:
    """Rank 0 writes it first: the shards are counted, and the slow rank's may be newer."""
    path = tmp_path / "global_step2"
    path.mkdir()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "latest").write_text("global_step2")
    os.utime(tmp_path / "latest", (1000, 1000))
    files = saved_files.zero_tag(stage)
    late = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    for name in files.keys() - {late}:
        (path / name).write_bytes(files[name])
        os.utime(path / name, (999, 999))
    assert isinstance(_judge(path), Waiting)
    (path / late).write_bytes(files[late])
    os.utime(path / late, (1002, 1002))
    assert isinstance(_judge(path, SETTLE_S), Complete)
    os.utime(path / late, (9000, 9000))
    assert isinstance(_judge(path), Waiting)


def test_the_last_ranks_shard_is_missed_for_ever_where_the_checkpoint_before_had_it(
    tmp_path: Path,
) -> None:
    """Shards that do not say how many they are: fewer elements than before is proof enough."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for step in (1, 2):
        (tmp_path / f"step-{step}").mkdir()
        for rank in (1, 2):
            name = f"shard-{rank:05d}-model-00001-of-00001.safetensors"
            (tmp_path / f"step-{step}" / name).write_bytes(saved_files.content(name, 0))
    before = completeness.examine(tmp_path / "step-1", list_files(tmp_path / "step-1")).file_set
    assert isinstance(_judge(tmp_path / "step-2", SETTLE_S, before=before), Complete)
    (tmp_path / "step-2" / name).unlink()
    assert isinstance(_judge(tmp_path / "step-2", before=before), Waiting)


FACTS = Facts(layout="hf-trainer", reason="test")


@settings(deadline=None)
@given(
    quiet_s=st.floats(0, 1000),
    settle_s=st.floats(0, 1000),
    vetoes=st.sampled_from([(), (".tmpX",)]),
    not_ended=st.sampled_from([None, "not written yet"]),
    doubts=st.sampled_from([(), ("more may come",)]),
    missing=st.sampled_from([None, CheckpointIncomplete("no weights", path="x")]),
    error=st.sampled_from([None, CheckpointCorrupt("truncated", path="x")]),
    gone=st.booleans(),
)
def test_complete_means_that_every_condition_holds(
    quiet_s: float,
    settle_s: float,
    vetoes: tuple[str, ...],
    not_ended: str | None,
    doubts: tuple[str, ...],
    missing: CheckpointIncomplete | None,
    error: CheckpointCorrupt | None,
    gone: bool,
) -> None:
    """Quiet, no veto, nothing missing or wrong, ended, doubts waited out: all of them, or waiting."""
    facts = dataclasses.replace(
        FACTS, vetoes=vetoes, not_ended=not_ended, doubts=doubts, missing=missing, error=error
    )
    verdict = completeness.verdict(facts, quiet_s=quiet_s, settle_s=settle_s, gone=gone)
    is_quiet, is_patient = quiet_s >= settle_s, quiet_s >= max(settle_s, completeness.PATIENCE_S)
    is_patient &= not gone
    whole = not (vetoes or not_ended or missing or error) and (not doubts or is_patient)
    assert isinstance(verdict, Complete) is (is_quiet and whole)
    surely = not (not_ended or doubts) or is_patient
    assert isinstance(verdict, Broken) is bool(is_quiet and not vetoes and error and surely)
    if isinstance(verdict, Waiting):
        assert verdict.why
