"""FP8 fine-grained and its relatives: 8-bit floats with a scale a block, a row or a tensor.

DeepSeek, Qwen3, MiniMax, GLM, Mistral (also under its native names), mxfp8, AutoFP8; and
DeepSeek-V4, whose experts are FP4. A scale multiplies, though most call it inverse. Codes without a
scale are refused: their values would be wrong by a factor that nobody can know.

Source: DeepSeek-V3's `fp8_cast_bf16.py`; `Fp8Dequantize` of transformers 5.24, whose derivation of
blocks from grids is not followed; OCP Microscaling Formats (MX) v1.0 for exponents and groups of 32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckptd.checkpoint.header import StoredTensor
from ckptd.errors import CheckpointCorrupt
from ckptd.quant.formats import narrow
from ckptd.quant.formats.grids import Block
from ckptd.quant.group import Found, Group, Stored

_MODULE_SCALES = (".weight_scale_inv", ".scale", ".qscale_weight", ".weight_scale")
"""The scale of `X.weight`: most; DeepSeek-V4; Mistral's own files; AutoFP8 and Quark."""
_NAMED_SCALES = ("_scale_inv", "_scale", ".scale_inv", ".scale")
"""The scale of a weight without a module of its own: fused experts."""
_MARKS = ("_scale_inv", ".weight_scale", ".qscale_weight", "_proj_scale")
"""Ends of names that only scales have."""
_DROPPED = (
    ".activation_scale",
    "_activation_scale",
    ".input_scale",
    "_input_scale",
    ".qscale_act",
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".kv_scale",
    ".prob_scale",
    ".output_scale",
)
"""Scales of activations and caches."""
_MAX_BLOCK = 1 << 31


@dataclass(frozen=True, slots=True)
class Fp8:
    """Checkpoints of 8-bit floats with scales."""

    name: str = "fp8"
    methods: tuple[str, ...] = ("fp8", "mxfp8")
    side_files: tuple[str, ...] = ()
    skip_key: str | None = "modules_to_not_convert"

    def recognise(self, stored: Stored) -> str | None:
        """Return the first 8-bit float with a scale beside it."""
        for tensor in stored.tensors.values():
            if tensor.spec.dtype in narrow.FLOAT8:
                scale = _scale_of(stored, tensor)
                if scale is not None:
                    return f"{tensor.spec.name} and {scale.spec.name} are there"
        return None

    def find(self, stored: Stored) -> Found:
        """Return every weight that has a scale.

        Raises:
            CheckpointCorrupt: codes without a scale, a scale without codes, a grid that does not
                cover its weight, or a block size that is none.
        """
        declared = declared_block(stored)
        dtype = narrow.compute_dtype(stored)
        groups = []
        for weight in _weights(stored):
            if weight.codes.spec.dtype in narrow.FLOAT8:
                groups.append(narrow.eight_bit(weight, dtype=dtype, declared=declared))
            else:
                groups.append(_fp4(weight, dtype=dtype))
        dropped = tuple(name for name in stored.tensors if name.endswith(_DROPPED))
        _require_no_orphan(stored, groups, dropped)
        return Found(groups=tuple(groups), dropped=dropped)


FORMAT = Fp8()


def declared_block(stored: Stored) -> Block | None:
    """Return the block that the quantization config says, if it does.

    Raises:
        CheckpointCorrupt: it is not a pair of sizes.
    """
    value = _first(stored.quantization, "weight_block_size", "block_size")
    if value is None:
        return None
    sizes = value if isinstance(value, list) else []
    if len(sizes) != 2 or not all(type(one) is int and 0 < one < _MAX_BLOCK for one in sizes):
        raise CheckpointCorrupt(
            "its quantization config has a weight_block_size that is none",
            path=stored.path,
            expected="rows and columns, such as [128, 128], or null",
            found=repr(value)[:80],
            hint="correct config.json",
        )
    return (sizes[0], sizes[1])


def _first(quantization: Mapping[str, Any], *keys: str) -> Any:
    return next((quantization[key] for key in keys if quantization.get(key) is not None), None)


def _weights(stored: Stored) -> Iterator[narrow.Weight]:
    for name, tensor in stored.tensors.items():
        scale = _scale_of(stored, tensor)
        if tensor.spec.dtype in narrow.FLOAT8:
            if scale is None:
                raise narrow.missing(tensor, f"a scale, such as {_names(name)[0]}")
        elif scale is None or tensor.spec.dtype not in narrow.BYTES:
            continue
        yield narrow.Weight(name=name, codes=tensor, scale=scale)


def _fp4(weight: narrow.Weight, *, dtype: Any) -> Group:
    """Return an FP4 weight; other integers have no meaning in this format."""
    if weight.scale.spec.dtype not in narrow.EXPONENTS:
        raise narrow.wrong(weight.scale, "exponents of FP4 groups")
    return narrow.fp4(weight, dtype=dtype)


def _scale_of(stored: Stored, tensor: StoredTensor) -> StoredTensor | None:
    name = tensor.spec.name
    if name.endswith(_MARKS) or name.endswith(_DROPPED):
        return None
    found = (stored.tensors.get(candidate) for candidate in _names(name))
    return next((scale for scale in found if scale is not None), None)


def _names(name: str) -> list[str]:
    if name.endswith(".weight"):
        module = name.removesuffix(".weight")
        return [module + suffix for suffix in _MODULE_SCALES]
    return [name + suffix for suffix in _NAMED_SCALES]


def _require_no_orphan(stored: Stored, groups: list[Group], dropped: tuple[str, ...]) -> None:
    used = {name for group in groups for name in group.consumed} | set(dropped)
    for name, tensor in stored.tensors.items():
        if name not in used and name.endswith(_MARKS):
            raise narrow.missing(tensor, "the quantized weight that this is a scale of")
