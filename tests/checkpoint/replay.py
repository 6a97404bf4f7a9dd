"""A recorded save made to happen again in a folder, on a clock that only the test moves.

`Replay` performs the writes, renames and deletions of a trace. `Daemon` does with it what the
daemon does: it looks after every step and when a candidate is due, pins what it sees, and judges
what is quiet or gone.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptd.checkpoint import completeness, pin
from ckptd.checkpoint.completeness import Complete, Verdict
from ckptd.checkpoint.listing import Fingerprint, Listing, list_files
from ckptd.errors import CheckpointVanished
from ckptd.watch import settle
from ckptd.watch.settle import Change, Track
from tests.checkpoint import saved_files

TRACES = saved_files.DATA / "traces"
EPOCH_S = 1_700_000_000
"""What the wall clock shows when a trace begins."""
TICK_S = 1e-6
"""By so much later than it is due the daemon looks: sums of times are not exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing that happens to a file: `ratio` of its final size is there afterwards."""

    at: float
    act: str
    path: str
    ratio: float = 1.0
    round_: int = 0
    ends: bool = False
    """Whether the write that it belongs to is over."""


def steps_of(trace: str, *, speed: float = 1.0) -> list[Step]:
    """Return the steps of a trace in their order, at `speed` times its pace."""
    lines = (TRACES / f"{trace}.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    final = _final_sizes(events)
    rounds: dict[str, int] = {}
    moved: set[str] = set()
    steps: list[tuple[float, int, Step]] = []
    for number, event in enumerate(events):
        steps += [(step.at, number, step) for step in _steps(event, final, rounds, moved)]
    steps.sort(key=lambda one: one[:2])
    return [_faster(step, speed) for _, _, step in steps]


def _final_sizes(events: list[dict[str, Any]]) -> dict[str, int]:
    final: dict[str, int] = {}
    for event in events:
        final[event["p"]] = max(final.get(event["p"], 0), event.get("sz", 0))
    return final


def _faster(step: Step, speed: float) -> Step:
    return Step(
        at=step.at / speed, act=step.act, path=step.path,
        ratio=step.ratio, round_=step.round_, ends=step.ends,
    )  # fmt: skip


def _steps(
    event: dict[str, Any], final: Mapping[str, int], rounds: dict[str, int], moved: set[str]
) -> Iterator[Step]:
    path, at = event["p"], event["t"]
    ratio = event["sz"] / final[path] if event.get("sz") and final[path] else 0.0
    round_ = rounds.setdefault(path, 0)
    match event["ev"]:
        case "CREATE" | "SCAN" if "sz" not in event and not _is_hidden(path):
            yield Step(at=at, act="mkdir", path=path)
        case "CREATE" | "SCAN":
            yield Step(at=at, act="write", path=path, ratio=ratio, round_=round_)
        case "MODIFY":
            if event["from"] < event["to"]:
                half = ratio / 2
                yield Step(at=event["from"], act="write", path=path, ratio=half, round_=round_)
            yield Step(at=event["to"], act="write", path=path, ratio=ratio or 1.0, round_=round_)
        case "CLOSE_WRITE":
            if ratio >= 1.0 and path not in moved:
                rounds[path] += 1
                yield Step(at=at, act="end", path=path, round_=round_, ends=True)
        case "MOVED_FROM":
            yield Step(at=at, act="take", path=path)
        case "MOVED_TO":
            rounds[path] += 1
            moved.add(path)
            yield Step(at=at, act="put", path=path, round_=round_, ends=True)
        case "DELETE":
            yield Step(at=at, act="delete", path=path)
        case "ATTRIB":
            pass
        case other:
            raise LookupError(other)


def _is_hidden(path: str) -> bool:
    return path.rpartition("/")[2].startswith(".")


class Replay:
    """The folder in which a trace happens."""

    def __init__(self, root: Path, *, outside: Path) -> None:
        """Write below `root`; a file that is moved in comes from the folder `outside`."""
        self.root = root
        self._outside = outside
        self._taken: Path | None = None
        root.mkdir(parents=True, exist_ok=True)
        outside.mkdir(parents=True, exist_ok=True)

    def perform(self, step: Step) -> None:
        """Make one step happen, at its time."""
        path = self.root / step.path
        match step.act:
            case "mkdir":
                path.mkdir(parents=True, exist_ok=True)
            case "write":
                self._write(path, step)
            case "take":
                self._taken = path
            case "put":
                moved = self._taken or self._outside / "moved"
                self._write(moved, step)  # the temporary file had no content of its own
                moved.rename(path)
                self._taken = None
            case "delete" if path.is_dir():
                path.rmdir()
            case "delete":
                path.unlink()

    def _write(self, path: Path, step: Step) -> None:
        is_temporary = ".tmp" in path.name and step.act == "write"
        whole = b"x" * 64 if is_temporary else saved_files.content(step.path, step.round_)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(whole[: int(len(whole) * step.ratio)])
        at_ns = int((EPOCH_S + step.at) * 1e9)
        os.utime(path, ns=(at_ns, at_ns))


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A checkpoint that was found to be whole."""

    at: float
    fingerprint: Fingerprint
    was_gone: bool


@dataclass(slots=True, kw_only=True)
class Daemon:
    """What the daemon does with the candidates below `root`, in one thread and without a clock."""

    root: Path
    pins: Path
    settle_s: float
    candidates: tuple[str, ...]
    taken: dict[str, list[Taken]] = field(default_factory=dict)
    verdicts: list[tuple[str, Verdict]] = field(default_factory=list)
    _tracks: dict[str, Track] = field(default_factory=dict)
    _before: completeness.FileSet | None = None

    def look(self, now: float, path: str | None = None) -> None:
        """Observe the candidates (those with something at `path`), and judge what is quiet or gone."""
        for name in self.candidates:
            if path is not None and name != "." and not f"{path}/".startswith(f"{name}/"):
                continue
            try:
                seen = list_files(self.root / name)
            except CheckpointVanished:
                seen = None
            track, changes = settle.observe(
                self._tracks.get(name),
                None if seen is None else settle.fingerprint_of(seen),
                now=now,
                quiet_s=self.settle_s,
            )
            if track is None:
                self._tracks.pop(name, None)
            else:
                self._tracks[name] = track
            for change in changes:
                self._on(name, change, seen, now)

    def due(self) -> list[float]:
        """Return when candidates become quiet if nothing happens."""
        found = (settle.due_at(track, quiet_s=self.settle_s) for track in self._tracks.values())
        return sorted(at for at in found if at is not None)

    def _pin_path(self, name: str) -> Path:
        return self.pins / f"pin-{name.replace('/', '+')}"

    def _on(self, name: str, change: Change, seen: Listing | None, now: float) -> None:
        pin_path = self._pin_path(name)
        if seen is None:
            if pin_path.exists():
                self._judge(name, list_files(pin_path), now, gone=True)
                shutil.rmtree(pin_path)
            return
        if any(set(one.fingerprint) >= set(seen.fingerprint) for one in self.taken.get(name, [])):
            return  # taken already, and perhaps being deleted
        pin_path.mkdir(parents=True, exist_ok=True)
        pin.refresh(seen.base_path, seen, pin_path, pin.PinMethod.HARD_LINK)
        if change is Change.SETTLED:
            pin.prune(pin_path, seen)
            self._judge(name, seen, now, gone=False)

    def _judge(self, name: str, seen: Listing, now: float, *, gone: bool) -> None:
        pin_path = self._pin_path(name)
        path = pin_path if (self.root / name).is_dir() or gone else self.root / name
        facts = completeness.examine(
            path,
            list_files(path),
            folder=self.root / name,
            seen=seen,
            before=self._before,
        )
        quiet_s = self.settle_s if gone else now - self._tracks[name].quiet_since
        verdict = completeness.verdict(facts, quiet_s=quiet_s, settle_s=self.settle_s, gone=gone)
        self.verdicts.append((name, verdict))
        if isinstance(verdict, Complete):
            taken = Taken(at=now, fingerprint=seen.fingerprint, was_gone=gone)
            self.taken.setdefault(name, []).append(taken)
            self._before = facts.file_set
            if not gone and pin_path.exists():
                shutil.rmtree(pin_path)


def run(replay: Replay, daemon: Daemon, steps: list[Step]) -> None:
    """Let a trace happen, step by step, and the daemon look after each and whenever it is due."""
    for number, step in enumerate(steps):
        replay.perform(step)
        daemon.look(step.at, step.path)
        until = steps[number + 1].at if number + 1 < len(steps) else float("inf")
        while due := [at for at in daemon.due() if at < until]:
            daemon.look(due[0] + TICK_S)
