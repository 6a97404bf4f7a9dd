"""Rotary position settings in one form, whichever form a config.json has them in.

transformers 4 wrote `rope_theta`, `rope_scaling` (with "type" or "rope_type") and
`partial_rotary_factor` side by side; transformers 5 writes one `rope_parameters` dict, or one for
each kind of layer. Pure: values in, the dict of transformers 5 out. What the numbers do is not
known here (rope.py).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

LAYER_KINDS = frozenset(
    {"full_attention", "sliding_attention", "chunked_attention", "linear_attention"}
)
"""Keys under which `rope_parameters` may hold one dict for each kind of layer."""

_LONG_CONTEXT = frozenset({"llama3", "yarn", "longrope"})
"""Types that need the context length of pre-training."""

_REQUIRED = {
    "default": {"rope_type"},
    "linear": {"rope_type", "factor"},
    "dynamic": {"rope_type", "factor"},
    "yarn": {"rope_type", "factor", "original_max_position_embeddings"},
    "longrope": {
        "rope_type",
        "short_factor",
        "long_factor",
        "original_max_position_embeddings",
    },
    "llama3": {
        "rope_type",
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
    "proportional": {"rope_type", "rope_theta"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeKeys:
    """How an architecture names and defaults its rotary settings.

    `theta` and `partial` are the old top-level keys; `default_partial` stands in the result even
    when no file says it. `layers` maps each kind of layer to its old key of the base and to its
    default (Gemma 3). `type_aliases` renames types (Phi-3 reads "su" and "yarn" as "longrope").
    """

    theta: str = "rope_theta"
    partial: str = "partial_rotary_factor"
    default_theta: float = 10_000.0
    default_partial: float | None = None
    layers: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    type_aliases: Mapping[str, str] = field(default_factory=dict)


def standardised(
    parameters: dict[str, Any] | None,
    *,
    old: dict[str, Any],
    keys: RopeKeys,
    layer_types: Iterable[str] | None,
    max_positions: int | None,
    original_max_positions: int | None,
) -> dict[str, Any]:
    """Return `rope_parameters` as transformers 5 has them; old keys used are taken out of `old`.

    `parameters` is left as it is. `original_max_positions` is the model's own field of that name,
    which wins (Phi-3); without it `max_positions` stands in where the type needs one.

    Raises:
        KeyError: the type of rotary embedding lacks a key that it needs.
    """
    scaling = old.pop("rope_scaling", None)
    if keys.layers:
        result = _by_layer(parameters, scaling, old=old, keys=keys)
    else:
        result = _filled(scaling or parameters, old=old, keys=keys, layer_types=layer_types)
    nested = _nested_keys(result, layer_types)
    for part in [result[key] for key in nested] if nested else [result]:
        if part is not None:
            _complete(part, keys, max_positions, original_max_positions)
    return result


def _by_layer(
    parameters: dict[str, Any] | None,
    scaling: dict[str, Any] | None,
    *,
    old: dict[str, Any],
    keys: RopeKeys,
) -> dict[str, Any]:
    """One dict a kind of layer; old scaling belongs to the layers with full attention."""
    result = copy.deepcopy(parameters or {})
    for kind, (theta_key, default) in keys.layers.items():
        part = result.get(kind) or {"rope_type": "default"}
        if scaling is not None and kind == "full_attention":
            part.update(scaling)
        theta = old.pop(theta_key, default)
        part.setdefault("rope_theta", theta)
        result[kind] = part
    return result


def _filled(
    parameters: dict[str, Any] | None,
    *,
    old: dict[str, Any],
    keys: RopeKeys,
    layer_types: Iterable[str] | None,
) -> dict[str, Any]:
    """The base and the rotated share put where they belong, in one dict or in each nested one."""
    result = copy.deepcopy(parameters or {})
    theta = old.pop(keys.theta, keys.default_theta)
    partial = old.pop(keys.partial, keys.default_partial)
    nested = _nested_keys(result, layer_types)
    for part in [result[key] for key in nested] if nested else [result]:
        if part is None:
            continue
        part.setdefault("rope_theta", theta)
        if partial is not None:
            part.setdefault("partial_rotary_factor", partial)
    return result


def _nested_keys(parameters: dict[str, Any], layer_types: Iterable[str] | None) -> list[str]:
    labels = LAYER_KINDS if layer_types is None else frozenset(layer_types)
    return [key for key in parameters if key in labels]


def _complete(
    part: dict[str, Any], keys: RopeKeys, max_positions: int | None, original: int | None
) -> None:
    """Give one dict its type and what the type needs."""
    part.setdefault("rope_type", part.get("type", "default"))
    part["rope_type"] = keys.type_aliases.get(part["rope_type"], part["rope_type"])
    if part["rope_type"] in _LONG_CONTEXT:
        if original is not None:
            part["original_max_position_embeddings"] = original
        elif max_positions is not None:
            part.setdefault("original_max_position_embeddings", max_positions)
    missing = _REQUIRED.get(part["rope_type"], set()) - part.keys()
    if missing:
        raise KeyError(
            f"rope_parameters of type {part['rope_type']!r} lack {', '.join(sorted(missing))}"
        )
