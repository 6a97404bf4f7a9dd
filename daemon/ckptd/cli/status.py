"""`ckptd status`: is the daemon there, and what is it doing."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ckptd import units
from ckptd.cli import arguments
from ckptd.cli.arguments import Json, SettingsFile, StateFolder
from ckptd.cli.output import Output, plain

if TYPE_CHECKING:
    from ckptd.telemetry.status import DaemonStatus, JobStatus, LimitStatus

WATCH_S = 1.0
"""Seconds between two looks of `--watch`."""
_CLEAR = "\x1b[H\x1b[J"


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Show whether the daemon runs and what it does.",
        epilog=arguments.examples(
            "ckptd status",
            "ckptd status --watch",
            "ckptd status --state-dir /var/lib/ckptd --json",
        ),
    )(status)


def status(
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Show it again whenever it changes, until Ctrl-C.")
    ] = False,
    settings: SettingsFile = None,
    state_dir: StateFolder = None,
    as_json: Json = False,
) -> None:
    """Show whether the daemon runs, what it watches and how far its jobs are."""
    output = Output(as_json=as_json)
    state_path = arguments.settings(settings, state_dir).state_dir
    shown = None
    while True:
        lines = _lines(state_path, as_json=as_json)
        if lines != shown:
            if watch and output.data_is_terminal and not as_json:
                output.data(_CLEAR + "\n".join(lines))
            else:
                output.data("\n".join(lines))
            shown = lines
        if not watch or output.closed:
            return
        time.sleep(WATCH_S)


def _lines(state_path: Path, *, as_json: bool) -> list[str]:
    found, problem = _read(state_path)
    running = _runs(found, state_path)
    if as_json:
        value = {"running": running, "problem": problem, "status": plain(found)}
        return [json.dumps(value, ensure_ascii=False)]
    if not running:
        last = f"; last seen {_time(found.at)}" if found is not None else ""
        return [f"ckptd is not running with {state_path}{last}"]
    if found is None:
        return [f"ckptd is starting ({problem})"]
    return _describe(found)


def _describe(found: DaemonStatus) -> list[str]:
    late = time.time() - found.at
    lines = [
        f"ckptd {found.version} is {found.state}, process {found.pid}, "
        f"since {_time(found.started_at)}" + _silence(late),
        f"hub: {found.endpoint}",
    ]
    counts = ", ".join(f"{number} {name}" for name, number in sorted(found.counts.items()))
    lines.append(f"jobs: {counts or 'none yet'}; {len(found.jobs)} of {found.slots} slots busy")
    lines += [line for job in found.jobs for line in _job(job)]
    if found.pins is not None:
        lines.append(
            f"pins: {found.pins.num_pins}, holding {units.format_bytes(found.pins.held_bytes)} of "
            f"{units.format_bytes(found.pins.limit_bytes)}; those of failed and held jobs go after "
            f"{units.format_duration(found.pins.max_age_s)}"
        )
    lines += _limits(found.limits)
    if not found.definitions:
        lines.append("definitions: none; put one into the pipelines.d folder")
    for definition in found.definitions:
        problem = f": {definition.problem}" if definition.problem else ""
        lines.append(
            f"definition {definition.pipeline or '(none)'} from {definition.path}{problem}"
        )
    for place in found.watches:
        problem = f": {place.problem}" if place.problem else ""
        lines.append(
            f"watching {place.pattern} for {place.pipeline} by {place.mode}: "
            f"{place.num_candidates} checkpoints, {place.num_settling} settling{problem}"
        )
    return lines


def _limits(limits: tuple[LimitStatus, ...]) -> list[str]:
    """Say what holds work back, each on its own line, and the other limits on one."""
    reached = [f"held back by {limit.name}: {limit.value}, {limit.now}"
               for limit in limits if limit.reached]  # fmt: skip
    told = [
        f"{limit.name} {limit.value}" + (f" ({limit.now})" if limit.now else "")
        for limit in limits
        if not limit.reached
    ]
    return reached + ([f"limits: {', '.join(told)}"] if told else [])


def _job(job: JobStatus) -> list[str]:
    shards = f", shard {job.shards_done} of {job.num_shards}" if job.num_shards else ""
    target = f" -> {job.target}" if job.target else ""
    name = f"{job.job_id} {job.run}/{job.name}{target}"
    lines = [f"  {name}: {job.phase.value}{shards}, since {_time(job.started_at)}"]
    moved = [
        f"{units.format_bytes(counter.done_bytes)} of {units.format_bytes(counter.total_bytes)} "
        f"{name}"
        for name, counter in (
            ("fetched", job.counters.fetched),
            ("read", job.counters.read),
            ("computed", job.counters.computed),
            ("written", job.counters.written),
            ("uploaded", job.counters.uploaded),
        )
        if counter.total_bytes
    ]
    if moved:
        lines.append("    " + ", ".join(moved))
    if job.note:
        lines.append(f"    {job.note}")
    return lines


def _read(state_path: Path) -> tuple[DaemonStatus | None, str | None]:
    """Return the last status the daemon wrote, or why there is none."""
    from ckptd.service.board import STATUS_NAME
    from ckptd.telemetry.status import DaemonStatus

    try:
        return DaemonStatus.from_json((state_path / STATUS_NAME).read_bytes()), None
    except FileNotFoundError:
        return None, "no status yet"
    except (OSError, ValueError) as error:
        return None, f"its status cannot be read: {error}"


def _runs(found: DaemonStatus | None, state_path: Path) -> bool:
    """Say whether the daemon of the state folder runs.

    Its lock is the truth, but asking for it takes it for a moment, and a daemon that starts in that
    moment would give up: it is asked only where the status file leaves a doubt.
    """
    if found is None:
        return _is_locked(state_path)
    fresh, alive = not _silence(time.time() - found.at), _is_alive(found.pid)
    return alive if fresh is alive else _is_locked(state_path)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def _is_locked(state_path: Path) -> bool:
    """Say whether a daemon holds the state folder: the kernel lets go of it when it dies."""
    try:
        fd = os.open(state_path / "lock", os.O_RDONLY)
    except OSError:
        return False
    with contextlib.closing(os.fdopen(fd)) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _silence(late_s: float) -> str:
    from ckptd.service.board import REFRESH_S

    if late_s < 3 * REFRESH_S:
        return ""
    return f"; it said nothing for {units.format_duration(late_s)}"


def _time(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
