"""Stage `cast` from end to end: torch's rounding, and nothing touched that should not be."""

from __future__ import annotations

import pytest
import torch

from ckptd import errors
from tests.pipeline.stages.conftest import config_of, planned, run, weights_of

EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize("source_dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", ["float64", "float32", "bfloat16", "float16"])
def test_values_are_torchs_bit_for_bit(source_dtype, target, family, tmp_path) -> None:
    """Each value is rounded as `Tensor.to` does it, subnormal and infinite ones, too."""
    saved = family("llama")
    weights = {name: value.to(source_dtype) for name, value in saved.weights.items()}
    odd = torch.tensor([0.0, -0.0, 1e-7, -6e-8, 3e-39, 60000.0, -1.5, torch.inf, -torch.inf])
    weights["odd"] = odd.to(source_dtype)
    source = saved.modified(tmp_path / "source", change=weights)
    run(source, f"- cast: {{dtype: {target}}}", tmp_path / "out")
    dtype = getattr(torch, target)
    for name, value in weights_of(tmp_path / "out").items():
        assert value.dtype == dtype
        bits = {16: torch.int16, 32: torch.int32, 64: torch.int64}[torch.finfo(dtype).bits]
        assert torch.equal(value.view(bits), weights[name].to(dtype).view(bits)), name
    assert config_of(tmp_path / "out")["dtype"] == target


def test_the_config_says_the_dtype_where_it_said_it_before(family, tmp_path) -> None:
    """`torch_dtype` stays `torch_dtype`; nested configurations follow; transformers loads it."""
    saved = family("llava")
    text = saved.config["text_config"] | {"torch_dtype": "float32"}
    config = {"text_config": text, "torch_dtype": "float32", "dtype": None}
    source = saved.modified(tmp_path / "source", config=config)
    run(source, "- cast: {dtype: bf16}", tmp_path / "out")
    written = config_of(tmp_path / "out")
    assert written["torch_dtype"] == written["text_config"]["torch_dtype"] == "bfloat16"
    assert "dtype" not in written["text_config"]
    assert saved.load(tmp_path / "out").dtype == torch.bfloat16


def test_a_config_that_says_another_dtype_than_the_weights_is_corrected(family, tmp_path) -> None:
    """Weights that have the dtype already would be loaded in the one that config.json says."""
    saved = family("llama")
    half = {name: value.bfloat16() for name, value in saved.weights.items()}
    source = saved.modified(tmp_path / "source", change=half, config={"dtype": "float32"})
    run(source, "- cast: {dtype: bfloat16}", tmp_path / "out")
    assert config_of(tmp_path / "out")["dtype"] == "bfloat16"
    assert saved.load(tmp_path / "out").dtype == torch.bfloat16


def test_what_is_kept_is_bit_identical(family, tmp_path) -> None:
    """Tensors under a `keep` pattern and integers stay; the report counts what changed."""
    saved = family("llama")
    extra = {"steps": torch.arange(7), "mask": torch.ones(3, dtype=torch.bool)}
    source = saved.modified(tmp_path / "source", change=extra)
    outcome = run(
        source, "- cast: {dtype: float16, keep: ['*norm*', 'lm_head.*']}", tmp_path / "out"
    )
    out, old = weights_of(tmp_path / "out"), weights_of(source)
    for name, value in old.items():
        kept = "norm" in name or "lm_head" in name or name in extra
        assert out[name].dtype == (value.dtype if kept else torch.float16)
        assert torch.equal(out[name], value.to(out[name].dtype))
    assert outcome.reports["cast"]["kept"] == 6
    assert outcome.reports["cast"]["changed"] == len(old) - 6 - len(extra)


def test_a_cast_to_the_same_dtype_changes_no_byte(family, tmp_path) -> None:
    """Nothing to do: weights and config.json are the source's, byte for byte."""
    source = family("llama").path
    run(source, "- cast: {dtype: float32}", tmp_path / "out")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes()[-4000:] == (source / name).read_bytes()[
            -4000:
        ]


def test_a_pattern_that_matches_nothing_is_refused(family) -> None:
    """A typo in `keep` would cast what should have stayed."""
    with pytest.raises(errors.StageRefused, match=r"\*nrom\*"):
        planned(family("llama").path, "- cast: {dtype: bfloat16, keep: ['*nrom*']}")


def test_a_value_too_large_is_refused_with_its_tensor(family, tmp_path) -> None:
    """Finite in float32, infinite in float16: the job fails, and nothing stands in the output."""
    saved = family("llama")
    value = saved.weights[EMBEDDING]
    value[3, 5] = 70000.0
    source = saved.modified(tmp_path / "source", change={EMBEDDING: value})
    with pytest.raises(errors.CheckFailed, match=EMBEDDING):
        run(source, "- cast: {dtype: float16}", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "config"),
    [
        ({}, {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
        ({}, {"text_config": {"quantization_config": {"quant_method": "gptq"}}}),
        ({"model.x.weight": torch.ones(2).to(torch.float8_e4m3fn)}, {}),
    ],
)
def test_quantized_checkpoints_are_refused(change, config, family, tmp_path) -> None:
    """A config that names a method, or a tensor of eight-bit floats: its scales must not be cast."""
    source = family("llama").modified(tmp_path / "source", change=change, config=config)
    with pytest.raises(errors.StageRefused, match=r"quantized.*dequantize"):
        planned(source, "- cast: {dtype: bfloat16}")


def test_an_empty_quantization_config_is_no_quantization(family, tmp_path) -> None:
    """`"quantization_config": null` says that there is none."""
    source = family("llama").modified(tmp_path / "source", config={"quantization_config": None})
    assert planned(source, "- cast: {dtype: bfloat16}").needs_torch
