"""Weights of 8-bit and FP4 codes with scales, as several families write them: groups, checked.

The families differ in what they call the tensors; what lies in them is the same.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from ckptd.checkpoint import dtypes
from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import StoredTensor
from ckptd.errors import CheckpointCorrupt
from ckptd.quant import configuration, parts
from ckptd.quant.formats import grids
from ckptd.quant.formats.grids import Block
from ckptd.quant.formula import Formula, ceil_div
from ckptd.quant.formulas.fp4 import Fp4
from ckptd.quant.formulas.scaled import Scaled
from ckptd.quant.group import Group, Stored
from ckptd.quant.parts import Part

FLOAT8 = frozenset({Dtype.F8_E4M3, Dtype.F8_E5M2, Dtype.F8_E4M3FNUZ, Dtype.F8_E5M2FNUZ})
"""Dtypes of float codes."""
FLOATS = frozenset({Dtype.F32, Dtype.BF16, Dtype.F16})
EXPONENTS = frozenset({Dtype.F8_E8M0, Dtype.U8})
"""How powers of two are stored as scales."""
BYTES = frozenset({Dtype.U8, Dtype.I8, Dtype.F4})
"""How two FP4 codes a byte are stored. `F4` counts elements in its shape, the others bytes."""
_MX_GROUP = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A weight's tensors: what it is called, its codes, scales and further factors."""

    name: str
    codes: StoredTensor
    scale: StoredTensor
    global_scale: StoredTensor | None = None
    pre_scale: StoredTensor | None = None

    @property
    def consumed(self) -> tuple[str, ...]:
        """The names of the tensors."""
        used = (self.codes, self.scale, self.global_scale, self.pre_scale)
        return tuple(tensor.spec.name for tensor in used if tensor is not None)


def compute_dtype(stored: Stored) -> Dtype:
    """Return the dtype that the model computes in: what the libraries dequantize to."""
    try:
        dtype = dtypes.from_torch_name(configuration.compute_dtype(stored.config) or "bfloat16")
    except ValueError:
        return Dtype.BF16
    return dtype if dtype.is_plain_float else Dtype.BF16


def eight_bit(
    weight: Weight, *, dtype: Dtype, declared: Block | None = None, scale_via: Dtype | None = None
) -> Group:
    """Return a weight of float8 or int8 codes; `declared` is the block that config.json says.

    Raises:
        CheckpointCorrupt: the scales are not a grid over the codes, or not numbers of scales.
    """
    count, rows, columns = grids.matrices(weight.codes.spec.shape)
    kinds = FLOATS | EXPONENTS if weight.codes.spec.dtype in FLOAT8 else FLOATS
    codes = parts.part(weight.codes, rows=count * rows, columns=columns)
    found = grids.scales(codes, count, weight.scale, _scale(weight.scale, kinds), declared=declared)
    if found is None:
        raise wrong(weight.scale, grids.expected(rows, columns, declared))
    pre_scale = column_scale(weight, columns)
    formulas = tuple(
        Scaled(
            codes=one.codes,
            scale=one.scale,
            block=one.block,
            pre_scale=pre_scale,
            scale_via=scale_via,
            dtype=dtype,
        )
        for one in found
    )
    kind = str(weight.codes.spec.dtype).removeprefix("F8_").lower()
    number = "int8" if kind == "i8" else f"float8 {kind}"
    return group(weight, formulas, f"{number}, {_grouping(formulas[0])}")


def is_fp4(codes: StoredTensor, scale: StoredTensor, group_size: int) -> bool:
    """Whether the shapes are those of `fp4` with groups of `group_size` along the last axis."""
    shape = _fp4_shape(codes)
    if len(shape) < 2:
        return False
    grid = (*shape[:-1], ceil_div(shape[-1], group_size))
    return math.prod(scale.spec.shape) == math.prod(grid) and scale.spec.shape[-1:] == grid[-1:]


def fp4(
    weight: Weight, *, dtype: Dtype, group_size: int = _MX_GROUP, signed_zero: bool = True
) -> Group:
    """Return a weight of packed E2M1 codes: with exponents (MX), or float8 and a global scale (NV).

    Raises:
        CheckpointCorrupt: the scales are not one for each `group_size` codes, or a global scale is
            neither one nor one for each expert.
    """
    shape = _fp4_shape(weight.codes)
    count, rows, columns = grids.matrices(shape)
    if len(shape) not in (2, 3) or not is_fp4(weight.codes, weight.scale, group_size):
        of = [*shape[:-1], ceil_div(shape[-1], group_size)] if shape else []
        raise wrong(weight.scale, f"{of} for groups of {group_size} of {list(shape)}")
    codes = parts.part(weight.codes, dtype=Dtype.U8, rows=count * rows, columns=columns // 2)
    scale = _scale(weight.scale, EXPONENTS | FLOATS | {Dtype.F8_E4M3})
    scale = dataclasses.replace(scale, rows=count * rows, columns=ceil_div(columns, group_size))
    one = global_scales(weight, count)
    pre_scale = column_scale(weight, columns)
    formulas = tuple(
        Fp4(
            codes=code,
            scale=part,
            global_scale=one[place],
            pre_scale=pre_scale,
            group=group_size,
            signed_zero=signed_zero,
            dtype=dtype,
        )
        for place, (code, part) in enumerate(
            zip(parts.stacked(codes, count), parts.stacked(scale, count), strict=True)
        )
    )
    name = "mxfp4" if scale.dtype is Dtype.F8_E8M0 else "nvfp4" if one[:1] != [None] else "fp4"
    return group(weight, formulas, f"4-bit {name}, groups of {group_size}", shape)


def group(
    weight: Weight, formulas: tuple[Formula, ...], scheme: str, shape: tuple[int, ...] | None = None
) -> Group:
    """Return the group; `shape` is the codes' own where it is not given."""
    return Group(
        name=weight.name,
        shape=weight.codes.spec.shape if shape is None else shape,
        formulas=formulas,
        consumed=weight.consumed,
        scheme=scheme,
    )


def global_scales(weight: Weight, count: int) -> list[Part | None]:
    """Return the global scale of each of `count` matrices: its own, the only one, or none.

    Raises:
        CheckpointCorrupt: there are more or fewer, or they are not floats.
    """
    tensor = weight.global_scale
    if tensor is None:
        return [None] * count
    numel = tensor.spec.numel
    if tensor.spec.dtype not in FLOATS or numel not in (1, count):
        raise wrong(tensor, f"a float, or {count} of them")
    part = parts.part(tensor, rows=numel, columns=1, is_scale=True)
    return [part] * count if numel == 1 else list(parts.stacked(part, count))


def column_scale(weight: Weight, columns: int) -> Part | None:
    """Return the scale of columns, 1 x `columns`, if the weight has one.

    Raises:
        CheckpointCorrupt: it is not one float a column.
    """
    tensor = weight.pre_scale
    if tensor is None:
        return None
    if tensor.spec.dtype not in FLOATS or tensor.spec.numel != columns:
        raise wrong(tensor, f"{columns} floats, one a column")
    return parts.part(tensor, rows=1, columns=columns, is_scale=True)


def wrong(tensor: StoredTensor, expected: str) -> CheckpointCorrupt:
    """Return the refusal of a partner that does not fit."""
    return CheckpointCorrupt(
        "does not fit its quantized weight",
        path=tensor.extent.path,
        tensor=tensor.spec.name,
        expected=expected,
        found=f"{tensor.spec.dtype} {list(tensor.spec.shape)}",
        hint="copy all shards again, or save the model again",
    )


def missing(tensor: StoredTensor, expected: str) -> CheckpointCorrupt:
    """Return the refusal of a tensor whose partner is not there."""
    return CheckpointCorrupt(
        "has lost the tensor that belongs to it",
        path=tensor.extent.path,
        tensor=tensor.spec.name,
        expected=expected,
        found="none",
        hint="copy all shards again, or save the model again",
    )


def _scale(tensor: StoredTensor, kinds: frozenset[Dtype]) -> Part:
    if tensor.spec.dtype not in kinds:
        raise wrong(tensor, f"scales of {', '.join(sorted(kinds))}")
    exponents = tensor.spec.dtype in EXPONENTS
    dtype = Dtype.F8_E8M0 if exponents else tensor.spec.dtype
    return parts.part(tensor, dtype=dtype, rows=1, columns=tensor.spec.numel, is_scale=True)


def _fp4_shape(codes: StoredTensor) -> tuple[int, ...]:
    shape = codes.spec.shape
    if codes.spec.dtype is Dtype.F4 or not shape:
        return shape
    return (*shape[:-1], shape[-1] * 2)


def _grouping(formula: Scaled) -> str:
    """Return in words what one scale is for."""
    rows, columns = formula.block
    if rows >= formula.rows and columns >= formula.columns:
        return "one scale"
    if rows == 1:
        return "a scale a row" if columns >= formula.columns else f"groups of {columns}"
    if rows >= formula.rows and columns == 1:
        return "a scale a column"
    return f"blocks of {rows} x {columns}"
