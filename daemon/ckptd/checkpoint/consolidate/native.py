"""Tensors with a trainer's own names as transformers has them, checked against the config.

Names are mapped by the tables of `dialects`, rows moved and stacked experts taken apart as there.
A trainer's names for a model type that is in no table stay as they are (`names.notes` says so);
those of a known one must fit the config exactly, for a wrong number of heads would give a model that
loads and speaks nonsense.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptd.checkpoint.consolidate import dialects, names, rearrange
from ckptd.checkpoint.consolidate.dialects import Dialect
from ckptd.checkpoint.header import StoredTensor
from ckptd.checkpoint.pieces import Assembled, Tensor
from ckptd.errors import CheckpointUnsupported

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_NUM_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
_ASSETS = "name the folder of the model that was trained with `assets:` (--assets)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Translated:
    """Tensors by the names that transformers has, each one's former name, and what to say of it."""

    tensors: Mapping[str, Tensor]
    former: Mapping[str, str]
    note: str


def translate(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    base: Collection[str],
    path: Path,
) -> Translated | None:
    """Return the tensors under the names that transformers has; None: not to translate.

    `base` are the names of the model that was trained, if known: the result must be among them.

    Raises:
        CheckpointUnsupported: a tensor has no place in the model, or the config does not fit.
    """
    text = _text(config)
    plain, dialect = _plain(tensors, text.get("model_type"))
    if dialect is None:
        return None
    _require_fit(plain, dialect, text, path)
    made: dict[str, Tensor] = {}
    former: dict[str, str] = {}
    for name, tensor in plain.items():
        for one in _translated(name, tensor, dialect, text, path):
            made[one.spec.name] = one
            former[one.spec.name] = tensor.spec.name
    strangers = sorted(made.keys() - set(base)) if base else []
    if strangers and strangers != ["lm_head.weight"]:
        raise CheckpointUnsupported(
            "its tensors are not those of the base model",
            path=path,
            tensor=strangers[0],
            hint=_ASSETS,
        )
    note = f"names of {dialect.trainer} for {text['model_type']} became those of transformers"
    return Translated(tensors=made, former=former, note=note)


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) and "model_type" not in config else config


def _plain(
    tensors: Mapping[str, Tensor], model_type: Any
) -> tuple[Mapping[str, Tensor], Dialect | None]:
    """Return the tensors without wrappers' and containers' names, and the dialect of the rest."""
    plain = {names.unwrapped(name): tensor for name, tensor in tensors.items()}
    for prefix in names.prefixes(plain):
        inner = {name.removeprefix(prefix): tensor for name, tensor in plain.items()}
        dialect = _dialect(inner, model_type)
        if dialect is not None and len(inner) == len(tensors):
            return inner, dialect
    return tensors, None


def _dialect(held: Collection[str], model_type: Any) -> Dialect | None:
    patterns = {_NUMBER.sub("{}", name, count=1) for name in held}
    return next(
        (
            dialect
            for dialect in dialects.DIALECTS
            if dialect.sign in patterns and model_type in dialect.model_types
        ),
        None,
    )


def _translated(
    name: str, tensor: Tensor, dialect: Dialect, config: Mapping[str, Any], path: Path
) -> list[Tensor]:
    number = _NUMBER.search(name)
    layer = number[0] if number else ""
    pattern = _NUMBER.sub("{}", name, count=1)
    if pattern in dialect.unneeded:
        return []
    if pattern in dialect.experts:
        count = next((config[key] for key in _NUM_EXPERTS if type(config.get(key)) is int), 0)
        into = dialect.experts[pattern]
        each = [into.format(layer, expert) for expert in range(max(0, min(count, 1 << 16)))]
        return rearrange.entries(tensor, each, path=path)
    if pattern in dialect.single:
        into = dialect.single[pattern].format(layer)
        if len(tensor.spec.shape) == 2:
            return [_renamed(tensor, into)]
        return rearrange.entries(tensor, [into], path=path)
    if pattern in dialect.rotary:
        heads = _heads(config, dialect.rotary[pattern])
        into = dialect.names[pattern].format(layer)
        return [rearrange.halves_together(tensor, into, heads, path=path)]
    if pattern in dialect.names:
        return [_renamed(tensor, dialect.names[pattern].format(layer))]
    if dialect.keeps_others:
        return [_renamed(tensor, name)]
    raise CheckpointUnsupported(
        f"{dialect.trainer} has a tensor that transformers' {config['model_type']} has not",
        path=path,
        tensor=name,
        hint="save with the trainer's Hugging Face option",
    )


def _heads(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key, config.get("num_attention_heads"))
    return value if type(value) is int else 0


def _require_fit(
    tensors: Mapping[str, Tensor], dialect: Dialect, config: Mapping[str, Any], path: Path
) -> None:
    """Compare what the config says with the shapes of the tensors.

    Raises:
        CheckpointUnsupported: they differ; names the config's key.
    """
    into = {_NUMBER.sub("{}", n, count=1): t.spec.shape for n, t in tensors.items()}
    shapes = {dialect.names.get(name, name): shape for name, shape in into.items()}
    layers = {int(match[1]) for name in tensors if (match := _LAYER.search(name))}
    found: dict[str, Any] = {"num_hidden_layers": len(layers)}
    embedding = shapes.get("model.embed_tokens.weight", ())
    if len(embedding) == 2:
        found |= {"hidden_size": embedding[1]}
    if layers != set(range(len(layers))):
        found["num_hidden_layers"] = max(layers) + 1
    for name, key in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        shape = shapes.get(f"model.layers.{{}}.self_attn.{name}.weight", ())
        size = _head_size(config)
        if len(shape) == 2 and size and dialect is not dialects.DEEPSEEK_V3:
            found[key] = shape[0] / size
            config = {key: _heads(config, key), **config}
    for key, value in found.items():
        if config.get(key) != value:
            raise CheckpointUnsupported(
                f"config.json does not fit its tensors: {key}",
                path=path,
                expected=f"{value:g}",
                found=f"{config.get(key)}",
                hint=_ASSETS,
            )


def _head_size(config: Mapping[str, Any]) -> int:
    size, width = config.get("head_dim"), config.get("hidden_size")
    if type(size) is int:
        return size
    heads = _heads(config, "num_attention_heads")
    return width // heads if heads and type(width) is int else 0


def _renamed(tensor: Tensor, name: str) -> Tensor:
    spec = dataclasses.replace(tensor.spec, name=name)
    if isinstance(tensor, Assembled):
        return Assembled(spec, tensor.grid, tensor.boxes)
    return StoredTensor(spec, tensor.extent)
