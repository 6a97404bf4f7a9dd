"""Models of architectures that have no native module: everything but a forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ckptd import errors
from ckptd.models import AutoModel, AutoModelForCausalLM
from ckptd.models.backed import BackedModel

SMALL = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("BartForConditionalGeneration", {
        "vocab_size": 99, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
    }),
    "opt": ("OPTForCausalLM", SMALL | {"word_embed_proj_dim": 32, "ffn_dim": 48}),
    "cohere": ("CohereForCausalLM", SMALL),
    "stablelm": ("StableLmForCausalLM", SMALL | {"tie_word_embeddings": False, "num_key_value_heads": 4}),
}  # fmt: skip


def saved(model_type: str, folder: Path) -> Any:
    """Save a random model of transformers and return it."""
    name, values = CASES[model_type]
    torch.manual_seed(0)
    model = getattr(transformers, name)(transformers.AutoConfig.for_model(model_type, **values))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("model_type", CASES)
def test_it_loads_counts_and_saves_as_transformers_does(model_type: str, tmp_path: Path) -> None:
    """Parameters are equal in number and value, and a saved folder loads there without a rest."""
    original = saved(model_type, tmp_path / "a")
    model = AutoModel.from_pretrained(tmp_path / "a")
    assert isinstance(model, BackedModel)
    assert model.num_parameters() == original.num_parameters()
    assert model.get_memory_footprint(return_buffers=False) >= original.get_memory_footprint(False)
    model.save_pretrained(tmp_path / "b")
    again, info = type(original).from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, value in original.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("model_type", CASES)
def test_it_resizes_every_tensor_of_the_vocabulary(model_type: str, tmp_path: Path) -> None:
    """After a resize and a save the model loads and runs in transformers with the new tokens."""
    original = saved(model_type, tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    embedding = model.resize_token_embeddings(128)
    assert embedding.weight.shape[0] == 128
    model.save_pretrained(tmp_path / "b")
    again, info = type(original).from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert again.config.vocab_size == 128
    ids = torch.tensor([[1, 127, 5]])
    assert again(input_ids=ids).logits.shape == (1, 3, 128)
    expected = original(input_ids=ids % 99).logits
    torch.testing.assert_close(
        again(input_ids=ids % 99).logits[..., :99], expected, atol=1e-5, rtol=1e-4
    )


def test_a_forward_names_the_architecture_and_those_that_run(tmp_path: Path) -> None:
    """The error says what cannot run and what can."""
    saved("opt", tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match=r"OPTForCausalLM.*llama"):
        model(torch.tensor([[1]]))


def test_a_checkpoint_without_vocabulary_is_still_a_model(tmp_path: Path) -> None:
    """A vision model loads, counts and saves; its embedding is refused, and so is a resize."""
    config = transformers.DeiTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=8, patch_size=4,
    )  # fmt: skip
    original = transformers.DeiTModel(config)
    original.save_pretrained(tmp_path / "a")
    model = AutoModel.from_pretrained(tmp_path / "a")
    assert model.num_parameters() == original.num_parameters()
    with pytest.raises(NotImplementedError, match="embedding"):
        model.get_input_embeddings()
    with pytest.raises(errors.StageRefused):
        model.resize_token_embeddings(10)
    model.save_pretrained(tmp_path / "b")
    transformers.DeiTModel.from_pretrained(tmp_path / "b")
