"""Experts that a writer saved under the names of transformers' memory, under their published ones.

GPTQModel 7 takes a Mixtral's fused experts apart in memory and saves them as it names them there.
HQQ quantizes linear layers alone, so that fused experts stay plain and are saved fused. Nobody else
looks for them under these names. Each becomes one weight an expert again, byte for byte.
Source: files of GPTQModel 7.7 and of HQQ; the conversions that transformers 5.24 knows.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

from ckptd.checkpoint.header import Extent, StoredTensor, TensorSpec
from ckptd.quant.group import Found, Stored

_PROJECTIONS = {"gate_proj": "gate_proj", "down_proj": "down_proj", "up_proj": "up_proj"}
_NUMBERED = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_PUBLISHED: dict[str, tuple[str, dict[str, str]]] = {
    "mixtral": ("block_sparse_moe", _NUMBERED),
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "glm4_moe", "olmoe", "qwen2_moe", "qwen3_moe"),
        ("mlp", _PROJECTIONS),
    ),
}
"""By model_type, the module of the experts and what a projection is called on disk."""
_EXPERT = re.compile(r"(.+)\.mlp\.experts\.(\d+)\.(gate_proj|down_proj|up_proj)\.(\w+)")
_FUSED = re.compile(r"(.+)\.mlp\.experts\.(gate_up_proj|down_proj)")
_ROUTER = re.compile(r"(.+)\.mlp\.gate\.(\w+)")


def published(found: Found, stored: Stored) -> Found:
    """Return `found` with weights of experts, and the routers beside them, as they are published."""
    names = _PUBLISHED.get(str(stored.config.get("model_type")))
    if names is None:
        return found
    used = {name for group in found.groups for name in group.consumed} | set(found.dropped)
    divided = [
        (name, tuple(_pieces(tensor, match, names)))
        for name, tensor in stored.tensors.items()
        if name not in used and (match := _FUSED.fullmatch(name)) and _is_fused(tensor)
    ]
    whole = {name for name, _ in divided}
    layers = {
        match[1]
        for name in stored.tensors
        if (match := _EXPERT.fullmatch(name)) or (name in whole and (match := _FUSED.match(name)))
    }
    groups = [dataclasses.replace(one, name=_name(one.name, names)) for one in found.groups]
    plain = [
        (name, _name(name, names))
        for name in stored.tensors
        if name not in used and name.partition(".mlp.")[0] in layers and _name(name, names) != name
    ]
    return dataclasses.replace(
        found,
        groups=tuple(groups),
        renamed=(*found.renamed, *plain),
        divided=(*found.divided, *divided),
    )


def _is_fused(tensor: StoredTensor) -> bool:
    shape = tensor.spec.shape
    return tensor.spec.dtype.is_plain_float and len(shape) == 3 and shape[1] % 2 == 0


def _pieces(
    tensor: StoredTensor, match: re.Match[str], names: tuple[str, dict[str, str]]
) -> Iterator[StoredTensor]:
    """Yield the experts' own matrices: of `gate_up_proj` the first half of the rows is the gate."""
    module, projections = names
    both = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else ("down_proj",)
    count, rows, columns = tensor.spec.shape
    shape = (rows // len(both), columns)
    nbytes = math.prod(shape) * tensor.spec.dtype.bits // 8
    for number in range(count):
        for place, projection in enumerate(both):
            name = f"{match[1]}.{module}.experts.{number}.{projections[projection]}.weight"
            offset = tensor.extent.offset + (number * len(both) + place) * nbytes
            extent = Extent(tensor.extent.path, offset, nbytes)
            yield StoredTensor(TensorSpec(name, tensor.spec.dtype, shape), extent)


def _name(name: str, names: tuple[str, dict[str, str]]) -> str:
    """Return the published name of an expert's or a router's tensor, else the same name."""
    module, projections = names
    if match := _EXPERT.fullmatch(name):
        layer, number, projection, leaf = match.groups()
        return f"{layer}.{module}.experts.{number}.{projections[projection]}.{leaf}"
    if match := _ROUTER.fullmatch(name):
        return f"{match[1]}.{module}.gate.{match[2]}"
    return name
