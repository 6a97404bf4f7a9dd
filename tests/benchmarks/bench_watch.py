"""Watching a large tree: what it costs while nothing happens, and how soon a new checkpoint is seen.

    python tests/benchmarks/bench_watch.py [--folders 4000] [--files 50] [--runs 40] [--idle 60]

Makes a tree of `folders` checkpoints in `runs` run folders, with `files` empty files each, and
watches it as the daemon does, twice, each in a process of its own: once with events, and once with
all events lost without anybody being told (every watch is refused the kernel and reported as set).
`idle` is the time in seconds over which the CPU time of the quiet watcher is taken. With
`--at FOLDER` the tree is made there and kept, and found again by the next run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NUM_NEW = 7
"""New checkpoints whose time to be seen is taken."""
SETTLE_S = 2.0


def make(root: Path, *, runs: int, folders: int, files: int) -> None:
    """Make the tree, or what is missing of it."""
    for number in range(folders):
        folder = root / f"run-{number % runs}" / f"checkpoint-{number // runs}"
        if not folder.is_dir():
            folder.mkdir(parents=True)
            for index in range(files):
                (folder / f"model-{index + 1:05d}-of-{files:05d}.safetensors").touch()


async def watch(root: Path, *, folders: int, idle_s: float, interval_s: float) -> dict[str, Any]:
    """Return the measurements of one watcher."""
    import anyio

    from ckptd.watch.watcher import Seen, Settled, Watcher, WatchEvent

    before = _memory_bytes()
    watcher = Watcher(
        key="bench",
        pattern=f"{root}/run-*/checkpoint-*",
        settle_s=SETTLE_S,
        scan_interval_s=interval_s,
    )
    send, received = anyio.create_memory_object_stream[WatchEvent](64)
    found: dict[str, Any] = {}
    began, cpu = time.perf_counter(), time.process_time()
    async with anyio.create_task_group() as tasks, received:
        tasks.start_soon(watcher.run, send)
        for kind, name in ((Seen, "seen"), (Settled, "quiet")):
            for _ in range(folders):
                while not isinstance(await received.receive(), kind):
                    pass
            found[f"{name}_s"] = time.perf_counter() - began
            found[f"{name}_cpu_s"] = time.process_time() - cpu
        await anyio.sleep(5)  # folders are believed from here on, and the rounds have begun
        began, cpu = time.perf_counter(), time.process_time()
        await anyio.sleep(idle_s)
        found["idle_share"] = (time.process_time() - cpu) / (time.perf_counter() - began)
        found["memory_bytes"] = _memory_bytes() - before
        found["seen_after_s"] = [
            await seen_after_s(root / "run-0" / f"checkpoint-new-{number}", received, number)
            for number in range(NUM_NEW)
        ]
        tasks.cancel_scope.cancel()
    return found


async def seen_after_s(folder: Path, received: Any, number: int) -> float:
    """Return the seconds from the making of `folder` until the watcher tells of it."""
    import anyio

    await anyio.sleep(1.0 + 0.37 * number)  # at any time between two scans
    folder.mkdir()
    began = time.perf_counter()
    while (await received.receive()).candidate.path.name != folder.name:
        pass
    seconds = time.perf_counter() - began
    folder.rmdir()
    return seconds


def lose_events() -> None:
    """From now on every watch is reported as set, and none is."""
    from ckptd.watch.inotify import Inotify

    numbers = itertools.count(1)
    Inotify.add = lambda self, path, mask: next(numbers)
    Inotify.remove = lambda self, watch: None


def measure(root: Path, options: argparse.Namespace, *, lost: bool) -> dict[str, Any]:
    """Return the measurements of a watcher in a process of its own."""
    command = [
        sys.executable, __file__, "--at", str(root), "--folders", str(options.folders),
        "--idle", str(options.idle), "--interval", str(options.interval), "--child",
        "lost" if lost else "events",
    ]  # fmt: skip
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def report(options: argparse.Namespace, events: dict[str, Any], lost: dict[str, Any]) -> None:
    """Print what was measured."""
    folders, files = options.folders, options.folders * options.files
    print(f"{files:,} files in {folders:,} checkpoints in {options.runs:,} run folders")
    for name, found in (("events", events), ("events lost", lost)):
        seen = found["seen_after_s"]
        print(
            f"{name}: idle {100 * found['idle_share']:.2f} % of a core;"
            f" new checkpoint seen after {statistics.median(seen):.3f} s,"
            f" {max(seen):.3f} s at most of {len(seen)};"
            f" {found['memory_bytes'] / 1e6:.0f} MB added"
        )
    print(
        f"start: all seen in {events['seen_s']:.1f} s ({events['seen_cpu_s']:.1f} s of CPU), all"
        f" quiet (settle {SETTLE_S:g} s) after {events['quiet_s']:.1f} s"
        f" ({events['quiet_cpu_s']:.1f} s of CPU)"
    )


def _memory_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folders", type=int, default=4000)
    parser.add_argument("--files", type=int, default=50)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--idle", type=float, default=60.0)
    parser.add_argument("--interval", type=float, default=1.0)
    parser.add_argument("--at", type=Path)
    parser.add_argument("--child", choices=("events", "lost"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        import anyio

        if options.child == "lost":
            lose_events()
        found = anyio.run(lambda: watch(
            options.at, folders=options.folders, idle_s=options.idle, interval_s=options.interval,
        ))  # fmt: skip
        print(json.dumps(found))
        return
    root = options.at or Path(tempfile.mkdtemp(prefix="ckptd-bench-watch-"))
    try:
        make(root, runs=options.runs, folders=options.folders, files=options.files)
        report(options, measure(root, options, lost=False), measure(root, options, lost=True))
    finally:
        if options.at is None:
            shutil.rmtree(root)


if __name__ == "__main__":
    main()
