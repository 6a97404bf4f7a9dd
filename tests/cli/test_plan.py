"""`ckptd plan`: what would be done, from headers alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptd.checkpoint import content
from tests.cli.conftest import Call


def test_text(ckptd: Call, checkpoint: Path, definition: Path) -> None:
    """The text names stages, bytes, target, tag and every shard."""
    result = ckptd("plan", checkpoint, "-p", definition)
    assert result.code == 0, result
    for text in ("tie", "footprint", "acme/demo@main", "step-20", "nothing, no torch"):
        assert text in result.out
    assert "model-00002-of-00002.safetensors" in result.out


def test_json(ckptd: Call, checkpoint: Path, definition: Path) -> None:
    """The JSON value adds up: what is copied and computed is what the tensors take."""
    value = ckptd("plan", checkpoint, "-p", definition, "--json").value
    assert value["copied_bytes"] + value["computed_bytes"] == value["source_bytes"]
    assert sum(shard["nbytes"] for shard in value["shards"]) == value["output_bytes"]
    assert value["push"]["target"] == "acme/demo@main"
    assert [stage["stage"] for stage in value["stages"]] == ["tie", "footprint", "reshard"]


def test_run_plans_the_same(ckptd: Call, checkpoint: Path, definition: Path) -> None:
    """What is planned is what is done: shards and bytes, and peak memory is not exceeded."""
    planned = ckptd("plan", checkpoint, "-p", definition, "--json").value
    ckptd("run", checkpoint, "-p", definition, "--no-push", "-o", "out")
    made = {path.name: path.stat().st_size for path in Path("out").glob("*.safetensors")}
    assert made == {shard["name"]: shard["nbytes"] for shard in planned["shards"]}


def test_digest_stays_open(ckptd: Call, checkpoint: Path, definition: Path) -> None:
    """A {digest} is shown as such, for knowing it means reading every byte."""
    text = definition.read_text().replace("step-{step}", "d-{digest}")
    definition.write_text(text.replace("acme/{run}", "acme/{run}-{digest}"))
    push = ckptd("plan", checkpoint, "-p", definition, "--json").value["push"]
    assert push["git_tag"] == "d-{digest}"
    assert push["repo_id"] == "acme/demo-{digest}"


def test_no_tensor_byte_is_read(
    ckptd: Call, checkpoint: Path, definition: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planning neither compares nor hashes contents."""

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("tensor bytes were read")

    monkeypatch.setattr(content, "read_into", refuse)
    assert ckptd("plan", checkpoint, "-p", definition).code == 0


def test_missing_placeholder(ckptd: Call, checkpoint: Path, definition: Path) -> None:
    """A placeholder without a value is found by plan, before any byte is read."""
    (checkpoint / "trainer_state.json").unlink()
    folder = checkpoint.rename(checkpoint.with_name("final"))
    result = ckptd("plan", folder, "-p", definition)
    assert result.code == 4
    assert "step" in result.err


def test_shipped_name(ckptd: Call, checkpoint: Path) -> None:
    """-p takes the name of a definition that ships."""
    assert ckptd("plan", checkpoint, "-p", "reshard", "--json").value["pipeline"] == "reshard"


def test_undecided_ties_are_named(ckptd: Call, checkpoint: Path, definition: Path) -> None:
    """Two tensors that `tie` will compare are named, since that may change the plan."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    weights = checkpoint / "model.safetensors"
    arrays = load_file(weights)
    arrays["lm_head.weight"] = np.copy(arrays["model.embed_tokens.weight"])
    save_file(arrays, weights, metadata={"format": "pt"})
    value = ckptd("plan", checkpoint, "-p", definition, "--json").value
    assert value["undecided"] == ["model.embed_tokens.weight = lm_head.weight?"]


def test_dequantize_shows_sizes_before_and_after(ckptd: Call) -> None:
    """A quantized checkpoint's plan names format, dtype and both sizes; footprint has the new one."""
    path = Path(__file__).parents[1] / "data" / "quant" / "awq_gemm"
    value = ckptd("plan", path, "-p", "dequantize", "--json").value
    report = value["stages"][0]["facts"]
    footprint = next(stage for stage in value["stages"] if stage["stage"] == "footprint")["facts"]
    assert report["format"] == "AWQ"
    assert report["bytes_before"] == value["source_bytes"] < report["bytes_after"]
    assert footprint["parameter_bytes"] == report["bytes_after"]
    assert "become" in ckptd("plan", path, "-p", "dequantize").out
