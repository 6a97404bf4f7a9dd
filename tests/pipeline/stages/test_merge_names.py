"""Names: how adapters spell them, how models have them in memory, and where the files do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ckptd.pipeline.adapter import places, renaming
from tests.pipeline.stages import adapters

RENAMED: dict[str, tuple[Any, dict[str, Any]]] = {
    "llava": (
        transformers.AutoModelForImageTextToText,
        {"target_modules": ["q_proj", "linear_1", "fc1", "lm_head"]},
    ),
    "qwen2_vl": (
        transformers.AutoModelForImageTextToText,
        {"target_modules": ["q_proj", "qkv", "o_proj", "lm_head"]},
    ),
    "gemma3": (transformers.AutoModelForImageTextToText, {"target_modules": ["k_proj", "fc2"]}),
    "vit_renamed": (
        transformers.AutoModelForImageClassification,
        {"target_modules": ["q_proj", "o_proj", "fc1", "fc2"], "modules_to_save": ["classifier"]},
    ),
    "gpt_neox": (
        transformers.AutoModelForCausalLM,
        {"target_modules": ["query_key_value"], "modules_to_save": ["lm_head"]},
    ),
    "nomic_bert": (
        transformers.AutoModelForMaskedLM,
        {"target_modules": ["q_proj", "v_proj", "o_proj"], "use_dora": True},
    ),
    "deepseek_v3": (
        transformers.AutoModelForCausalLM,
        {
            "target_modules": ["kv_b_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        },
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RENAMED)
def test_names_of_memory(name: str, tmp_path: Path) -> None:
    """Modules that transformers names or divides otherwise than the files are found there."""
    kind, changes = RENAMED[name]
    base = adapters.save_base(adapters.make(name), tmp_path / "base")
    wanted = peft.LoraConfig(r=2, lora_alpha=3, **changes)
    adapted = adapters.adapt(base, wanted, tmp_path / "adapter", kind=kind)
    spelled = {key.removeprefix("base_model.model.") for key in load_file(
        tmp_path / "adapter" / "adapter_model.safetensors")}  # fmt: skip
    in_files = {key.rpartition(".")[0] for key in adapters.weights(base)}
    assert any(key.partition(".lora")[0] not in in_files for key in spelled)
    adapters.merge(tmp_path / "adapter", tmp_path / "out")
    adapters.require_close(
        adapters.weights(tmp_path / "out"), adapters.merged_by_peft(adapted, tmp_path / "reference")
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RENAMED)
def test_names_are_those_that_transformers_gives(name: str, tmp_path: Path) -> None:
    """The table gives every tensor in the files exactly its name in the model."""
    model = adapters.make(name)
    base = adapters.save_base(model, tmp_path / "base")
    names = renaming.of(adapters.config(base), adapters.weights(base).keys())
    known = {*names.whole, *names.pieces, *names.experts}
    missing = model.state_dict().keys() - known
    tied = {*(model.all_tied_weights_keys or {})}
    assert known <= model.state_dict().keys()
    assert missing <= tied


@pytest.mark.filterwarnings("ignore")
def test_a_text_model_out_of_one_that_sees(tmp_path: Path) -> None:
    """An adapter of the language model alone goes into the language model of the whole."""
    whole = adapters.make("gemma3")
    base = adapters.save_base(whole, tmp_path / "base")
    before = adapters.weights(base)
    start = "language_model."
    text = {key.removeprefix(start): v for key, v in before.items() if key.startswith(start)}
    model = transformers.Gemma3ForCausalLM(whole.config.text_config)
    model.load_state_dict(text | {"lm_head.weight": text["model.embed_tokens.weight"]})
    model.save_pretrained(tmp_path / "text")
    wanted = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    adapted = adapters.adapt(tmp_path / "text", wanted, tmp_path / "adapter")
    adapters.merge(tmp_path / "adapter", tmp_path / "out", f"- merge: {{base: {base}}}")
    expected = adapters.merged_by_peft(adapted, tmp_path / "reference")
    found = adapters.weights(tmp_path / "out")
    adapters.require_close({key: found[start + key] for key in expected}, expected)
    others = [key for key in before if not key.startswith(start)]
    assert all(torch.equal(found[key], before[key]) for key in others)


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


def test_places_by_an_exchange_of_beginnings() -> None:
    """One exchange that holds for all modules of a kind is taken; none or several are not."""
    tower = [f"a.tower.layers.{n}.fc.weight" for n in range(3)]
    text = [f"b.text.layers.{n}.fc.weight" for n in range(4)]
    wanted = [f"model.layers.{n}.fc.weight" for n in range(4)]
    found = places.of({}, [*tower, *text], ())
    found.exchange(wanted, lambda name, tensor: True)
    assert [found.find(name) for name in wanted] == text
    found = places.of({}, [*tower, *text], ())
    found.exchange(wanted[:3], lambda name, tensor: True)
    assert [found.find(name) for name in wanted[:3]] == [None] * 3
    found = places.of({}, [*tower, *text], ())
    found.exchange(wanted[:3], lambda name, tensor: tensor.startswith("a."))
    assert [found.find(name) for name in wanted[:3]] == tower
    both = places.of({}, ["a.fc.weight", "b.fc.weight"], ())
    assert both.find("fc.weight") is None
