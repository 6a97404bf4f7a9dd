"""Layouts: a folder is told by what its trainer leaves in it, and the answer says why."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ckptd.checkpoint import layouts
from ckptd.checkpoint.listing import list_files
from ckptd.errors import CheckpointUnsupported


def _marker(folder: Path, name: str) -> layouts.Marker | None:
    return layouts.LAYOUTS["hf-trainer"].marker(folder, list_files(folder), name)


@pytest.mark.parametrize(
    ("name", "files", "layout"),
    [
        ("checkpoint-2", ["trainer_state.json"], "hf-trainer"),
        ("anything", ["trainer_state.json"], "hf-trainer"),
        ("checkpoint-2", ["training_args.bin"], "hf-trainer"),
        ("anything", ["training_args.bin"], "hf"),
        ("anything", ["optimizer.pt"], "hf-trainer"),
        ("anything", ["rng_state_1.pth"], "hf-trainer"),
        ("checkpoint-2", ["model.safetensors", "config.json"], "hf"),
        ("empty", [], "hf"),
    ],
)
def test_the_layout_is_told_by_its_files(
    name: str, files: list[str], layout: str, tmp_path: Path
) -> None:
    """A trainer's own files make a trainer's checkpoint; `save_model` into the run does not."""
    for file in files:
        (tmp_path / file).write_text("{}")
    chosen, reason = layouts.choose(Path(name), list_files(tmp_path))
    assert chosen.name == layout
    assert reason


def test_a_definition_may_name_the_layout(tmp_path: Path) -> None:
    """A name is taken as it is, an unknown one is refused with the known ones."""
    listing = list_files(tmp_path)
    assert layouts.choose(tmp_path, listing, "hf-trainer")[0].name == "hf-trainer"
    with pytest.raises(CheckpointUnsupported, match="hf-trainer"):
        layouts.choose(tmp_path, listing, "unheard-of")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "not written"),
        ('{"global_step": 2', "JSON"),
        ("[]", "JSON"),
        ("\udcff", "JSON"),
        ('{"global_step": 1}', "earlier"),
        ("{}", "earlier"),
        ('{"global_step": 2}', None),
    ],
)
def test_the_marker_must_be_whole_and_of_this_step(
    content: str | None, problem: str | None, tmp_path: Path
) -> None:
    """An absent, torn or older trainer_state.json does not end a save."""
    if content is not None:
        raw = content.encode("utf-8", "surrogateescape")
        (tmp_path / "trainer_state.json").write_bytes(raw)
    marker = _marker(tmp_path, "checkpoint-2")
    assert marker is not None
    assert marker.problem is None if problem is None else problem in (marker.problem or "")


@pytest.mark.parametrize(
    ("name", "state", "step"),
    [
        ("checkpoint-12", {"global_step": 7}, 7),
        ("checkpoint-12", {"global_step": "7"}, 12),
        ("checkpoint-12", {"global_step": True}, 12),
        ("checkpoint-12", None, 12),
        ("run-step_300", None, 300),
        ("step3000", None, 3000),
        ("final", None, None),
    ],
)
def test_the_step_is_the_trainers_or_the_folders(
    name: str, state: Any, step: int | None, tmp_path: Path
) -> None:
    """trainer_state.json knows best, then the folder's name; else there is none."""
    if state is not None:
        (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert layouts.step_of(tmp_path, name) == step


def test_a_trainer_state_that_is_a_link_or_a_pipe_gives_no_step(tmp_path: Path) -> None:
    """A link may lead out of the folder, and a pipe would be read for ever: the name decides."""
    (tmp_path / "elsewhere.json").write_text('{"global_step": 77}')
    linked, piped = tmp_path / "linked", tmp_path / "piped"
    linked.mkdir()
    piped.mkdir()
    (linked / "trainer_state.json").symlink_to(tmp_path / "elsewhere.json")
    os.mkfifo(piped / "trainer_state.json")
    assert layouts.step_of(linked, "checkpoint-3") == 3
    assert layouts.step_of(piped, "checkpoint-3") == 3


def test_a_trainer_state_larger_than_any_is_not_read(tmp_path: Path) -> None:
    """A file of a terabyte that claims to be the state is told by its size alone."""
    with (tmp_path / "trainer_state.json").open("wb") as file:
        file.truncate(1 << 40)
    assert layouts.step_of(tmp_path, "checkpoint-3") == 3
    marker = _marker(tmp_path, "checkpoint-3")
    assert marker is not None
    assert marker.problem == "not whole JSON yet"
