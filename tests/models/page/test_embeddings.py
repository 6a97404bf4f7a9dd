"""Ties, embeddings, counts and parts, one row a method, argument and edge, beside transformers."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from tests.models.page.sides import OURS, Side, agree, facts, place, side

MODELS = ("user", "untied", "parts", "llama", "llama tied", "bert", "gpt2", "t5")
ACTS = dict[str, Callable[[Any, Side], Any]]


@dataclass(frozen=True, kw_only=True)
class Resize:
    """One call of `resize_token_embeddings`."""

    options: dict[str, Any]
    better: type[Exception] | None = None


RESIZES: dict[str, Resize] = {
    "nothing": Resize(options={}),
    "grow": Resize(options={"new_num_tokens": 37}),
    "same": Resize(options={"new_num_tokens": 29}),
    "shrink": Resize(options={"new_num_tokens": 7}),
    "to one": Resize(options={"new_num_tokens": 1}),
    "negative": Resize(options={"new_num_tokens": -1}),
    "pad": Resize(options={"pad_to_multiple_of": 16}),
    "pad by one": Resize(options={"pad_to_multiple_of": 1}),
    "grow and pad": Resize(options={"new_num_tokens": 33, "pad_to_multiple_of": 8}),
    "shrink and pad": Resize(options={"new_num_tokens": 5, "pad_to_multiple_of": 8}),
    "pad by text": Resize(options={"pad_to_multiple_of": "8"}),
    "pad by a float": Resize(options={"pad_to_multiple_of": 8.0}),
    "pad by nothing": Resize(options={"pad_to_multiple_of": 0}, better=ValueError),
    "plain": Resize(options={"new_num_tokens": 37, "mean_resizing": False}),
    "plain and pad": Resize(options={"pad_to_multiple_of": 64, "mean_resizing": False}),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", RESIZES)
def test_resizing(name: str, kind: str) -> None:
    """Shapes, old rows, sizes, ties and configuration are those of transformers."""
    row = RESIZES[name]

    def act(this: Side) -> dict[str, Any]:
        model = this.model(kind)
        before = {n: len(t) for n, t in model.state_dict().items() if t.dim()}
        embedding = model.resize_token_embeddings(**row.options)
        assert embedding is model.get_input_embeddings()
        found = facts(model)
        state = found.pop("weights")
        head = model.get_output_embeddings()
        return found | {
            "shapes": {n: (tuple(t.shape), t.dtype) for n, t in state.items()},
            "old rows": {n: t[: before[n]] for n, t in state.items() if n in before},
            "sizes": (embedding.num_embeddings, embedding.padding_idx),
            "head": None if head is None else head.weight.shape[0],
        }

    agree(act, better=row.better)


@pytest.mark.parametrize("kind", ["user", "untied"])
def test_new_rows_follow_the_rule_of_the_class(kind: str) -> None:
    """Without mean resizing new rows, and biases, are what the user's `_init_weights` makes them."""

    def act(this: Side) -> dict[str, Any]:
        model = this.model(kind)
        model.resize_token_embeddings(20, mean_resizing=False)
        return dict(model.state_dict())

    ours = agree(act)
    assert ours["model.embed_tokens.weight"][13:].unique().tolist() == [1.0]


def test_a_rule_sees_the_whole_matrix() -> None:
    """A rule that looks at the shape sees the one with all rows."""
    seen = []

    def act(this: Side) -> None:
        model = this.model("untied")
        model._init_weights = lambda module: seen.append(tuple(module.weight.shape))
        model.resize_token_embeddings(20, mean_resizing=False)

    agree(act)
    assert seen == [(20, 8)] * 4


@pytest.mark.parametrize("kind", MODELS)
def test_a_mean_is_repeated_where_the_covariance_is_not_definite(kind: str) -> None:
    """Rows that are all alike give new rows that are exactly the same."""

    def act(this: Side) -> Any:
        model = this.model(kind)
        with torch.no_grad():
            model.get_input_embeddings().weight.fill_(0.5)
        model.resize_token_embeddings(40)
        return model.get_input_embeddings().weight.detach()

    agree(act)


def test_a_padding_index_beyond_the_end_is_forgotten() -> None:
    """Shrinking below the pad token leaves the configuration's token and takes the module's."""

    def act(this: Side) -> Any:
        model = this.model("user", pad_token_id=12)
        embedding = model.resize_token_embeddings(5)
        return embedding.padding_idx, model.config.pad_token_id, model.config.vocab_size

    assert agree(act) == (None, 12, 5)


@pytest.mark.parametrize("kind", MODELS)
def test_frozen_rows_stay_frozen(kind: str) -> None:
    """What did not train before does not train after; a bias of the head that did still does."""

    def act(this: Side) -> Any:
        model = this.model(kind)
        model.get_input_embeddings().weight.requires_grad_(False)
        model.resize_token_embeddings(40)
        return [name for name in facts(model)["frozen"] if not name.endswith(".bias")]

    agree(act)
    model = side(OURS).model("bert")
    model.get_input_embeddings().weight.requires_grad_(False)
    model.resize_token_embeddings(40)
    assert model.cls.predictions.bias.requires_grad


def untie(model: Any) -> None:
    """Say that nothing is tied any more; the parameters stay shared."""
    model.config.tie_word_embeddings = False


TIES: ACTS = {
    "tie_weights": lambda model, _: model.tie_weights(),
    "tie_weights: recompute_mapping false": lambda model, _: model.tie_weights(
        recompute_mapping=False
    ),
    "tie_weights: after the flag": lambda model, _: (untie(model), model.tie_weights())[1],
    "tie_weights: after the flag, by the map": lambda model, _: (
        untie(model),
        model.tie_weights(recompute_mapping=False),
    )[1],
    "get_expanded_tied_weights_keys": lambda model, _: model.get_expanded_tied_weights_keys(),
    "get_expanded_tied_weights_keys: all": lambda model, _: model.get_expanded_tied_weights_keys(
        all_submodels=True
    ),
    "all_tied_weights_keys": lambda model, _: model.all_tied_weights_keys,
}


FORGOTTEN = "tie_weights: after the flag"
"""Where ours forgets a tie that the configuration has taken back, so that a save keeps both."""


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", TIES)
def test_ties(name: str, kind: str) -> None:
    """What is tied, and what is one afterwards, is as in transformers."""

    def act(this: Side) -> Any:
        model = this.model(kind)
        answer = TIES[name](model, this)
        kept = {} if name == FORGOTTEN else {"map": model.all_tied_weights_keys}
        return {"answer": answer} | kept | facts(model)

    agree(act)


@pytest.mark.parametrize("kind", ["user", "llama tied", "bert", "parts"])
def test_parameters_that_were_replaced_are_tied_again(kind: str) -> None:
    """A bare call ties whatever the values are: the target becomes the source."""

    def act(this: Side) -> Any:
        model = this.model(kind)
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(torch.ones_like(head.weight))
        model.tie_weights()
        return facts(model)

    agree(act)


@pytest.mark.parametrize("kind", ["user", "llama tied", "bert"])
@pytest.mark.parametrize("missing", ["target", "source", "both", "neither"])
@pytest.mark.parametrize("equal", [True, False])
def test_ties_with_missing_keys(kind: str, missing: str, equal: bool) -> None:
    """Tying is symmetric for what is missing; what is tied is not missing any more."""

    def act(this: Side) -> Any:
        model = this.model(kind)
        target, source = next(p for p in model.all_tied_weights_keys.items() if "weight" in p[0])
        head = model.get_output_embeddings()
        value = head.weight.detach().clone()
        head.weight = nn.Parameter(value if equal else value + 1)
        names = {"target": {target}, "source": {source}, "both": {target, source}}
        keys = set(names.get(missing, set()))
        model.tie_weights(missing_keys=keys, recompute_mapping=False)
        found = facts(model)
        if missing == "neither" and not equal:
            # Ours also corrects the flag, so that a later save keeps both.
            found.pop("config")
        return {"missing": sorted(keys)} | found

    agree(act)


@pytest.mark.parametrize("kind", MODELS)
def test_tied_weights_are_marked(kind: str) -> None:
    """Targets of ties are marked as initialised, others are not."""

    def act(this: Side) -> Any:
        model = this.model(kind)
        for parameter in model.parameters():
            parameter._is_hf_initialized = False
        model.mark_tied_weights_as_initialized(types.SimpleNamespace(missing_keys=set()))
        return sorted(n for n, p in model.named_parameters() if p._is_hf_initialized)

    agree(act)


def replaced(method: str) -> Callable[[Any, Side], Any]:
    """Return an act that sets a fresh module and says where it went."""

    def act(model: Any, _: Side) -> Any:
        fresh = nn.Embedding(3, 4) if "input" in method else nn.Linear(4, 3)
        getattr(model, method)(fresh)
        return [name for name, module in model.named_modules() if module is fresh]

    return act


def moved(setter: str, getter: str, **options: Any) -> Callable[[Any, Side], Any]:
    """Return an act that replaces a part and says where it went and whether it is found."""

    def act(model: Any, _: Side) -> Any:
        fresh = nn.Linear(1, 1)
        getattr(model, setter)(fresh, **options)
        where = [name for name, module in model.named_modules() if module is fresh]
        return where, getattr(model, getter)(**options) is fresh if where else None

    return act


PARTS: ACTS = {
    "get_input_embeddings": lambda m, _: place(m, m.get_input_embeddings()),
    "get_output_embeddings": lambda m, _: place(m, m.get_output_embeddings()),
    "set_input_embeddings": replaced("set_input_embeddings"),
    "set_output_embeddings": replaced("set_output_embeddings"),
    "get_encoder": lambda m, _: place(m, m.get_encoder()),
    "get_encoder: image": lambda m, _: place(m, m.get_encoder(modality="image")),
    "get_encoder: video": lambda m, _: place(m, m.get_encoder(modality="video")),
    "get_encoder: audio": lambda m, _: place(m, m.get_encoder(modality="audio")),
    "get_encoder: nonsense": lambda m, _: place(m, m.get_encoder(modality="smell")),
    "get_decoder": lambda m, _: place(m, m.get_decoder()),
    "set_encoder": moved("set_encoder", "get_encoder"),
    "set_encoder: audio": moved("set_encoder", "get_encoder", modality="audio"),
    "set_encoder: image": moved("set_encoder", "get_encoder", modality="image"),
    "base_model": lambda m, _: place(m, m.base_model),
    "can_generate": lambda m, _: (m.can_generate(), type(m).can_generate()),
    "get_memory_footprint": lambda m, _: m.get_memory_footprint(),
    "get_memory_footprint: parameters": lambda m, _: m.get_memory_footprint(return_buffers=False),
    "num_parameters": lambda m, _: m.num_parameters(),
    "num_parameters: trainable": lambda m, _: (
        next(iter(m.parameters())).requires_grad_(False),
        m.num_parameters(only_trainable=True),
    )[1],
    "num_parameters: without embeddings": lambda m, _: m.num_parameters(exclude_embeddings=True),
    "num_parameters: both": lambda m, _: (
        next(iter(m.parameters())).requires_grad_(False),
        m.num_parameters(only_trainable=True, exclude_embeddings=True),
    )[1],
    "get_parameter_or_buffer": lambda m, _: {
        name: m.get_parameter_or_buffer(name) for name in m.state_dict()
    },
    "get_parameter_or_buffer: buffers": lambda m, _: {
        name: m.get_parameter_or_buffer(name) for name, _ in m.named_buffers()
    },
    "get_parameter_or_buffer: nothing": lambda m, _: m.get_parameter_or_buffer("not.there"),
    "get_parameter_or_buffer: module": lambda m, _: m.get_parameter_or_buffer(
        next(name for name, _ in m.named_children())
    ),
    "get_parameter_or_buffer: extra state": lambda m, _: m.get_parameter_or_buffer("_extra_state"),
    "device and dtype": lambda m, _: (m.device, m.dtype, m.half().dtype),
    "main_input_name": lambda m, _: (m.main_input_name, m.base_model_prefix),
    "dequantize": lambda m, _: m.dequantize(),
}
DIFFERENT = {
    # The original drops what it is given, or replaces a part it would not find again.
    ("set_encoder: image", "parts"),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", PARTS)
def test_parts_and_counts(name: str, kind: str) -> None:
    """Every lookup, replacement and count answers as in transformers."""
    if (name, kind) in DIFFERENT:
        return
    agree(lambda this: PARTS[name](this.model(kind), this))
