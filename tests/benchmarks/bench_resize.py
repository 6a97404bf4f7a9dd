"""resize_token_embeddings beside transformers, and what importing the model layer costs.

    python tests/benchmarks/bench_resize.py [--rows 128256] [--width 2048] [--new 64]

Each library resizes the embedding and the untied head of a one-layer Llama in bfloat16, in a process
of its own; peak memory is what the resize added to that process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path


def resize(library: str, rows: int, width: int, new: int) -> dict[str, float]:
    """Return seconds and added peak bytes of one resize."""
    import torch

    if library == "transformers":
        from transformers import LlamaConfig, LlamaForCausalLM
    else:
        from ckptd.models.native.llama import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(2)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=width, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _peak_bytes()
    began = time.perf_counter()
    model.resize_token_embeddings(rows + new)
    return {"seconds": time.perf_counter() - began, "added_bytes": _peak_bytes() - before}


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def import_seconds(code: str) -> float:
    """Return the fastest of three imports, in processes of their own."""
    timed = f"import time; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"
    runs = [subprocess.run([sys.executable, "-c", timed], check=True, capture_output=True, text=True)
            for _ in range(3)]  # fmt: skip
    return min(float(run.stdout) for run in runs)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=128_256)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--library", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.library:
        print(json.dumps(resize(asked.library, asked.rows, asked.width, asked.new)))
        return
    found = {}
    for library in ("ckptd", "transformers"):
        sizes = ["--rows", str(asked.rows), "--width", str(asked.width), "--new", str(asked.new)]
        command = [sys.executable, __file__, "--library", library, *sizes]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[library] = json.loads(done.stdout.splitlines()[-1])
        value = found[library]
        print(
            f"{library:<14}{value['seconds']:>8.2f} s{value['added_bytes'] / 1e6:>10.0f} MB added"
        )
    ratio = found["transformers"]["seconds"] / found["ckptd"]["seconds"]
    print(f"transformers takes {ratio:.1f} times as long")
    plain = import_seconds("import torch")
    ours = import_seconds(
        "import torch; from ckptd.models import AutoModelForCausalLM, PreTrainedModel"
    )
    print(f"import torch {plain:.2f} s, with ckptd.models {ours - plain:+.2f} s")


if __name__ == "__main__":
    main()
