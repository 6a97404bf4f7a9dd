"""Layouts that are no folder with a model in it, seen by a daemon and published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import HfApi, snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, equal, manual_seed, randn

from ckptd.jobs.job import State
from ckptd.jobs.store import Sighting, Verdict
from tests.flow.conftest import Deployment, write_checkpoint

STAGES = "  - cast: {dtype: bfloat16}\n"


def _define(node: Deployment, glob: str) -> None:
    path = node.define(stages=STAGES, tag="null")
    path.write_text(path.read_text().replace("*/checkpoint-*", glob))


def _files(node: Deployment) -> set[str]:
    api = HfApi(endpoint=node.hub.url, token=node.hub.token)
    return set(api.list_repo_files("ckptd/run"))


def _download(node: Deployment, target: Path) -> Path:
    return Path(
        snapshot_download(
            "ckptd/run", local_dir=target, endpoint=node.hub.url, token=node.hub.token
        )
    )


def _lora(path: Path, seed: int) -> dict[str, Tensor]:
    manual_seed(seed)
    weights = {"lora_unet.lora_up.weight": randn(8, 4), "lora_unet.lora_down.weight": randn(4, 8)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path, metadata={"ss_steps": str(seed * 100)})
    return weights


def test_each_flat_file_of_a_run_is_a_checkpoint(node: Deployment, tmp_path: Path) -> None:
    """Epochs of kohya in one folder: a commit each, under their names; earlier ones stay."""
    _define(node, "*/*.safetensors")
    node.start()
    made = {}
    for epoch in (1, 2):
        name = f"cats-{epoch:06d}.safetensors"
        made[name] = _lora(node.runs / "run" / name, epoch)
        jobs = node.wait_for_ended(epoch)
    assert [job.state for job in jobs] == [State.PUBLISHED] * 2
    assert [job.spec.step for job in jobs] == [100, 200]
    assert [job.spec.layout for job in jobs] == ["flat"] * 2
    assert made.keys() <= _files(node)
    folder = _download(node, tmp_path / "download")
    for name, weights in made.items():
        found = load_file(folder / name)
        assert all(equal(found[n], tensor.bfloat16()) for n, tensor in weights.items())
        with safe_open(folder / name, "pt") as file:
            assert file.metadata()["ss_steps"] in {"100", "200"}
    assert "library_name: diffusers" in (folder / "README.md").read_text()
    assert node.stop() == 0
    node.wait_for(node.clean)


@pytest.mark.parametrize("kind", ["pipeline", "accelerate"])
def test_components_of_diffusers_are_published_as_a_tree(
    kind: str, node: Deployment, tmp_path: Path
) -> None:
    """unet and vae in their folders, their configs beside them; no config.json is made up."""
    _define(node, "*/checkpoint-*")
    node.start()
    path = node.runs / "run" / "checkpoint-7"
    made = {}
    for number, name in enumerate(("unet", "vae")):
        manual_seed(number)
        made[name] = {"conv_in.weight": randn(4, 3, 3, 3)}
        (path / name).mkdir(parents=True)
        (path / name / "config.json").write_text(json.dumps({"_class_name": name}))
        save_file(made[name], path / name / "diffusion_pytorch_model.safetensors")
    if kind == "pipeline":
        (path / "model_index.json").write_text('{"_class_name": "SomePipeline"}')
    (job,) = node.wait_for_ended(1)
    assert (job.state, job.spec.layout) == (State.PUBLISHED, "diffusers")
    folder = _download(node, tmp_path / "download")
    for name, weights in made.items():
        found = load_file(folder / name / "diffusion_pytorch_model.safetensors")
        assert equal(found["conv_in.weight"], weights["conv_in.weight"].bfloat16())
        assert (folder / name / "config.json").read_bytes() == (
            path / name / "config.json"
        ).read_bytes()
    assert not (folder / "config.json").exists()
    assert (folder / "model_index.json").exists() is (kind == "pipeline")
    assert node.stop() == 0


def _said(node: Deployment) -> dict[str, Sighting]:
    return {Path(found.source_path).name: found for found in node.sightings()}


def test_what_the_last_checkpoint_had_is_known_after_a_restart(node: Deployment) -> None:
    """The next one of the run lacks the tokenizer: it waits and names it, and goes on when it comes."""
    node.define()
    node.start()
    run = node.runs / "run"
    write_checkpoint(run / "checkpoint-10", 10)
    node.wait_for_ended(1)
    assert node.stop() == 0
    write_checkpoint(run / "checkpoint-20", 20)
    (run / "checkpoint-20" / "tokenizer.json").unlink()
    node.start()
    seen = node.wait_for(lambda: _said(node).get("checkpoint-20"))
    assert seen.verdict is Verdict.INCOMPLETE
    assert "tokenizer.json, which checkpoint-10 had, not there" in (seen.reason or "")
    (run / "checkpoint-20" / "tokenizer.json").write_text("{}")
    _, second = node.wait_for_ended(2)
    assert second.state is State.PUBLISHED


def test_what_was_refused_is_judged_again_after_a_chmod(node: Deployment) -> None:
    """Nothing else of it has changed, and no folder has: the event and the mode tell."""
    node.define()
    node.start()
    folder = node.runs / "run" / "checkpoint-10"
    write_checkpoint(folder, 10)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])

    def refused() -> Sighting | None:
        seen = _said(node).get("checkpoint-10")
        return seen if seen is not None and seen.verdict is Verdict.REFUSED else None

    first = node.wait_for(refused)
    weights.chmod(0o640)
    node.wait_for(lambda: (again := refused()) is not None and again.at > first.at)
    assert not node.jobs()
