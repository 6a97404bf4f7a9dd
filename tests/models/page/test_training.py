"""Training, attention, masks, initial weights and generation, beside transformers."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from ckptd.models.base import PreTrainedModel
from tests.models.page import test_embeddings, test_loading, test_saving
from tests.models.page.sides import KINDS, OURS, THEIRS, Side, agree, facts, inputs, side

MODELS = ("user", "untied", "parts", "llama", "llama tied", "bert", "gpt2", "t5")
PAGE: dict[str, tuple[str, ...]] = {
    "push_to_hub": (
        "repo_id", "commit_message", "commit_description", "private", "token", "revision",
        "create_pr", "max_shard_size", "tags",
    ),
    "add_model_tags": ("tags",),
    "can_generate": (),
    "dequantize": (),
    "disable_input_require_grads": (),
    "enable_input_require_grads": (),
    "from_pretrained": (
        "pretrained_model_name_or_path", "model_args", "config", "cache_dir",
        "ignore_mismatched_sizes", "force_download", "local_files_only", "token", "revision",
        "use_safetensors", "weights_only", "kwargs",
    ),
    "get_compiled_call": ("compile_config",),
    "get_decoder": (),
    "get_encoder": ("modality",),
    "get_expanded_tied_weights_keys": ("all_submodels",),
    "get_memory_footprint": ("return_buffers",),
    "get_parameter_or_buffer": ("target",),
    "gradient_checkpointing_disable": (),
    "gradient_checkpointing_enable": ("gradient_checkpointing_kwargs",),
    "init_weights": (),
    "initialize_weights": (),
    "mark_tied_weights_as_initialized": ("loading_info",),
    "post_init": (),
    "register_for_auto_class": ("auto_class",),
    "resize_token_embeddings": ("new_num_tokens", "pad_to_multiple_of", "mean_resizing"),
    "save_pretrained": (
        "save_directory", "is_main_process", "state_dict", "push_to_hub", "max_shard_size",
        "variant", "token", "save_peft_format", "save_original_format", "kwargs",
    ),
    "set_attn_implementation": ("attn_implementation",),
    "set_decoder": ("decoder",),
    "set_encoder": ("encoder", "modality"),
    "tie_weights": ("missing_keys", "recompute_mapping"),
    "warn_if_padding_and_no_attention_mask": ("input_ids", "attention_mask"),
    "get_extended_attention_mask": ("attention_mask", "input_shape", "device", "dtype"),
    "invert_attention_mask": ("encoder_attention_mask",),
    "num_parameters": ("only_trainable", "exclude_embeddings"),
}  # fmt: skip
"""Every method of the page and its arguments, in the page's order."""


OPTIONAL = {
    ("get_compiled_call", "compile_config"),
    ("mark_tied_weights_as_initialized", "loading_info"),
}
"""Arguments that may be left out here and not in transformers: the page has none for the second."""


@pytest.mark.parametrize("method", PAGE)
def test_every_method_of_the_page_takes_its_arguments(method: str) -> None:
    """Names and order of the arguments are the page's, and defaults those of transformers."""
    here = inspect.signature(getattr(PreTrainedModel, method)).parameters
    names = [name for name in here if name != "self"]
    wanted = list(PAGE[method])
    assert [name for name in names if name in wanted] == wanted
    there = getattr(transformers.PreTrainedModel, method, None)
    if there is None:
        assert method in {"get_extended_attention_mask", "invert_attention_mask"}
        return
    described = inspect.signature(there).parameters
    for name in set(wanted) & set(described):
        if (method, name) not in OPTIONAL:
            assert here[name].default == described[name].default, name
        assert here[name].kind == described[name].kind, name


def test_every_argument_of_loading_and_saving_has_a_row() -> None:
    """No argument of `from_pretrained` and `save_pretrained` is left untried here."""
    tried = {row.split(":")[0] for row in test_loading.ROWS} | {"pretrained_model_name_or_path"}
    assert set(PAGE["from_pretrained"]) <= tried
    saved = {row.split(":")[0] for row in test_saving.ROWS} | {"state_dict", "kwargs"}
    assert set(PAGE["save_pretrained"]) <= saved
    parts = {row.split(":")[0] for row in {**test_embeddings.PARTS, **test_embeddings.TIES}}
    lookups = {"get_encoder", "set_encoder", "get_decoder", "num_parameters", "can_generate"}
    assert lookups | {"tie_weights", "get_memory_footprint", "dequantize"} <= parts


def gradients(model: Any, kind: str) -> dict[str, Any]:
    """Return the gradient of every parameter after one step."""
    model.zero_grad()
    model(**inputs(kind, labels=True)).loss.backward()
    return {name: p.grad is not None for name, p in model.named_parameters()}


def checkpointed(model: Any) -> list[str]:
    """Return the classes of the modules whose flag is set."""
    on = (m for m in model.modules() if getattr(m, "gradient_checkpointing", False))
    return sorted({type(m).__name__ for m in on})


def enabled(*args: Any, **options: Any) -> Callable[[Any, str], Any]:
    """Return an act that enables checkpointing, trains a step and disables it."""

    def act(model: Any, kind: str) -> Any:
        model.train()
        model.gradient_checkpointing_enable(*args, **options)
        found = [model.is_gradient_checkpointing, bool(checkpointed(model)), gradients(model, kind)]
        model.gradient_checkpointing_disable()
        return [*found, model.is_gradient_checkpointing, checkpointed(model)]

    return act


def frozen_inputs(model: Any, kind: str) -> Any:
    """Freeze everything; gradients still reach what is added behind the embeddings."""
    model.requires_grad_(False)
    model.enable_input_require_grads()
    hooks = len(model._require_grads_hooks)
    output = model(**inputs(kind))
    needs = output.logits.requires_grad
    model.disable_input_require_grads()
    after = model(**inputs(kind)).logits.requires_grad
    model.disable_input_require_grads()
    return hooks, needs, after


ACTS: dict[str, Callable[[Any, str], Any]] = {
    "gradient_checkpointing_enable": enabled(),
    "gradient_checkpointing_enable: reentrant": enabled({"use_reentrant": True}),
    "gradient_checkpointing_enable: not reentrant": enabled(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    ),
    "gradient_checkpointing_disable: unasked": lambda model, _: (
        model.gradient_checkpointing_disable(),
        model.is_gradient_checkpointing,
    )[1],
    "enable_input_require_grads": frozen_inputs,
    "disable_input_require_grads: unasked": lambda model, _: model.disable_input_require_grads(),
    "loss": lambda model, kind: gradients(model.train(), kind),
}
TRAINED = ("user", "untied", "llama", "llama tied", "bert", "gpt2")


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("name", ACTS)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")
def test_training(name: str, kind: str) -> None:
    """Switches for training have the same effect and the same exceptions."""
    agree(lambda this: ACTS[name](this.model(kind), kind))


@pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")
def test_a_model_without_checkpointing_refuses() -> None:
    """A class that does not declare it cannot be checkpointed."""
    agree(lambda this: this.model("parts").gradient_checkpointing_enable())


def after(method: str) -> Callable[[Any], Any]:
    """Return an act that initialises what is not marked, and says what changed."""

    def act(model: Any) -> Any:
        named = dict(model.named_parameters())
        keep = next(reversed(named))
        for name, parameter in named.items():
            parameter.data.fill_(9.0)
            parameter._is_hf_initialized = name == keep
        for module in model.modules():
            if hasattr(module, "_is_hf_initialized"):
                del module._is_hf_initialized
        torch.manual_seed(2)
        getattr(model, method)()
        found = facts(model)
        return {"weights": found["weights"], "shared": found["shared"]}

    return act


@pytest.mark.parametrize("kind", ["user", "untied", "parts"])
@pytest.mark.parametrize("method", ["init_weights", "initialize_weights", "post_init"])
def test_initial_weights(method: str, kind: str) -> None:
    """Each module is initialised once, by the rule of the model it is in; marked ones are kept."""
    agree(lambda this: after(method)(this.model(kind)))


@pytest.mark.parametrize("kind", MODELS)
def test_fresh_models_are_drawn_alike(kind: str) -> None:
    """Constant parameters of a fresh model are equal, others have the same spread."""

    def act(this: Side) -> Any:
        torch.manual_seed(0)
        model = this.cls(kind)(this.config(kind))
        return {n: bool(p.std(correction=0) == 0) for n, p in model.named_parameters()}

    agree(act)


ATTENTION: dict[str, Any] = {
    "eager": "eager",
    "sdpa": "sdpa",
    "nonsense": "nonsense",
    "flash_attention_2": "flash_attention_2",
    "flash_attention_3": "flash_attention_3",
    "by part": {"": "eager"},
    "by parts": {"text_config": "sdpa", "": "eager"},
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str, kind: str) -> None:
    """A choice of attention is taken, for the whole or a part, or refused, as in transformers."""

    def act(this: Side) -> Any:
        model = this.model(kind)
        model.set_attn_implementation(ATTENTION[name])
        parts = {n: getattr(model.config, n)._attn_implementation for n in model.config.sub_configs}
        return model.config._attn_implementation, parts

    agree(act)


@pytest.mark.parametrize("kind", ["user", "llama", "bert"])
@pytest.mark.parametrize(
    ("config", "ids", "mask"),
    [
        ({"pad_token_id": 3}, [[3, 4, 5], [4, 5, 6]], None),
        ({"pad_token_id": 3}, [[4, 5, 3], [4, 5, 6]], None),
        ({"pad_token_id": 3, "eos_token_id": 3}, [[4, 5, 3], [4, 5, 6]], None),
        ({"pad_token_id": 3}, [[4, 3, 5], [4, 5, 6]], None),
        ({"pad_token_id": 3}, [[3, 4, 5], [4, 5, 6]], [[0, 1, 1], [1, 1, 1]]),
        ({"pad_token_id": None}, [[3, 4, 5], [4, 5, 6]], None),
    ],
)
def test_padding_is_warned_about(
    kind: str, config: dict[str, Any], ids: Any, mask: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning comes where one comes in transformers, once, and says the same of other tokens."""
    log = logging.getLogger("transformers.modeling_utils")
    logging.getLogger("transformers").propagate = True
    said: dict[str, list[str]] = {}
    for name in (THEIRS, OURS):
        model = side(name).model(kind, **config)
        log.warning_once.__func__.cache_clear() if hasattr(log.warning_once, "__func__") else (
            log.warning_once.cache_clear()
        )
        caplog.clear()
        for _ in range(2):
            model.warn_if_padding_and_no_attention_mask(
                torch.tensor(ids), None if mask is None else torch.tensor(mask)
            )
        said[name] = [record.getMessage() for record in caplog.records if "pad" in record.message]
    logging.getLogger("transformers").propagate = False
    assert len(said[OURS]) == min(1, len(said[THEIRS]))
    if said[THEIRS]:
        same_token = "token" in said[THEIRS][0] and re.search(r"bos|eos|sep", said[THEIRS][0])
        assert bool(re.search(r"bos|eos|sep", said[OURS][0])) == bool(same_token)


MASKS = [
    torch.tensor([[1, 1, 0], [1, 0, 0]]),
    torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]),
    torch.ones(2, 3, 3, dtype=torch.long).tril(),
    torch.ones(2, 0, dtype=torch.long),
    torch.ones(2, 5, dtype=torch.long),
]


@pytest.mark.parametrize("mask", MASKS, ids=lambda m: f"{tuple(m.shape)}{m.dtype}")
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float64])
@pytest.mark.parametrize("is_decoder", [False, True])
def test_masks(mask: torch.Tensor, dtype: torch.dtype | None, is_decoder: bool) -> None:
    """Both masks are 0 where attention goes and the dtype's lowest number elsewhere."""
    model = side(OURS).model("user", is_decoder=is_decoder)
    batch, keys = mask.shape[0], mask.shape[-1]
    queries = 3 if mask.dim() == 3 else min(3, keys)
    extended = model.get_extended_attention_mask(mask, (batch, queries), dtype=dtype)
    kind = dtype or torch.float32
    assert extended.dtype == kind
    for row in range(batch):
        for query in range(extended.shape[2]):
            for key in range(keys):
                visible = bool(mask[row, query, key] if mask.dim() == 3 else mask[row, key])
                if is_decoder and mask.dim() == 2:
                    visible = visible and key <= query + keys - queries
                found = extended[row, 0, query, key].item()
                assert found == (0 if visible else torch.finfo(kind).min)
    inverted = model.invert_attention_mask(mask)
    assert inverted.dtype == model.dtype
    wide = mask[:, None] if mask.dim() == 3 else mask[:, None, None]
    assert torch.equal(inverted == 0, wide.bool())


def test_masks_of_other_shapes_are_refused() -> None:
    """A mask with one dimension or four is no mask; `device` is deprecated."""
    model = side(OURS).model("user")
    for shape in ((3,), (1, 1, 1, 1)):
        with pytest.raises(ValueError, match="dimensions"):
            model.invert_attention_mask(torch.ones(shape))
        with pytest.raises(ValueError, match="Wrong shape"):
            model.get_extended_attention_mask(torch.ones(shape), (1, 1))
    with pytest.warns(FutureWarning, match="device"):
        model.get_extended_attention_mask(torch.ones(1, 2), (1, 2), device=torch.device("cpu"))


def test_what_can_be_recorded_is_declared() -> None:
    """Every native class declares the outputs of transformers', on the class and on its objects."""
    for name, _, _ in KINDS.values():
        theirs = getattr(transformers, name, None)
        if theirs is None:
            continue
        ours = side(OURS).get(name)
        assert ours.can_record_outputs.keys() == (theirs._can_record_outputs or {}).keys(), name
        for part in ours.can_record_outputs.values():
            assert issubclass(part, nn.Module)
    user = type("Fresh", (side(OURS).cls("user"),), {"_can_record_outputs": {"a": nn.Linear}})
    assert user.can_record_outputs == {"a": nn.Linear}
    over = type("Fresh", (side(OURS).cls("user"),), {"can_record_outputs": {"b": nn.Linear}})
    assert over.can_record_outputs == {"b": nn.Linear}


def test_assigning_parameters_is_declared(tmp_path: Path) -> None:
    """`_supports_assign_param_buffer` of a class of one's own loads the same either way."""
    for flag in (True, False):
        base = side(OURS).cls("user")
        fresh = type("Fresh", (base,), {"_supports_assign_param_buffer": flag})
        side(OURS).model("user").save_pretrained(tmp_path)
        loaded = fresh.from_pretrained(tmp_path)
        for name, tensor in side(OURS).model("user").state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)
