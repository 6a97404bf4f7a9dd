"""Thousands of checkpoints through one daemon: memory, files, database and pace; run by hand.

    python -m tests.benchmarks.bench_endurance [--checkpoints 10000] [--keep 4] [--runs 8] [--xet] [--forward-only]

A day of training, accelerated: small checkpoints are written as fast as they are taken, into `--runs`
run folders in turn, each with the trainer's rotation (`--keep`), and pushed to a Hub on loopback. From
time to time a line says what daemon and runner hold, and what the checkpoints since the last line
have cost. At the end every job must be published, with one commit each, nothing may be left in the
state folder, and the daemon must hold what it held after the first fifth (`ALLOWED_BYTES`). It is
then started again, which must not take longer for all those jobs. The Hub runs in this process, so
its memory is not in the figures.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from ckptd.hub.local import server
from ckptd.jobs.database import Database
from ckptd.jobs.job import State
from tests.flow.conftest import Deployment, write_checkpoint

AHEAD = 16
"""Checkpoints that may wait to be published before the next one is written."""
ROWS = 40
LINES = 20
ALLOWED_BYTES = 8_000_000
"""How much more a process may hold at the end than after the first fifth: what allocators keep."""
RESTART_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What the processes hold and have used so far."""

    number: int
    at: float
    daemon_bytes: int
    runner_bytes: int
    daemon_cpu_s: float
    open_files: int
    database_bytes: int

    def line(self, before: Look) -> str:
        """Return what is now, and what a checkpoint has cost since `before`."""
        num, seconds = self.number - before.number, self.at - before.at
        cost_s = (self.daemon_cpu_s - before.daemon_cpu_s) / num
        return (
            f"{self.number:>6} checkpoints, {num / seconds:4.1f} a second: daemon "
            f"{self.daemon_bytes / 1e6:.1f} MB, runner {self.runner_bytes / 1e6:.1f} MB, "
            f"{self.open_files} files open, {cost_s * 1000:.0f} ms of the daemon's CPU for each; "
            f"database {self.database_bytes / 1e6:.1f} MB"
        )


def main() -> None:
    """Read the arguments, run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", type=int, default=10_000)
    parser.add_argument("--keep", type=int, default=4)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--xet", action="store_true", help="upload over Xet instead of LFS")
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=given.folder) as root,
        server.running(root=Path(root) / "hub") as hub,
    ):
        node = Deployment(Path(root), hub)
        node.define(settle="100ms", push="  forward_only: true\n" if given.forward_only else "")
        start(node, xet=given.xet)
        try:
            looks = endure(node, total=given.checkpoints, keep=given.keep, num_runs=given.runs)
            wrong = [
                *complaints(node, total=given.checkpoints, num_runs=given.runs),
                *growth(looks),
            ]
            node.kill()
            began = time.monotonic()
            start(node, xet=given.xet)
            restart_s = time.monotonic() - began
        finally:
            node.kill()
    print(f"started again in {restart_s:.2f} s")
    if restart_s > RESTART_S:
        wrong.append(f"a start took {restart_s:.1f} s")
    sys.exit("\n".join(wrong) or None)


def start(node: Deployment, *, xet: bool) -> None:
    """Start the daemon."""
    node.start(HF_HUB_DISABLE_XET=str(int(not xet)))


def endure(node: Deployment, *, total: int, keep: int, num_runs: int) -> list[Look]:
    """Write and wait, and tell some times; return what was seen."""
    kept: list[deque[Path]] = [deque() for _ in range(num_runs)]
    looks = [look(node, 0)]
    every = max(1, total // LINES)
    for number in range(1, total + 1):
        folders = kept[number % num_runs]
        folder = node.runs / f"run-{number % num_runs}" / f"checkpoint-{number}"
        write_checkpoint(folder, number, rows=ROWS)
        folders.append(folder)
        # Fewer at the beginning: sixteen at once would be written and deleted in one moment.
        ahead = min(AHEAD, number // keep)
        node.wait_for(lambda wanted=number - ahead: published(node) >= wanted)
        if len(folders) > keep:
            shutil.rmtree(folders.popleft())
        if number % every == 0:
            looks.append(look(node, number))
            print(looks[-1].line(looks[-2]), flush=True)
    node.wait_for(node.clean)  # nothing is pinned: every job has ended
    return looks


def complaints(node: Deployment, *, total: int, num_runs: int) -> list[str]:
    """Return what went another way, and print the sums."""
    jobs = node.jobs()
    others = [job for job in jobs if job.state is not State.PUBLISHED]
    commits = sum(len(node.commits(f"ckptd/run-{run}")) for run in range(num_runs))
    print(f"{len(jobs)} jobs, {commits} commits, {len(others)} jobs that went another way")
    wrong = [f"{job.spec.name}: {job.state}: {job.reason}" for job in others]
    steps = {job.spec.step for job in jobs}
    wrong += [f"checkpoint-{step} has no job" for step in range(1, total + 1) if step not in steps]
    return wrong + ([] if commits == len(jobs) else ["not one commit for each"])


def growth(looks: list[Look]) -> list[str]:
    """Return what holds more at the end than it held when it had warmed up."""
    warm, last = looks[len(looks) // 5], looks[-1]
    print(
        f"from {warm.number} to {last.number} checkpoints: daemon "
        f"{(last.daemon_bytes - warm.daemon_bytes) / 1e6:+.1f} MB, runner "
        f"{(last.runner_bytes - warm.runner_bytes) / 1e6:+.1f} MB"
    )
    wrong = []
    if last.daemon_bytes - warm.daemon_bytes > ALLOWED_BYTES:
        wrong.append("the daemon's memory grows")
    if last.runner_bytes - warm.runner_bytes > ALLOWED_BYTES:
        wrong.append("the runner's memory grows")
    if last.open_files > warm.open_files + 10:
        wrong.append("the daemon's open files grow")
    return wrong


def published(node: Deployment) -> int:
    """Return how many jobs are published."""
    with Database(node.state / "jobs.sqlite3", read_only=True) as database:
        return database.counts().get(State.PUBLISHED, 0)


def look(node: Deployment, number: int) -> Look:
    """Return what the processes hold now."""
    assert node.process is not None
    pid = node.process.pid
    ticks = [int(field) for field in Path(f"/proc/{pid}/stat").read_text().split()[13:15]]
    files = [*node.state.glob("jobs.sqlite3*")]
    return Look(
        number=number,
        at=time.monotonic(),
        daemon_bytes=resident_bytes(pid),
        runner_bytes=sum(map(resident_bytes, node.runner_pids())),
        daemon_cpu_s=sum(ticks) / os.sysconf("SC_CLK_TCK"),
        open_files=len(list(Path(f"/proc/{pid}/fd").iterdir())),
        database_bytes=sum(path.stat().st_size for path in files),
    )


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
