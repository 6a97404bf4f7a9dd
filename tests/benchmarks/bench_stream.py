"""Copying, hashing, casting, resizing and planning against `cp`; run by hand, prints ratios.

    python tests/benchmarks/bench_stream.py --gb 3 [--folder DIR] [--repeat 3] [--sparse-gb 200]

Every row is a process of its own, so that peak memory is that row's alone. Seconds are the work's
without start-up (interpreter, imports), which has a column of its own. Of several runs the fastest
counts: whatever else the machine does only adds. Before each run everything written so far is
synced, and as much memory as the run will fill is touched and freed, so that no row pays for the
row before it or, on a virtual machine, for memory that the host has yet to give.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import mmap
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ckptd.bench import synthetic

MAX_SHARD_BYTES = 500_000_000
BUDGET_BYTES = 256 << 20
THREADS = 2


def run_stream(
    source: Path, out: Path, *, work: str, hashing: bool, cache: str = "direct"
) -> dict[str, Any]:
    """Stream `source` into `out` and return the seconds of each phase."""
    began = time.perf_counter()
    import anyio

    from ckptd.aio.budget import ByteBudget
    from ckptd.checkpoint import checkpoint
    from ckptd.checkpoint.writer import Cache
    from ckptd.plan import draft, plan
    from ckptd.plan.sources import Sources
    from ckptd.plan.stream import FinishedShard, Meter, Stream

    opened = checkpoint.open_checkpoint(source)
    start = draft.from_checkpoint(opened)
    made = plan.make(dataclasses.replace(_drafted(start, work), max_shard_bytes=MAX_SHARD_BYTES))

    async def ignore(shard: FinishedShard) -> None:
        pass

    with Sources(opened.stamps) as sources:
        evaluator = None
        if made.needs_torch:
            from ckptd.plan import evaluate

            evaluate.set_threads(THREADS if made.grows_rows else 1)
            evaluator = evaluate.Evaluator(device="cpu", sources=sources)
        budget = ByteBudget(BUDGET_BYTES)
        stream = Stream(
            made, out, sources=sources, evaluator=evaluator, budget=budget, threads=THREADS,
            hashing=hashing, cache=Cache(cache), meter=Meter(),
        )  # fmt: skip

        async def main() -> None:
            await stream.run(finished={}, on_shard=ignore)

        ready = time.perf_counter()
        anyio.run(main)
    ended = time.perf_counter()
    return {"start_s": ready - began, "work_s": ended - ready, "budget": budget.peak}


def _drafted(start: Any, work: str) -> Any:
    from ckptd.checkpoint.dtypes import Dtype
    from ckptd.plan import expression
    from ckptd.plan.nodes import Grown, NewRows

    tensors = dict(start.tensors)
    if work in {"F16", "F32"}:
        tensors = {name: expression.cast(value, Dtype(work)) for name, value in tensors.items()}
    if work == "resize":
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            old = tensors[name]
            shape = (64, *old.shape[1:])
            new = Grown(old, shape, 0, 0, NewRows.MEAN, 0.02, 0)
            tensors[name] = expression.concat([old, new])
    return dataclasses.replace(start, tensors=tensors)


def run_plan(source: Path) -> dict[str, Any]:
    """Open and plan `source`; return the seconds that takes."""
    from ckptd.checkpoint import checkpoint
    from ckptd.plan import draft, plan

    began = time.perf_counter()
    opened = checkpoint.open_checkpoint(source)
    start = draft.from_checkpoint(opened)
    made = plan.make(dataclasses.replace(start, max_shard_bytes=5 * MAX_SHARD_BYTES))
    digest = made.digest
    return {
        "start_s": 0.0,
        "work_s": time.perf_counter() - began,
        "tensors": len(opened.tensors),
        "gb": opened.tensor_bytes / 1e9,
        "digest": digest,
    }


def run_plan_of_job(source: Path) -> dict[str, Any]:
    """Open `source` and plan tie and reshard as a job does, set up as the runner is."""
    import gc

    from ckptd.checkpoint import checkpoint
    from ckptd.pipeline import compose, definition

    gc.set_threshold(100_000, 50, 1000)
    stages = f"pipeline: bench\nstages: [tie, reshard: {{max_shard_size: {2 * 10**9}}}]\n"
    wanted = definition.parse_definition(stages, "bench.yaml")
    began = time.perf_counter()
    opened = checkpoint.open_checkpoint(source)
    made = compose.from_headers(opened, wanted.stages)
    return {
        "start_s": 0.0,
        "digest": made.digest,
        "work_s": time.perf_counter() - began,
        "tensors": len(opened.tensors),
        "gb": opened.tensor_bytes / 1e9,
        "shards": len(made.shards),
    }


def run_cp(source: Path, out: Path) -> dict[str, Any]:
    """Copy the files of `source` with cp."""
    began = time.perf_counter()
    subprocess.run(["cp", "--reflink=auto", "-r", str(source), str(out)], check=True)
    return {"start_s": 0.0, "work_s": time.perf_counter() - began}


def run_cp_and_sync(source: Path, out: Path) -> dict[str, Any]:
    """Copy the files of `source` with cp and make them durable, as our own rows do."""
    began = time.perf_counter()
    run_cp(source, out)
    os.sync()
    return {"start_s": 0.0, "work_s": time.perf_counter() - began}


ROWS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "cp": run_cp,
    "cp, sync": run_cp_and_sync,
    "verbatim": lambda source, out: run_stream(source, out, work="", hashing=False),
    "verbatim, cached": lambda source, out: run_stream(
        source, out, work="", hashing=False, cache="keep"
    ),
    "verbatim, sha256": lambda source, out: run_stream(source, out, work="", hashing=True),
    "resize (mean)": lambda source, out: run_stream(source, out, work="resize", hashing=False),
    "cast to float16": lambda source, out: run_stream(source, out, work="F16", hashing=False),
    "cast to float32": lambda source, out: run_stream(source, out, work="F32", hashing=False),
    "cast to float16, sha256": lambda source, out: run_stream(
        source, out, work="F16", hashing=True
    ),
}


PLANS = {"plan": run_plan, "plan of a job": run_plan_of_job}


def measured(row: str, source: Path, out: Path) -> dict[str, Any]:
    """Return what one run of `row` in a fresh process says, with its peak memory."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    _settle(sum(512 * path.stat().st_blocks for path in source.iterdir()))
    command = [sys.executable, __file__, "--row", row, str(source), str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    value: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return value


def _settle(nbytes: int) -> None:
    """Sync the disk, and have the memory that the page cache will need, half of what is free at most."""
    os.sync()
    nbytes = min(nbytes, os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE // 2)
    block = mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for start in range(0, nbytes, mmap.PAGESIZE):
        block[start] = 1
    block.close()


def one_row(row: str, source: Path, out: Path) -> None:
    """Do one row in this process and print the result as JSON."""
    value = PLANS[row](source) if row in PLANS else ROWS[row](source, out)
    children = row.startswith("cp")
    usage = resource.getrusage(resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF)
    value |= {"rss_mb": _peak_mb(), "cpu_s": usage.ru_utime + usage.ru_stime}
    print(json.dumps(value))


def _peak_mb() -> float:
    """Peak memory of this program; getrusage would count its parent before exec, too."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def table(source: Path, out: Path, rows: list[str], repeat: int) -> None:
    """Measure every row, in turns, and print the best of each against cp's best."""
    results: dict[str, list[dict[str, Any]]] = {row: [] for row in rows}
    for _ in range(repeat):
        for row in rows:
            results[row].append(measured(row, source, out))
    best = {row: min(values, key=lambda v: v["work_s"]) for row, values in results.items()}
    print(f"{'work':<26}{'start s':>9}{'work s':>9}{'x cp':>7}{'CPU s':>8}{'peak MB':>9}")
    for row, value in best.items():
        ratio = value["work_s"] / best["cp"]["work_s"] if "cp" in best else float("nan")
        peak = max(v["rss_mb"] for v in results[row])
        print(
            f"{row:<26}{value['start_s']:>9.2f}{value['work_s']:>9.2f}{ratio:>7.2f}"
            f"{value['cpu_s']:>8.1f}{peak:>9.0f}"
        )


def planned(
    name: str,
    folder: Path,
    specs: list[Any],
    *,
    sparse: bool,
    shard_bytes: int,
    row: str = "plan",
    repeat: int = 1,
) -> None:
    """Plan a checkpoint of `specs` and print the time and peak memory."""
    synthetic.write(folder, specs, sparse=sparse, shard_bytes=shard_bytes)
    results = [measured(row, folder, folder.parent / "out") for _ in range(repeat)]
    value = min(results, key=lambda result: result["work_s"])
    shutil.rmtree(folder)
    print(
        f"plan {name}: {value['tensors']:,} tensors, {value['gb']:,.1f} GB, "
        f"{value['work_s']:.2f} s, peak {value['rss_mb']:.0f} MB"
    )


def small_tensors(folder: Path, count: int, repeat: int) -> None:
    """Stream `count` tensors of 512 bytes and print what each of them costs."""
    specs = synthetic.moe_specs(count)
    synthetic.write(folder, specs, sparse=False, shard_bytes=synthetic.SHARD_BYTES)
    for row in ("verbatim", "cast to float16", "cast to float32"):
        results = [measured(row, folder, folder.parent / "out") for _ in range(repeat)]
        best = min(results, key=lambda result: result["work_s"])
        print(
            f"{count:,} small tensors, {row}: {best['work_s'] / count * 1e6:.1f} us each, "
            f"{best['cpu_s']:.1f} s of CPU in all, peak {best['rss_mb']:.0f} MB"
        )
    shutil.rmtree(folder)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=3.0, help="size of the checkpoint to stream")
    parser.add_argument("--sparse-gb", type=float, default=200.0, help="size of the planned one")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/ckptd-bench"))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--small", type=int, default=60_000, help="small tensors to stream")
    parser.add_argument("--only", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.row:
        one_row(asked.row[0], Path(asked.row[1]), Path(asked.row[2]))
        return
    folder: Path = asked.folder
    planned(
        "many small", folder / "many", synthetic.moe_specs(60_000), sparse=False,
        shard_bytes=synthetic.SHARD_BYTES,
    )  # fmt: skip
    specs = synthetic.llama_specs(int(asked.sparse_gb * 1e9))
    planned("sparse", folder / "sparse", specs, sparse=True, shard_bytes=5 * synthetic.SHARD_BYTES)
    planned(
        "giant", folder / "giant", synthetic.giant_specs(), sparse=True,
        shard_bytes=2 * synthetic.SHARD_BYTES, row="plan of a job", repeat=asked.repeat,
    )  # fmt: skip
    small_tensors(folder / "small", asked.small, asked.repeat)
    source = folder / "source"
    if asked.only:
        specs = synthetic.llama_specs(int(asked.gb * 1e9))
        synthetic.write(source, specs, sparse=False, shard_bytes=synthetic.SHARD_BYTES)
        table(source, folder / "out", asked.only, asked.repeat)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
