"""Decoding one large layer of each format against a copy of its result; run by hand, prints ratios.

    python -m tests.benchmarks.bench_dequantize [--only gptq4,bnb_nf4] [--device cuda] [--repeat 7]
    python -m tests.benchmarks.bench_dequantize --shape 768x2048 --copies 300
    python -m tests.benchmarks.bench_dequantize --job ct_w4a16 --gb 3 [--folder DIR]

The first form decodes a layer of 14336 x 4096 to bfloat16 from bytes that are in memory, in the
blocks of the stream, in 1 and 2 threads, and compares with a copy of the result's bytes into memory
that exists, in as many threads, and, where the library that writes the format is installed, with
its own dequantizer on the same tensors and threads. The second does it for many small weights. The
third runs a whole job on a checkpoint of `--gb`, and compares its wall time with decoding alone and
with writing alone.

What is compared runs in turns, and of several turns the fastest counts, with one thread block by
block. Gigabytes are of the result.
Ratios are of wall time and, in brackets, of processor time, which tells more on a busy machine. On a
GPU the share of its memory's bandwidth that is used takes the place of threads.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ckptd.bench import limits
from ckptd.checkpoint import checkpoint
from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.writer import Cache
from ckptd.plan import blocks, decoded, dequantize, evaluate
from ckptd.plan.nodes import Decode
from ckptd.plan.plan import Computed, segments_of
from ckptd.plan.sources import Sources
from ckptd.quant import registry, stored
from ckptd.quant.formula import Arith
from tests.benchmarks import layer_files, layers, libraries

BF16_BYTES = 2
REST_S = 5.0
"""Before a job or a write: longer than free memory is kept by a virtual machine."""
TURNS_S = 20.0
"""Turns end after this many seconds, whatever the number of them: some libraries are slow."""

COPIED_BYTES = 16 << 20
"""What is copied at once: as much as a block of the stream."""

Call = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Fastest:
    """The least seconds of all turns, by the clock and by the processors."""

    wall_s: float
    cpu_s: float

    def or_faster(self, other: Fastest) -> Fastest:
        """Return the lesser of each."""
        return Fastest(min(self.wall_s, other.wall_s), min(self.cpu_s, other.cpu_s))

    def over(self, other: Fastest) -> str:
        """Return how many times as long as `other` it took."""
        return f"{self.wall_s / other.wall_s:6.2f} x [{self.cpu_s / other.cpu_s:6.2f}]"


def in_turns(
    calls: Mapping[str, Sequence[Call]], *, repeat: int, device: str
) -> dict[str, Fastest]:
    """Run the calls of every name once to warm up, then `repeat` times in turns.

    Of each call the fastest turn counts, and those of a name are added up: where work is divided
    into calls of a few milliseconds, whatever else the machine does is left out.
    """
    best: dict[str, list[Fastest]] = {}
    until = time.perf_counter() + TURNS_S
    for turn in range(repeat + 1):
        for name, parts in calls.items():
            took = [_timed(part, device) for part in parts]
            if turn:
                held = best.get(name, took)
                best[name] = [one.or_faster(other) for one, other in zip(held, took, strict=True)]
        if turn and time.perf_counter() > until:
            break
    return {
        name: Fastest(sum(one.wall_s for one in parts), sum(one.cpu_s for one in parts))
        for name, parts in best.items()
    }


def _timed(call: Call, device: str) -> Fastest:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return Fastest(time.perf_counter() - wall, time.process_time() - cpu)


def spread(parts: Sequence[Call], threads: int) -> list[Call]:
    """Return calls that together do all `parts`, in as many threads as a stream would compute with.

    One thread does them one by one, several share them in a single call.
    """
    if threads == 1:
        return list(parts)
    pool = ThreadPoolExecutor(threads)
    return [lambda: list(pool.map(lambda part: part(), parts))]


def decoding(folder: Path, *, device: str) -> list[Call]:
    """Return what decodes the weights of `folder` from memory, batch by batch."""
    opened = checkpoint.open_checkpoint(folder)
    seen = stored.of_checkpoint(opened)
    chosen = registry.choose(seen)
    assert chosen is not None
    values = [
        (group.name, dequantize.weight(group, dtype=Dtype.BF16, arith=Arith.FLOAT32))
        for group in chosen.find(seen).groups
    ]
    segments = [part for name, value in values for part in segments_of([(name, value)])]
    computed = [part for part in segments if isinstance(part, Computed)]
    with Sources(opened.stamps) as sources:
        reader = evaluate.Evaluator(device="cpu", sources=sources)
        staged = [reader.read(batch) for batch in blocks.batches(computed)]
    if device == "cpu":
        return [functools.partial(reader.compute, batch) for batch in staged]
    return [_on_device(batch, block, device) for batch in staged for block in batch.blocks]


def _on_device(batch: evaluate.Staged, block: blocks.Block, device: str) -> Call:
    """Return what decodes a block whose bytes are on the device."""
    value = block.value
    assert isinstance(value, Decode)
    loaded = {window: batch.loaded[window].to(device) for window in value.windows}
    out = torch.empty(value.shape, dtype=torch.bfloat16, device=device)
    return functools.partial(decoded.into, out, value, loaded, block.tensor)


def copying(nbytes: int, *, device: str) -> list[Call]:
    """Return what copies `nbytes` between memory that exists, a block of the stream at a time."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    parts = zip(target.split(COPIED_BYTES), source.split(COPIED_BYTES), strict=True)
    return [functools.partial(own.copy_, other) for own, other in parts]


def bench_layer(
    name: str, *, shape: tuple[int, int], copies: int, device: str, repeat: int
) -> None:
    """Print one row for each number of threads."""
    layer = layers.LAYERS[name](*shape)
    out_bytes = copies * shape[0] * shape[1] * BF16_BYTES
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "layer"
        layer_files.write(folder, layer, copies=copies)
        ours = decoding(folder, device=device)
    copy = copying(out_bytes, device=device)
    library = libraries.call(name, layer) if device == "cpu" and copies == 1 else None
    for threads in (1, 2) if device == "cpu" else (1,):
        calls = {"ours": spread(ours, threads), "copy": spread(copy, threads)}
        if library is not None:
            calls["library"] = [_with_threads(library, threads)]
        torch.set_num_threads(1)
        took = in_turns(calls, repeat=repeat, device=device)
        row = f"{name:15} {threads} thread{'s' if threads > 1 else ' '}"
        row += f" {out_bytes / took['ours'].wall_s / 1e9:6.2f} GB/s, "
        row += f"{took['ours'].over(took['copy'])} of a copy"
        if library is not None:
            row += f", library {took['library'].over(took['ours'])} of ours"
        if device != "cpu":
            moved = out_bytes + copies * layer.nbytes
            share = moved / took["ours"].wall_s / (2 * out_bytes / took["copy"].wall_s)
            row += f", {share:.0%} of the memory's bandwidth"
        print(row, flush=True)


def _with_threads(call: Call, threads: int) -> Call:
    """Return a call that has as many of torch's own threads, which ours does not use."""

    def made() -> None:
        torch.set_num_threads(threads)
        call()
        torch.set_num_threads(1)

    return made


def bench_job(
    name: str, *, shape: tuple[int, int], gb: float, parent: Path | None, turns: int
) -> None:
    """Print wall time and peak memory of a whole job, beside decoding and writing alone.

    Job and writing run in turns, and of each the fastest counts.
    """
    layer = layers.LAYERS[name](*shape)
    copies = max(1, round(gb * 1e9 / layer.nbytes))
    out_bytes = copies * shape[0] * shape[1] * BF16_BYTES
    folder = Path(tempfile.mkdtemp(dir=parent))
    try:
        shard_layers = max(1, copies // 4)
        layer_files.write(folder / "source", layer, copies=copies, shard_layers=shard_layers)
        layer_files.write(folder / "few", layer, copies=min(4, copies))
        torch.set_num_threads(1)
        few = decoding(folder / "few", device="cpu")
        took = in_turns({"few": spread(few, 2)}, repeat=5, device="cpu")["few"]
        decode_s = took.wall_s * copies / min(4, copies)
        written, ran = [], []
        for _ in range(turns):
            written.append(_write_s(folder / "plain", out_bytes))
            _rest()
            ran.append(_run(folder / "source", folder / "out"))
            shutil.rmtree(folder / "out")
    finally:
        shutil.rmtree(folder)
    write_s = min(written)
    outcome, wall_s = min(ran, key=lambda run: float(run[0]["duration_s"]))
    print(
        f"{name}: {copies * layer.nbytes / 1e9:.1f} GB become {out_bytes / 1e9:.1f} GB in "
        f"{wall_s:.1f} s ({outcome['duration_s']:.1f} s without start-up), peak "
        f"{outcome['peak_bytes'] / 1e6:.0f} MB; decoding alone {decode_s:.1f} s, writing alone "
        f"{write_s:.1f} s: {outcome['duration_s'] / max(decode_s, write_s):.2f} x the larger",
        flush=True,
    )


def _run(source: Path, out: Path) -> tuple[dict[str, Any], float]:
    """Return what a job that dequantizes `source` says, and its seconds with start-up."""
    start = "import sys; from ckptd.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", start, "run", str(source), "-p", "dequantize"]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, "-o", str(out), "--no-push", "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout), time.perf_counter() - began


def _rest() -> None:
    """Sync, and wait until a virtual machine has given free memory back, which costs when it is used
    again: 1.6 s or 14.7 s for the same 3.9 GB were measured right after freeing and later."""
    os.sync()
    time.sleep(REST_S)


def _write_s(path: Path, nbytes: int) -> float:
    """Return the seconds to write and sync `nbytes` as a job does: past the page cache."""
    _rest()
    seconds = nbytes / limits.written(path, nbytes, 2, Cache.DIRECT)
    path.unlink()
    return seconds


def main() -> None:
    """Read the arguments and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(layers.LAYERS))
    parser.add_argument("--shape", default="14336x4096", help="outputs x inputs of a layer")
    parser.add_argument("--copies", type=int, default=1, help="so many equal layers")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--job")
    parser.add_argument("--turns", type=int, default=3, help="how often a job runs")
    parser.add_argument("--gb", type=float, default=3.0)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    rows, _, columns = given.shape.partition("x")
    shape = int(rows), int(columns)
    if given.job:
        for name in given.job.split(","):
            bench_job(name, shape=shape, gb=given.gb, parent=given.folder, turns=given.turns)
        return
    for name in given.only.split(","):
        bench_layer(
            name, shape=shape, copies=given.copies, device=given.device, repeat=given.repeat
        )


if __name__ == "__main__":
    main()
