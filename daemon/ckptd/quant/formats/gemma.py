"""Gemma for mobile devices: integers of 2, 4 or 8 bits with a scale for each row.

`X.weight` with `X.weight_scale`, and embeddings as `X.embedding_quantized` with
`X.embedding_scale`, which may have several scales a row. Codes are packed low bits first; 8 bits
are plain int8. How many bits a module has stands in config.json alone. Scales of activations and
of the cache are dropped: the plain model does not round them.

Source: QuantizedLinear, QuantizedEmbedding and replace_with_quant_layers of transformers 5.24.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from ckptd.checkpoint import dtypes
from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import StoredTensor
from ckptd.errors import CheckpointCorrupt
from ckptd.quant import configuration, parts
from ckptd.quant.formats import quanto_shapes
from ckptd.quant.formulas.packed import Packed
from ckptd.quant.formulas.scaled import Scaled
from ckptd.quant.group import Found, Group, Stored

_PAIRS = ((".weight_scale", ".weight"), (".embedding_scale", ".embedding_quantized"))
"""How scales are called, and the codes that they belong to."""
_DROPPED = (
    ".input_activation_scale",
    ".output_activation_scale",
    ".k_cache_scale",
    ".v_cache_scale",
)
_OFFSETS = {2: 2, 4: 8, 8: 0}
"""What is subtracted from stored codes; those of 8 bits have a sign."""


@dataclass(frozen=True, slots=True)
class Gemma:
    """Gemma's quantization-aware training; bits are known from config.json alone."""

    name: str = "gemma"
    methods: tuple[str, ...] = ("gemma",)
    side_files: tuple[str, ...] = ()
    skip_key: str | None = "modules_to_not_convert"

    def recognise(self, stored: Stored) -> str | None:
        """Return None: nothing in the tensors tells 2 bits from 4."""
        return None

    def find(self, stored: Stored) -> Found:
        """Return every weight and embedding with scales; see `Format`."""
        bits_of = _Bits.of(stored)
        dtype = _dtype(stored)
        groups = [_group(stored, name, bits_of, dtype) for name in _codes(stored)]
        dropped = [name for name in stored.tensors if name.endswith(_DROPPED)]
        return Found(groups=tuple(groups), dropped=tuple(dropped))


FORMAT = Gemma()


@dataclass(frozen=True, slots=True)
class _Bits:
    """The bits of modules: patterns in order, of which the first to match in a name decides."""

    default: int
    patterns: tuple[tuple[re.Pattern[str], int], ...]

    @classmethod
    def of(cls, stored: Stored) -> _Bits:
        """Return what the quantization config says.

        Raises:
            CheckpointCorrupt: it does not say it in transformers' way.
        """
        default = stored.quantization.get("num_bits", 4)
        overrides = stored.quantization.get("module_quant_configs") or {}
        _check(stored, type(default) is int and default in _OFFSETS, "num_bits 2, 4 or 8", default)
        _check(stored, isinstance(overrides, Mapping), "module_quant_configs by module", overrides)
        patterns = []
        for pattern, override in overrides.items():
            _check(stored, isinstance(override, Mapping), f"settings of {pattern}", override)
            bits = override.get("num_bits", default)
            _check(stored, type(bits) is int and bits in _OFFSETS, f"bits of {pattern}", bits)
            try:
                patterns.append((re.compile(pattern), bits))
            except re.error:
                _check(stored, False, "a regular expression", pattern)
        return cls(default, tuple(patterns))

    def bits(self, module: str) -> int:
        """Return the bits of `module`: of all matches the one that begins first counts."""
        found = [
            (match.start(), bits) for one, bits in self.patterns if (match := one.search(module))
        ]
        return min(found, key=lambda match: match[0])[1] if found else self.default


def _check(stored: Stored, holds: bool, expected: str, found: Any) -> None:
    if not holds:
        raise CheckpointCorrupt(
            "its quantization config is not one of Gemma's",
            path=stored.path,
            expected=expected,
            found=repr(found)[:80],
        )


def _dtype(stored: Stored) -> Dtype:
    """Return the dtype that the model is loaded in, which its weights are computed in, too."""
    name = configuration.compute_dtype(stored.config)
    try:
        dtype = dtypes.from_torch_name(name or "bfloat16")
    except ValueError:
        dtype = None
    if dtype not in (Dtype.F32, Dtype.F16, Dtype.BF16):
        raise CheckpointCorrupt(
            "config.json has no dtype to compute in",
            path=stored.path,
            expected="bfloat16, float16 or float32",
            found=repr(name)[:80],
        )
    return dtype


def _codes(stored: Stored) -> Iterator[str]:
    """Yield the names of all codes; each has its scale."""
    for name in stored.tensors:
        for scale_suffix, suffix in _PAIRS:
            if name.endswith(scale_suffix):
                codes = name.removesuffix(scale_suffix) + suffix
                if codes not in stored.tensors:
                    _corrupt(stored.tensors[name], "belongs to codes that are missing", codes)
                yield codes
            elif name.endswith(suffix):
                is_codes = stored.tensors[name].spec.dtype in (Dtype.U8, Dtype.I8)
                scale = name.removesuffix(suffix) + scale_suffix
                if is_codes and scale not in stored.tensors:
                    _corrupt(stored.tensors[name], "is quantized, but has no scale", scale)


def _group(stored: Stored, name: str, bits_of: _Bits, dtype: Dtype) -> Group:
    scale_suffix, suffix = next(pair for pair in _PAIRS if name.endswith(pair[1]))
    module = name.removesuffix(suffix)
    codes, scale = stored.tensors[name], stored.tensors[module + scale_suffix]
    bits = bits_of.bits(module)
    rows, columns = _shape(stored, module, codes, bits)
    groups = scale.spec.shape[1] if len(scale.spec.shape) == 2 else 0
    if scale.spec.dtype not in (Dtype.F32, Dtype.F16, Dtype.BF16):
        _corrupt(scale, "has the wrong dtype", "a float")
    if scale.spec.shape[:1] != (rows,) or not groups or columns % groups:
        _corrupt(scale, "does not fit the codes", f"{rows} x 1, or whole blocks of {columns}")
    block = max(1, columns // groups)
    scales = parts.part(scale, is_scale=True)
    formula: Packed | Scaled
    if bits == 8:
        formula = Scaled(
            codes=parts.part(codes), scale=scales, block=(1, block), scale_via=dtype, dtype=dtype
        )
    else:
        formula = Packed(
            codes=parts.part(codes),
            scale=scales,
            bits=bits,
            columns=columns,
            group=block,
            offset=_OFFSETS[bits],
            scale_via=dtype,
            dtype=dtype,
        )
    return Group(
        name=f"{module}.weight",
        shape=(rows, columns),
        formulas=(formula,),
        consumed=(name, scale.spec.name),
        scheme=f"{bits}-bit Gemma, blocks of {block}",
    )


def _shape(stored: Stored, module: str, codes: StoredTensor, bits: int) -> tuple[int, int]:
    """Return rows and columns; columns are those that fill whole bytes."""
    spec = codes.spec
    if len(spec.shape) != 2 or spec.shape[1] == 0:
        _corrupt(codes, "is not a matrix of codes", "two axes")
    wanted = Dtype.I8 if bits == 8 else Dtype.U8
    if spec.dtype is not wanted:
        _corrupt(codes, "disagrees with config.json", f"{wanted} for {bits} bits")
    columns = spec.shape[1] * 8 // bits
    known = quanto_shapes.known_sizes(quanto_shapes.config_of(module, stored.config))
    others = {spec.shape[1] * 8 // other for other in (2, 4)} - {columns}
    if bits != 8 and columns not in known and others & known:
        _corrupt(codes, "disagrees with config.json", f"{columns} columns for {bits} bits")
    return spec.shape[0], columns


def _corrupt(tensor: StoredTensor, what: str, expected: str) -> NoReturn:
    raise CheckpointCorrupt(
        what,
        path=tensor.extent.path,
        tensor=tensor.spec.name,
        expected=expected,
        found=f"{tensor.spec.dtype} {list(tensor.spec.shape)}",
    )
