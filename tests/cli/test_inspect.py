"""`ckptd inspect`: what a checkpoint is."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.cli.conftest import Call

QUANTIZED = Path(__file__).parents[1] / "data" / "quant" / "awq_gemm"


def test_text(ckptd: Call, checkpoint: Path) -> None:
    """The text says layout and why, step, weights, ties and what is left out."""
    result = ckptd("inspect", checkpoint)
    assert result.code == 0, result
    for text in (
        "(trainer_state.json is there)",
        "4 tensors",
        "lm_head.weight = model.embed_tokens.weight: not in the file; config says tied",
        "strange.xyz",
    ):
        assert text in result.out
    assert "q_proj" not in result.out.partition("travels")[2]


def test_tensors(ckptd: Call, checkpoint: Path) -> None:
    """--tensors lists every tensor with dtype, shape and file."""
    out = ckptd("inspect", checkpoint, "--tensors").out
    line = next(line for line in out.splitlines() if line.startswith("model.norm.weight"))
    assert line.split() == ["model.norm.weight", "F32", "16", "64", "model.safetensors"]


def test_json(ckptd: Call, checkpoint: Path) -> None:
    """The JSON value has everything, tensors included."""
    value = ckptd("inspect", checkpoint, "--json").value
    assert value["num_tensors"] == len(value["tensors"]) == 4
    assert value["tensor_bytes"] == sum(tensor["nbytes"] for tensor in value["tensors"])
    assert value["footprint"]["parameter_bytes"] == value["tensor_bytes"]
    assert value["step"] == 20
    assert value["quantization"] is None


def test_what_is_no_transformers_model(ckptd: Call, tmp_path: Path) -> None:
    """A flat file is called what it is; its layout has a reason, and no config is promised."""
    path = tmp_path / "cats-step00000500.safetensors"
    save_file({"lora_unet.lora_up.weight": torch.ones(2, 2)}, path, metadata={"ss_steps": "9"})
    result = ckptd("inspect", path)
    assert result.code == 0, result
    assert "flat: a file that is a checkpoint by itself (cats-step00000500" in result.out
    assert "config.json" not in result.out.partition("travels")[2]
    value = ckptd("inspect", path, "--json").value
    assert (value["layout"], value["parts"], value["step"]) == ("flat", [path.stem], 500)


def test_quantization(ckptd: Call) -> None:
    """Format, bits and groups are named, and what `dequantize` would make."""
    value = ckptd("inspect", QUANTIZED, "--json").value["quantization"]
    assert (value["method"], value["format"], value["problem"]) == ("awq", "AWQ", None)
    assert sum(value["schemes"].values()) == value["dequantized"]
    assert value["bytes_after"] > value["bytes_before"]
    text = ckptd("inspect", QUANTIZED).out
    assert "4-bit awq, groups of" in text
    assert "`dequantize` makes float16" in text


def test_quantization_that_is_not_decoded(ckptd: Call, checkpoint: Path) -> None:
    """A method that is not decoded is told with its name; the rest of the checkpoint, too."""
    path = checkpoint / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "aqlm"}}
    path.write_text(json.dumps(config))
    result = ckptd("inspect", checkpoint, "--json")
    assert result.code == 0
    assert result.value["quantization"]["method"] == "aqlm"
    assert "not decoded" in result.value["quantization"]["problem"]


def test_half_written(ckptd: Call, checkpoint: Path) -> None:
    """A checkpoint that is still being written is described, with the verdict to wait and why."""
    (checkpoint / "trainer_state.json").unlink()
    (checkpoint / "model.safetensors.tmp").write_text("")
    value = ckptd("inspect", checkpoint, "--json").value
    assert value["verdict"] == "waiting"
    assert "model.safetensors.tmp" in value["verdict_reason"]


def test_broken(ckptd: Call, checkpoint: Path) -> None:
    """A broken checkpoint is told with what is known of it, and exits with 4."""
    (checkpoint / "model.safetensors").write_bytes(b"\x00" * 7)
    text = ckptd("inspect", checkpoint)
    assert text.code == 4
    assert "hf-trainer" in text.out
    assert "model.safetensors" in text.err
    value = ckptd("inspect", checkpoint, "--json")
    assert value.code == 4
    assert value.value["error"]["code"] == "CheckpointCorrupt"
    assert value.value["layout"] == "hf-trainer"


def test_empty_folder(ckptd: Call, tmp_path: Path) -> None:
    """An empty folder is refused."""
    (tmp_path / "empty").mkdir()
    assert ckptd("inspect", tmp_path / "empty").code == 4
