"""Pins of a definition, apart from the daemon."""

from __future__ import annotations

from pathlib import Path

from ckptd.checkpoint import listing
from ckptd.checkpoint.open_files import OpenFiles
from ckptd.service.pins import Pins
from ckptd.watch import scan


def _live_and_die(pins: Pins, root: Path, step: int) -> None:
    source = root / "run" / f"checkpoint-{step}"
    source.mkdir(parents=True)
    (source / "model.safetensors").write_bytes(b"weights")
    live_path = pins.live_path(source, root)
    assert live_path is not None
    pins.refresh_early(live_path, source)
    pins.refresh_fully(live_path, listing.list_files(source))
    if step % 2:
        pins.freeze(live_path, pins.frozen_path(live_path, f"job{step}"))
    else:
        pins.release(live_path)


def test_what_is_done_with_leaves_nothing_in_memory(tmp_path: Path) -> None:
    """However many checkpoints there were, nothing is kept of those that were taken or let go."""
    pins = Pins(
        owner="me",
        pipeline="p",
        place=scan.parse(f"{tmp_path}/runs/*/checkpoint-*"),
        state_path=tmp_path / "state",
        held=OpenFiles(),
    )

    def kept() -> int:
        return sum(len(value) for value in vars(pins).values() if isinstance(value, (dict, set)))

    _live_and_die(pins, tmp_path / "runs", 1)
    before = kept()
    for step in range(2, 12):
        _live_and_die(pins, tmp_path / "runs", step)
    assert kept() == before
