"""From a complete checkpoint to its job: what the job says of the checkpoint, and for how long."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptd.checkpoint import listing
from ckptd.checkpoint.open_files import OpenFiles
from ckptd.checkpoint.signs import file_set
from ckptd.checkpoint.signs.file_set import FileSet
from ckptd.jobs.sqlite import SqliteStore
from ckptd.pipeline.definition import parse_definition
from ckptd.service.earlier import Earlier
from ckptd.service.identify import KnownBases
from ckptd.service.pins import Pins
from ckptd.service.taking import Accepted, Taken, Taker
from ckptd.watch import scan
from tests.flow.conftest import write_checkpoint

pytestmark = pytest.mark.anyio
DOUBT = "trainer_state.json is older than the weights"


async def _taken(root: Path, store: SqliteStore, doubts: tuple[str, ...]) -> tuple[Taken, FileSet]:
    """Take checkpoint-1 of a run, pinned whole."""
    source = root / "runs" / "run" / "checkpoint-1"
    write_checkpoint(source, 1, rows=64)
    text = f"pipeline: p\nwatch:\n  - path: {root}/runs/*/checkpoint-*\nstages:\n  - tie\n"
    definition = parse_definition(text, "p.yaml")
    (watch,) = definition.watch
    pins = Pins(
        owner="me", pipeline="p", place=scan.parse(watch.path), state_path=root / "state",
        held=OpenFiles(),
    )  # fmt: skip
    pin_path = pins.live_path(source, root / "runs")
    assert pin_path is not None
    pins.refresh_fully(pin_path, listing.list_files(source))
    pinned = listing.list_files(pin_path)
    had = file_set.of(source.name, "hf-trainer", pinned.files, weights=(), elements=7)
    bases = KnownBases(endpoint=None)
    taker = Taker(definition=definition, watch=watch, pins=pins, store=store, bases=bases)
    accepted = Accepted(pinned=pinned, file_set=had, doubts=doubts)
    return await taker.take(source, pin_path, accepted), had


async def test_what_was_waited_out_stands_in_the_job(tmp_path: Path) -> None:
    """A checkpoint that was taken although something spoke against it says what it was."""
    store = await SqliteStore.open(tmp_path / "jobs.sqlite3")
    taken, _ = await _taken(tmp_path, store, (DOUBT,))
    assert taken.job_id is not None
    assert taken.note == f"taken, although {DOUBT}"
    assert (await store.get(taken.job_id)).spec.doubts == (DOUBT,)
    await store.aclose()


async def test_what_a_checkpoint_had_outlives_the_daemon(tmp_path: Path) -> None:
    """Of the run's newest job; other runs and pipelines have their own."""
    store = await SqliteStore.open(tmp_path / "jobs.sqlite3")
    taken, had = await _taken(tmp_path, store, ())
    assert taken.note is None
    await store.aclose()
    store = await SqliteStore.open(tmp_path / "jobs.sqlite3")
    assert await Earlier(store, "p").of(tmp_path / "runs" / "run") == had
    assert await Earlier(store, "p").of(tmp_path / "runs" / "other") is None
    assert await Earlier(store, "q").of(tmp_path / "runs" / "run") is None
    await store.aclose()
