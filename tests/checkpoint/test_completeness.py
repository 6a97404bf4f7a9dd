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
from ckptd.checkpoint.layouts import Marker
from ckptd.checkpoint.listing import list_files

TRACE = Path(__file__).parents[1] / "data" / "hf_trainer_save.jsonl"
SETTLE_S = 10.0


def _judge(path: Path, quiet_s: float = math.inf, **options: Any) -> Verdict:
    facts = completeness.examine(path, list_files(path), **options)
    return completeness.verdict(facts, quiet_s=quiet_s, settle_s=SETTLE_S)


def _apply(event: dict[str, Any], source: Path, target: Path, moved: list[Path]) -> None:
    """Make one event of the trace happen in `target`; contents come from `source`."""
    name = Path(event["p"]).name
    path, real = target / name, source / name
    if name.startswith(".tmp"):
        real = source / "model.safetensors"
    match event["ev"]:
        case "CREATE" if event["p"] == "checkpoint-2":
            target.mkdir()
        case "CREATE" if event["sz"] == 0:
            path.write_bytes(b"")
        case "CREATE" | "MODIFY" | "CLOSE_WRITE":
            path.write_bytes(real.read_bytes())
        case "MOVED_FROM":
            moved.append(path)
        case "MOVED_TO":
            moved.pop().rename(path)
        case "DELETE" if event["p"] == "checkpoint-2":
            target.rmdir()
        case "DELETE":
            path.unlink()


@pytest.fixture
def saved(make_folder: Any) -> Path:
    """A whole Trainer checkpoint with every file the trace names."""
    folder: Path = make_folder("checkpoint-2", step=2)
    for line in TRACE.read_text().splitlines():
        name = Path(json.loads(line)["p"]).name
        if "." in name and not name.startswith(".tmp") and not (folder / name).exists():
            (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize("layout", ["auto", "hf-trainer"])
def test_a_trainers_save_is_complete_after_its_last_write_and_not_before(
    layout: str, saved: Path, tmp_path: Path
) -> None:
    """Replays a recorded save and its rotation: judged after each event, at the trace's pace.

    Where the layout is known (named, or training_args.bin is there) not even endless quiet makes
    it complete before trainer_state.json is whole.
    """
    events = [json.loads(line) for line in TRACE.read_text().splitlines()]
    last_write = max(i for i, event in enumerate(events) if event["ev"] != "DELETE")
    target, moved = tmp_path / "run" / "checkpoint-2", []
    target.parent.mkdir()
    verdicts = []
    for number, event in enumerate(events[: last_write + 1]):
        _apply(event, saved, target, moved)
        pause_s = events[number + 1]["t"] - event["t"]
        known = layout == "hf-trainer" or (target / "training_args.bin").exists()
        verdicts.append(_judge(target, math.inf if known else pause_s, layout=layout))
    first = next(i for i, verdict in enumerate(verdicts) if isinstance(verdict, Complete))
    assert events[first]["p"] == "checkpoint-2/trainer_state.json"
    assert isinstance(verdicts[-1], Complete)
    assert not any(isinstance(verdict, Broken) for verdict in verdicts)
    assert isinstance(_judge(target, quiet_s=SETTLE_S - 0.1, layout=layout), Waiting)


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


@pytest.mark.parametrize("name", [".tmp4LeFwu", "x.part", ".incomplete", "sub/.tmpX", ".nfs01"])
def test_a_write_in_progress_is_a_veto(name: str, saved: Path) -> None:
    """As long as a half-written file is there, nothing is complete."""
    (saved / name).parent.mkdir(exist_ok=True)
    (saved / name).write_bytes(b"x")
    assert isinstance(_judge(saved), Waiting)


def test_a_marker_of_an_earlier_save_needs_a_long_quiet(saved: Path) -> None:
    """Weights newer than the marker: the settle period is not enough, a minute is."""
    os.utime(saved / "trainer_state.json", (1, 1))
    assert isinstance(_judge(saved, quiet_s=SETTLE_S), Waiting)
    assert isinstance(_judge(saved, quiet_s=completeness.STALE_MARKER_QUIET_S), Complete)


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
    shutil.move(saved / "config.json", tmp_path / "config.json")
    assert isinstance(_judge(saved), Waiting)
    assert isinstance(_judge(saved, assets=tmp_path), Complete)


FACTS = Facts(
    layout="hf-trainer",
    reason="test",
    vetoes=(),
    missing=None,
    error=None,
    marker=Marker(name="trainer_state.json", problem=None),
    marker_is_stale=False,
    done_file=None,
    done_file_there=False,
)


@settings(deadline=None)
@given(
    quiet_s=st.floats(0, 1000),
    settle_s=st.floats(0, 1000),
    vetoes=st.sampled_from([(), (".tmpX",)]),
    problem=st.sampled_from([None, "not written yet"]),
    stale=st.booleans(),
    done=st.sampled_from([(None, False), ("DONE", False), ("DONE", True)]),
)
def test_complete_means_that_every_condition_holds(
    quiet_s: float,
    settle_s: float,
    vetoes: tuple[str, ...],
    problem: str | None,
    stale: bool,
    done: tuple[str | None, bool],
) -> None:
    """Quiet long enough, no veto, and a good marker or the done file: all of them, or waiting."""
    facts = dataclasses.replace(
        FACTS,
        vetoes=vetoes,
        marker=Marker(name="trainer_state.json", problem=problem),
        marker_is_stale=stale,
        done_file=done[0],
        done_file_there=done[1],
    )
    verdict = completeness.verdict(facts, quiet_s=quiet_s, settle_s=settle_s)
    marked = problem is None and (
        not stale or quiet_s >= max(settle_s, completeness.STALE_MARKER_QUIET_S)
    )
    ended = done[1] if done[0] is not None else marked
    assert isinstance(verdict, Complete) is (quiet_s >= settle_s and not vetoes and ended)
    if isinstance(verdict, Waiting):
        assert verdict.why
