"""Tied weights of a module: which names are one parameter, and making them so.

Works on any `PreTrainedModel`; the maps are the documented ones, `{target: source}`, whose keys and
values name parameters, modules or patterns. What is published of tied tensors is decided in
`tying`; here nothing is compared but what loading asks for.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from ckptd.models.base import PreTrainedModel

_PLAIN = re.compile(r"[A-Za-z0-9_.]+\.(weight|bias)")
"""A full parameter name; anything else is a module or a pattern and is looked up."""
_log = logging.getLogger(__name__)


def expanded(model: PreTrainedModel, *, all_submodels: bool) -> dict[str, str]:
    """Return `{target: source}` with full parameter names, as the configurations say now.

    Args:
        model: the model.
        all_submodels: of every model inside, too, each asked for its own configuration.

    Raises:
        ValueError: a pattern matches nothing, or targets and sources do not pair up.
    """
    if not all_submodels:
        return _own(model)
    found: dict[str, str] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if hasattr(module, "get_expanded_tied_weights_keys"):
            dot = f"{prefix}." if prefix else ""
            own = module.get_expanded_tied_weights_keys(all_submodels=False)
            found |= {f"{dot}{target}": f"{dot}{source}" for target, source in own.items()}
    return found


def with_children(model: PreTrainedModel) -> dict[str, str]:
    """Return the model's own map and those of its direct children, which know theirs already."""
    found = model.get_expanded_tied_weights_keys(all_submodels=False)
    for name, child in model.named_children():
        inner: Mapping[str, str] | None = getattr(child, "all_tied_weights_keys", None)
        found |= {
            f"{name}.{target}": f"{name}.{source}" for target, source in (inner or {}).items()
        }
    return found


def tie(model: nn.Module, pairs: Iterable[tuple[str, str]]) -> None:
    """Make each target the same parameter as its source; a bias beside it gets as many rows."""
    for target, source in pairs:
        path, _, leaf = target.rpartition(".")
        parent = model.get_submodule(path)
        parameter = _at(model, source)
        setattr(parent, leaf, parameter)
        _fit(parent, leaf, parameter)


def settle(model: PreTrainedModel, missing_keys: set[str]) -> list[tuple[str, str]]:
    """Return the pairs to tie after loading, given the names that the checkpoint did not have.

    Tying is symmetric: where only the target was there, it is the source. Where both were there and
    hold different values they stay apart: the pair leaves `model.all_tied_weights_keys`, and
    `config.tie_word_embeddings` becomes False, so that a later save keeps both. Names that will be
    tied leave `missing_keys`; where none of a group was there, all stay, for nothing is known.
    """
    pairs = []
    apart = []
    mapping = model.all_tied_weights_keys
    for target, source in list(mapping.items()):
        here = {name: name not in missing_keys for name in (target, source)}
        if here[target] and here[source]:
            if not _equal(_at(model, target), _at(model, source)):
                apart.append((target, source))
                continue
            pairs.append((target, source))
        elif here[source]:
            pairs.append((target, source))
            missing_keys.discard(target)
        else:
            holder = target if here[target] else _other(mapping, source, missing_keys)
            if holder is None:
                _log.warning(
                    "neither %s nor anything tied to it is in the checkpoint: it seems corrupt",
                    source,
                )
                pairs.append((target, source))
                continue
            pairs += [(name, holder) for name in (source, target) if name != holder]
            missing_keys -= {source, target}
            tie(model, pairs[-2:])
    for target, source in apart:
        _log.warning(
            "%s and %s are tied by the configuration but differ in the checkpoint: kept apart",
            target,
            source,
        )
        del mapping[target]
    if apart:
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False
    return pairs


def _own(model: PreTrainedModel) -> dict[str, str]:
    wanted = getattr(model.config, "tie_word_embeddings", False)
    mapping: Mapping[str, str] | None = model._tied_weights_keys
    if not wanted or mapping is None:
        return {}
    if all(_PLAIN.fullmatch(name) for pair in mapping.items() for name in pair):
        return dict(mapping)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in model.named_buffers(remove_duplicate=False)]
    found: dict[str, str] = {}
    for target, source in mapping.items():
        for one, other in _matched(target, source, names, type(model).__name__):
            found[one] = found.get(other, other)
    return found


def _matched(target: str, source: str, names: Collection[str], owner: str) -> list[tuple[str, str]]:
    """Return the names that both patterns mean, the sources repeated as often as needed."""
    sources = sorted(name for name in names if re.match(source, name))
    targets = sorted(name for name in names if re.match(target, name))
    if not sources or not targets or len(targets) % len(sources):
        raise ValueError(
            f"{owner}: tied weights {target!r} -> {source!r} match {len(targets)} and "
            f"{len(sources)} parameters; the first must be a multiple of the second, and neither "
            "nothing"
        )
    return list(zip(targets, itertools.cycle(sources), strict=False))


def _other(mapping: Mapping[str, str], source: str, missing: Collection[str]) -> str | None:
    """Return another target of `source` that the checkpoint had."""
    tied = (target for target, its in mapping.items() if its == source)
    return next((target for target in tied if target not in missing), None)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or (one.shape == other.shape and torch.equal(one, other.to(one)))


def _at(model: nn.Module, name: str) -> Any:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def _fit(parent: nn.Module, leaf: str, weight: torch.Tensor) -> None:
    """Give a head's bias and sizes the rows of the weight it was tied to."""
    if leaf != "weight" or weight.dim() < 2:
        return
    bias = getattr(parent, "bias", None)
    if isinstance(bias, nn.Parameter) and len(bias) != len(weight):
        bias.data = functional.pad(bias.data, (0, len(weight) - len(bias)))
    if isinstance(parent, nn.Linear):
        parent.out_features = len(weight)
    elif isinstance(parent, nn.Embedding):
        parent.num_embeddings = len(weight)
