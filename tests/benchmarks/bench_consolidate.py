"""Consolidating ranks' files against `cp` and the framework's own tool; run by hand, prints ratios.

    python -m tests.benchmarks.bench_consolidate [--kind dcp_rows,dcp_columns,zero3] [--gb 4]
        [--ranks 8] [--folder DIR] [--turns 3] [--no-tool]

A Llama-like model is written by torch's own distributed checkpoint, each matrix divided by rows or
by columns among the ranks, or in the files of ZeRO 3. `ckptd run` makes one checkpoint of it, in
turns with `cp` of the same files (then `sync`, for ours is durable); of each the fastest counts.
torch's `dcp_to_torch_save`, which holds the whole model in memory, runs once beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from ckptd.bench import synthetic
from tests.checkpoint.consolidate import zero_files
from tests.checkpoint.consolidate.test_dcp import write_ranks

KINDS = ("dcp_rows", "dcp_columns", "zero3")
REST_S = 5.0
"""Before each run: longer than a virtual machine keeps free memory, whose return costs time."""


def write(run: Path, kind: str, *, gb: float, num_ranks: int) -> Path:
    """Write a run's folder; return its checkpoint."""
    run.mkdir(parents=True)
    synthetic.write(run, synthetic.llama_specs(0), sparse=True, shard_bytes=1 << 40)
    (run / "model.safetensors").unlink()
    specs = synthetic.llama_specs(int(gb * 1e9 / (2 if kind == "zero3" else 1)))
    torch.manual_seed(0)
    pattern = torch.randn(synthetic.ROWS * synthetic.HIDDEN, dtype=torch.bfloat16)
    dtype = torch.float32 if kind == "zero3" else torch.bfloat16
    whole = {}
    for spec in specs:
        count = torch.Size(spec.shape).numel()
        whole[spec.name] = pattern[:count].to(dtype, copy=True).view(spec.shape)
    if kind == "zero3":
        path = run / "global_step1"
        zero_files.write(path, [whole], stage=3, num_ranks=num_ranks)
        return path
    path = run / "step-1"
    grid = [num_ranks, 1] if kind == "dcp_rows" else [1, num_ranks]
    grids = {name: grid for name, tensor in whole.items() if tensor.dim() == 2}
    write_ranks(path, whole, grids, num_ranks, FileSystemWriter(path))
    return path


def ours(source: Path, out: Path) -> dict[str, Any]:
    """Return what `ckptd run` says of itself."""
    command = [
        sys.executable, "-c", "import sys; from ckptd.cli.main import main; sys.exit(main())",
        "run", str(source), "-p", "reshard", "-o", str(out), "--no-push", "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def copied(source: Path, out: Path) -> tuple[float, float]:
    """Return the seconds of `cp`, and of `cp` and `sync`."""
    began = time.perf_counter()
    subprocess.run(["cp", "--reflink=auto", "-r", str(source), str(out)], check=True)
    copied_s = time.perf_counter() - began
    os.sync()
    return copied_s, time.perf_counter() - began


def tool(source: Path, out: Path) -> tuple[float, int]:
    """Return the seconds and the peak memory of torch's own tool, in a process of its own."""
    began = time.perf_counter()
    pid = os.fork()
    if not pid:
        dcp_to_torch_save(source, out)
        os._exit(0)
    _, status, usage = os.wait4(pid, 0)
    assert not status
    return time.perf_counter() - began, usage.ru_maxrss * 1024


def bench(kind: str, *, gb: float, num_ranks: int, parent: Path, turns: int, beside: bool) -> None:
    """Print one row."""
    source = write(parent / "run", kind, gb=gb, num_ranks=num_ranks)
    nbytes = sum(path.stat().st_size for path in source.iterdir())
    ran, cp = [], []
    for turn in range(turns):
        for job in (True, False):
            out = parent / f"out-{turn}-{job}"
            os.sync()
            time.sleep(REST_S)
            if job:
                ran.append(ours(source, out))
            else:
                cp.append(copied(source, out))
            shutil.rmtree(out)
    best = min(ran, key=lambda outcome: float(outcome["duration_s"]))
    cp_s, synced_s = (min(values) for values in zip(*cp, strict=True))
    peak = max(outcome["peak_bytes"] for outcome in ran)
    row = (
        f"{kind}: {nbytes / 1e9:.1f} GB of {num_ranks} ranks in {best['duration_s']:.1f} s, peak "
        f"{peak / 1e6:.0f} MB; {best['duration_s'] / cp_s:.2f} x cp, "
        f"{best['duration_s'] / synced_s:.2f} x cp and sync ({synced_s:.1f} s)"
    )
    if beside and kind.startswith("dcp"):
        seconds, used = tool(source, parent / "tool.pt")
        row += f"; dcp_to_torch_save {seconds / best['duration_s']:.2f} x ours, {used / 1e9:.1f} GB"
    print(row, flush=True)


def main() -> None:
    """Read the arguments and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", default=",".join(KINDS))
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--no-tool", action="store_true", help="without the framework's own")
    given = parser.parse_args()
    for kind in given.kind.split(","):
        with tempfile.TemporaryDirectory(dir=given.folder) as parent:
            bench(
                kind, gb=given.gb, num_ranks=given.ranks, parent=Path(parent), turns=given.turns,
                beside=not given.no_tool,
            )  # fmt: skip


if __name__ == "__main__":
    main()
