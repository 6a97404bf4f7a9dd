"""AMD Quark: FP8, int8, FP4 and 4-bit integers, as its Hugging Face export writes them.

Every weight is `X.weight` with `X.weight_scale`. Codes of 4-bit integers lie transposed, eight
outputs in a word, with `X.weight_zero_point` packed alike; whether they are signed, and in which
order the eight are, says only the config. Weights rotated online are refused: the plain model has
no place for the rotation.

Source: `StaticScaledRealQuantizer`, `Pack_4_bits` and `Pack_fp4` of amd-quark 0.13. It computes in
float32.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import StoredTensor
from ckptd.errors import CheckpointUnsupported
from ckptd.quant import parts
from ckptd.quant.formats import narrow
from ckptd.quant.formula import ceil_div
from ckptd.quant.formulas.awq import Across
from ckptd.quant.formulas.scaled import Scaled
from ckptd.quant.group import Found, Group, Stored
from ckptd.quant.parts import Part

_CODES = narrow.FLOAT8 | {Dtype.U8, Dtype.I8, Dtype.I32}
_SCALE = "_scale"
_ZERO = "_zero_point"
_MARKS = (".weight_scale", ".weight_zero_point")
_DROPPED = (
    *(f".{what}{end}" for what in ("input", "output") for end in (_SCALE, _ZERO)),
    *(f".{cache}_scale" for cache in ("k", "v", "q", "kv", "prob_output")),
)
"""Scales of activations and caches."""
_INTEGERS = {"int4": True, "uint4": False}
"""Whether codes of 4 bits are signed."""
_FP4_GROUPS = (32, 16)
_ZEROS = frozenset({Dtype.I8, Dtype.U8, Dtype.I32})
_ORDERS = {"reorder": True, "order": False}
"""Whether the even ones of eight outputs come first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weight:
    """The tensors of one weight."""

    name: str
    codes: StoredTensor
    scale: StoredTensor
    zero: StoredTensor | None

    @property
    def consumed(self) -> tuple[str, ...]:
        """The names of all."""
        used = (self.codes, self.scale, self.zero)
        return tuple(tensor.spec.name for tensor in used if tensor is not None)

    @property
    def plain(self) -> narrow.Weight:
        """The same without zeros."""
        return narrow.Weight(name=self.name, codes=self.codes, scale=self.scale)

    def unsupported(self, what: str, expected: str) -> CheckpointUnsupported:
        """Return the refusal of a kind of weight."""
        return CheckpointUnsupported(
            what,
            path=self.codes.extent.path,
            tensor=self.name,
            expected=expected,
            found=f"{self.codes.spec.dtype} {list(self.codes.spec.shape)}",
            hint="load it with AMD Quark and save it dequantized, or start from the original",
        )


@dataclass(frozen=True, slots=True)
class Quark:
    """Checkpoints exported by AMD Quark."""

    name: str = "quark"
    methods: tuple[str, ...] = ("quark",)
    side_files: tuple[str, ...] = ()
    skip_key: str | None = "exclude"

    def recognise(self, stored: Stored) -> str | None:
        """Return None: without config.json nothing says whether codes are signed."""
        del stored
        return None

    def find(self, stored: Stored) -> Found:
        """Return every weight that has scales.

        Raises:
            CheckpointCorrupt: codes without scales, scales without codes, or shapes that do not fit.
            CheckpointUnsupported: rotated weights, other widths than 4 and 8 bits, or a config
                that does not say how integers are packed.
        """
        _refuse_rotation(stored)
        dtype = narrow.compute_dtype(stored)
        groups = [_group(stored, weight, dtype) for weight in _weights(stored)]
        dropped = [name for name in stored.tensors if name.endswith(_DROPPED)]
        used = {name for group in groups for name in group.consumed}
        for name, tensor in stored.tensors.items():
            if name not in used and name.endswith(_MARKS):
                raise narrow.missing(tensor, "the quantized weight that this belongs to")
        return Found(groups=tuple(groups), dropped=tuple(dropped))


FORMAT = Quark()


def _refuse_rotation(stored: Stored) -> None:
    algorithms = stored.quantization.get("algo_config")
    for one in algorithms if isinstance(algorithms, list) else [algorithms]:
        name = one.get("name") if isinstance(one, Mapping) else None
        if name is not None and "rotation" in str(name):
            raise CheckpointUnsupported(
                "its weights are rotated, which a plain model cannot undo",
                path=stored.path,
                expected="a quantization config without rotation",
                found=str(name)[:80],
                hint="start from the weights that it was quantized from",
            )


def _weights(stored: Stored) -> Iterator[_Weight]:
    for name, tensor in stored.tensors.items():
        quantized = name.endswith(".weight") or tensor.spec.dtype in narrow.FLOAT8
        if not quantized or tensor.spec.dtype not in _CODES:
            continue
        scale = stored.tensors.get(name + _SCALE)
        if scale is None:
            raise narrow.missing(tensor, name + _SCALE)
        yield _Weight(name=name, codes=tensor, scale=scale, zero=stored.tensors.get(name + _ZERO))


def _group(stored: Stored, weight: _Weight, dtype: Dtype) -> Group:
    kind = weight.codes.spec.dtype
    if kind is Dtype.I32:
        return _four_bit(stored, weight, dtype)
    if weight.zero is None and kind is Dtype.U8:
        spec = _weight_spec(stored.quantization, weight.name.removesuffix(".weight"))
        for size in (_size(spec), *_FP4_GROUPS):
            if size is not None and narrow.is_fp4(weight.codes, weight.scale, size):
                return narrow.fp4(weight.plain, dtype=dtype, group_size=size)
        raise weight.unsupported("is of a kind that is not decoded", "FP4, FP8, int8 or int4")
    if weight.zero is None and kind in narrow.FLOAT8:
        return narrow.eight_bit(weight.plain, dtype=dtype)
    return _eight_bit(stored, weight, dtype)


def _eight_bit(stored: Stored, weight: _Weight, dtype: Dtype) -> Group:
    """Return a weight of integers: one scale, one a row, or groups, which lie transposed."""
    shape, scale = weight.codes.spec.shape, weight.scale.spec
    if len(shape) != 2 or 0 in shape or len(scale.shape) > 2:
        raise weight.unsupported("is of 8-bit integers, but no matrix", "[rows, columns]")
    if scale.dtype not in narrow.FLOATS:
        raise narrow.wrong(weight.scale, "floats")
    transposed = len(scale.shape) == 2
    if transposed:
        size = _group_size(stored, weight)
        grid, block, grouping = scale.shape, (size, 1), f"groups of {size}"
        if grid != (ceil_div(shape[0], size), shape[1]):
            raise narrow.wrong(weight.scale, f"{[ceil_div(shape[0], size), shape[1]]}")
    elif scale.numel == 1:
        grid, block, grouping = (1, 1), shape, "one scale"
    else:
        grid, block, grouping = (shape[0], 1), (1, shape[1]), "a scale a row"
        if scale.numel != shape[0]:
            raise narrow.wrong(weight.scale, f"[{shape[0]}], one a row")
    formula = Scaled(
        codes=parts.part(weight.codes),
        scale=parts.part(weight.scale, rows=grid[0], columns=grid[1], is_scale=True),
        zero=_zeros(weight, grid),
        block=block,
        transposed=transposed,
        dtype=dtype,
    )
    return Group(
        name=weight.name,
        shape=shape[::-1] if transposed else shape,
        formulas=(formula,),
        consumed=weight.consumed,
        scheme=f"8-bit int, {grouping}",
    )


def _zeros(weight: _Weight, grid: tuple[int, ...]) -> Part | None:
    """Return the zeros, of the scales' grid, if the weight has any."""
    if weight.zero is None:
        return None
    if weight.zero.spec.dtype not in _ZEROS or weight.zero.spec.numel != grid[0] * grid[1]:
        raise narrow.wrong(weight.zero, f"{grid[0] * grid[1]} integers")
    return parts.part(weight.zero, rows=grid[0], columns=grid[1])


def _group_size(stored: Stored, weight: _Weight) -> int:
    size = _size(_weight_spec(stored.quantization, weight.name.removesuffix(".weight")))
    if size is None:
        raise weight.unsupported("has no group size in config.json", "a positive group_size")
    return size


def _size(spec: Mapping[str, Any]) -> int | None:
    size = spec.get("group_size")
    return size if type(size) is int and 0 < size < 1 << 31 else None


def _four_bit(stored: Stored, weight: _Weight, dtype: Dtype) -> Group:
    """Return a weight of 4-bit integers: words along the inputs, scales (groups, outputs)."""
    spec = _weight_spec(stored.quantization, weight.name.removesuffix(".weight"))
    signed = _choice(weight, spec.get("dtype"), _INTEGERS, "int4 or uint4")
    if spec.get("qscheme") != "per_group" or weight.zero is None:
        raise weight.unsupported("is of packed integers without groups", "per_group, with zeros")
    export = stored.quantization.get("export")
    method = export.get("pack_method") if isinstance(export, Mapping) else "reorder"
    interleaved = _choice(weight, method, _ORDERS, "reorder or order")
    size = _group_size(stored, weight)
    if len(weight.codes.spec.shape) != 2:
        raise narrow.wrong(weight.codes, "a matrix of words")
    inputs, words = weight.codes.spec.shape
    outputs = weight.scale.spec.shape[-1] if weight.scale.spec.shape else 0
    groups = ceil_div(inputs, size)
    if weight.scale.spec.dtype not in narrow.FLOATS or weight.scale.spec.shape != (groups, outputs):
        raise narrow.wrong(weight.scale, f"{[groups, words * 8]} for groups of {size}")
    if words != ceil_div(outputs, 8):
        raise narrow.wrong(weight.codes, f"{[inputs, ceil_div(outputs, 8)]} words")
    if weight.zero.spec.dtype is not Dtype.I32 or weight.zero.spec.shape != (groups, words):
        raise narrow.wrong(weight.zero, f"I32 {[groups, words]}")
    formula = Across(
        codes=parts.part(weight.codes),
        zeros=parts.part(weight.zero),
        scale=parts.part(weight.scale, is_scale=True),
        bits=4,
        group=size,
        interleaved=interleaved,
        signed=signed,
        dtype=dtype,
    )
    return Group(
        name=weight.name,
        shape=(outputs, inputs),
        formulas=(formula,),
        consumed=weight.consumed,
        scheme=f"4-bit {spec['dtype']}, groups of {size}",
    )


def _weight_spec(quantization: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """Return what the config says of a module's weight: its own entry, or the one for all."""
    layers = quantization.get("layer_quant_config")
    own = [
        value
        for pattern, value in (layers.items() if isinstance(layers, Mapping) else ())
        if fnmatch.fnmatchcase(module, pattern)
    ]
    config = own[0] if own else quantization.get("global_quant_config")
    spec = config.get("weight") if isinstance(config, Mapping) else None
    return spec if isinstance(spec, Mapping) else {}


def _choice(weight: _Weight, value: Any, choices: Mapping[str, bool], expected: str) -> bool:
    if not isinstance(value, str) or value not in choices:
        raise weight.unsupported(
            f"is packed in a way that config.json does not say: {value!r}"[:120], expected
        )
    return choices[value]
