"""Thousands of checkpoints through one daemon: memory, file descriptors and pace; run by hand.

    python -m tests.benchmarks.bench_endurance [--checkpoints 10000] [--keep 4] [--runs 8]

A day of training, accelerated: small checkpoints are written as fast as they are taken, into `--runs`
run folders in turn, each with the trainer's rotation (`--keep`), and pushed to a Hub on loopback. From
time to time a line says what daemon and runner hold. At the end every job must be published, with
one commit each, and nothing may be left in the state folder. The Hub runs in this process, so its
memory is not in the figures.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

from ckptd.hub.local import server
from ckptd.jobs.database import Database
from ckptd.jobs.job import State
from tests.flow.conftest import Deployment, write_checkpoint

AHEAD = 16
"""Checkpoints that may wait to be published before the next one is written."""
ROWS = 40


def main() -> None:
    """Read the arguments, run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", type=int, default=10_000)
    parser.add_argument("--keep", type=int, default=4)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=given.folder) as root,
        server.running(root=Path(root) / "hub") as hub,
    ):
        node = Deployment(Path(root), hub)
        node.define(settle="100ms")
        node.start()
        try:
            endure(node, total=given.checkpoints, keep=given.keep, num_runs=given.runs)
        finally:
            node.kill()


def endure(node: Deployment, *, total: int, keep: int, num_runs: int) -> None:
    """Write and wait, and tell a hundred times at most; exit with 1 where a job went wrong."""
    kept: list[deque[Path]] = [deque() for _ in range(num_runs)]
    began = time.monotonic()
    every = max(1, total // 20)
    for number in range(1, total + 1):
        folders = kept[number % num_runs]
        folder = node.runs / f"run-{number % num_runs}" / f"checkpoint-{number}"
        write_checkpoint(folder, number, rows=ROWS)
        folders.append(folder)
        node.wait_for(lambda count=number: published(node) >= count - AHEAD)
        if len(folders) > keep:
            shutil.rmtree(folders.popleft())
        if number % every == 0:
            tell(node, number, time.monotonic() - began)
    node.wait_for(lambda: published(node) >= total)
    tell(node, total, time.monotonic() - began)
    others = [job for job in node.jobs() if job.state is not State.PUBLISHED]
    commits = sum(len(node.commits(f"ckptd/run-{run}")) for run in range(num_runs))
    node.wait_for(node.clean)
    print(f"{total} checkpoints, {commits} commits, {len(others)} jobs that went another way")
    if others or commits != total:
        sys.exit(1)


def published(node: Deployment) -> int:
    """Return how many jobs are published."""
    with Database(node.state / "jobs.sqlite3", read_only=True) as database:
        return database.counts().get(State.PUBLISHED, 0)


def tell(node: Deployment, number: int, seconds: float) -> None:
    """Print what the processes hold now."""
    assert node.process is not None
    pids = [node.process.pid, *node.runner_pids()]
    held = " + ".join(f"{resident_bytes(pid) / 1e6:.0f}" for pid in pids)
    open_files = len(list(Path(f"/proc/{node.process.pid}/fd").iterdir()))
    print(
        f"{number:>6} checkpoints, {number / seconds:5.1f} a second: daemon + runner {held} MB, "
        f"{open_files} files open",
        flush=True,
    )


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
