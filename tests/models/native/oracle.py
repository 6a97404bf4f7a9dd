"""Tiny random models of transformers beside ours with the same weights, and how they are compared."""

from __future__ import annotations

import functools
import inspect
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers

from ckptd import models

TOLERANCE = 1e-5
ROWS, LENGTH, PAD = 99, 7, 0
RENAMED = {"lm_head.weight": "embed_out.weight"}
"""Names that transformers has at run time, of GPT-NeoX, and those in its files."""
ATTRIBUTES = (
    "base_model_prefix",
    "main_input_name",
    "_keys_to_ignore_on_load_missing",
    "_keys_to_ignore_on_load_unexpected",
    "_keys_to_ignore_on_save",
    "_keep_in_fp32_modules",
    "_keep_in_fp32_modules_strict",
    "_supports_sdpa",
    "supports_gradient_checkpointing",
)
IGNORED_ROW = torch.tensor([[1] * LENGTH, [1] * 4 + [0] * (LENGTH - 4)])
MASKS = {"none": None, "right": IGNORED_ROW, "left": IGNORED_ROW.flip(1)}
"""Padding of the second of two rows."""


@dataclass(frozen=True)
class Pair:
    """One model twice, and the tensors of the file that carried its weights."""

    theirs: Any
    ours: Any
    saved: Mapping[str, torch.Tensor]


@functools.cache
def _pair(name: str, implementation: str, values: tuple[tuple[str, Any], ...], **init: Any) -> Pair:
    return make(name, implementation, dict(values), **init)


def pair(name: str, implementation: str = "eager", /, **values: Any) -> Pair:
    """Return a model of both libraries, in evaluation mode; the same one for the same arguments."""
    return _pair(name, implementation, tuple(sorted(values.items())))


def make(name: str, implementation: str, values: Mapping[str, Any], **init: Any) -> Pair:
    """Return a fresh model of both libraries, every weight off its default."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cls = our_class(name)
    config_class = getattr(transformers, cls.config_class.__name__)
    theirs = getattr(transformers, name)(
        config_class(**values, attn_implementation=implementation), **init
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        saved = safetensors.torch.load_file(Path(folder) / "model.safetensors")
        config = cls.config_class.from_pretrained(folder)
    config._attn_implementation = implementation
    ours = cls(config, **init).eval()
    found = ours.load_state_dict(saved, strict=False)
    assert not found.unexpected_keys
    assert set(found.missing_keys) <= set(ours.all_tied_weights_keys)
    return Pair(theirs, ours, saved)


def our_class(name: str) -> Any:
    """Return our class of that name."""
    return getattr(models, name)


def compare(both: Pair, **inputs: Any) -> Any:
    """Call both with the same inputs, compare every tensor, and return our output."""
    with torch.no_grad():
        expected = both.theirs(**inputs)
        found = both.ours(**inputs)
    same(expected, found)
    return found


def same(expected: Any, found: Any) -> None:
    """Check that both outputs have the same fields with the same values, caches left aside."""
    fields = {
        ("past_key_values" if key == "cache" else key): value
        for key, value in expected.items()
        # Where it records attentions, transformers gives an empty tuple for those there are not.
        if not (isinstance(value, tuple) and not value)
    }
    assert list(fields) == list(found)
    for name, value in fields.items():
        if name != "past_key_values":
            close(value, found[name], name)


def close(expected: Any, found: Any, name: str = "") -> None:
    """Check two tensors, or two nests of tensors."""
    if isinstance(expected, torch.Tensor):
        assert expected.shape == found.shape, name
        worst = (expected.float() - found.float()).abs().max().item()
        assert worst < TOLERANCE, f"{name}: {worst}"
        return
    assert len(expected) == len(found), name
    for index, (one, other) in enumerate(zip(expected, found, strict=True)):
        close(one, other, f"{name}[{index}]")


def same_class(name: str) -> None:
    """Check what a class declares: the attributes, the ties, and the names its forward takes."""
    ours, theirs = our_class(name), getattr(transformers, name)
    for attribute in ATTRIBUTES:
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    ties = theirs._tied_weights_keys or {}
    if name.startswith("GPTNeoX"):
        ties = {RENAMED.get(target, target): source for target, source in ties.items()}
    assert (ours._tied_weights_keys or {}) == ties
    wanted = ["past_key_values" if p == "cache" else p for p in _parameters(theirs.forward)]
    ours_own = _parameters(ours.forward)
    assert ours_own[: len(wanted) - 1] == wanted[:-1]


def same_state(both: Pair) -> None:
    """Check names, order, shapes and dtypes of the state, counts, bytes and buffers."""
    ours, theirs = both.ours, both.theirs
    state = ours.state_dict()
    left_out = set(ours.all_tied_weights_keys)
    assert set(state) - left_out == set(both.saved) - left_out
    assert {name: tensor.shape for name, tensor in both.saved.items()} == {
        name: state[name].shape for name in both.saved
    }
    assert ours.num_parameters() == theirs.num_parameters()
    assert ours.num_parameters(exclude_embeddings=True) == theirs.num_parameters(
        exclude_embeddings=True
    )
    buffers = [
        {name: (b.shape, b.dtype) for name, b in model.named_buffers()} for model in (ours, theirs)
    ]
    assert buffers[0] == buffers[1]


def same_config(config_name: str, **values: Any) -> None:
    """Check that both configuration classes mean the same by the same arguments."""
    name = config_name.removesuffix("Config") + "Model"
    ours = our_class(name).config_class(**values).to_dict()
    theirs = getattr(transformers, config_name)(**values).to_dict()
    assert ours == theirs


def stepwise(both: Pair, steps: Iterable[int], mask: torch.Tensor, **inputs: Any) -> None:
    """Feed `input_ids` in pieces of the given lengths through the caches of both, and compare.

    The last piece's output must also be that of one call with everything.
    """
    ids = inputs.pop("input_ids")
    kept_name = "cache" if "cache" in _parameters(both.theirs.forward) else "past_key_values"
    cache: Any = None
    their_cache: Any = None
    start = 0
    with torch.no_grad():
        for stop in steps:
            given = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop], **inputs}
            expected = both.theirs(**given, use_cache=True, **{kept_name: their_cache})
            found = both.ours(**given, use_cache=True, past_key_values=cache)
            same(expected, found)
            cache, their_cache, start = found.past_key_values, expected[kept_name], stop
        whole = both.ours(input_ids=ids, attention_mask=mask, use_cache=False, **inputs)
    assert cache.get_seq_length() == ids.shape[1]
    # Padding rows that see nothing differ by how many keys they average.
    close(whole[0][:, -1:], found[0][:, -1:])


def same_gradients(model: Any, **inputs: Any) -> None:
    """Check that checkpointing changes no gradient, and that no cache is written meanwhile."""
    model.train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        output = model(**inputs)
        output.loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert getattr(output, "past_key_values", None) is None
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def ids(rows: int = 2, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    """Return random token ids without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, ROWS, (rows, length), generator=generator)


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return random numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)
