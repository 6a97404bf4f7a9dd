"""Adapters from outside: a trainer saves one, the merged model stands on the Hub."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from huggingface_hub import HfApi, snapshot_download
from safetensors.numpy import load_file, save_file

from ckptd.jobs.job import State
from tests.flow.conftest import Deployment, write_checkpoint

TARGET = "model.layers.0.mlp.up_proj.weight"


def _base(node: Deployment, tmp_path: Path) -> tuple[dict[str, np.ndarray], str]:
    """Put a base model on the Hub; return its tensors and its commit."""
    tensors = write_checkpoint(tmp_path / "base", 1)
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
    folder.mkdir(parents=True)
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
    os.utime(adapter / "adapter_model.safetensors")
    os.utime(adapter / "trainer_state.json")
    jobs = node.wait_for_ended(2)

    assert [job.state for job in jobs] == [State.PUBLISHED] * 2
    assert len({job.spec.content_digest for job in jobs}) == 2
    found = load_file(_published(node, "main", tmp_path / "download") / "model.safetensors")
    assert np.allclose(found[target], moved[target] + change, atol=1e-5)


def test_an_adapter_is_published_as_it_is(node: Deployment, tmp_path: Path) -> None:
    """Without a merge: the adapter's own files, and no config.json is asked for."""
    node.define(stages="  - reshard\n")
    node.start()
    _write_adapter(node.runs / "run" / "checkpoint-10", TARGET, np.zeros((6, 4)), 10)
    (job,) = node.wait_for_ended(1)
    assert job.state is State.PUBLISHED, job.reason
    names = {path.name for path in _published(node, "main", tmp_path / "download").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= names
    assert not names & {"config.json", "model.safetensors", "optimizer.pt", "trainer_state.json"}
    card = (tmp_path / "download" / "README.md").read_text()
    assert "library_name: peft" in card
