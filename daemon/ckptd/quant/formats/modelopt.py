"""NVIDIA ModelOpt: FP8, MXFP8, NVFP4, MXFP4, int8 and int4 (AWQ), also mixed in one checkpoint.

What a weight is say its tensors, as `hf_quant_config.json` or config.json speak of the whole:
`X.weight` with `X.weight_scale`, and `X.weight_scale_2` (NVFP4's global scale) and
`X.pre_quant_scale` (what activations are multiplied by, so that the plain weight is, too). Experts
that are one tensor `X` have `X_weight_scale` and so on.

Source: `export/unified_export_hf.py`, `export/quant_utils.py` and `quantization/qtensor` of
nvidia-modelopt 0.47. The library rounds scales of FP8 and int8 to the result's dtype before it
multiplies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckptd.checkpoint.dtypes import Dtype
from ckptd.errors import CheckpointUnsupported
from ckptd.quant import parts
from ckptd.quant.formats import grids, narrow
from ckptd.quant.formula import ceil_div
from ckptd.quant.formulas.paired import Kind, Paired
from ckptd.quant.group import Found, Group, Stored

_SIDE_FILE = "hf_quant_config.json"
_CODES = narrow.FLOAT8 | {Dtype.U8, Dtype.I8}
_SCALES = ("weight_scale", "weight_scale_2", "pre_quant_scale")
_MARKS = tuple(sep + scale for sep in "._" for scale in _SCALES)
"""Ends of names that only partners of weights have."""
_DROPPED = (
    *(sep + scale for sep in "._" for scale in ("input_scale", "output_scale")),
    *(f".{cache}_{what}" for cache in "kvq" for what in ("scale", "bias")),
)
"""Scales of activations and of the key and value cache."""
_LOW_RANK = (".svdquant_lora_a", ".svdquant_lora_b")
_INT4_GROUPS = (128, 64, 32, 16, 256)
_NV_GROUPS = (16, 32)


@dataclass(frozen=True, slots=True)
class ModelOpt:
    """Checkpoints exported by NVIDIA's ModelOpt."""

    name: str = "modelopt"
    methods: tuple[str, ...] = ("modelopt", "modelopt_fp4", "modelopt_mixed")
    side_files: tuple[str, ...] = (_SIDE_FILE,)
    skip_key: str | None = "ignore"

    def recognise(self, stored: Stored) -> str | None:
        """Return that its own config is there, or the first global scale of NVFP4."""
        described = stored.document(_SIDE_FILE)
        if described is not None and isinstance(described.get("quantization"), Mapping):
            return f"{_SIDE_FILE} is there"
        for name in stored.tensors:
            codes = stored.tensors.get(name.removesuffix("_scale_2"))
            if name.endswith("weight_scale_2") and codes is not None:
                return f"{name} is there"
        return None

    def find(self, stored: Stored) -> Found:
        """Return every weight that has scales.

        Raises:
            CheckpointCorrupt: codes without scales, scales without codes, or shapes and dtypes that
                are no known kind of weight.
            CheckpointUnsupported: weights that are more than codes and scales (SVDQuant's low-rank
                part).
        """
        _refuse_low_rank(stored)
        dtype = narrow.compute_dtype(stored)
        groups = [_group(stored, weight, dtype) for weight in _weights(stored)]
        dropped = tuple(name for name in stored.tensors if name.endswith(_DROPPED))
        used = {name for group in groups for name in group.consumed} | set(dropped)
        for name, tensor in stored.tensors.items():
            if name not in used and name.endswith(_MARKS):
                raise narrow.missing(tensor, "the quantized weight that this is a scale of")
        return Found(groups=tuple(groups), dropped=dropped)


FORMAT = ModelOpt()


def _refuse_low_rank(stored: Stored) -> None:
    for name, tensor in stored.tensors.items():
        if name.endswith(_LOW_RANK):
            raise CheckpointUnsupported(
                "is the low-rank part of SVDQuant, which no plain weight can have",
                path=tensor.extent.path,
                tensor=name,
                hint="start from the weights that it was quantized from",
            )


def _weights(stored: Stored) -> Iterator[narrow.Weight]:
    for name, tensor in stored.tensors.items():
        if tensor.spec.dtype not in _CODES or name.endswith((*_MARKS, *_DROPPED)):
            continue
        scale, global_scale, pre_scale = (stored.tensors.get(one) for one in _partners(name))
        if scale is None:
            if name.endswith(".weight") or tensor.spec.dtype in narrow.FLOAT8:
                raise narrow.missing(tensor, _partners(name)[0])
            continue  # a buffer of bytes
        yield narrow.Weight(
            name=name,
            codes=tensor,
            scale=scale,
            global_scale=global_scale,
            pre_scale=pre_scale,
        )


def _partners(name: str) -> list[str]:
    """Return what scale, global scale and scale of columns of a weight are called."""
    if name.endswith(".weight"):
        return [name.removesuffix("weight") + scale for scale in _SCALES]
    return [f"{name}_{scale}" for scale in _SCALES]


def _group(stored: Stored, weight: narrow.Weight, dtype: Dtype) -> Group:
    codes, scale = weight.codes.spec, weight.scale.spec
    if len(codes.shape) < 2:
        raise narrow.wrong(weight.codes, "a matrix of codes")
    if codes.dtype is not Dtype.U8:
        if weight.global_scale is not None:
            raise narrow.wrong(weight.global_scale, f"none beside {codes.dtype} codes")
        rounds = scale.dtype in narrow.FLOATS
        return narrow.eight_bit(weight, dtype=dtype, scale_via=dtype if rounds else None)
    if scale.dtype is Dtype.F8_E4M3 or _is_wide_nvfp4(stored, weight):
        return _nvfp4(stored, weight, dtype)
    if scale.dtype in narrow.EXPONENTS:
        return narrow.fp4(weight, dtype=dtype)
    return _int4(stored, weight, dtype)


def _is_wide_nvfp4(stored: Stored, weight: narrow.Weight) -> bool:
    """Whether it is NVFP4 whose scales somebody saved in a wider float, where they are the same.

    Int4 codes have two rows a byte, so that their scales have twice as many rows as the codes.
    """
    if weight.global_scale is None or weight.scale.spec.dtype not in narrow.FLOATS:
        return False
    sizes = (*_declared_group(stored, weight.name), *_NV_GROUPS)
    return any(narrow.is_fp4(weight.codes, weight.scale, size) for size in sizes)


def _nvfp4(stored: Stored, weight: narrow.Weight, dtype: Dtype) -> Group:
    if weight.global_scale is None:
        raise narrow.missing(weight.scale, weight.scale.spec.name + "_2")
    sizes = (*_declared_group(stored, weight.name), *_NV_GROUPS)
    for size in sizes:
        if narrow.is_fp4(weight.codes, weight.scale, size):
            return narrow.fp4(weight, dtype=dtype, group_size=size, signed_zero=False)
    shape = weight.codes.spec.shape
    if len(shape) == 3:
        rows = shape[1] * 2
        for size in sizes:
            if size % 2 == 0 and weight.scale.spec.shape == (
                shape[0],
                ceil_div(rows, size),
                shape[2],
            ):
                return _paired(weight, dtype, kind=Kind.E2M1, block=(size, 1))
    grid = [*shape[:-1], ceil_div(shape[-1] * 2, _NV_GROUPS[0])]
    raise narrow.wrong(weight.scale, f"{grid} for groups of {_NV_GROUPS[0]}")


def _int4(stored: Stored, weight: narrow.Weight, dtype: Dtype) -> Group:
    shape = weight.codes.spec.shape
    if weight.scale.spec.dtype not in narrow.FLOATS or len(shape) > 3:
        raise narrow.wrong(weight.scale, "scales of int4 codes: floats")
    rows, columns = shape[-2] * 2, shape[-1]
    for size in (*_declared_group(stored, weight.name), *_INT4_GROUPS, max(1, columns)):
        if weight.scale.spec.shape == (*shape[:-2], rows, ceil_div(columns, size)):
            return _paired(weight, dtype, kind=Kind.INT4, block=(1, size))
    grid = [*shape[:-2], rows, ceil_div(columns, _INT4_GROUPS[0])]
    raise narrow.wrong(weight.scale, f"{grid} for groups of {_INT4_GROUPS[0]}")


def _paired(weight: narrow.Weight, dtype: Dtype, *, kind: Kind, block: tuple[int, int]) -> Group:
    """Return a weight whose bytes hold two rows each; the scale's grid was checked.

    Beside int4 a second scale (W4A8_AWQ) only says how kernels round to FP8 afterwards.
    """
    count, pairs, columns = grids.matrices(
        (1,) * (3 - len(weight.codes.spec.shape)) + weight.codes.spec.shape
    )
    scale = weight.scale.spec
    codes = parts.part(weight.codes, rows=count * pairs, columns=columns)
    grid = parts.part(weight.scale, rows=scale.numel // max(1, scale.shape[-1]), is_scale=True)
    grid = dataclasses.replace(grid, columns=scale.shape[-1])
    one = narrow.global_scales(weight, count)
    pre_scale = narrow.column_scale(weight, columns)
    formulas = tuple(
        Paired(
            codes=code,
            scale=part,
            global_scale=one[place] if kind is Kind.E2M1 else None,
            pre_scale=pre_scale,
            block=block,
            kind=kind,
            dtype=dtype,
        )
        for place, (code, part) in enumerate(
            zip(parts.stacked(codes, count), parts.stacked(grid, count), strict=True)
        )
    )
    name = "int4" if kind is Kind.INT4 else "nvfp4"
    shape = weight.codes.spec.shape
    return narrow.group(
        weight,
        formulas,
        f"4-bit {name}, groups of {max(block)}",
        (*shape[:-2], shape[-2] * 2, columns),
    )


def _declared_group(stored: Stored, name: str) -> tuple[int, ...]:
    """Return the group size that the configs say of this weight, if they say one that is usable."""
    own = stored.document(_SIDE_FILE) or {}
    described = own.get("quantization")
    sizes = []
    for config in (described, stored.quantization):
        if not isinstance(config, Mapping):
            continue
        layers = config.get("quantized_layers")
        layer = layers.get(name.removesuffix(".weight")) if isinstance(layers, Mapping) else None
        sizes += [_size(one) for one in (layer, config) if isinstance(one, Mapping)]
    return tuple(size for size in sizes if size is not None)


def _size(config: Mapping[str, Any]) -> int | None:
    size = config.get("group_size")
    return size if type(size) is int and 0 < size < 1 << 31 else None
