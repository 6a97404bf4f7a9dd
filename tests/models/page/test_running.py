"""Answers, generated tokens and compiled calls, beside transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.models.page.sides import OURS, THEIRS, Side, agree, inputs, saved, side

MODELS = ("user", "untied", "parts", "llama", "llama tied", "bert", "gpt2", "t5")
GENERATING = ("user", "untied", "llama", "llama tied", "gpt2", "t5", "qwen3_moe")


@pytest.mark.parametrize("kind", GENERATING)
@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 5, "do_sample": False},
        {"max_length": 9, "do_sample": False},
        {"max_new_tokens": 4, "do_sample": True, "top_k": 5, "temperature": 0.7},
        {"max_new_tokens": 4, "do_sample": True, "top_p": 0.8},
        {"max_new_tokens": 3, "do_sample": False, "eos_token_id": [4, 9]},
        {"max_new_tokens": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("padded", [False, True])
def test_generation(kind: str, options: dict[str, Any], padded: bool, tmp_path: Path) -> None:
    """The tokens are those of transformers, drawn ones for the same seed, padded on the left too."""
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    mask = torch.ones_like(ids)
    if padded:
        ids[0, :2], mask[0, :2] = 0, 0

    saved(kind, tmp_path, {"pad_token_id": 0})

    def act(this: Side) -> Any:
        model = this.cls(kind).from_pretrained(tmp_path)
        torch.manual_seed(11)
        given = {"use_cache": False} if kind in {"user", "untied"} else {}
        return model.generate(ids, attention_mask=mask, **given, **options)

    agree(act)


@pytest.mark.parametrize("kind", MODELS)
def test_forwards_answer_alike(kind: str) -> None:
    """The same weights give the same answer, and the same loss."""
    if kind == "parts":
        given: dict[str, Any] = {"input_ids": torch.tensor([[1, 2, 3]])}
    else:
        given = inputs(kind, labels=True)
    found = {}
    for name in (THEIRS, OURS):
        model = side(name).model(kind)
        with torch.no_grad():
            output = model(**given)
        found[name] = output if isinstance(output, torch.Tensor) else output.logits
    assert found[OURS].shape == found[THEIRS].shape
    assert (found[OURS] - found[THEIRS]).abs().max() < 1e-5


def test_a_compiled_call_answers_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled call is made of `__call__`, kept for a configuration and made anew for another."""
    made: list[dict[str, Any]] = []

    def compiled(function: Any, **options: Any) -> Any:
        made.append(options)
        return lambda *args, **kwargs: function(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", compiled)
    for name in (THEIRS, OURS):
        made.clear()
        model = side(name).model("llama")
        config = transformers.CompileConfig(mode="default")
        ids = torch.tensor([[3, 4]])
        first = model.get_compiled_call(config)
        assert torch.equal(first(ids).logits, model(ids).logits)
        assert model.get_compiled_call(config) is first
        other = transformers.CompileConfig(mode="max-autotune")
        assert model.get_compiled_call(other) is not first
        assert [options["mode"] for options in made] == ["default", "max-autotune"]
        assert {"fullgraph", "dynamic", "backend"} <= set(made[0])
    assert made[0] == {k: v for k, v in made[0].items() if k in config.to_dict()}
