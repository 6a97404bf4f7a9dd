"""Planned peak memory: what it depends on and what it does not."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from ckptd.checkpoint import checkpoint
from ckptd.pipeline import compose, definition
from ckptd.plan.plan import Plan
from ckptd.runner import memory

BUDGET_BYTES = 100_000_000


def _plan(folder: Path, rows: int, stages: str) -> Plan:
    """Return the plan of a sparse checkpoint with one tensor of `rows` rows."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    entry = {"dtype": "F32", "shape": [rows, 1000], "data_offsets": [0, rows * 4000]}
    header = json.dumps({"model.norm.weight": entry}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + rows * 4000)
    wanted = definition.parse_definition(f"pipeline: p\nstages: {stages}\n", "p.yaml")
    return compose.from_headers(checkpoint.open_checkpoint(folder), wanted.stages)


def _peak(plan: Plan, *, push: bool = False) -> int:
    return memory.planned_peak_bytes(plan, byte_budget=BUDGET_BYTES, num_threads=2, push=push)


def test_verbatim_work_is_small(tmp_path: Path) -> None:
    """Moving bytes takes less than 150 MB, and a thousand times the bytes take no more."""
    small, large = (
        _plan(tmp_path / "a", 1000, "[reshard]"),
        _plan(tmp_path / "b", 10**6, "[reshard]"),
    )
    assert _peak(small) == _peak(large) < 150_000_000


def test_computed_work_is_bounded(tmp_path: Path) -> None:
    """Computing takes at most the byte budget more than what is always there."""
    stages = "[{cast: {dtype: bfloat16}}]"
    small, large = _plan(tmp_path / "a", 1000, stages), _plan(tmp_path / "b", 10**6, stages)
    assert _peak(small) < _peak(large) < 700_000_000


def test_xet_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A push through Xet is planned with Xet's own memory; switched off, without."""
    plan = _plan(tmp_path / "a", 1000, "[reshard]")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    without = _peak(plan, push=True)
    monkeypatch.delenv("HF_HUB_DISABLE_XET")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert _peak(plan, push=True) - without == memory.XET_BYTES
