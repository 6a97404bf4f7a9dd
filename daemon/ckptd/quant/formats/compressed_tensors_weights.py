"""The formula of one weight of compressed-tensors, from its tensors and its scheme.

The tensors that there are, their dtypes and shapes say what it is; the scheme gives what they do
not say (bits, the size of groups and blocks), and must agree with them. Results have the dtype of
the scale, bfloat16 where scales are exponents or FP8, as the library's have.
Source: files of compressed-tensors 0.4 to 0.20, OCP Microscaling Formats (MX) v1.0.
"""

from __future__ import annotations

import math
import struct

from ckptd.checkpoint.dtypes import Dtype
from ckptd.quant import parts
from ckptd.quant.formats.compressed_tensors_schemes import Scheme
from ckptd.quant.formats.compressed_tensors_tensors import (
    Grid,
    Tensors,
    corrupt,
    grid_of,
    unsupported,
)
from ckptd.quant.formula import Formula, ceil_div
from ckptd.quant.formulas.fp4 import Fp4
from ckptd.quant.formulas.packed import Packed, Values
from ckptd.quant.formulas.scaled import Scaled
from ckptd.quant.group import Group
from ckptd.quant.parts import Part

FLOAT8 = (Dtype.F8_E4M3, Dtype.F8_E5M2)
CODES = (*FLOAT8, Dtype.I8)
"""Dtypes of weights that are codes of a byte each."""
_FLOATS = (Dtype.BF16, Dtype.F16, Dtype.F32)
_EXPONENTS = (Dtype.U8, Dtype.F8_E8M0)
_STRADDLES_SINCE = (0, 18)
"""The version from which codes of 3, 5, 6 and 7 bits straddle words."""


def group(tensors: Tensors, scheme: Scheme) -> Group:
    """Return the weight that `tensors` are under `scheme`.

    Raises:
        CheckpointCorrupt: they do not agree with each other or with the scheme.
        CheckpointUnsupported: a variant that is not decoded.
    """
    codes = tensors.codes
    if len(codes.spec.shape) < 2:
        corrupt(codes, "is quantized, but not a matrix", "two axes or more")
    if codes is not tensors.get("packed"):
        shape, formulas, text = _plain(tensors, scheme)
    elif codes.spec.dtype is Dtype.I32:
        shape, formulas, text = _words(tensors, scheme)
    elif codes.spec.dtype is Dtype.U8:
        shape, formulas, text = _small_floats(tensors, scheme)
    else:
        corrupt(codes, "is not packed codes", "I32 words of integers or U8 bytes of floats")
    return Group(
        name=tensors.name,
        shape=shape,
        formulas=formulas,
        consumed=tuple(one.spec.name for one in tensors.held.values()),
        scheme=text,
    )


_Made = tuple[tuple[int, ...], tuple[Formula, ...], str]
"""The shape of the weight, its formulas, and what it is in words."""


def _plain(tensors: Tensors, scheme: Scheme) -> _Made:
    """Codes of a byte each: int8, FP8, and FP8 with exponents for scales."""
    codes, scale = tensors.codes, tensors.scale
    if codes.spec.dtype not in CODES:
        unsupported(codes, "has codes of a dtype that is not decoded", "I8 or F8_E4M3")
    for key in ("g_idx", "global_scale"):
        if (extra := tensors.get(key)) is not None:
            unsupported(extra, "is not decoded for codes of a byte each", "no such tensor")
    is_float = codes.spec.dtype in FLOAT8
    if is_float != (scheme.kind == "float"):
        corrupt(codes, "and the config disagree on its type", f"{scheme.kind} codes")
    exponents = is_float and scale.spec.dtype in _EXPONENTS
    if not exponents:
        _check_float(tensors)
    grid = grid_of(tensors, scheme, codes.spec.shape)
    zero = tensors.get("zero_point")
    if zero is not None and is_float:
        unsupported(zero, "FP8 with zero points is not decoded", "no zero points")
    zeros = _plain_zeros(tensors, scheme, grid)
    formulas = tuple(
        Scaled(
            codes=code,
            scale=one,
            zero=zero_part,
            block=(grid.row_block, grid.group),
            dtype=Dtype.BF16 if exponents else scale.spec.dtype,
        )
        for code, one, zero_part in zip(
            grid.matrices(codes),
            grid.split(scale, as_dtype=Dtype.F8_E8M0 if exponents else None),
            zeros,
            strict=True,
        )
    )
    kind = "MXFP8" if exponents else "FP8" if is_float else "8-bit integers"
    return codes.spec.shape, formulas, f"{kind}, {grid.text}"


def _words(tensors: Tensors, scheme: Scheme) -> _Made:
    """Integers of 1 to 8 bits in words of 32."""
    codes, scale, bits = tensors.codes, tensors.scale, scheme.bits
    if scheme.kind != "int" or bits > 8:
        corrupt(codes, "and the config disagree on its type", f"{bits}-bit {scheme.kind} codes")
    _check_float(tensors)
    shape = _shape(tensors)
    dense = _is_dense(tensors, bits, shape[-1])
    grid = grid_of(tensors, scheme, shape)
    zero = tensors.get("zero_point")
    is_packed = zero is not None and zero.spec.dtype is Dtype.I32
    zeros = (
        _packed_zeros(tensors, bits, grid, dense=dense)
        if is_packed
        else _plain_zeros(tensors, scheme, grid)
    )
    g_idx = _g_idx(tensors, grid)
    formulas = tuple(
        Packed(
            codes=code,
            scale=one,
            zero=zero_part,
            g_idx=g_idx,
            bits=bits,
            columns=grid.columns,
            group=grid.group,
            row_block=grid.row_block,
            offset=0 if is_packed else 1 << bits - 1,
            zero_bits=bits if is_packed else 0,
            dense=dense,
            dtype=scale.spec.dtype,
        )
        for code, one, zero_part in zip(
            grid.matrices(codes, as_bytes=True), grid.split(scale), zeros, strict=True
        )
    )
    text = f"{bits}-bit integers, {grid.text}"
    text += ", zero points" if zero is not None else ""
    return shape, formulas, text + (", reordered" if g_idx is not None else "")


def _small_floats(tensors: Tensors, scheme: Scheme) -> _Made:
    """FP4 (NVFP4 and MXFP4) and FP6, which is MXFP6."""
    codes, scale, bits = tensors.codes, tensors.scale, scheme.bits
    if scheme.kind != "float" or bits not in (4, 6):
        corrupt(codes, "and the config disagree on its type", f"{bits}-bit {scheme.kind} codes")
    zero = tensors.get("zero_point")
    if zero is not None:
        unsupported(zero, "FP4 with zero points is not decoded", "no zero points")
    if scheme.strategy not in ("group", "tensor_group"):
        unsupported(scale, "FP4 without groups is not decoded", "groups of columns")
    *outer, width = codes.spec.shape
    if width * 8 % bits:
        corrupt(codes, "ends within a code", f"rows of whole {bits}-bit codes")
    shape = (*outer, width * 8 // bits)
    grid = grid_of(tensors, scheme, shape)
    exponents = scale.spec.dtype in _EXPONENTS
    of_all = _global_scales(tensors, scheme, grid, exponents=exponents)
    matrices = grid.matrices(codes, as_bytes=True)
    scales = grid.split(scale, as_dtype=Dtype.F8_E8M0 if exponents else None)
    if bits == 6:
        if not exponents:
            unsupported(scale, "FP6 with scales that are not exponents", "U8")
        made = tuple(_fp6(grid, code, one) for code, one in zip(matrices, scales, strict=True))
        return shape, made, f"MXFP6, {grid.text}"
    formulas = tuple(
        Fp4(
            codes=code,
            scale=one,
            global_scale=whole,
            group=grid.group,
            divides=True,
            dtype=Dtype.BF16,
        )
        for code, one, whole in zip(matrices, scales, of_all, strict=True)
    )
    return shape, formulas, f"{'MXFP4' if exponents else 'NVFP4'}, {grid.text}"


def _fp6(grid: Grid, codes: Part, scale: Part) -> Formula:
    return Packed(
        codes=codes,
        scale=scale,
        bits=6,
        columns=grid.columns,
        group=grid.group,
        values=Values.E2M3,
        dtype=Dtype.BF16,
    )


def _check_float(tensors: Tensors) -> None:
    if tensors.scale.spec.dtype not in _FLOATS:
        corrupt(tensors.scale, "has a dtype that scales do not have", "BF16, F16 or F32")


def _shape(tensors: Tensors) -> tuple[int, ...]:
    """Return the shape that `weight_shape` gives for packed words, checked against them."""
    codes, descriptor = tensors.codes, tensors.required("shape")
    axes = len(codes.spec.shape)
    letter = {Dtype.I64: "q", Dtype.I32: "i"}.get(descriptor.spec.dtype)
    if letter is None or descriptor.spec.shape != (axes,):
        corrupt(descriptor, "is not the shape of a weight", f"{axes} whole numbers (I64)")
    shape = struct.unpack(f"<{axes}{letter}", tensors.peek(descriptor))
    if shape[:-1] != codes.spec.shape[:-1] or not 0 <= shape[-1] <= 32 * codes.spec.shape[-1]:
        rows = [*codes.spec.shape[:-1], "columns"]
        corrupt(descriptor, "and the codes disagree", str(rows), str(list(shape)))
    return shape


def _is_dense(tensors: Tensors, bits: int, columns: int) -> bool:
    """Return whether codes straddle words, which the width of a row tells."""
    codes = tensors.codes
    width, in_word = codes.spec.shape[-1], 32 // bits
    widths = {True: ceil_div(columns * bits, 32), False: ceil_div(columns, in_word)}
    if width not in widths.values():
        both = " or ".join(str(one) for one in dict.fromkeys(widths.values()))
        corrupt(codes, f"does not hold {columns} codes of {bits} bits a row", f"{both} words")
    if widths[True] != widths[False]:
        return width == widths[True]
    if 32 % bits == 0 or columns <= in_word:  # the same bits either way
        return True
    if not tensors.version:
        unsupported(codes, "may be packed in two ways, and the config has no version", "a version")
    return tensors.version >= _STRADDLES_SINCE


def _plain_zeros(tensors: Tensors, scheme: Scheme, grid: Grid) -> list[Part] | list[None]:
    zero = tensors.get("zero_point")
    if zero is None:
        if not scheme.symmetric:
            tensors.required("zero_point")
        return [None] * grid.experts
    if zero.spec.dtype is not Dtype.I8:
        corrupt(zero, "has a dtype that zero points do not have", "I8")
    return grid.split(zero)


def _packed_zeros(tensors: Tensors, bits: int, grid: Grid, *, dense: bool) -> list[Part]:
    """Return zeros that are packed along the rows of each matrix' grid."""
    zero = tensors.required("zero_point")
    in_word = 32 // bits
    words = ceil_div(grid.height * bits, 32) if dense else ceil_div(grid.height, in_word)
    wanted = (*grid.outer, words, grid.width)
    if zero.spec.shape != wanted:
        corrupt(zero, "does not cover the weight", f"I32 {list(wanted)} ({grid.text})")
    whole = parts.part(zero, rows=grid.experts * words, columns=grid.width)
    return parts.stacked(whole, grid.experts)


def _g_idx(tensors: Tensors, grid: Grid) -> Part | None:
    """Return the group of each column, where columns were reordered by activation."""
    stored = tensors.get("g_idx")
    if stored is None:
        return None
    if stored.spec.dtype is not Dtype.I32 or stored.spec.shape != (grid.columns,):
        corrupt(stored, "is not the group of each column", f"I32 [{grid.columns}]")
    if grid.row_block != 1:
        unsupported(stored, "reordered blocks are not decoded", "groups of columns")
    return parts.part(stored, rows=1, columns=grid.columns)


def _global_scales(
    tensors: Tensors, scheme: Scheme, grid: Grid, *, exponents: bool
) -> list[Part] | list[None]:
    """Return the divisor of each matrix' scales."""
    scale, whole = tensors.scale, tensors.get("global_scale")
    if exponents:
        if whole is not None or (scheme.layout or "").startswith("nvfp4"):
            unsupported(scale, "exponents with a global scale are not decoded", "F8_E4M3")
        return [None] * grid.experts
    if scale.spec.dtype not in (Dtype.F8_E4M3, Dtype.BF16):
        unsupported(scale, "FP4 with scales of this dtype is not decoded", "F8_E4M3 or U8")
    if whole is None:
        if scheme.strategy == "tensor_group":
            tensors.required("global_scale")
        return [None] * grid.experts
    numel = math.prod(whole.spec.shape)
    if whole.spec.dtype is not Dtype.F32 or numel not in (1, grid.experts):
        corrupt(whole, "is not a global scale", "one F32")
    part = parts.part(whole, rows=numel, columns=1, is_scale=True)
    return [part] * grid.experts if numel == 1 else parts.stacked(part, grid.experts)
