"""Stage `dequantize` from end to end: the library's own values, and nothing quantized left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptd import errors
from tests.pipeline.stages.conftest import config_of, planned, run, weights_of

CASES_PATH = Path(__file__).parents[2] / "data" / "quant"
CASES = sorted(path.name for path in CASES_PATH.iterdir() if (path / "config.json").is_file())
QUANTIZATION = ("quantization_config", "compression_config", "quantization")


def _split(folder: Path, out: Path) -> Path:
    """Write the folder's tensors alternately into two shards, so that partners are apart."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = load_file(folder / "model.safetensors")
    weight_map = {}
    for number in (0, 1):
        name = f"model-0000{number + 1}-of-00002.safetensors"
        part = dict(list(tensors.items())[number::2])
        save_file(part, out / name, metadata=_metadata(folder))
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return out


def _metadata(folder: Path) -> dict[str, str]:
    from ckptd.checkpoint import header

    return dict(header.read(folder / "model.safetensors").metadata)


def _fp8(folder: Path, **config: Any) -> dict[str, torch.Tensor]:
    """Write an FP8 checkpoint of two linear layers and a norm; return its tensors."""
    torch.manual_seed(1)
    tensors: dict[str, torch.Tensor] = {"model.norm.weight": torch.randn(70).bfloat16()}
    for name in ("model.a", "model.b"):
        tensors[f"{name}.weight"] = torch.randn(200, 70).to(torch.float8_e4m3fn)
        tensors[f"{name}.weight_scale_inv"] = torch.rand(2, 1) + 0.5
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    value = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    (folder / "config.json").write_text(json.dumps(value | config))
    return tensors


def _plain(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    scale = tensors[f"{name}.weight_scale_inv"].repeat_interleave(128, 0)[:200]
    return tensors[f"{name}.weight"].float() * scale


@pytest.mark.parametrize("apart", [False, True], ids=["one file", "partners in two files"])
@pytest.mark.parametrize("case", CASES)
def test_the_librarys_values_bit_for_bit(case: str, apart: bool, tmp_path: Path) -> None:
    """`arith: library` gives the real library's tensors; plain ones stay; the config is plain."""
    source = CASES_PATH / case
    if not (source / "model.safetensors").is_file():
        pytest.skip("several files already, or another container")
    expected = load_file(source / "reference.safetensors")
    before = load_file(source / "model.safetensors")
    clean = tmp_path / "clean"
    shutil.copytree(source, clean, ignore=shutil.ignore_patterns("reference.*"))
    folder = _split(clean, tmp_path / "apart") if apart else clean
    outcome = run(folder, "- dequantize: {arith: library}", tmp_path / "out")
    found = weights_of(tmp_path / "out")
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)), name
    for name in found.keys() & before.keys() - expected.keys():
        assert torch.equal(found[name].view(torch.uint8), before[name].view(torch.uint8)), name
    assert not set(QUANTIZATION) & config_of(tmp_path / "out").keys()
    assert outcome.reports["dequantize"]["dequantized"] == len(expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_float32_arithmetic_rounds_once(dtype: str, tmp_path: Path) -> None:
    """The default computes in float32 and rounds once to the dtype that is asked for."""
    tensors = _fp8(tmp_path / "source")
    run(tmp_path / "source", f"- dequantize: {{dtype: {dtype}}}", tmp_path / "out")
    found = weights_of(tmp_path / "out")
    wanted = getattr(torch, dtype)
    for name in ("model.a", "model.b"):
        assert torch.equal(found[f"{name}.weight"], _plain(tensors, name).to(wanted))
    assert found.keys() == {"model.norm.weight", "model.a.weight", "model.b.weight"}
    assert torch.equal(found["model.norm.weight"], tensors["model.norm.weight"])


@pytest.mark.parametrize("shape", [(3, 16, 24), (3, 0, 24), (3, 16, 0), (0, 16, 24), (1, 16, 24)])
def test_experts_with_one_scale_for_all(shape: tuple[int, ...], tmp_path: Path) -> None:
    """ModelOpt's FP8 of Llama 4 and gpt-oss: a stack of experts in one tensor, and one scale."""
    tensors = _fp8(tmp_path / "source")
    codes, scale = torch.randn(shape).to(torch.float8_e4m3fn), torch.tensor(0.75)
    name = "model.layers.0.mlp.experts.down_proj"
    plain = {key: value for key, value in tensors.items() if "norm" in key}
    made = {name: codes, f"{name}_weight_scale": scale, f"{name}_input_scale": torch.ones(())}
    save_file(plain | made, tmp_path / "source/model.safetensors")
    config = config_of(tmp_path / "source")
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8"}
    (tmp_path / "source/config.json").write_text(json.dumps(config))
    run(tmp_path / "source", "- dequantize", tmp_path / "out")
    found = weights_of(tmp_path / "out")
    assert torch.equal(found[name], (codes.float() * scale).bfloat16())
    assert found.keys() == {name, *plain}


def test_the_dtype_is_the_one_the_config_computes_in(tmp_path: Path) -> None:
    """Without `dtype`, config.json's counts, nested or under its former name."""
    _fp8(tmp_path / "source", dtype=None, text_config={"torch_dtype": "float16", "a": 1})
    run(tmp_path / "source", "- dequantize", tmp_path / "out")
    assert weights_of(tmp_path / "out")["model.a.weight"].dtype is torch.float16
    config = config_of(tmp_path / "out")
    assert config["text_config"] == {"torch_dtype": "float16", "a": 1}


def test_nothing_else_of_the_config_changes(tmp_path: Path) -> None:
    """Quantization goes at every depth, the dtype is set where it stood, all else stays."""
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    text = {"hidden_size": 3, "dtype": "float16", "quantization_config": quantization}
    _fp8(tmp_path / "source", text_config=text, rope={"a": [1, {"b": None}]})
    before = config_of(tmp_path / "source")
    run(tmp_path / "source", "- dequantize: {dtype: float32}", tmp_path / "out")
    del before["quantization_config"]
    before |= {"dtype": "float32", "text_config": {"hidden_size": 3, "dtype": "float32"}}
    assert config_of(tmp_path / "out") == before


def test_side_files_about_quantization_stay_behind(tmp_path: Path) -> None:
    """What describes the quantization does not travel with plain weights; the rest does."""
    _fp8(tmp_path / "source")
    for name in ("quantize_config.json", "hf_quant_config.json", "generation_config.json"):
        (tmp_path / "source" / name).write_text("{}")
    run(tmp_path / "source", "- dequantize", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.json")} == {
        "config.json", "generation_config.json", "ckptd.json",
    }  # fmt: skip


def test_weights_that_are_kept_stay_quantized(tmp_path: Path) -> None:
    """Kept weights keep bytes and scales; the config lists the others as plain."""
    tensors = _fp8(tmp_path / "source")
    run(tmp_path / "source", "- dequantize: {keep: ['*.b.*']}", tmp_path / "out")
    found = weights_of(tmp_path / "out")
    assert torch.equal(found["model.a.weight"], _plain(tensors, "model.a").bfloat16())
    for name in ("model.b.weight", "model.b.weight_scale_inv"):
        assert torch.equal(found[name].view(torch.uint8), tensors[name].view(torch.uint8))
    config = config_of(tmp_path / "out")["quantization_config"]
    assert config["modules_to_not_convert"] == ["model.a", "lm_head"]


@pytest.mark.parametrize("listed", [None, [], ["model.c"]])
def test_what_loaders_take_for_plain_is_listed(listed: list[str] | None, tmp_path: Path) -> None:
    """Where no list says so, heads are plain: the list that is made names them, in a file or not."""
    tensors = _fp8(tmp_path / "source", tie_word_embeddings=True)
    plain = {name: torch.ones(8, 70) for name in ("model.embed_tokens.weight", "model.c.weight")}
    save_file(tensors | plain, tmp_path / "source/model.safetensors")
    config = config_of(tmp_path / "source")
    config["quantization_config"]["modules_to_not_convert"] = listed
    (tmp_path / "source/config.json").write_text(json.dumps(config))
    run(tmp_path / "source", "- dequantize: {keep: ['*.b.*']}", tmp_path / "out")
    found = config_of(tmp_path / "out")["quantization_config"]["modules_to_not_convert"]
    everything = {"model.embed_tokens", "lm_head", "model.a", "model.c"}
    assert set(found) == (everything if listed is None else {*listed, "model.a"})


def test_what_describes_the_whole_does_not_stay_beside_a_half(tmp_path: Path) -> None:
    """Files that repeat the quantization config would contradict the one that was changed."""
    _fp8(tmp_path / "source")
    (tmp_path / "source/hf_quant_config.json").write_text("{}")
    run(tmp_path / "source", "- dequantize: {keep: ['*.b.*']}", tmp_path / "out")
    assert not (tmp_path / "out/hf_quant_config.json").exists()


@pytest.mark.parametrize("case", ["torchao_integers", "quanto_text", "fp8"])
def test_halves_that_no_loader_would_understand_are_refused(case: str, tmp_path: Path) -> None:
    """Where metadata or nothing at all says what is quantized, no list of plain modules helps."""
    source = CASES_PATH / case
    if case == "fp8":
        source = tmp_path / "source"
        _fp8(source, quantization_config=None)
        names = ["model.b.weight"]
    else:
        names = list(load_file(source / "reference.safetensors"))
    with pytest.raises(errors.StageRefused, match="whole or not at all"):
        planned(source, f"- dequantize: {{keep: ['{names[0]}']}}")


@pytest.mark.parametrize("option", ["only", "keep"])
def test_a_pattern_that_matches_nothing_is_refused(option: str, tmp_path: Path) -> None:
    """A misspelt pattern never quietly changes what is dequantized."""
    _fp8(tmp_path / "source")
    with pytest.raises(errors.StageRefused, match=f"{option} pattern"):
        planned(tmp_path / "source", f"- dequantize: {{{option}: ['*.c.*']}}")


def test_a_plain_checkpoint_stays_as_it_is(family: Callable[[str], Any], tmp_path: Path) -> None:
    """Where nothing is quantized, every byte stays, and the report says so."""
    saved = family("llama")
    outcome = run(saved.path, "- dequantize", tmp_path / "out")
    assert outcome.reports["dequantize"]["summary"] == "nothing is quantized"
    assert config_of(tmp_path / "out") == saved.config
    found = weights_of(tmp_path / "out")
    assert all(torch.equal(found[name], value) for name, value in saved.weights.items())


@pytest.mark.parametrize("method", ["aqlm", "vptq", "made-up", 7, None])
def test_a_method_that_is_not_decoded_is_refused(method: Any, tmp_path: Path) -> None:
    """Before a byte is read, with the method and those that are decoded."""
    _fp8(tmp_path / "source", quantization_config={"quant_method": method, "x": 1})
    if method is None:  # the tensors tell
        assert planned(tmp_path / "source", "- dequantize").computed_bytes
        return
    with pytest.raises(errors.CheckpointUnsupported) as caught:
        planned(tmp_path / "source", "- dequantize")
    assert str(method) in str(caught.value)
    assert "bitsandbytes" in str(caught.value)


def test_a_quantized_tensor_without_scale_is_refused_by_name(tmp_path: Path) -> None:
    """FP8 codes that nobody scales would be garbage in the output."""
    tensors = _fp8(tmp_path / "source")
    del tensors["model.b.weight_scale_inv"]
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(errors.CheckpointRefused, match=r"model\.b\.weight"):
        planned(tmp_path / "source", "- dequantize")


def test_a_plain_twin_is_refused(tmp_path: Path) -> None:
    """A weight that stands in the file both plain and quantized is a leftover of an earlier save."""
    tensors = _fp8(tmp_path / "source")
    tensors["model.a.qweight"] = torch.zeros(9, 200, dtype=torch.int32)
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(errors.CheckpointRefused, match=r"model\.a"):
        planned(tmp_path / "source", "- dequantize")


def test_the_other_stages_follow(tmp_path: Path) -> None:
    """A quantized embedding is dequantized, then grown, cast and divided into files."""
    torch.manual_seed(2)
    tensors = {
        "model.embed_tokens.weight": torch.randn(99, 64).to(torch.float8_e4m3fn),
        "model.embed_tokens.weight_scale_inv": torch.rand(1, 1) + 0.5,
        "model.norm.weight": torch.randn(64).bfloat16(),
        "lm_head.weight": torch.randn(99, 64).bfloat16(),
    }
    (tmp_path / "source").mkdir()
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16",
        "vocab_size": 99, "hidden_size": 64, "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }  # fmt: skip
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    stages = "- dequantize\n- resize: {pad_to_multiple_of: 64}\n- cast: {dtype: float32}\n- footprint\n- reshard: {max_shard_size: 20KB}"
    outcome = run(tmp_path / "source", stages, tmp_path / "out")
    found = weights_of(tmp_path / "out")
    name = "model.embed_tokens.weight"
    expected = (tensors[name].float() * tensors[f"{name}_scale_inv"]).bfloat16().float()
    assert found[name].shape == (128, 64)
    assert torch.equal(found[name][:99], expected)
    assert torch.allclose(found[name][99:], expected.mean(0).expand(29, -1), atol=1e-3)
    assert config_of(tmp_path / "out")["vocab_size"] == 128
    report = outcome.reports["dequantize"]
    assert (report["bytes_before"], report["bytes_after"]) == (99 * 64 * 3 + 132, 99 * 64 * 4 + 128)
