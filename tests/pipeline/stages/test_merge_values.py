"""Merged weights against those that PEFT itself makes, for each method and kind of base."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.pipeline.stages import adapters

LORA = Path(__file__).parents[2] / "data" / "trainers" / "lora"
DATA = Path(__file__).parents[2] / "data" / "quant"
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "patterns": (
        "llama",
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 3}, "alpha_pattern": {"q_proj": 9}},
    ),
    "rank_stabilized": ("qwen3", {"use_rslora": True}),
    "dora": ("llama", {"use_dora": True}),
    "head": ("llama", {"target_modules": ["lm_head", "v_proj"]}),
    "biases_of_all": ("opt", {"bias": "all"}),
    "biases_of_lora": ("opt", {"bias": "lora_only"}),
    "own_biases": ("opt", {"lora_bias": True, "target_modules": ["q_proj", "fc1"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d_dora": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding_dora": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "saved_modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tokens": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": [59, 0, 7]},
    ),
    "tied_tokens": (
        "qwen3",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 4]}},
    ),
    "attention_of_experts": ("mixtral", {"target_modules": ["q_proj"]}),
    "experts": (
        "mixtral",
        {
            "target_modules": [],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "one_expert_parameter": (
        "mixtral",
        {
            "target_modules": ["v_proj"],
            "target_parameters": ["mlp.experts.down_proj"],
            "rank_pattern": {"down_proj": 2},
        },
    ),
}
EXPERTS = {
    "target_modules": ["q_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
VARIANTS["separate_experts"] = ("qwen3_moe", EXPERTS)
VARIANTS["turned_experts"] = ("gpt_oss", EXPERTS)
VARIANTS["routers"] = (
    "qwen3_moe",
    {"target_modules": [], "target_parameters": ["mlp.gate.weight"]},
)
TIED = {"opt", "gpt2"}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _tied(name: str, kind: str) -> dict[str, Any]:
    return {"tie_word_embeddings": True} if name == "tied_tokens" or kind in TIED else {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_as_peft_merges(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Every variant gives PEFT's own tensors: float32 to 1e-6, bfloat16 to one rounding."""
    kind, changes = VARIANTS[name]
    model = adapters.make(kind, **_tied(name, kind))
    base = adapters.save_base(model, tmp_path / "base", dtype)
    wanted = peft.LoraConfig(**(adapters.ALL_LINEAR | changes), task_type="CAUSAL_LM")
    adapted = adapters.adapt(base, wanted, tmp_path / "adapter")
    adapters.merge(tmp_path / "adapter", tmp_path / "out")
    expected = adapters.merged_by_peft(adapted, tmp_path / "reference")
    found = adapters.weights(tmp_path / "out")
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert value.dtype == dtype, key
        exact = expected[key]
        assert value.shape == exact.shape, key
        error = (value.double() - exact).abs()
        if dtype is torch.float32:
            assert (error <= 1e-6 * (1 + exact.abs())).all(), (key, float(error.max()))
        else:
            rounding = (exact.to(dtype).double() - exact).abs()
            assert (error <= rounding + 1e-6 * (1 + exact.abs())).all(), (key, float(error.max()))


def test_a_trainers_checkpoint(tmp_path: Path) -> None:
    """A real one gives what peft made of it, bit for bit, and the rest of the base as it is."""
    stages = f"- merge: {{base: {LORA / 'base'}}}"
    adapters.merge(LORA / "checkpoint", tmp_path / "out", stages)
    found = adapters.weights(tmp_path / "out")
    changed = load_file(LORA / "reference.safetensors")
    assert len(changed) == 6
    reference = load_file(LORA / "base" / "model.safetensors") | changed
    assert found.keys() == reference.keys()
    assert all(torch.equal(found[name], value) for name, value in reference.items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dora", [False, True])
def test_convolutions_and_single_rows(dora: bool, tmp_path: Path) -> None:
    """A convolution's kernel and a head of one row are merged as PEFT merges them."""
    base = adapters.save_base(adapters.make("vit"), tmp_path / "base")
    wanted = peft.LoraConfig(r=2, use_dora=dora, target_modules=["projection", "classifier"])
    kind = transformers.AutoModelForImageClassification
    adapted = adapters.adapt(base, wanted, tmp_path / "adapter", kind=kind)
    adapters.merge(tmp_path / "adapter", tmp_path / "out")
    adapters.require_close(
        adapters.weights(tmp_path / "out"), adapters.merged_by_peft(adapted, tmp_path / "reference")
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_was_converted(start: str, tmp_path: Path) -> None:
    """PiSSA and OLoRA change the base when they begin; saved as PEFT's plain LoRA they are merged."""
    base = adapters.save_base(adapters.make("llama"), tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    wanted = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start)
    adapted = peft.get_peft_model(model, wanted)
    adapted.save_pretrained(tmp_path / "first")
    adapted.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name:
                value.add_(torch.randn_like(value) * 0.2)
    adapted.save_pretrained(
        tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "first")
    )
    adapters.merge(tmp_path / "adapter", tmp_path / "out", f"- merge: {{base: {base}}}")
    merged = adapters.merged_by_peft(adapted, tmp_path / "reference")
    found = adapters.weights(tmp_path / "out")
    assert found.keys() == merged.keys()
    for key, exact in merged.items():
        assert torch.allclose(found[key].double(), exact, atol=2e-6), key


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["ia3", "loha", "oft"])
def test_other_methods_into_a_quantized_base(name: str, tmp_path: Path) -> None:
    """They change the base as it is in float32, and the result is rounded once."""
    base = _fp8_base(tmp_path / "base")
    adapters.merge(base, tmp_path / "exact", "- dequantize: {dtype: float32}")
    wanted = copy.deepcopy(METHODS[name][1])
    adapted = adapters.adapt(tmp_path / "exact", wanted, tmp_path / "adapter")
    adapters.merge(tmp_path / "adapter", tmp_path / "out", f"- merge: {{base: {base}}}")
    expected = adapters.merged_by_peft(adapted, tmp_path / "reference")
    found = adapters.weights(tmp_path / "out")
    for key, exact in expected.items():
        rounding = (exact.to(found[key].dtype).double() - exact).abs()
        error = (found[key].double() - exact).abs()
        assert (error <= rounding + 2e-6 * (1 + exact.abs())).all(), key


@pytest.mark.filterwarnings("ignore")
def test_a_pickled_base(tmp_path: Path) -> None:
    """Weights from before safetensors are as good a base as others."""
    adapter = adapters.small(tmp_path)
    adapters.merge(adapter, tmp_path / "one")
    path = tmp_path / "base" / "model.safetensors"
    torch.save(load_file(path), tmp_path / "base" / "pytorch_model.bin")
    path.unlink()
    adapters.merge(adapter, tmp_path / "other")
    one, other = adapters.weights(tmp_path / "one"), adapters.weights(tmp_path / "other")
    assert one.keys() == other.keys()
    assert all(torch.equal(other[key], value) for key, value in one.items())


@pytest.mark.filterwarnings("ignore")
def test_a_pickled_adapter(tmp_path: Path) -> None:
    """It is merged as its safetensors would be, and becomes such where it is published alone."""
    adapter = adapters.small(tmp_path)
    adapters.merge(adapter, tmp_path / "one")
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    path.unlink()
    first = next(iter(tensors))
    tensors[first] = tensors[first].T.contiguous().T
    torch.save(tensors, adapter / "adapter_model.bin")
    adapters.merge(adapter, tmp_path / "other")
    one, other = adapters.weights(tmp_path / "one"), adapters.weights(tmp_path / "other")
    assert all(torch.equal(other[key], value) for key, value in one.items())
    adapters.merge(adapter, tmp_path / "alone", "- reshard")
    alone = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    assert alone.keys() == tensors.keys()
    assert all(torch.equal(alone[key], value) for key, value in tensors.items())
    assert not (tmp_path / "alone" / "adapter_model.bin").exists()


METHODS: dict[str, tuple[str, Any]] = {
    "adalora": (
        "llama",
        peft.AdaLoraConfig(init_r=5, lora_alpha=7, target_modules=["q_proj"], total_step=10),
    ),
    "adalora_conv1d": (
        "gpt2",
        peft.AdaLoraConfig(init_r=4, target_modules=["c_attn"], fan_in_fan_out=True, total_step=10),
    ),
    "ia3": (
        "llama",
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "ia3_biases": (
        "opt",
        peft.IA3Config(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"]),
    ),
    "ia3_conv1d": (
        "gpt2",
        peft.IA3Config(
            target_modules=["c_attn", "mlp.c_proj"],
            feedforward_modules=["mlp.c_proj"],
            fan_in_fan_out=True,
        ),
    ),
    "loha": (
        "llama",
        peft.LoHaConfig(
            r=3, alpha=5, target_modules=["q_proj", "up_proj"], rank_pattern={"q_proj": 2}
        ),
    ),
    "loha_conv": ("vit", peft.LoHaConfig(r=2, target_modules=["projection", "q_proj"])),
    "lokr": ("llama", peft.LoKrConfig(r=2, alpha=3, target_modules=["q_proj", "down_proj"])),
    "lokr_both": (
        "llama",
        peft.LoKrConfig(r=1, alpha=3, target_modules=["up_proj"], decompose_both=True),
    ),
    "lokr_factor": (
        "llama",
        peft.LoKrConfig(r=2, alpha=3, target_modules=["o_proj"], decompose_factor=2),
    ),
    "oft": ("llama", peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj", "up_proj"])),
    "oft_exact": (
        "llama",
        peft.OFTConfig(r=0, oft_block_size=8, target_modules=["k_proj"], use_cayley_neumann=False),
    ),
    "oft_shared": (
        "opt",
        peft.OFTConfig(
            r=0,
            oft_block_size=4,
            target_modules=["q_proj", "fc2"],
            block_share=True,
            num_cayley_neumann_terms=2,
        ),
    ),
    "oft_constrained": (
        "llama",
        peft.OFTConfig(
            r=0,
            oft_block_size=4,
            target_modules=["q_proj"],
            coft=True,
            eps=0.05,
            use_cayley_neumann=False,
        ),
    ),
    "loha_kernel": (
        "vit",
        peft.LoHaConfig(r=2, target_modules=["projection"], use_effective_conv2d=True),
    ),
    "lokr_kernel": (
        "vit",
        peft.LoKrConfig(
            r=1, target_modules=["projection"], use_effective_conv2d=True, decompose_factor=2
        ),
    ),
    "lokr_kernel_both": (
        "vit",
        peft.LoKrConfig(
            r=1, target_modules=["projection"], use_effective_conv2d=True, decompose_both=True
        ),
    ),
    "lokr_kernel_whole": (
        "vit",
        peft.LoKrConfig(r=8, target_modules=["projection"], use_effective_conv2d=True),
    ),
    "boft": ("llama", peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj", "down_proj"])),
    "boft_biases": ("opt", peft.BOFTConfig(boft_block_size=8, target_modules=["q_proj", "fc2"])),
    "fourierft": (
        "llama",
        peft.FourierFTConfig(n_frequency=90, target_modules=["q_proj", "down_proj"], scaling=9.0),
    ),
    "fourierft_conv1d": (
        "gpt2",
        peft.FourierFTConfig(
            n_frequency=50, target_modules=["c_attn"], fan_in_fan_out=True, random_loc_seed=3
        ),
    ),
    "c3a": ("llama", peft.C3AConfig(block_size=8, target_modules=["q_proj", "up_proj"])),
    "hra": ("llama", peft.HRAConfig(r=4, target_modules=["q_proj", "down_proj"])),
    "hra_together": ("llama", peft.HRAConfig(r=4, target_modules=["v_proj"], apply_GS=True)),
    "ln_tuning": ("llama", peft.LNTuningConfig(target_modules=["input_layernorm", "norm"])),
    "vera": ("llama", peft.VeraConfig(r=4, target_modules=["q_proj", "k_proj"])),
    "vera_conv1d": (
        "gpt2",
        peft.VeraConfig(r=4, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True),
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", METHODS)
def test_other_methods_as_peft_merges_them(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Each method gives PEFT's own tensors: float32 to 1e-6, bfloat16 to one rounding."""
    kind, wanted = METHODS[name]
    base = adapters.save_base(adapters.make(kind), tmp_path / "base", dtype)
    model = transformers.AutoModelForCausalLM
    if kind == "vit":
        model = transformers.AutoModelForImageClassification
    adapted = adapters.adapt(base, copy.deepcopy(wanted), tmp_path / "adapter", kind=model)
    adapters.merge(tmp_path / "adapter", tmp_path / "out")
    expected = adapters.merged_by_peft(adapted, tmp_path / "reference")
    found = adapters.weights(tmp_path / "out")
    assert found.keys() == expected.keys()
    before = adapters.weights(base)
    assert any(not torch.equal(before[key], value) for key, value in found.items())
    for key, value in found.items():
        exact = expected[key]
        rounding = (exact.to(dtype).double() - exact).abs()
        error = (value.double() - exact).abs()
        assert (error <= rounding + 1e-6 * (1 + exact.abs())).all(), (key, float(error.max()))


def _fp8_base(path: Path) -> Path:
    """Save a base whose linear weights are FP8 with a scale for each 8 by 8 block."""
    adapters.save_base(adapters.make("llama"), path, torch.bfloat16)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in load_file(path / "model.safetensors").items():
        tensors[name] = value
        if "proj" in name:
            rows, columns = value.shape
            scale = torch.rand(-(-rows // 8), -(-columns // 8)) * 0.01 + 0.001
            whole = scale.repeat_interleave(8, 0).repeat_interleave(8, 1)[:rows, :columns]
            tensors[name] = (value.float() / whole).clamp(-440, 440).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, path / "model.safetensors")
    config = adapters.config(path)
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["fp8", "nf4"])
def test_a_quantized_base(kind: str, tmp_path: Path) -> None:
    """QLoRA: base and product are added in float32 and rounded once; the rest is dequantized."""
    base = DATA / "bnb_nf4_nested" if kind == "nf4" else _fp8_base(tmp_path / "base")
    for name, options in (("exact", "{dtype: float32}"), ("plain", "{}")):
        adapters.merge(base, tmp_path / name, f"- dequantize: {options}")
    exact, plain = adapters.weights(tmp_path / "exact"), adapters.weights(tmp_path / "plain")
    name = "model.layers.0.mlp.down_proj.weight"
    rows, columns = exact[name].shape
    torch.manual_seed(3)
    down, up = torch.randn(2, columns), torch.randn(rows, 2)
    key = f"base_model.model.{name.removesuffix('.weight')}"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(
        {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up},
        adapter / "adapter_model.safetensors",
    )
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(said))
    adapters.merge(adapter, tmp_path / "out")
    found = adapters.weights(tmp_path / "out")
    assert found.keys() == plain.keys()
    wanted = exact[name].double() + 1.5 * up.double() @ down.double()
    once = wanted.to(torch.bfloat16)
    error = (found[name].double() - wanted).abs()
    assert found[name].dtype == torch.bfloat16
    assert (error <= (once.double() - wanted).abs() + 1e-6).all()
    others = [key for key in plain if key != name]
    assert all(torch.equal(found[key], plain[key]) for key in others)
    assert "quantization_config" not in adapters.config(tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", ["bnb_nf4_nested", "gguf_llama", "fp8"])
def test_a_quantized_base_as_peft_merges_it_dequantized(
    kind: str, dora: bool, tmp_path: Path
) -> None:
    """QLoRA end to end: the base made plain in float32, PEFT's merge of that, one rounding."""
    base = _fp8_base(tmp_path / "base") if kind == "fp8" else DATA / kind
    if kind.startswith("gguf"):
        base = tmp_path / "base"
        base.mkdir()
        shutil.copy(DATA / kind / "model.gguf", base)
    for name, options in (("exact", "{dtype: float32}"), ("plain", "{}")):
        adapters.merge(base, tmp_path / name, f"- dequantize: {options}")
    wanted = peft.LoraConfig(**adapters.ALL_LINEAR, use_dora=dora, task_type="CAUSAL_LM")
    adapted = adapters.adapt(tmp_path / "exact", wanted, tmp_path / "adapter")
    adapters.merge(tmp_path / "adapter", tmp_path / "out", f"- merge: {{base: {base}}}")
    expected = adapters.merged_by_peft(adapted, tmp_path / "reference")
    found, plain = adapters.weights(tmp_path / "out"), adapters.weights(tmp_path / "plain")
    assert found.keys() == plain.keys()
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert value.dtype == plain[key].dtype, key
        rounding = (expected[key].to(value.dtype).double() - expected[key]).abs()
        error = (value.double() - expected[key]).abs()
        assert (error <= rounding + 2e-6 * (1 + expected[key].abs())).all(), key
    assert "quantization_config" not in adapters.config(tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
def test_trained_tokens_alone(tmp_path: Path) -> None:
    """The method of its own for single tokens: rows replaced, everything else the base's bytes."""
    base = adapters.save_base(adapters.make("llama"), tmp_path / "base")
    wanted = peft.TrainableTokensConfig(token_indices=[5, 2], target_modules=["embed_tokens"])
    adapted = adapters.adapt(base, wanted, tmp_path / "adapter")
    outcome = adapters.merge(tmp_path / "adapter", tmp_path / "out")
    assert outcome.computed_bytes == 0
    adapters.require_close(
        adapters.weights(tmp_path / "out"), adapters.merged_by_peft(adapted, tmp_path / "reference")
    )
