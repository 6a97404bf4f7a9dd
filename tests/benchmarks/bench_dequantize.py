"""Decoding one large layer of each format against a copy of its result; run by hand, prints ratios.

    python tests/benchmarks/bench_dequantize.py [--only gptq4,bnb_nf4] [--device cuda] [--repeat 5]
    python tests/benchmarks/bench_dequantize.py --job ct_w4a16 --gb 3 [--folder DIR]

The first form decodes a layer of 14336 x 4096 to bfloat16 from bytes that are in memory, in the
blocks of the stream, in 1 and 2 threads, and compares with a copy of the result's bytes in as many
threads and, where the library that writes the format is installed, with its own dequantizer on the
same tensors and threads. The second runs a whole job on a checkpoint of `--gb`, and compares its
wall time with decoding alone and with writing alone. Of several runs the fastest counts.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import layers
import torch

from ckptd.checkpoint import checkpoint
from ckptd.checkpoint.dtypes import Dtype
from ckptd.plan import blocks, dequantize, evaluate
from ckptd.plan.plan import Computed, segments_of
from ckptd.plan.sources import Sources
from ckptd.quant import registry, stored
from ckptd.quant.formula import Arith

ROWS, COLUMNS = 14336, 4096
BF16 = 2


def fastest(call: Callable[[], Any], repeat: int) -> float:
    """Return the seconds of the fastest of `repeat` calls."""
    best = float("inf")
    for _ in range(repeat):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best


def decode_s(folder: Path, *, threads: int, device: str, repeat: int) -> float:
    """Return the seconds to decode every weight of `folder` from staged blocks."""
    opened = checkpoint.open_checkpoint(folder)
    seen = stored.of_checkpoint(opened)
    chosen = registry.choose(seen)
    assert chosen is not None
    values = [
        (group.name, dequantize.weight(group, dtype=Dtype.BF16, arith=Arith.FLOAT32))
        for group in chosen.find(seen).groups
    ]
    segments = [part for name, value in values for part in segments_of(name, value, 0)]
    with Sources(opened.stamps) as sources:
        evaluator = evaluate.Evaluator(device=device, sources=sources)
        computed = [part for part in segments if isinstance(part, Computed)]
        staged = [evaluator.read(batch) for batch in blocks.batches(computed)]
        evaluator.compute(staged[0])

        def once() -> None:
            in_threads(evaluator.compute, staged, threads)
            if device != "cpu":
                torch.cuda.synchronize()

        return fastest(once, repeat)


def in_threads(call: Callable[[Any], Any], items: Sequence[Any], threads: int) -> None:
    """Call for every item, in as many threads as lanes of a stream would."""
    if threads == 1:
        for item in items:
            call(item)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(call, items))


def copy_s(nbytes: int, *, threads: int, device: str, repeat: int) -> float:
    """Return the seconds to copy `nbytes`, in `threads` parts."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    parts = list(zip(target.chunk(threads), source.chunk(threads), strict=True))

    def once() -> None:
        in_threads(lambda pair: pair[0].copy_(pair[1]), parts, threads)
        if device != "cpu":
            torch.cuda.synchronize()

    return fastest(once, repeat)


def library_call(name: str, tensors: layers.Tensors) -> Callable[[], Any] | None:
    """Return the library's own dequantization of a layer, or None where it is not installed."""
    try:
        return LIBRARIES[name](tensors) if name in LIBRARIES else None
    except ImportError:
        return None


def _bitsandbytes_4bit(tensors: layers.Tensors) -> Callable[[], Any]:
    functional = importlib.import_module("bitsandbytes.functional")
    raw = bytes(tensors["weight.quant_state.bitsandbytes__nf4"].tolist())
    state = functional.QuantState.from_dict(
        {
            name.removeprefix("weight."): value
            for name, value in tensors.items()
            if name != "weight"
        },
        device=torch.device("cpu"),
    )
    assert json.loads(raw)["quant_type"] == "nf4"
    return lambda: functional.dequantize_4bit(tensors["weight"], state)


def _bitsandbytes_int8(tensors: layers.Tensors) -> Callable[[], Any]:
    functional = importlib.import_module("bitsandbytes.functional")
    return lambda: functional.int8_vectorwise_dequant(tensors["weight"], tensors["SCB"]).to(
        torch.bfloat16
    )


def _fp8(tensors: layers.Tensors) -> Callable[[], Any]:
    module = importlib.import_module("transformers.integrations.finegrained_fp8")
    made = module.Fp8Dequantize(None)
    weight, scale = tensors["weight"], tensors["weight_scale_inv"]
    return lambda: made._dequantize_one(weight, scale)


def _mxfp4(tensors: layers.Tensors) -> Callable[[], Any]:
    module = importlib.import_module("transformers.integrations.mxfp4")
    codes, scales = tensors["gate_up_proj_blocks"], tensors["gate_up_proj_scales"]
    return lambda: module.convert_moe_packed_tensors(codes, scales)


def _compressed(tensors: layers.Tensors) -> Callable[[], Any]:
    packed = importlib.import_module("compressed_tensors.compressors.pack_quantized.helpers")
    forward = importlib.import_module("compressed_tensors.quantization.lifecycle.forward")
    shape = torch.Size(tensors["weight_shape"].tolist())

    def call() -> Any:
        codes = packed.unpack_from_int32(tensors["weight_packed"], 4, shape)
        return forward.dequantize(x_q=codes, scale=tensors["weight_scale"])

    return call


def _mlx(tensors: layers.Tensors) -> Callable[[], Any]:
    mx = importlib.import_module("mlx.core")
    weight = mx.array(tensors["weight"].view(torch.int32).numpy()).view(mx.uint32)
    scales, biases = (
        mx.array(tensors[name].float().numpy()).astype(mx.bfloat16) for name in ("scales", "biases")
    )
    return lambda: mx.eval(mx.dequantize(weight, scales, biases, group_size=64, bits=4))


LIBRARIES: dict[str, Callable[[layers.Tensors], Callable[[], Any]]] = {
    "bnb_nf4": _bitsandbytes_4bit,
    "bnb_int8": _bitsandbytes_int8,
    "fp8_block": _fp8,
    "mxfp4_experts": _mxfp4,
    "ct_w4a16": _compressed,
    "mlx4": _mlx,
}


def bench_layer(name: str, *, device: str, repeat: int) -> None:
    """Print one row for each number of threads."""
    layer = layers.LAYERS[name](ROWS, COLUMNS)
    out_bytes = ROWS * COLUMNS * BF16
    with tempfile.TemporaryDirectory() as folder:
        layers.write(Path(folder) / "layer", layer)
        for threads in (1, 2) if device == "cpu" else (1,):
            torch.set_num_threads(1)
            ours = decode_s(Path(folder) / "layer", threads=threads, device=device, repeat=repeat)
            copied = copy_s(out_bytes, threads=threads, device=device, repeat=repeat)
            torch.set_num_threads(threads)
            call = library_call(name, layer[0]) if device == "cpu" else None
            theirs = fastest(call, repeat) if call is not None else None
            against = f"{theirs / ours:6.2f} x" if theirs is not None else "       -"
            print(
                f"{name:16} {threads} thread{'s' if threads > 1 else ' '} "
                f"{out_bytes / ours / 1e9:6.2f} GB/s out, {ours / copied:5.2f} x the copy, "
                f"library {against}",
                flush=True,
            )


def bench_job(name: str, *, gb: float, parent: Path) -> None:
    """Print wall time and peak memory of a whole job, beside decoding and writing alone."""
    layer = layers.LAYERS[name](ROWS, COLUMNS)
    size = sum(tensor.nbytes for tensor in layer[0].values())
    copies = max(1, round(gb * 1e9 / size))
    folder = Path(tempfile.mkdtemp(dir=parent))
    try:
        layers.write(folder / "source", layer, copies=copies, shard_layers=max(1, copies // 4))
        layers.write(folder / "one", layer)
        torch.set_num_threads(1)
        decoding = copies * decode_s(folder / "one", threads=2, device="cpu", repeat=3)
        out_bytes = copies * ROWS * COLUMNS * BF16
        writing = _write_s(folder / "zeros", out_bytes)
        os.sync()
        began = time.perf_counter()
        done = subprocess.run(
            [str(Path(sys.executable).with_name("ckptd")), "run", str(folder / "source"), "-p", "dequantize",
             "-o", str(folder / "out"), "--no-push", "--json"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        wall = time.perf_counter() - began
        if done.returncode:
            sys.exit(done.stderr)
        outcome = json.loads(done.stdout)
        print(
            f"{name}: {copies * size / 1e9:.1f} GB become {out_bytes / 1e9:.1f} GB in {wall:.1f} s "
            f"({outcome['duration_s']:.1f} s without start-up), peak "
            f"{outcome['peak_bytes'] / 1e6:.0f} MB; decoding alone {decoding:.1f} s, writing alone "
            f"{writing:.1f} s: {outcome['duration_s'] / max(decoding, writing):.2f} x the larger"
        )
    finally:
        shutil.rmtree(folder)


def _write_s(path: Path, nbytes: int) -> float:
    """Return the seconds to write and sync `nbytes`."""
    block = bytes(8 << 20)
    os.sync()
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, nbytes)
        for start in range(0, nbytes, len(block)):
            file.write(block[: nbytes - start])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


def main() -> None:
    """Read the arguments and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(layers.LAYERS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--job")
    parser.add_argument("--gb", type=float, default=3.0)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.job:
        bench_job(given.job, gb=given.gb, parent=given.folder)
        return
    for name in given.only.split(","):
        bench_layer(name, device=given.device, repeat=given.repeat)


if __name__ == "__main__":
    main()
