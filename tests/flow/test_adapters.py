"""Adapters from outside: a trainer saves one, the merged model stands on the Hub."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from huggingface_hub import HfApi, snapshot_download
from ruamel.yaml import YAML
from safetensors.numpy import load_file, save_file

from ckptd.jobs.job import State
from tests.flow.conftest import Deployment, write_checkpoint

TARGET = "model.layers.0.mlp.up_proj.weight"


BASE_CARD = """---
license: other
license_name: ours
license_link: LICENSE
pipeline_tag: text-generation
tags: [base-only]
---
# The base
"""
ADAPTER_CARD = """---
base_model: /data/models/base
library_name: peft
tags: [lora, 'base_model:adapter:/data/models/base']
---
# Model Card

A fine-tuned version of [None](https://huggingface.co/None).
generator = pipeline("text-generation", model="None", device="cuda")
"""


def _base(node: Deployment, tmp_path: Path) -> tuple[dict[str, np.ndarray], str]:
    """Put a base model on the Hub; return its tensors and its commit."""
    tensors = write_checkpoint(tmp_path / "base", 1)
    (tmp_path / "base" / "README.md").write_text(BASE_CARD)
    api = HfApi(endpoint=node.hub.url, token=node.hub.token)
    api.create_repo("ckptd/base", private=True)
    made = api.upload_folder(
        repo_id="ckptd/base", folder_path=tmp_path / "base", ignore_patterns=["*.pt", "trainer*"]
    )
    return tensors, made.oid


def _write_adapter(folder: Path, target: str, tensor: np.ndarray, step: int) -> np.ndarray:
    """Save an adapter as a Trainer does, its configuration after its weights; return its change."""
    generator = np.random.default_rng(step)
    down = generator.standard_normal((2, tensor.shape[1]), dtype=np.float32)
    up = generator.standard_normal((tensor.shape[0], 2), dtype=np.float32)
    name = f"base_model.model.{target.removesuffix('.weight')}"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up},
        folder / "adapter_model.safetensors",
    )
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "ckptd/base"}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    (folder / "tokenizer.json").write_text('{"trained": true}')
    (folder / "optimizer.pt").write_bytes(b"pickled")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return np.asarray(2 * up @ down)


def _metadata(folder: Path) -> dict[str, object]:
    front = (folder / "README.md").read_text().split("---\n")[1]
    found = YAML(typ="safe", pure=True).load(front)
    assert isinstance(found, dict)
    return found


def _published(node: Deployment, revision: str, target: Path) -> Path:
    path = snapshot_download(
        "ckptd/run",
        revision=revision,
        local_dir=target,
        endpoint=node.hub.url,
        token=node.hub.token,
    )
    return Path(path)


def test_a_base_on_the_hub(node: Deployment, tmp_path: Path) -> None:
    """The base is fetched once, at the commit that the job names; the result is a whole model."""
    tensors, commit = _base(node, tmp_path)
    target = next(name for name in tensors if "layers" in name)
    node.define(stages="  - merge\n")
    node.start()
    change = _write_adapter(node.runs / "run" / "checkpoint-10", target, tensors[target], 10)
    (job,) = node.wait_for_ended(1)

    assert job.state is State.PUBLISHED, job.reason
    assert job.spec.base_place == f"ckptd/base@{commit}"
    folder = _published(node, "step-10", tmp_path / "download")
    found = load_file(folder / "model.safetensors")
    assert np.allclose(found[target], tensors[target] + change, atol=1e-5)
    others = [name for name in found if name != target]
    assert all(np.array_equal(found[name], tensors[name]) for name in others)
    assert json.loads((folder / "tokenizer.json").read_text()) == {"trained": True}
    assert not (folder / "adapter_config.json").exists()
    provenance = json.loads((folder / "ckptd.json").read_text())
    assert provenance["source"]["base"] == {"name": f"ckptd/base@{commit}", "digest": commit}
    assert provenance["source"]["digest"] == job.spec.content_digest
    assert _metadata(folder) == {
        "library_name": "transformers",
        "base_model": "ckptd/base",
        "base_model_relation": "finetune",
        "license": "other",
        "license_name": "ours",
        "license_link": "https://huggingface.co/ckptd/base/blob/main/LICENSE",
        "pipeline_tag": "text-generation",
        "tags": ["ckptd"],
    }
    assert node.stop() == 0


def test_another_base_is_another_job(node: Deployment, tmp_path: Path) -> None:
    """The same adapter is published again once its base's branch has moved, and only then."""
    tensors, _ = _base(node, tmp_path)
    target = next(name for name in tensors if "layers" in name)
    node.define(stages="  - merge\n", tag="null")
    node.start()
    adapter = node.runs / "run" / "checkpoint-10"
    change = _write_adapter(adapter, target, tensors[target], 10)
    node.wait_for_ended(1)
    moved = {name: value + 1 for name, value in tensors.items()}
    save_file(moved, tmp_path / "base" / "model.safetensors")
    api = HfApi(endpoint=node.hub.url, token=node.hub.token)
    api.upload_file(
        repo_id="ckptd/base",
        path_or_fileobj=tmp_path / "base" / "model.safetensors",
        path_in_repo="model.safetensors",
    )
    weights = adapter / "adapter_model.safetensors"
    times = weights.stat()
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns - 1))
    jobs = node.wait_for_ended(2)

    assert [job.state for job in jobs] == [State.PUBLISHED] * 2
    assert len({job.spec.content_digest for job in jobs}) == 2
    found = load_file(_published(node, "main", tmp_path / "download") / "model.safetensors")
    assert np.allclose(found[target], moved[target] + change, atol=1e-5)


def test_an_adapter_is_published_as_it_is(node: Deployment, tmp_path: Path) -> None:
    """Without a merge: the adapter's own files and card, completed by what its base's card says."""
    _base(node, tmp_path)
    node.define(stages="  - reshard\n", push="  revision: '{model_type}'\n")
    node.start()
    folder = node.runs / "run" / "checkpoint-10"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(ADAPTER_CARD)
    _write_adapter(folder, TARGET, np.zeros((6, 4)), 10)
    (job,) = node.wait_for_ended(1)
    assert job.state is State.PUBLISHED, job.reason
    names = {path.name for path in _published(node, "llama", tmp_path / "download").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= names
    assert not names & {"config.json", "model.safetensors", "optimizer.pt", "trainer_state.json"}
    assert _metadata(tmp_path / "download") == {
        "base_model": "ckptd/base",
        "library_name": "peft",
        "tags": ["lora", "base_model:adapter:ckptd/base", "ckptd"],
        "base_model_relation": "adapter",
        "license": "other",
        "license_name": "ours",
        "license_link": "https://huggingface.co/ckptd/base/blob/main/LICENSE",
        "pipeline_tag": "text-generation",
    }
    text = (tmp_path / "download" / "README.md").read_text()
    assert "of [ckptd/base](https://huggingface.co/ckptd/base)." in text
    assert 'model="ckptd/run"' in text
