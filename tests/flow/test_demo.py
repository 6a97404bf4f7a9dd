"""`ckptd demo`, as a new user runs it, and what it published."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ckptd.cli import demo_training
from ckptd.hub.local import server


def test_the_demo_publishes_a_model_that_transformers_runs(tmp_path: Path) -> None:
    """Three checkpoints are published though the trainer keeps one; the last one is the model."""
    command = [sys.executable, "-c", "from ckptd.cli.main import main; main()", "demo", "--json"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    for name in ("HF_ENDPOINT", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "HF_HUB_DISABLE_XET"):
        environment.pop(name, None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [line["git_tag"] for line in result["published"]] == ["step-40", "step-80", "step-120"]
    assert all(line["pull_request"] for line in result["published"])

    with server.running(root=Path(result["root"]) / "hub") as hub:
        folder = snapshot_download(
            "ckptd/tiny-llama",
            revision="step-120",
            local_dir=tmp_path / "published",
            endpoint=hub.url,
            token=hub.token,
        )
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.vocab_size == 320
    tokens = AutoTokenizer.from_pretrained(folder)("def main() -> None:", return_tensors="pt")
    weights = {
        name: value.float()
        for shard in Path(folder).glob("*.safetensors")
        for name, value in load_file(shard).items()
    }
    with torch.no_grad():
        theirs = model(tokens.input_ids).logits
        ours = demo_training.logits(weights, tokens.input_ids, demo_training.SIZES)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
