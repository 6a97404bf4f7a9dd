"""Make the checkpoints of MXFP4 in tests/data/quant from a larger real one.

Run by hand with transformers 5.24, naming a gpt-oss checkpoint with MXFP4 experts:

    python tests/tools/quant_mxfp4.py path/to/mxfp4_gptoss tests/data/quant

The tests' own was quantized with torchao 0.18 and laid out as openai/gpt-oss. Two experts are kept,
with fewer rows and groups: the kept bytes are those of the real one. The reference is what
transformers' own function makes of them. `mxfp4_original` has the same in OpenAI's layout, with
what their own loader gives: the same values, not transposed.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

KEPT = {"gate_up_proj": (2, 128, 3), "down_proj": (2, 96, 2)}
"""Experts, rows of codes and groups of each kind of weight."""


def main() -> None:
    """Write both folders under the second folder named."""
    source, root = Path(sys.argv[1]), Path(sys.argv[2])
    whole = load_file(source / "model.safetensors")
    tensors: dict[str, torch.Tensor] = {"model.norm.weight": whole["model.norm.weight"][:96]}
    original: dict[str, torch.Tensor] = {"norm.scale": whole["model.norm.weight"][:96]}
    values, plain = {}, {}
    for place, (name, (experts, rows, groups)) in enumerate(KEPT.items(), start=1):
        prefix, former = f"model.layers.0.mlp.experts.{name}", f"block.0.mlp.mlp{place}"
        blocks = whole[f"{prefix}_blocks"][:experts, :rows, :groups].contiguous()
        scales = whole[f"{prefix}_scales"][:experts, :rows, :groups].contiguous()
        bias = whole[f"{prefix}_bias"][:experts, :rows].contiguous()
        value = convert_moe_packed_tensors(blocks, scales)
        tensors |= {f"{prefix}_blocks": blocks, f"{prefix}_scales": scales, f"{prefix}_bias": bias}
        original |= {f"{former}_weight.blocks": blocks, f"{former}_weight.scales": scales}
        original[f"{former}_bias"] = bias
        values[prefix] = value
        plain[f"{former}_weight"] = value.transpose(1, 2).contiguous()
    config = json.loads((source / "config.json").read_text())
    config |= {"hidden_size": 96, "intermediate_size": 64, "num_local_experts": 2}
    write(root / "mxfp4_gptoss", config, tensors, values)
    write(root / "mxfp4_original", {"num_hidden_layers": 1, "num_experts": 2}, original, plain)


def write(
    folder: Path,
    config: dict[str, object],
    tensors: dict[str, torch.Tensor],
    values: dict[str, torch.Tensor],
) -> None:
    """Write a checkpoint and its reference into `folder`, which is emptied before."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(values, folder / "reference.safetensors")


if __name__ == "__main__":
    main()
