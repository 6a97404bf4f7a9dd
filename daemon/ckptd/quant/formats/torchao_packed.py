"""torchao's 4-bit classes and those of Blackwell: packed codes, scales transposed or in tiles.

The int4 classes have no `dequantize` of their own; the formulas are those of the kernels that they
are packed for.
Source: the classes' docstrings and packing in torchao 0.14 to 0.18; for Int4PlainInt32Tensor the
conversion for Intel GPUs in torch-xpu-ops.
"""

from __future__ import annotations

import math

from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import StoredTensor
from ckptd.quant import parts
from ckptd.quant.formats.torchao_index import Entry
from ckptd.quant.formats.torchao_weights import FLOATS, group, no_pre_scale
from ckptd.quant.formula import Formula, ceil_div
from ckptd.quant.formulas import int4, swizzled
from ckptd.quant.formulas.fp4 import Fp4
from ckptd.quant.formulas.int4 import Nibbles, Tiles
from ckptd.quant.formulas.scaled import Scaled
from ckptd.quant.formulas.swizzled import Swizzled
from ckptd.quant.group import Group
from ckptd.quant.parts import Part

_BYTES = (Dtype.U8, Dtype.I8)
_MX_CODES = {
    "float8_e4m3fn": Dtype.F8_E4M3,
    "float8_e5m2": Dtype.F8_E5M2,
    "float4_e2m1fn_x2": Dtype.U8,
}


def nibbles(entry: Entry) -> Group:
    """Return an Int4Tensor: signed nibbles, `code * scale + zero`.

    Raises:
        CheckpointCorrupt, CheckpointUnsupported: see `ckptd.quant.group.Format.find`.
    """
    shape = _int4_shape(entry, (2, 3))
    codes = entry.check("qdata", (*shape[:-1], shape[-1] // 2), _BYTES)
    return _nibbles(entry, codes, shape, signed=True)


def words(entry: Entry) -> Group:
    """Return an Int4PlainInt32Tensor of Intel GPUs: nibbles in words, `(code - zero) * scale`.

    Raises:
        CheckpointCorrupt, CheckpointUnsupported: see `ckptd.quant.group.Format.find`.
    """
    shape = _int4_shape(entry, (2,))
    codes = entry.check("qdata", (shape[0], shape[1] // 8), (Dtype.I32,))
    if shape[1] % 8:
        entry.mismatch(codes, f"eight codes a word for {list(shape)}")
    if entry.tensor("zero_point").spec.dtype is not Dtype.I8:
        entry.unsupported(
            "the order of codes that NPUs use is not decoded",
            expected="whole zero points, as for Intel GPUs",
            found=str(entry.tensor("zero_point").spec.dtype),
        )
    return _nibbles(entry, codes, shape, signed=False)


def tiles(entry: Entry) -> Group:
    """Return an Int4TilePackedTo4dTensor: `(code - 8) * scale + zero`.

    Raises:
        CheckpointCorrupt, CheckpointUnsupported: see `ckptd.quant.group.Format.find`.
    """
    shape = _int4_shape(entry, (2, 3))
    *experts, height, width = shape
    by = _group(entry, shape, even=False)
    codes, pairs = entry.tensor("qdata"), entry.tensor("scale_and_zero")
    tall, wide = codes.spec.shape[-4:-2] if len(codes.spec.shape) >= 4 else (0, 0)
    padded = (tall * int4.TILE_ROWS, wide * int4.TILE_COLUMNS)
    fits = padded[0] - height in range(128) and padded[1] - width in range(1024)
    if codes.spec.shape != (*experts, tall, wide, 32, 4) or codes.spec.dtype is not Dtype.I32:
        entry.mismatch(codes, f"I32 [{ceil_div(height, 8)}, {ceil_div(width, 128)}, 32, 4]")
    if not fits or padded[1] % by:
        entry.mismatch(codes, f"tiles of 8 x 128 for {list(shape)}, padded to 1024 columns")
    entry.check("scale_and_zero", (*experts, padded[1] // by, padded[0], 2), FLOATS)
    count = math.prod(experts)
    row_bytes = wide * int4.TILE_BYTES
    code_parts = parts.part(codes, rows=count * tall, columns=row_bytes, dtype=Dtype.U8)
    pair_parts = parts.part(
        pairs, rows=count * padded[1] // by, columns=2 * padded[0], is_scale=True
    )
    made = tuple(
        Tiles(
            codes=matrix,
            scale_and_zero=pair,
            pre_scale=_pre_scale(entry, width),
            group=by,
            height=height,
            width=width,
            dtype=Dtype.BF16,
        )
        for matrix, pair in zip(
            parts.stacked(code_parts, count), parts.stacked(pair_parts, count), strict=True
        )
    )
    return group(entry, made, shape, f"4-bit, groups of {by}")


def nvfp4(entry: Entry) -> Group:
    """Return an NVFP4Tensor: E2M1 with E4M3 scales of 16, and one for the tensor or each expert.

    Raises:
        CheckpointCorrupt, CheckpointUnsupported: see `ckptd.quant.group.Format.find`.
    """
    by = entry.size("block_size")
    if by != 16:
        entry.corrupt("block_size is wrong", expected="16", found=f"{by}")
    dtype = entry.dtype("orig_dtype")
    return _blackwell(entry, Dtype.U8, (Dtype.F8_E4M3,), by, dtype, "E2M1 with E4M3 scales")


def mx(entry: Entry) -> Group:
    """Return an MXTensor: FP8 or E2M1 with powers of two as scales.

    Raises:
        CheckpointCorrupt, CheckpointUnsupported: see `ckptd.quant.group.Format.find`.
    """
    element = entry.dtype_name("elem_dtype")
    stored = _MX_CODES.get(element)
    if stored is None:
        entry.unsupported(
            "elements of this type are not decoded",
            expected=" or ".join(_MX_CODES),
            found=repr(entry.attributes.get("elem_dtype"))[:80],
        )
    by = entry.size("block_size")
    scales = (Dtype.F8_E8M0, Dtype.U8)
    return _blackwell(entry, stored, scales, by, entry.dtype("orig_dtype"), element)


def _int4_shape(entry: Entry, axes: tuple[int, ...]) -> tuple[int, ...]:
    told = entry.attributes.get("shape")
    count = len(told) if isinstance(told, list) else 0
    shape = entry.sizes("shape", count)
    if count not in axes:
        entry.unsupported(
            "a weight of so many axes is not decoded",
            expected=" or ".join(str(one) for one in axes),
            found=f"{list(shape)}",
        )
    if shape[-1] % 2:
        entry.corrupt("shape has half a byte", expected="an even last axis", found=f"{list(shape)}")
    return shape


def _group(entry: Entry, shape: tuple[int, ...], *, even: bool = True) -> int:
    """Return the columns under one scale; int4 classes have groups along the last axis alone."""
    block = entry.sizes("block_size", len(shape))
    wrong = any(one != 1 for one in block[:-1]) or block[-1] < 1
    if wrong or (even and shape[-1] % block[-1]):
        entry.corrupt("block_size is wrong", expected=f"groups of {list(shape)}", found=f"{block}")
    return block[-1]


def _pre_scale(entry: Entry, columns: int) -> Part | None:
    """Return the scale of activations, which the plain weight takes over."""
    if "act_pre_scale" not in entry.inner:
        return None
    tensor = entry.inner["act_pre_scale"]
    if tensor.spec.numel != columns or tensor.spec.dtype not in FLOATS:
        entry.mismatch(tensor, f"a float for each of {columns} columns")
    return parts.part(tensor, rows=1, columns=columns, is_scale=True)


def _nibbles(entry: Entry, codes: StoredTensor, shape: tuple[int, ...], *, signed: bool) -> Group:
    *experts, height, width = shape
    count, by = math.prod(experts), _group(entry, shape)
    grid = (*experts, width // by, height)
    zeros = FLOATS if signed else (Dtype.I8,)
    stacks = (
        parts.part(codes, rows=count * height, columns=width // 2, dtype=Dtype.U8),
        parts.part(entry.check("scale", grid, FLOATS), is_scale=True),
        parts.part(entry.check("zero_point", grid, zeros), is_scale=signed),
    )
    made = tuple(
        Nibbles(
            codes=matrix,
            scale=scale,
            zero=zero,
            pre_scale=_pre_scale(entry, width),
            group=by,
            signed=signed,
            dtype=entry.tensor("scale").spec.dtype,
        )
        for matrix, scale, zero in zip(*(parts.stacked(one, count) for one in stacks), strict=True)
    )
    return group(entry, made, shape, f"4-bit, groups of {by}")


def _blackwell(
    entry: Entry,
    element: Dtype,
    scales: tuple[Dtype, ...],
    by: int,
    dtype: Dtype,
    scheme: str,
) -> Group:
    no_pre_scale(entry)
    codes = entry.tensor("qdata")
    in_byte = 2 if element is Dtype.U8 else 1
    if codes.spec.dtype is not element or len(codes.spec.shape) not in (2, 3):
        entry.mismatch(codes, f"{element} of two axes or three")
    shape = (*codes.spec.shape[:-1], codes.spec.shape[-1] * in_byte)
    if shape[-1] % by:
        entry.mismatch(codes, f"whole blocks of {by} columns")
    if entry.flag("is_swizzled_scales"):
        made = _swizzled(entry, shape, scales, by, dtype)
        return group(entry, made, shape, f"{scheme}, blocks of {by}, tiled")
    whole = entry.check("scale", (*shape[:-1], shape[-1] // by), scales)
    count = math.prod(shape[:-2])
    code_parts = parts.stacked(parts.part(codes), count)
    scale_parts = parts.stacked(_scale_part(whole, scales[0]), count)
    global_parts = _globals(entry, count)
    plain: list[Formula] = []
    for matrix, scale, one in zip(code_parts, scale_parts, global_parts, strict=True):
        if element is Dtype.U8:
            plain.append(Fp4(codes=matrix, scale=scale, global_scale=one, group=by, dtype=dtype))
        else:
            plain.append(Scaled(codes=matrix, scale=scale, block=(1, by), dtype=dtype))
    return group(entry, tuple(plain), shape, f"{scheme}, blocks of {by}")


def _scale_part(tensor: StoredTensor, dtype: Dtype, columns: int | None = None) -> Part:
    return parts.part(tensor, dtype=dtype, columns=columns, is_scale=True)


def _swizzled(
    entry: Entry, shape: tuple[int, ...], scales: tuple[Dtype, ...], by: int, dtype: Dtype
) -> tuple[Swizzled, ...]:
    """Return matrices with tiled scales: torchao tiles the rows of all experts as one matrix.

    Experts of whole tiles are the same one by one; others only go together.
    """
    rows, groups = math.prod(shape[:-1]), shape[-1] // by
    tall = ceil_div(rows, swizzled.TILE_ROWS)
    row_bytes = ceil_div(groups, swizzled.TILE_COLUMNS) * swizzled.TILE_BYTES
    tensor = entry.tensor("scale")
    if tensor.spec.dtype not in scales or tensor.spec.numel != tall * row_bytes:
        entry.mismatch(tensor, f"{scales[0]} of {tall * row_bytes} elements, in tiles of 128 x 4")
    count = math.prod(shape[:-2])
    if shape[-2] % swizzled.TILE_ROWS:
        count = 1
    global_parts = _globals(entry, count)
    code_parts = parts.stacked(parts.part(entry.tensor("qdata")), count)
    scale_parts = parts.stacked(_scale_part(tensor, scales[0], row_bytes), count)
    return tuple(
        Swizzled(codes=matrix, scale=scale, global_scale=one, group=by, dtype=dtype)
        for matrix, scale, one in zip(code_parts, scale_parts, global_parts, strict=True)
    )


def _globals(entry: Entry, count: int) -> list[Part | None]:
    """Return the scale of the tensor for each of its matrices, or its own for each expert."""
    tensor = entry.inner.get("per_tensor_scale")
    if tensor is None:
        return [None] * count
    if tensor.spec.dtype is not Dtype.F32 or tensor.spec.numel not in (1, count):
        entry.mismatch(tensor, f"F32, one or {count}")
    each = parts.part(tensor, rows=tensor.spec.numel, columns=1, is_scale=True)
    return [*parts.stacked(each, count)] if each.rows == count else [each] * count
