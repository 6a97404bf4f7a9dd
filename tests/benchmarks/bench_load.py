"""Loading a model against safetensors and transformers; run by hand, prints ratios.

    python tests/benchmarks/bench_load.py --gb 3 [--folder DIR] [--repeat 5] [--device cpu]

The files are in the page cache. Every row is a process of its own; seconds are without imports; of
several runs, in turns, the fastest counts. On the CPU safetensors and transformers map the files:
what they return has read nothing yet, is shared with the page cache, and changes (or kills the
process) when the file does. So there are three questions: how soon a model is there (`returns`),
how soon every weight has been read once (`used`), and the like for like one, how soon the weights
are in memory of their own (`owned`, which ours is when it returns). Peak memory is divided into
what the process owns and what it maps.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ckptd.bench import synthetic

SHARD_BYTES = 1_000_000_000


def load_ours(folder: Path, device: str) -> list[Any]:
    """Load with ckptd."""
    from ckptd.models.native.llama import LlamaForCausalLM

    return list(LlamaForCausalLM.from_pretrained(folder, device=device).parameters())


def load_transformers(folder: Path, device: str) -> list[Any]:
    """Load with transformers, onto a device only where it is not the default."""
    import transformers

    transformers.logging.disable_progress_bar()
    where = {} if device == "cpu" else {"device_map": device}
    return list(transformers.LlamaForCausalLM.from_pretrained(folder, **where).parameters())


def load_safetensors(folder: Path, device: str) -> list[Any]:
    """Load a plain dictionary with safetensors."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    return [tensor for file in files for tensor in load_file(file, device=device).values()]


LOADERS: dict[str, Callable[[Path, str], list[Any]]] = {
    "ckptd": load_ours,
    "safetensors": load_safetensors,
    "transformers": load_transformers,
}
AFTER = ("returns", "used", "owned")


def use(tensors: Iterable[Any]) -> None:
    """Read every byte once, as the first forward does."""
    import torch

    for tensor in tensors:
        flat = tensor.detach().view(-1)
        flat[: len(flat) // 4 * 4].view(torch.int64).sum()


def own(tensors: Iterable[Any]) -> list[Any]:
    """Copy every tensor into memory of its own."""
    return [tensor.detach().clone() for tensor in tensors]


def one_row(loader: str, after: str, folder: Path, device: str) -> None:
    """Do one row in this process and print the result as JSON."""
    import torch

    torch.set_num_threads(2)
    if loader == "transformers":
        import transformers.models.llama.modeling_llama  # noqa: F401
    elif loader == "ckptd":
        import ckptd.models.native.llama  # noqa: F401
    began = time.perf_counter()
    kept = LOADERS[loader](folder, device)
    if after == "used":
        use(kept)
    elif after == "owned" and loader != "ckptd":
        kept = own(kept)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    work_s = time.perf_counter() - began
    print(json.dumps({"work_s": work_s, **_memory_mb()}))


def _memory_mb() -> dict[str, float]:
    fields = ("VmHWM", "RssAnon", "RssFile")
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in fields:
            found[name] = int(value.split()[0]) / 1024
    return found


def measured(loader: str, after: str, folder: Path, device: str) -> dict[str, Any]:
    """Return what one run of a row in a fresh process says, the files being in the cache."""
    _warm(folder)
    command = [sys.executable, __file__, "--row", loader, after, "--device", device]
    done = subprocess.run(
        [*command, "--folder", str(folder)], check=True, capture_output=True, text=True
    )
    value: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return value


def _warm(folder: Path) -> None:
    buffer = bytearray(8 << 20)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def table(folder: Path, device: str, repeat: int) -> None:
    """Measure every row, in turns, and print the best of each against ours."""
    rows = [(loader, after) for after in AFTER for loader in LOADERS]
    results: dict[tuple[str, str], list[dict[str, Any]]] = {row: [] for row in rows}
    for _ in range(repeat):
        for row in rows:
            results[row].append(measured(*row, folder, device))
    print(f"{'':<24}{'seconds':>9}{'x ckptd':>9}{'peak MB':>9}{'own MB':>9}{'mapped MB':>11}")
    for loader, after in rows:
        best = min(results[loader, after], key=lambda v: v["work_s"])
        ours = min(value["work_s"] for value in results["ckptd", after])
        print(
            f"{loader + ', ' + after:<24}{best['work_s']:>9.2f}{best['work_s'] / ours:>9.2f}"
            f"{best['VmHWM']:>9.0f}{best['RssAnon']:>9.0f}{best['RssFile']:>11.0f}"
        )


def make(folder: Path, gb: float) -> None:
    """Write a Llama of about `gb` decimal gigabytes in bfloat16, in shards."""
    specs = synthetic.llama_specs(int(gb * 1e9))
    synthetic.write(folder, specs, sparse=False, shard_bytes=SHARD_BYTES)
    layers = sum("q_proj" in spec.name for spec in specs)
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    os.sync()


def main() -> None:
    """Read the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=3)
    parser.add_argument("--folder", type=Path, default=Path("bench-load"))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--row", nargs=2, metavar=("LOADER", "AFTER"))
    arguments = parser.parse_args()
    if arguments.row:
        one_row(*arguments.row, arguments.folder, arguments.device)
        return
    made = not arguments.folder.exists()
    try:
        if made:
            make(arguments.folder, arguments.gb)
        table(arguments.folder, arguments.device, arguments.repeat)
    finally:
        if made:
            shutil.rmtree(arguments.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
