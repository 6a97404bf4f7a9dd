"""Merging adapters: ties, heads, vocabularies, side files, and what is refused."""

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


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


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
    wanted = peft.LoraConfig(**(adapters.ALL_LINEAR | changes), task_type="CAUSAL_LM")
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
@pytest.mark.parametrize(("kind", "num_labels"), [("llama", 1), ("qwen3", 3), ("gpt2", 2)])
def test_a_head_that_the_base_lacks(kind: str, num_labels: int, tmp_path: Path) -> None:
    """A classifier or reward model: the merged one has the head, its class and its labels."""
    tied = kind != "llama"
    model = adapters.make(kind, tie_word_embeddings=tied)
    base = adapters.save_base(model, tmp_path / "base")
    trained = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=num_labels, pad_token_id=0
    )
    wanted = peft.LoraConfig(r=2, task_type="SEQ_CLS")
    adapted = adapters.trained(trained, wanted, tmp_path / "adapter")
    outcome = adapters.merge(tmp_path / "adapter", tmp_path / "out")
    assert "verify finds that" in outcome.reports["merge"]["warnings"][0]
    adapters.require_close(
        adapters.weights(tmp_path / "out"), adapters.merged_by_peft(adapted, tmp_path / "reference")
    )
    found, expected = (adapters.config(tmp_path / name) for name in ("out", "reference"))
    assert found["architectures"] == expected["architectures"]
    assert len(found["id2label"]) == num_labels
    assert found["id2label"] == expected.get("id2label", found["id2label"])
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", pad_token_id=0
    )
    tokens = torch.arange(3, 23).view(2, 10)
    with torch.no_grad():
        logits = adapted.float().eval()(tokens).logits
        assert torch.allclose(merged.eval()(tokens).logits, logits, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS"])
def test_a_head_in_the_place_of_another(task: str, tmp_path: Path) -> None:
    """The base's own head goes, with all that belongs to it: the files are the class's, no more."""
    base = adapters.save_base(adapters.make("bert"), tmp_path / "base")
    kind = {
        "TOKEN_CLS": transformers.AutoModelForTokenClassification,
        "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    }[task]
    model = kind.from_pretrained(base)
    wanted = peft.LoraConfig(r=2, task_type=task, target_modules=["query"])
    adapted = adapters.trained(model, wanted, tmp_path / "adapter")
    adapters.merge(tmp_path / "adapter", tmp_path / "out", "- merge\n- verify")
    adapters.require_close(
        adapters.weights(tmp_path / "out"), adapters.merged_by_peft(adapted, tmp_path / "reference")
    )


@pytest.mark.filterwarnings("ignore")
def test_a_head_without_a_class_is_refused(tmp_path: Path) -> None:
    """A head goes only into a family that has a class for its task, and only with that task."""
    adapter = adapters.small(tmp_path)
    path = adapter / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.score.weight": torch.ones(2, 16)}, path)
    with pytest.raises(errors.StageRefused, match="score"):
        adapters.merge(adapter, tmp_path / "out")
    said = adapter / "adapter_config.json"
    said.write_text(json.dumps(json.loads(said.read_text()) | {"task_type": "SEQ_CLS"}))
    config = adapters.config(tmp_path / "base") | {"architectures": ["OwnForCausalLM"]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"model_type": "own"}))
    with pytest.raises(errors.StageRefused, match="no class for"):
        adapters.merge(adapter, tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING prepends virtual tokens"),
        ({"peft_type": "PREFIX_TUNING"}, "nothing to merge"),
        ({"peft_type": "P_TUNING"}, "nothing to merge"),
        ({"peft_type": "OFT", "coft": True}, "OFT"),
        ({"peft_type": "BOFT"}, "BOFT"),
        ({"peft_type": "FOURIERFT"}, "FOURIERFT"),
        ({"peft_type": "RANDLORA"}, "RANDLORA"),
        ({"peft_type": "XLORA"}, "XLORA"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "loftq"}, "loftq"),
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
        adapters.merge(adapters.small(tmp_path, **changes), tmp_path / "out")
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
    path = adapters.small(tmp_path) / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(errors.StageRefused, match=said):
        adapters.merge(path.parent, tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
def test_bases_that_are_not_there(tmp_path: Path) -> None:
    """A base that is nowhere, an adapter as a base, and a model that is no adapter."""
    adapter = adapters.small(tmp_path)
    with pytest.raises(errors.CheckpointIncomplete, match="/nowhere/at/all"):
        adapters.merge(adapter, tmp_path / "out", "- merge: {base: /nowhere/at/all}")
    with pytest.raises(errors.CheckpointUnsupported, match="adapter itself"):
        adapters.merge(adapter, tmp_path / "out", f"- merge: {{base: {adapter}}}")
    with pytest.raises(errors.StageRefused, match="not an adapter"):
        adapters.merge(tmp_path / "base", tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
def test_relative_names_of_a_base(tmp_path: Path) -> None:
    """A trainer's relative name is looked up from its own folder and above, not from the pin."""
    adapter = adapters.small(tmp_path, base_model_name_or_path="./base")
    moved = tmp_path / "pins" / "x" / "y" / "z"
    shutil.copytree(adapter, moved)
    adapters.merge(moved, tmp_path / "out", source_path=adapter)
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_alone(tmp_path: Path) -> None:
    """Without a merge it is published as it is; stages that need a model refuse it."""
    adapter = adapters.small(tmp_path)
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
    adapter = adapters.small(tmp_path)
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
        "generation_config.json", "README.md",
    }  # fmt: skip
    assert "The base" not in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"new": 1}'
    said = json.loads((tmp_path / "out" / "ckptd.json").read_text())
    assert said["source"]["base"] == {"name": "base", "digest": None}
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
