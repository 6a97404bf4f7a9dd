"""Tensors that share memory: which names a save writes, and which tie flags it must write False.

A file of safetensors holds every name once, with bytes of its own. A name is left out only where
loading will give it back: it is declared tied to another (by a model whose configuration says so),
and both really are the same memory. Everything else is written, each name with its own content:

- shared although the configuration says untied: both are written (the original drops one, and a
  reload fills it with random numbers);
- declared tied but holding different values (an adapter was merged into one of them): both are
  written, and the flag of the configuration that declares the tie is written False, so that no
  loader ties them again (the original leaves it True);
- sharing that nobody declared, whole or in part: both are written, with a warning (the original
  raises RuntimeError and ends the training run). A reload gives equal values that are not shared.

Decided from memory and values; no file is touched and no tensor is copied.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What a save writes."""

    tensors: dict[str, torch.Tensor]
    """Name -> tensor, in the order given; tied names left out."""
    untied: tuple[Any, ...]
    """Configurations whose `tie_word_embeddings` must be written False."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Owner:
    """A model, inside or outermost, and the ties its own configuration asks for."""

    config: Any
    pairs: dict[str, str]


def decide(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Decision:
    """Return which of `tensors` to write; the module docstring has the rule.

    Args:
        model: asked, with every model inside it, for `get_expanded_tied_weights_keys`.
        tensors: the state to be saved, by full name; all with data.
    """
    owners = list(_owners(model))
    untied = {id(owner.config): owner for owner in owners if _has_diverged(owner, tensors)}
    declared: dict[str, str] = {}
    for owner in owners:
        if id(owner.config) not in untied:
            declared |= owner.pairs
    dropped: set[str] = set()
    for names in _by_storage(tensors).values():
        dropped |= _dropped(names, tensors, declared)
    return Decision(
        tensors={name: tensor for name, tensor in tensors.items() if name not in dropped},
        untied=tuple(owner.config for owner in untied.values()),
    )


def is_same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both are the same elements at the same place."""
    return _place(one) == _place(other)


def _owners(model: nn.Module) -> Iterator[_Owner]:
    for prefix, module in model.named_modules(remove_duplicate=False):
        expand = getattr(module, "get_expanded_tied_weights_keys", None)
        if expand is None:
            continue
        dot = f"{prefix}." if prefix else ""
        own: Mapping[str, str] = expand(all_submodels=False)
        pairs = {f"{dot}{target}": f"{dot}{source}" for target, source in own.items()}
        yield _Owner(config=getattr(module, "config", None), pairs=pairs)


def _has_diverged(owner: _Owner, tensors: Mapping[str, torch.Tensor]) -> bool:
    for target, source in owner.pairs.items():
        one, other = tensors.get(target), tensors.get(source)
        if one is None or other is None or is_same_memory(one, other) or _is_equal(one, other):
            continue
        _log.warning(
            "%s and %s are declared tied but hold different values: both are saved, and the saved "
            "config says tie_word_embeddings=False",
            target,
            source,
        )
        return True
    return False


def _is_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other.to(one.device))


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)


def _by_storage(tensors: Mapping[str, torch.Tensor]) -> dict[tuple[Any, ...], list[str]]:
    """Return the names of each storage that has more than one; empty tensors share nothing."""
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        if tensor.numel():
            groups[tensor.device, tensor.untyped_storage().data_ptr()].append(name)
    return {place: names for place, names in groups.items() if len(names) > 1}


def _dropped(
    names: list[str], tensors: Mapping[str, torch.Tensor], declared: Mapping[str, str]
) -> set[str]:
    """Return the names of one storage that a loader restores from another of them."""
    classes: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name in names:
        classes[_place(tensors[name])].append(name)
    dropped: set[str] = set()
    kept: list[str] = []
    for same in classes.values():
        restored = [name for name in same if _is_restored(name, set(same), declared)]
        if len(restored) == len(same):
            restored.remove(max(same))
        dropped |= set(restored)
        kept += [name for name in same if name not in restored]
    overlapping = _overlapping(kept, tensors)
    if overlapping:
        _log.warning(
            "%s share memory, but no tie that the configuration asks for declares it: each is "
            "saved with its own content",
            ", ".join(overlapping),
        )
    return dropped


def _is_restored(name: str, same: set[str], declared: Mapping[str, str]) -> bool:
    """Whether following the declared ties from `name` leads to another name of the same memory."""
    seen = {name}
    source = declared.get(name)
    while source is not None and source not in seen:
        if source in same:
            return True
        seen.add(source)
        source = declared.get(source)
    return False


def _overlapping(names: list[str], tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names whose byte ranges meet another's, in the order of their place."""
    ranges = sorted((*_range(tensors[name]), name) for name in names)
    found: dict[str, None] = {}
    last, last_end = "", -1
    for begin, end, name in ranges:
        if begin < last_end:
            found |= {last: None, name: None}
        if end > last_end:
            last, last_end = name, end
    return list(found)


def _range(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the addresses of the first byte and of the one after the last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((length - 1) * stride for length, stride in steps)
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size()
