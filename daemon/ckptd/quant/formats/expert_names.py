"""Experts that a writer saved under the names of transformers' memory, under their published ones.

GPTQModel 7 takes a Mixtral's fused experts apart in memory and saves them as it names them there.
Nobody else looks for them under these names; transformers would load such a model without experts.
Source: files of GPTQModel 7.7; the conversions that transformers 5.24 knows for `mixtral`.
"""

from __future__ import annotations

import dataclasses
import re

from ckptd.quant.group import Found, Stored

_MODEL_TYPE = "mixtral"
_NUMBERED = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_EXPERT = re.compile(r"(.+)\.mlp\.experts\.(\d+)\.(gate_proj|down_proj|up_proj)\.(\w+)")
_ROUTER = re.compile(r"(.+)\.mlp\.gate\.(\w+)")


def published(found: Found, stored: Stored) -> Found:
    """Return `found` with weights of experts, and the routers beside them, as they are published."""
    if stored.config.get("model_type") != _MODEL_TYPE:
        return found
    layers = {match[1] for name in stored.tensors if (match := _EXPERT.fullmatch(name))}
    if not layers:
        return found
    groups = [dataclasses.replace(group, name=_name(group.name)) for group in found.groups]
    used = {name for group in found.groups for name in group.consumed} | set(found.dropped)
    plain = [
        (name, _name(name))
        for name in stored.tensors
        if name not in used and name.partition(".mlp.")[0] in layers and _name(name) != name
    ]
    return dataclasses.replace(found, groups=tuple(groups), renamed=(*found.renamed, *plain))


def _name(name: str) -> str:
    """Return the published name of an expert's or a router's tensor, else the same name."""
    if match := _EXPERT.fullmatch(name):
        layer, number, projection, leaf = match.groups()
        return f"{layer}.block_sparse_moe.experts.{number}.{_NUMBERED[projection]}.{leaf}"
    if match := _ROUTER.fullmatch(name):
        return f"{match[1]}.block_sparse_moe.gate.{match[2]}"
    return name
