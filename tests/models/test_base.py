"""What every PreTrainedModel can do, beside transformers where the page is its page."""

from __future__ import annotations

import gc
import inspect
import logging
import weakref
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from ckptd import models
from ckptd.models.base import PreTrainedModel
from ckptd.models.config.config import PreTrainedConfig
from tests.models.pairs import CLASSES, ours, theirs

NAMES = list(CLASSES)


@pytest.mark.parametrize("name", NAMES)
def test_counts_equal_those_of_transformers(name: str) -> None:
    """Footprint and parameter counts, in each variant, are transformers' to the byte."""
    original = theirs(name)
    model = ours(name, original)
    assert model.get_memory_footprint() == original.get_memory_footprint()
    assert model.get_memory_footprint(return_buffers=False) == original.get_memory_footprint(False)
    first = next(iter(model.parameters()))
    first.requires_grad_(False)
    next(iter(original.parameters())).requires_grad_(False)
    for trainable in (False, True):
        for excluded in (False, True):
            arguments = {"only_trainable": trainable, "exclude_embeddings": excluded}
            assert model.num_parameters(**arguments) == original.num_parameters(**arguments)


@pytest.mark.parametrize("name", NAMES)
def test_parts_are_found_where_transformers_finds_them(name: str) -> None:
    """Embeddings, head, encoder, decoder and base model are the modules of the same name."""
    original = theirs(name)
    model = ours(name, original)

    def place(whole: nn.Module, part: Any) -> str | None:
        return next((path for path, module in whole.named_modules() if module is part), None)

    for method in ("get_input_embeddings", "get_output_embeddings", "get_encoder", "get_decoder"):
        expected = place(original, getattr(original, method)())
        if name == "GPTNeoXForCausalLM" and expected == "lm_head":
            expected = "embed_out"  # its name in the files, which is ours at run time, too
        assert place(model, getattr(model, method)()) == expected, method
    assert place(model, model.base_model) == place(original, original.base_model)
    assert model.can_generate() is original.can_generate()
    assert model.main_input_name == original.main_input_name
    assert model.base_model_prefix == original.base_model_prefix


def test_signatures_are_those_of_the_page() -> None:
    """Names and defaults of the documented methods are transformers', but for what it added since."""
    added = {"allow_all_kernels", "disable_mmap", "distributed_checkpoint", "fusion_config"}
    for method in (
        "add_model_tags", "can_generate", "enable_input_require_grads", "from_pretrained",
        "get_decoder", "get_encoder", "get_expanded_tied_weights_keys", "get_memory_footprint",
        "get_parameter_or_buffer", "gradient_checkpointing_disable", "init_weights",
        "initialize_weights", "num_parameters", "post_init", "push_to_hub",
        "register_for_auto_class", "resize_token_embeddings", "save_pretrained",
        "set_attn_implementation", "set_decoder", "set_encoder", "tie_weights",
        "warn_if_padding_and_no_attention_mask",
    ):  # fmt: skip
        here = inspect.signature(getattr(PreTrainedModel, method)).parameters
        there = inspect.signature(getattr(transformers.PreTrainedModel, method)).parameters
        for parameter, described in there.items():
            if parameter in added and parameter not in here:
                continue
            assert parameter in here, (method, parameter)
            assert here[parameter].default == described.default, (method, parameter)


def test_parameters_buffers_and_extra_state_are_found_by_name() -> None:
    """get_parameter_or_buffer gives each leaf, and refuses modules and unknown names."""
    model = ours("LlamaForCausalLM")
    assert model.get_parameter_or_buffer("lm_head.weight") is model.lm_head.weight
    assert (
        model.get_parameter_or_buffer("model.rotary_emb.inv_freq")
        is model.model.rotary_emb.inv_freq
    )
    for wrong in ("model.layers", "model.layers.0.nothing", "nowhere.at.all"):
        with pytest.raises(AttributeError):
            model.get_parameter_or_buffer(wrong)


def test_tags_are_kept_in_order_and_once() -> None:
    """add_model_tags takes a string or a list and leaves the class alone."""
    model = ours("LlamaForCausalLM")
    model.add_model_tags("one")
    model.add_model_tags(["two", "one", "three"])
    assert model.model_tags == ["one", "two", "three"]
    assert ours("LlamaForCausalLM").model_tags is None


def test_gradient_checkpointing_keeps_gradients_and_saves_memory() -> None:
    """Checkpointed layers keep fewer bytes for backward; loss and gradients are the same."""

    def trained(checkpointed: bool) -> tuple[int, dict[str, torch.Tensor]]:
        model = ours("LlamaForCausalLM", num_hidden_layers=4).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        kept = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        ids = torch.arange(60).reshape(2, 30)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return kept, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain_bytes, plain = trained(checkpointed=False)
    bytes_, checkpointed = trained(checkpointed=True)
    assert bytes_ < plain_bytes / 2
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


def test_gradient_checkpointing_can_be_switched_off() -> None:
    """After disable no layer is checkpointed."""
    model = ours("LlamaForCausalLM")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_input_gradients_flow_through_frozen_embeddings() -> None:
    """Enabled, the embedding's output needs a gradient; disabled, no hook is left."""
    model = ours("LlamaForCausalLM")
    model.requires_grad_(False)
    model.enable_input_require_grads()
    embedding = model.get_input_embeddings()
    assert embedding(torch.tensor([1])).requires_grad
    model.disable_input_require_grads()
    model.disable_input_require_grads()
    assert not embedding(torch.tensor([1])).requires_grad


def test_a_model_that_cannot_be_checkpointed_says_so() -> None:
    """A class without support refuses, naming itself."""

    class Plain(PreTrainedModel):
        config_class = PreTrainedConfig

    with pytest.raises(ValueError, match="Plain does not support gradient checkpointing"):
        Plain(PreTrainedConfig()).gradient_checkpointing_enable()


def test_padding_without_a_mask_is_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    """Pad tokens at an edge and no mask give one warning; a mask gives none."""
    model = ours("LlamaForCausalLM", pad_token_id=0)
    padded = torch.tensor([[0, 5, 6]])
    with caplog.at_level(logging.WARNING):
        model.warn_if_padding_and_no_attention_mask(padded, torch.ones_like(padded))
        assert not caplog.records
        model.warn_if_padding_and_no_attention_mask(padded, None)
        model.warn_if_padding_and_no_attention_mask(padded, None)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("mask_shape", [(2, 5), (2, 3, 5)])
def test_inverted_masks_have_the_documented_values(mask_shape: tuple[int, ...]) -> None:
    """Ones become 0, zeros the lowest value, with a head axis put in."""
    model = ours("BertForMaskedLM")
    mask = torch.ones(mask_shape)
    mask[..., -1] = 0
    inverted = model.invert_attention_mask(mask)
    assert inverted.shape == (2, 1, 1 if len(mask_shape) == 2 else 3, 5)
    assert inverted.dtype == model.dtype
    assert (inverted[..., :-1] == 0).all()
    assert (inverted[..., -1] == torch.finfo(torch.float32).min).all()


def test_extended_masks_hide_the_future_of_a_decoder() -> None:
    """An encoder's mask only hides padding; a decoder's hides later positions, a past is seen."""
    model = ours("BertForMaskedLM")
    mask = torch.tensor([[1, 1, 1, 0]])
    low = torch.finfo(torch.float32).min
    plain = model.get_extended_attention_mask(mask, (1, 4))
    assert plain.tolist() == [[[[0, 0, 0, low]]]]
    model.config.is_decoder = True
    causal = model.get_extended_attention_mask(mask, (1, 3))
    assert causal[0, 0].tolist() == [[0, 0, low, low], [0, 0, 0, low], [0, 0, 0, low]]
    with pytest.raises(ValueError, match="Wrong shape"):
        model.get_extended_attention_mask(mask[0], (1, 4))
    with pytest.warns(FutureWarning):
        model.get_extended_attention_mask(mask, (1, 3), device=torch.device("cpu"))


def test_attention_can_be_changed_and_wrong_names_are_refused() -> None:
    """eager and sdpa are taken; unknown names and missing packages get the documented errors."""
    model = ours("LlamaForCausalLM")
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation({"": "sdpa"})
    assert model.model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="nonsense"):
        model.set_attn_implementation("nonsense")
    with pytest.raises(ImportError):
        model.set_attn_implementation("flash_attention_2")


def test_the_compiled_call_is_kept_until_asked_otherwise() -> None:
    """The same arguments give the same callable, others a new one."""
    model = ours("LlamaForCausalLM")
    eager = {"backend": "eager"}
    first = model.get_compiled_call(eager)
    assert model.get_compiled_call(eager) is first
    assert model.get_compiled_call({"backend": "eager", "dynamic": True}) is not first
    ids = torch.arange(5)[None]
    torch.testing.assert_close(first(input_ids=ids).logits, model(input_ids=ids).logits)


def test_initial_weights_follow_the_configuration() -> None:
    """Matrices have the configured deviation, norms are one, the padding row is zero."""
    model = ours("LlamaForCausalLM", initializer_range=0.1, pad_token_id=3, hidden_size=64)
    assert model.model.norm.weight.unique().tolist() == [1.0]
    assert abs(model.model.layers[0].mlp.up_proj.weight.std().item() - 0.1) < 0.01
    assert not model.model.embed_tokens.weight[3].any()


def test_marked_parameters_keep_their_values() -> None:
    """initialize_weights leaves what is marked as initialised alone, parameter by parameter."""
    model = ours("BertForMaskedLM")
    dense = model.bert.encoder.layer[0].output.dense
    for module in model.modules():
        module._is_hf_initialized = False
    with torch.no_grad():
        dense.weight.fill_(7.0)
        dense.bias.fill_(7.0)
    dense.weight._is_hf_initialized = True
    model.initialize_weights()
    assert (dense.weight == 7.0).all()
    assert (dense.bias == 0.0).all()


def test_a_model_needs_a_configuration() -> None:
    """Anything else is refused with the way to load by name."""
    with pytest.raises(TypeError, match="from_pretrained"):
        PreTrainedModel("some/repo")  # type: ignore[arg-type]


def test_the_public_names_are_there() -> None:
    """Every public name can be imported from ckptd.models; others are refused."""
    assert all(getattr(models, name) is not None for name in models.__all__)
    with pytest.raises(AttributeError):
        _ = models.Nonsense


def test_models_are_freed() -> None:
    """Nothing holds a model once its user lets it go."""
    model = ours("LlamaForCausalLM")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
