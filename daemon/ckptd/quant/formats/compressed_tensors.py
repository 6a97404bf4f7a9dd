"""compressed-tensors: packed integers, int8, FP8, NVFP4, MXFP4, MXFP6, MXFP8, and mixes of them.

A weight is quantized if its codes and its scale are there, whatever the config ignores; its group
in the config gives the parameters. Checkpoints that were saved before they were compressed
(`quantization_status: frozen`) have plain weights with scales for quantized inference: the weights
stay as they are, as the library's own dense format leaves them, and the scales go. Rotations that
were merged into weights need nothing; rotations at run time would be lost and are refused, and so
are the sparse layouts, which the library itself gave up.
Source: files and config of compressed-tensors 0.4 to 0.20.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckptd.checkpoint.header import StoredTensor
from ckptd.errors import CheckpointCorrupt, CheckpointRefused, CheckpointUnsupported
from ckptd.quant.formats import compressed_tensors_schemes, compressed_tensors_weights
from ckptd.quant.formats.compressed_tensors_schemes import ConfigGroup
from ckptd.quant.formats.compressed_tensors_tensors import Tensors, corrupt
from ckptd.quant.group import Found, Group, Stored

_PARTNERS = ("packed", "scale", "zero_point", "shape", "g_idx", "global_scale")
"""What stands after a weight's name and an underscore."""
_ACTIVATIONS = tuple(
    f".{base}_{partner}"
    for base in ("input", "output")
    for partner in ("scale", "zero_point", "global_scale", "g_idx")
)
_CACHES = tuple(
    f".{base}_{partner}"
    for base in ("q", "k", "v")
    for partner in ("scale", "zero_point", "global_scale")
)
_SPARSE = (".bitmask", ".compressed", ".row_offsets", ".scale_packed")
"""Parts of sparse-bitmask, sparse-24-bitmask and marlin-24."""
_UNSUPPORTED_FORMATS = ("marlin-24", "sparse-bitmask", "sparse-24-bitmask")
_UNCOMPRESSED_FORMATS = (None, "dense", "fakequant")
_MERGED = ("weight_input", "weight_output")
"""Places of a transform that are part of the stored weights."""


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """The family of compressed-tensors, which llm-compressor writes."""

    name: str = "compressed-tensors"
    methods: tuple[str, ...] = ("compressed-tensors",)
    side_files: tuple[str, ...] = ()
    skip_key: str | None = "ignore"

    def recognise(self, stored: Stored) -> str | None:
        """Return why the checkpoint is of this format where config.json does not say, or None."""
        if "config_groups" in stored.quantization:
            return "its quantization config has config_groups"
        for name in stored.tensors:
            base = name.removesuffix("_packed")
            if base != name and base.endswith(".weight") and f"{base}_scale" in stored.tensors:
                return f"{name} has a scale"
        return None

    def find(self, stored: Stored) -> Found:
        """Return every weight, and the scales of activations and caches as dropped.

        Raises:
            CheckpointCorrupt: a partner is missing or of the wrong shape or dtype, or the config
                is not what it should be; names it.
            CheckpointUnsupported: a variant that is not decoded; names it.
        """
        _refuse_sparse(stored)
        _refuse_rotated(stored)
        config_groups = compressed_tensors_schemes.read(stored)
        version = _version(stored.quantization.get("version"))
        groups, dropped = [], []
        for name in _weights(stored):
            tensors = _tensors(stored, name, version)
            if _is_quantized(tensors):
                groups.append(_group(stored, tensors, config_groups))
            else:
                dropped.extend(_unused(stored, tensors))
        dropped.extend(_of_inference(stored))
        return Found(groups=tuple(groups), dropped=tuple(dropped))


FORMAT = CompressedTensors()


def _weights(stored: Stored) -> Iterator[str]:
    """Yield each name once that has codes or, ending in weight, partners of codes."""
    seen = set()
    for name, tensor in stored.tensors.items():
        weight = name
        if tensor.spec.dtype not in compressed_tensors_weights.CODES:
            partner = next((one for one in _PARTNERS if name.endswith(f"_{one}")), None)
            if partner is None:
                continue
            weight = name.removesuffix(f"_{partner}")
            if partner != "packed" and not weight.endswith(".weight"):
                continue
        elif name.endswith(("_scale", "_zero_point")):
            continue
        if weight not in seen:
            seen.add(weight)
            yield weight


def _tensors(stored: Stored, name: str, version: tuple[int, ...]) -> Tensors:
    names = {"codes": name} | {partner: f"{name}_{partner}" for partner in _PARTNERS}
    held = {key: stored.tensors[full] for key, full in names.items() if full in stored.tensors}
    if "codes" not in held and "packed" not in held:
        first = next(iter(held.values()))
        raise CheckpointCorrupt(
            "belongs to a weight that is not there",
            path=first.extent.path,
            tensor=first.spec.name,
            expected=f"{name}_packed or {name}",
            hint="a shard was lost or not copied: download or save it again",
        )
    return Tensors(name=name, held=held, peek=stored.peek, version=version)


def _is_quantized(tensors: Tensors) -> bool:
    codes = tensors.codes
    if "packed" in tensors.held and "codes" in tensors.held:
        corrupt(codes, "stands beside the weight that it is", "one of the two", tensors.name)
    return "packed" in tensors.held or not codes.spec.dtype.is_plain_float


def _group(stored: Stored, tensors: Tensors, config_groups: tuple[ConfigGroup, ...]) -> Group:
    """Return a weight by its scheme, or by the only one of all schemes that its tensors fit."""
    tensors.required("scale")
    module = tensors.name.removesuffix(".weight")
    schemes = compressed_tensors_schemes.of_module(config_groups, module)
    if not schemes:
        raise CheckpointCorrupt(
            "is quantized, but the config has no group with weights",
            path=stored.path,
            tensor=tensors.codes.spec.name,
            expected="config_groups in the quantization config",
            hint="copy config.json from where the checkpoint comes from",
        )
    if len(schemes) == 1:
        return compressed_tensors_weights.group(tensors, schemes[0])
    fitting = []
    for scheme in schemes:
        try:
            fitting.append(compressed_tensors_weights.group(tensors, scheme))
        except CheckpointRefused:
            continue
    if len(fitting) != 1:
        raise CheckpointCorrupt(
            "is quantized, but no target of the config means it, and not one group alone fits",
            path=stored.path,
            tensor=tensors.codes.spec.name,
            expected="a target that matches",
            found=f"{len(fitting)} groups that fit",
        )
    return fitting[0]


def _unused(stored: Stored, tensors: Tensors) -> list[str]:
    """Return the partners of a weight that was saved before it was compressed.

    Raises:
        CheckpointCorrupt: the config says that it was compressed.
    """
    status, layout = (stored.quantization.get(key) for key in ("quantization_status", "format"))
    if status in ("compressed", None) and layout not in _UNCOMPRESSED_FORMATS:
        corrupt(tensors.codes, "is plain, but has a scale and is said to be compressed", "codes")
    return [one.spec.name for key, one in tensors.held.items() if key != "codes"]


def _of_inference(stored: Stored) -> list[str]:
    """Return what quantized activations and caches need: small tensors beside weights."""
    return [name for name, tensor in stored.tensors.items() if _serves(stored, name, tensor)]


def _serves(stored: Stored, name: str, tensor: StoredTensor) -> bool:
    if not name.endswith((*_ACTIVATIONS, *_CACHES)):
        return False
    weight = name.rpartition(".")[0] + ".weight"
    of_linear = weight in stored.tensors or f"{weight}_packed" in stored.tensors
    return _is_of_cache(tensor) or (of_linear and name.endswith(_ACTIVATIONS))


def _is_of_cache(tensor: StoredTensor) -> bool:
    """Whether it is one value, or one a head: a parameter of the model's own has more."""
    shape = tensor.spec.shape
    return math.prod(shape) == 1 or (len(shape) == 3 and shape[1:] == (1, 1))


def _refuse_sparse(stored: Stored) -> None:
    declared = [stored.quantization.get("format")]
    sparsity = stored.quantization.get("sparsity_config")
    if isinstance(sparsity, Mapping):
        declared.append(sparsity.get("format"))
    groups = stored.quantization.get("config_groups")
    if isinstance(groups, Mapping):
        declared.extend(one.get("format") for one in groups.values() if isinstance(one, Mapping))
    named = [one for one in declared if isinstance(one, str) and one in _UNSUPPORTED_FORMATS]
    tensors = [name for name in stored.tensors if name.endswith(_SPARSE)]
    if named or tensors:
        raise CheckpointUnsupported(
            f"sparse weights are not decoded: {', '.join(sorted(set(named))) or 'by their tensors'}",
            path=stored.path,
            tensor=next(iter(tensors), None),
            expected="dense codes (pack-quantized, float-quantized...)",
            hint="decompress it with compressed-tensors 0.14 or older, and save that",
        )


def _refuse_rotated(stored: Stored) -> None:
    """Refuse transforms that are applied at run time: plain weights alone would compute wrong.

    One at `weight_input` or `weight_output` was multiplied into the weights when they were made,
    and nothing is left to do for it.
    """
    config = stored.quantization.get("transform_config")
    if not config:
        return
    online = sorted({place for place in _places(config) if place not in _MERGED})
    if online:
        raise CheckpointUnsupported(
            "activations are rotated at run time (transform_config), which plain weights lose",
            path=stored.path,
            expected=f"transforms in {' and '.join(_MERGED)} alone",
            found=", ".join(online)[:80],
            hint="take the checkpoint that it was quantized from",
        )


def _places(config: Any) -> Iterator[str]:
    groups = config.get("config_groups") if isinstance(config, Mapping) else None
    if not isinstance(groups, Mapping):
        yield "unreadable"
        return
    for scheme in groups.values():
        apply = scheme.get("apply") if isinstance(scheme, Mapping) else None
        if not isinstance(apply, list):
            yield "unreadable"
            continue
        for one in apply:
            place = one.get("location") if isinstance(one, Mapping) else None
            yield place if isinstance(place, str) else "unreadable"


def _version(text: object) -> tuple[int, ...]:
    """Return major and minor of a version like 0.13.1.a20260101, or nothing."""
    match = re.match(r"(\d{1,6})\.(\d{1,6})", text) if isinstance(text, str) else None
    return (int(match[1]), int(match[2])) if match else ()
