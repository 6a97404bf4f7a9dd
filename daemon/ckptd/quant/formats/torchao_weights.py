"""How each class of torchao's tensors is one weight: from its inner tensors to formulas.

Shapes and dtypes are checked against the class's own rules before a formula is made; what only
quantized activations need is dropped by name.
Source: the classes' `__init__` and `dequantize` in torchao 0.14 to 0.18.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import StoredTensor
from ckptd.quant import parts
from ckptd.quant.formats.torchao_index import Entry
from ckptd.quant.formula import Formula
from ckptd.quant.formulas.scaled import Scaled
from ckptd.quant.group import Group
from ckptd.quant.parts import Part

FLOATS = (Dtype.F32, Dtype.BF16, Dtype.F16)
_INTEGERS = (Dtype.I8, Dtype.I16, Dtype.I32, Dtype.I64)
_FLOAT8 = (Dtype.F8_E4M3, Dtype.F8_E5M2, Dtype.F8_E4M3FNUZ, Dtype.F8_E5M2FNUZ)
_ACTIVATIONS = ("act_quant_scale", "act_quant_zero_point", "act_per_tensor_scale")
"""Inner tensors for quantized activations: a plain weight has no use for them."""


def group(
    entry: Entry, formulas: tuple[Formula, ...], shape: tuple[int, ...], scheme: str
) -> Group:
    """Return the weight of an entry, which consumes all inner tensors but those of activations.

    Raises:
        CheckpointUnsupported: there are no experts in a stack of them.
    """
    if not formulas:
        entry.unsupported(
            "a stack without a matrix", expected="one or more", found=f"{list(shape)}"
        )
    return Group(
        name=entry.name,
        shape=shape,
        formulas=formulas,
        consumed=tuple(
            tensor.spec.name for field, tensor in entry.inner.items() if field not in _ACTIVATIONS
        ),
        scheme=f"{entry.kind}, {scheme}",
    )


def dropped(entry: Entry) -> tuple[str, ...]:
    """Return the inner tensors of an entry that only quantized activations need."""
    return tuple(entry.inner[field].spec.name for field in _ACTIVATIONS if field in entry.inner)


def no_pre_scale(entry: Entry) -> None:
    """Refuse an activation scale that the weight would have to take over.

    Raises:
        CheckpointUnsupported: there is one.
    """
    if "act_pre_scale" in entry.inner:
        entry.unsupported(
            "activations are scaled before they are quantized, which is not decoded",
            expected="no act_pre_scale",
            found=entry.inner["act_pre_scale"].spec.name,
        )


def integers(entry: Entry) -> Group:
    """Return an Int8Tensor or IntxUnpackedToInt8Tensor: `(code - zero) * scale`.

    Raises:
        CheckpointCorrupt, CheckpointUnsupported: see `ckptd.quant.group.Format.find`.
    """
    no_pre_scale(entry)
    codes = entry.tensor("qdata")
    shape = codes.spec.shape
    if codes.spec.dtype is not Dtype.I8 or len(shape) < 2:
        entry.mismatch(codes, "I8 of two axes or more")
    block = entry.sizes("block_size", len(shape))
    counts = tuple(_blocks(entry, size, by) for size, by in zip(shape, block, strict=True))
    scale = _on_grid(entry, "scale", counts, FLOATS)
    zero = None
    if "zero_point" in entry.inner or entry.kind != "Int8Tensor":
        zero = _on_grid(entry, "zero_point", counts, (*_INTEGERS, *FLOATS))
    made = _scaled(entry, codes, scale, zero, counts, entry.dtype("dtype"))
    bits = entry.dtype_name("target_dtype").removeprefix("int") or "8"
    return group(entry, made, shape, f"{bits}-bit, {_blocks_text(shape, counts)}")


def float8(entry: Entry) -> Group:
    """Return a Float8Tensor: `code * scale`, with blocks that the scale's shape tells.

    Raises:
        CheckpointCorrupt, CheckpointUnsupported: see `ckptd.quant.group.Format.find`.
    """
    codes, scale = entry.tensor("qdata"), entry.tensor("scale")
    shape, grid = codes.spec.shape, scale.spec.shape
    if codes.spec.dtype not in _FLOAT8 or len(shape) < 2:
        entry.mismatch(codes, "float8 of two axes or more")
    counts = (1,) * len(shape) if scale.spec.numel == 1 else grid
    fits = len(counts) == len(shape) and all(
        count == size or (count and size % count == 0)
        for count, size in zip(counts, shape, strict=True)
    )
    if not fits or scale.spec.dtype not in FLOATS:
        entry.mismatch(scale, f"a float for equal blocks of {list(shape)}")
    if entry.attributes.get("block_size"):  # none at all says one scale for everything
        block = entry.sizes("block_size", len(shape))
        told = tuple(_blocks(entry, size, by) for size, by in zip(shape, block, strict=True))
        if told != counts:
            entry.mismatch(scale, f"a grid of {list(told)} for blocks of {list(block)}")
    made = _scaled(entry, codes, scale, None, counts, entry.dtype("dtype"))
    return group(entry, made, shape, f"{codes.spec.dtype}, {_blocks_text(shape, counts)}")


def _blocks(entry: Entry, size: int, by: int) -> int:
    """Return how many blocks of `by` an axis has; torchao divides evenly."""
    if by == size:
        return 1
    if by < 1 or size % by:
        entry.corrupt("block_size does not divide the weight", expected=f"{size}", found=f"{by}")
    return size // by


def _on_grid(
    entry: Entry, field: str, counts: tuple[int, ...], allowed: tuple[Dtype, ...]
) -> StoredTensor:
    """Return an inner tensor with a value a block, whichever axes of 1 it is stored with."""
    tensor = entry.tensor(field)
    long = [count for count in counts if count != 1]
    if tensor.spec.dtype not in allowed or [n for n in tensor.spec.shape if n != 1] != long:
        entry.mismatch(tensor, f"{' or '.join(allowed)} {list(counts)}")
    return tensor


def _blocks_text(shape: tuple[int, ...], counts: tuple[int, ...]) -> str:
    if math.prod(counts) == 1:
        return "one scale"
    sizes = (size // max(count, 1) for size, count in zip(shape, counts, strict=True))
    return f"blocks of {' x '.join(str(size) for size in sizes)}"


@dataclass(frozen=True, slots=True)
class _Layout:
    """A weight of any number of axes as `experts` matrices with a grid each."""

    experts: int
    rows: int
    columns: int
    grids: int
    grid: tuple[int, int]


def _layout(entry: Entry, shape: tuple[int, ...], counts: tuple[int, ...]) -> _Layout:
    if len(shape) == 2:
        return _Layout(1, shape[0], shape[1], 1, (counts[0], counts[1]))
    if len(shape) == 3:
        return _Layout(shape[0], shape[1], shape[2], counts[0], (counts[1], counts[2]))
    if math.prod(counts[1:]) != 1:
        entry.unsupported(
            "blocks within the kernel of a convolution are not decoded",
            expected="a scale for each output channel",
            found=f"{list(counts)} blocks of {list(shape)}",
        )
    return _Layout(1, shape[0], math.prod(shape[1:]), 1, (counts[0], 1))


def _scaled(
    entry: Entry,
    codes: StoredTensor,
    scale: StoredTensor,
    zero: StoredTensor | None,
    counts: tuple[int, ...],
    dtype: Dtype,
) -> tuple[Scaled, ...]:
    """Return a formula for each matrix; experts may share one grid."""
    layout = _layout(entry, codes.spec.shape, counts)
    block = (
        max(layout.rows // max(layout.grid[0], 1), 1),
        max(layout.columns // max(layout.grid[1], 1), 1),
    )

    def grids(tensor: StoredTensor, *, is_scale: bool) -> list[Part]:
        rows, columns = layout.grids * layout.grid[0], layout.grid[1]
        whole = parts.part(tensor, rows=rows, columns=columns, is_scale=is_scale)
        return parts.stacked(whole, layout.grids)

    float_zero = zero is not None and zero.spec.dtype in FLOATS
    rows = parts.part(codes, rows=layout.experts * layout.rows, columns=layout.columns)
    scales = grids(scale, is_scale=True)
    zeros = None if zero is None else grids(zero, is_scale=float_zero)
    return tuple(
        Scaled(
            codes=matrix,
            scale=scales[place * layout.grids // layout.experts],
            zero=None if zeros is None else zeros[place * layout.grids // layout.experts],
            block=block,
            rounds_difference=float_zero,
            dtype=dtype,
        )
        for place, matrix in enumerate(parts.stacked(rows, layout.experts))
    )
