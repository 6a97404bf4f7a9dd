"""Merging adapters: against what PEFT itself makes of them, and what it would not say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ckptd import errors
from tests.pipeline.stages import adapters

LORA = Path(__file__).parents[2] / "data" / "trainers" / "lora"
DATA = Path(__file__).parents[2] / "data" / "quant"
ALL_LINEAR: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}
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
    wanted = peft.LoraConfig(**(ALL_LINEAR | changes), task_type="CAUSAL_LM")
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


TIES: dict[str, tuple[dict[str, Any], bool]] = {
    "head": ({"target_modules": ["lm_head"]}, False),
    "embedding": ({"target_modules": ["embed_tokens"]}, False),
    "embedding_saved": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        False,
    ),
    "both_saved": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        False,
    ),
    "kept_tied": (
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
        True,
    ),
    "tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}, True),
    "neither": ({"target_modules": ["q_proj"]}, True),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TIES)
def test_ties_follow_what_was_trained(name: str, tmp_path: Path) -> None:
    """The published model computes what the trained one did, tied only where that was."""
    changes, tied = TIES[name]
    base = adapters.save_base(adapters.make("llama", tie_word_embeddings=True), tmp_path / "base")
    wanted = peft.LoraConfig(**(ALL_LINEAR | changes), task_type="CAUSAL_LM")
    adapted = adapters.adapt(base, wanted, tmp_path / "adapter")
    adapters.merge(tmp_path / "adapter", tmp_path / "out")
    assert adapters.config(tmp_path / "out")["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in adapters.weights(tmp_path / "out")) is not tied
    _require_same_logits(adapted, tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary(tied: bool, tmp_path: Path) -> None:
    """Embedding and head of a vocabulary that grew come from the adapter, the config follows."""
    base = adapters.save_base(adapters.make("llama", tie_word_embeddings=tied), tmp_path / "base")
    wanted = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = adapters.adapt(base, wanted, tmp_path / "adapter", resize=64)
    adapters.merge(tmp_path / "adapter", tmp_path / "out")
    assert adapters.config(tmp_path / "out")["vocab_size"] == 64
    assert adapters.config(tmp_path / "out").get("tie_word_embeddings", False) is tied
    _require_same_logits(adapted, tmp_path / "out")


def _require_same_logits(adapted: Any, folder: Path) -> None:
    tokens = torch.arange(3, 23).view(2, 10)
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = adapted.eval()(tokens).logits
        found = merged.eval()(tokens).logits
    assert torch.allclose(found, expected, atol=1e-5), float((found - expected).abs().max())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dora", [False, True])
def test_convolutions_and_single_rows(dora: bool, tmp_path: Path) -> None:
    """A convolution's kernel and a head of one row are merged as PEFT merges them."""
    base = adapters.save_base(adapters.make("vit"), tmp_path / "base")
    wanted = peft.LoraConfig(r=2, use_dora=dora, target_modules=["projection", "classifier"])
    kind = transformers.AutoModelForImageClassification
    adapted = adapters.adapt(base, wanted, tmp_path / "adapter", kind=kind)
    adapters.merge(tmp_path / "adapter", tmp_path / "out")
    _require_close(
        adapters.weights(tmp_path / "out"), adapters.merged_by_peft(adapted, tmp_path / "reference")
    )


SPELLINGS = {
    "no prefix": lambda key: key.removeprefix("base_model.model."),
    "with the adapter's name": lambda key: key.replace("lora_A.", "lora_A.default.").replace(
        "lora_B.", "lora_B.default."
    ),
    "compiled": lambda key: f"_orig_mod.{key}",
    "sharded": lambda key: key.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
    "the base model alone": lambda key: key.replace("base_model.model.model.", "base_model.model."),
    "a module to save": lambda key: key.replace(
        "lm_head.weight", "lm_head.modules_to_save.default.weight"
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_names(name: str, tmp_path: Path) -> None:
    """However trainers spell the names, the result is the same."""
    base = adapters.save_base(adapters.make("llama"), tmp_path / "base")
    wanted = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapters.adapt(base, wanted, tmp_path / "adapter")
    adapters.merge(tmp_path / "adapter", tmp_path / "one")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    spelled = {SPELLINGS[name](key): value for key, value in load_file(path).items()}
    assert spelled.keys() != load_file(path).keys()
    save_file(spelled, path)
    adapters.merge(tmp_path / "adapter", tmp_path / "other")
    one, other = adapters.weights(tmp_path / "one"), adapters.weights(tmp_path / "other")
    assert all(torch.equal(other[key], value) for key, value in one.items())


@pytest.mark.filterwarnings("ignore")
def test_a_base_without_its_prefix(tmp_path: Path) -> None:
    """The files of the first GPT-2 models name `h.0...`, adapters `transformer.h.0...`."""
    base = adapters.save_base(adapters.make("gpt2"), tmp_path / "base")
    wanted = peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    adapters.adapt(base, wanted, tmp_path / "adapter")
    adapters.merge(tmp_path / "adapter", tmp_path / "one")
    path = base / "model.safetensors"
    short = {k.removeprefix("transformer."): value for k, value in load_file(path).items()}
    save_file(short, path)
    adapters.merge(tmp_path / "adapter", tmp_path / "other")
    one, other = adapters.weights(tmp_path / "one"), adapters.weights(tmp_path / "other")
    assert {key.removeprefix("transformer.") for key in one} == other.keys()
    assert all(torch.equal(other[k.removeprefix("transformer.")], v) for k, v in one.items())


def _require_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, exact in expected.items():
        error = (found[key].double() - exact).abs()
        assert (error <= 1e-6 * (1 + exact.abs())).all(), (key, float(error.max()))


def _adapter(tmp_path: Path, **changes: Any) -> Path:
    """Return a small adapter on a small base, whose configuration is changed."""
    base = adapters.save_base(adapters.make("llama"), tmp_path / "base")
    wanted = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapters.adapt(base, wanted, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return tmp_path / "adapter"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"r": 3}, "another rank"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"lora_alpha": "many"}, "not as PEFT writes it"),
    ],
)
def test_what_is_not_merged_is_refused_by_name(changes, said: str, tmp_path: Path) -> None:
    """Other methods and variants, and settings that contradict the tensors."""
    with pytest.raises(errors.StageRefused, match=said):
        adapters.merge(_adapter(tmp_path, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t | {"base_model.model.model.layers.9.mlp.x.weight": torch.ones(2)}, "layers.9"),
        (
            lambda t: (
                t
                | {
                    "base_model.model.model.layers.9.q.lora_A.weight": torch.ones(2, 16),
                    "base_model.model.model.layers.9.q.lora_B.weight": torch.ones(16, 2),
                }
            ),
            "layers.9.q",
        ),
        (
            lambda t: {k: v for k, v in t.items() if k != f"{Q}.lora_B.weight"},
            "only one of the two",
        ),
        (lambda t: t | {f"{Q}.lora_A.weight": torch.ones(2, 15)}, "does not fit the base"),
        (lambda t: t | {f"{Q}.lora_A.weight": torch.ones(0)}, "not gathered"),
        (lambda t: t | {f"{Q}.lora_A.a.weight": torch.ones(2, 16)}, "twice"),
        (
            lambda t: {
                (k.replace("lora_A", "lora_A.a") if "layers.0" in k else k.replace("_A", "_A.b")): v
                for k, v in t.items()
            },
            "several adapters",
        ),
        (lambda t: t | {f"{Q}.strange": torch.ones(3)}, "strange"),
        (lambda t: t | {"base_model.model.model.norm.weight": torch.ones(3)}, "model.norm.weight"),
    ],
)
def test_a_tensor_without_a_place_is_refused_by_name(change, said: str, tmp_path: Path) -> None:
    """Nothing of the adapter is left out silently."""
    path = _adapter(tmp_path) / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(errors.StageRefused, match=said):
        adapters.merge(path.parent, tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
def test_bases_that_are_not_there(tmp_path: Path) -> None:
    """A base that is nowhere, an adapter as a base, and a model that is no adapter."""
    adapter = _adapter(tmp_path)
    with pytest.raises(errors.CheckpointIncomplete, match="/nowhere/at/all"):
        adapters.merge(adapter, tmp_path / "out", "- merge: {base: /nowhere/at/all}")
    with pytest.raises(errors.CheckpointUnsupported, match="adapter itself"):
        adapters.merge(adapter, tmp_path / "out", f"- merge: {{base: {adapter}}}")
    with pytest.raises(errors.StageRefused, match="not an adapter"):
        adapters.merge(tmp_path / "base", tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
def test_relative_names_of_a_base(tmp_path: Path) -> None:
    """A trainer's relative name is looked up from its own folder and above, not from the pin."""
    adapter = _adapter(tmp_path, base_model_name_or_path="./base")
    moved = tmp_path / "pins" / "x" / "y" / "z"
    shutil.copytree(adapter, moved)
    adapters.merge(moved, tmp_path / "out", source_path=adapter)
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_alone(tmp_path: Path) -> None:
    """Without a merge it is published as it is; stages that need a model refuse it."""
    adapter = _adapter(tmp_path)
    (adapter / "tokenizer.json").write_text("{}")
    adapters.merge(adapter, tmp_path / "out", "- reshard")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    weights_name = "adapter_model.safetensors"
    assert names == {
        weights_name, "adapter_config.json", "tokenizer.json", "README.md", "ckptd.json"
    }  # fmt: skip
    one, other = load_file(adapter / weights_name), load_file(tmp_path / "out" / weights_name)
    assert one.keys() == other.keys()
    assert all(torch.equal(other[key], value) for key, value in one.items())
    peft.PeftModel.from_pretrained(adapters.make("llama"), tmp_path / "out")
    for stage in ("tie", "resize: {to: 64}", "footprint: {max: 1GB}", "dequantize", "verify"):
        with pytest.raises(errors.StageRefused, match="needs a whole model"):
            adapters.merge(adapter, tmp_path / "other", f"- {stage}")


@pytest.mark.filterwarnings("ignore")
def test_side_files(tmp_path: Path) -> None:
    """The trainer's tokenizer, the base's generation config; no adapter config and no card of one."""
    adapter = _adapter(tmp_path)
    base = tmp_path / "base"
    (adapter / "tokenizer.json").write_text('{"new": 1}')
    (base / "tokenizer.json").write_text("{}")
    (base / "vocab.json").write_text("{}")
    (base / "LICENSE").write_text("free")
    (base / "README.md").write_text("# The base")
    (base / "generation_config.json").write_text('{"top_k": 3}')
    adapters.merge(adapter, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "model.safetensors", "config.json", "ckptd.json", "tokenizer.json", "LICENSE",
        "generation_config.json",
    }  # fmt: skip
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"new": 1}'
    said = json.loads((tmp_path / "out" / "ckptd.json").read_text())
    assert said["source"]["base"] == {"name": "base", "digest": None}
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


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
def test_trained_tokens_alone(tmp_path: Path) -> None:
    """The method of its own for single tokens: rows replaced, everything else the base's bytes."""
    base = adapters.save_base(adapters.make("llama"), tmp_path / "base")
    wanted = peft.TrainableTokensConfig(token_indices=[5, 2], target_modules=["embed_tokens"])
    adapted = adapters.adapt(base, wanted, tmp_path / "adapter")
    outcome = adapters.merge(tmp_path / "adapter", tmp_path / "out")
    assert outcome.computed_bytes == 0
    _require_close(
        adapters.weights(tmp_path / "out"), adapters.merged_by_peft(adapted, tmp_path / "reference")
    )
