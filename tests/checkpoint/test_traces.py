"""Recorded saves of real trainers: complete after the last write, and never a moment before."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from ckptd.checkpoint import completeness
from ckptd.checkpoint.completeness import Broken, Complete
from ckptd.checkpoint.listing import list_files
from tests.checkpoint import saved_files
from tests.checkpoint.replay import TICK_S, Daemon, Replay, Step, run, steps_of

SAVES: dict[str, dict[str, str]] = {
    "hf_trainer": {f"checkpoint-{n}": "trainer_state.json" for n in (2, 4, 6, 8, 10)}
    | {".": "training_args.bin"},
    "hf_lora": {f"checkpoint-{n}": "trainer_state.json" for n in (2, 4, 6)}
    | {".": "training_args.bin"},
    "save_pretrained": {"sharded": "model.safetensors.index.json", "tied": "model.safetensors"},
    "dcp": {
        "sync/step-1": ".metadata",
        "sync/step-2": ".metadata",
        "async/step-3": ".metadata",
        "hf_sharded": "shard-00002-model-00001-of-00001.safetensors",
        "hf_consol": "model.safetensors.index.json",
        "verl/global_step_1": "actor/model_world_size_2_rank_0.pt",
    },
    "ds_z2": {
        f"global_step{n}": "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt" for n in (1, 2, 3)
    },
    "lightning": {f"epoch=0-step={n}.ckpt": "" for n in (2, 4, 6, 8)} | {"last.ckpt": ""},
}
"""Trace -> candidate -> the file whose end is the end of each of its saves."""

LAST_FILES = {"trainer_state.json", "model.safetensors.index.json", ".metadata"}
"""Without which no save of theirs has ended."""


@dataclass(frozen=True, slots=True)
class Save:
    """From the first step of a save to its last write, and when and how it goes on after it."""

    begin: float
    end: float
    next_step: float
    is_deleted_then: bool


def _saves(steps: list[Step], candidate: str, last: str) -> list[Save]:
    prefix = "" if candidate == "." else candidate
    name = "/".join(part for part in (prefix, last) if part)
    own = [
        s for s in steps if s.path == prefix or s.path.startswith(f"{prefix}/" if prefix else "")
    ]
    saves, after = [], -1.0
    for end in [s.at for s in own if s.path == name and s.ends]:
        begin = next(s.at for s in own if s.at > after)
        following = next((s for s in own if s.at > end), None)
        next_step = float("inf") if following is None else following.at
        is_deleted = following is not None and following.act == "delete"
        saves.append(Save(begin, end, next_step, is_deleted))
        after = end
    return saves


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run's folder, with the config that no distributed save has."""
    for place in ("run", "run/sync", "run/async", "run/verl"):
        (tmp_path / place).mkdir()
    return tmp_path / "run"


def _replayed(root: Path, trace: str, settle_s: float, speed: float) -> tuple[Daemon, list[Step]]:
    steps = steps_of(trace, speed=speed)
    _prepare(root, trace)
    daemon = Daemon(
        root=root, pins=root.parent / "pins", settle_s=settle_s, candidates=tuple(SAVES[trace])
    )
    run(Replay(root, outside=root.parent / "outside"), daemon, steps)
    return daemon, steps


def _prepare(root: Path, trace: str) -> None:
    if trace in {"dcp", "ds_z2", "lightning"}:
        for place in (root, root / "sync", root / "async", root / "verl"):
            (place / "config.json").write_bytes(saved_files.CONFIG)


@pytest.mark.parametrize("trace", SAVES)
@pytest.mark.parametrize("speed", [1.0, 10.0])
@pytest.mark.parametrize("settle_s", [0.05, 0.5, 10.0])
def test_each_save_is_taken_once_after_its_last_write_and_within_the_quiet_period(
    trace: str, speed: float, settle_s: float, root: Path
) -> None:
    """A save is taken when it has been quiet or is gone, once, unless the next one overtook it."""
    daemon, steps = _replayed(root, trace, settle_s, speed)
    for candidate, last in SAVES[trace].items():
        saves = _saves(steps, candidate, last)
        taken = daemon.taken.get(candidate, [])
        assert saves
        assert len({one.fingerprint for one in taken}) == len(taken)
        for save in saves:
            own = [one for one in taken if save.begin <= one.at and one.at < _until(save, saves)]
            assert all(one.at >= save.end for one in own), candidate
            assert len(own) <= 1, candidate
            if save.next_step > save.end + settle_s:
                assert len(own) == 1, (candidate, daemon.verdicts)
                assert own[0].at <= save.end + settle_s + 2 * TICK_S, candidate
            elif save.is_deleted_then and candidate.startswith("checkpoint-"):
                assert [one.was_gone for one in own] == [True], (candidate, daemon.verdicts)
        assert len(taken) <= len(saves)
    assert not [verdict for _, verdict in daemon.verdicts if isinstance(verdict, Broken)]


def _until(save: Save, saves: list[Save]) -> float:
    return min((other.begin for other in saves if other.begin > save.end), default=float("inf"))


@pytest.mark.parametrize("trace", ["hf_trainer", "hf_lora", "save_pretrained", "dcp"])
def test_a_trainer_that_stops_before_its_last_write_is_waited_for_ever(
    trace: str, root: Path
) -> None:
    """However long it is quiet after any step: what has a last file is not whole without it.

    Asked as soon as files tell the trainer (weights and config alone could be anybody's), and in a
    save into the same folder as soon as weights are touched.
    """
    _prepare(root, trace)
    steps = steps_of(trace)
    ended = {name: last for name, last in SAVES[trace].items() if last in LAST_FILES}
    ended.pop("hf_consol", None)  # its shards are whole before they are put together
    saves = {name: _saves(steps, name, last) for name, last in ended.items()}
    replay = Replay(root, outside=root.parent / "outside")
    num_asked = 0
    for step in steps:
        replay.perform(step)
        for name, last in ended.items():
            is_last = step.path == f"{name}/{last}" and step.ratio == 1.0
            is_last |= step.round_ > 0 and step.path.endswith("config.json")
            in_save = any(save.begin <= step.at < save.end for save in saves[name])
            if is_last or not in_save or not step.path.startswith(name):
                continue
            if trace == "hf_lora" and not (root / name / "training_args.bin").exists():
                continue
            layout = "hf-trainer" if trace == "hf_trainer" else "auto"
            facts = completeness.examine(root / name, list_files(root / name), layout=layout)
            verdict = completeness.verdict(facts, quiet_s=1e9, settle_s=1.0)
            assert not isinstance(verdict, Complete), (step, verdict)
            num_asked += 1
    assert num_asked > 15
