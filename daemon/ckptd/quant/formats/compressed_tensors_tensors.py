"""The tensors of one weight of compressed-tensors, and the grid that its scales lie on.

Whatever does not fit is refused here by name. Source: files of compressed-tensors 0.4 to 0.20.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import StoredTensor
from ckptd.errors import CheckpointCorrupt, CheckpointUnsupported
from ckptd.quant import parts
from ckptd.quant.formats.compressed_tensors_schemes import Scheme
from ckptd.quant.formula import ceil_div
from ckptd.quant.parts import Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensors:
    """What is stored of a weight: the tensor `name` itself as "codes", `name_scale` as "scale"...

    `version` is that of the library that wrote it, (0, 18), or empty where it is not known.
    """

    name: str
    held: Mapping[str, StoredTensor]
    peek: Callable[[StoredTensor], bytes]
    version: tuple[int, ...]

    @property
    def codes(self) -> StoredTensor:
        """The tensor that the values are in."""
        return self.held["packed"] if "packed" in self.held else self.held["codes"]

    @property
    def scale(self) -> StoredTensor:
        """The scale; refuses a weight without one."""
        return self.required("scale")

    def get(self, partner: str) -> StoredTensor | None:
        """Return the tensor `name_partner`, or None."""
        return self.held.get(partner)

    def required(self, partner: str) -> StoredTensor:
        """Return the tensor `name_partner`.

        Raises:
            CheckpointCorrupt: there is none.
        """
        if partner not in self.held:
            raise CheckpointCorrupt(
                "is quantized, but a partner is missing",
                path=self.codes.extent.path,
                tensor=self.codes.spec.name,
                expected=f"{self.name}_{partner}",
                hint="a shard was lost or not copied: download or save it again",
            )
        return self.held[partner]


def corrupt(tensor: StoredTensor, what: str, expected: str, found: str | None = None) -> NoReturn:
    """Refuse a tensor that is not as `expected`; `found` is its dtype and shape if not given."""
    raise CheckpointCorrupt(
        what,
        path=tensor.extent.path,
        tensor=tensor.spec.name,
        expected=expected,
        found=found or f"{tensor.spec.dtype} {list(tensor.spec.shape)}",
    )


def unsupported(tensor: StoredTensor, what: str, expected: str) -> NoReturn:
    """Refuse a variant that is not decoded."""
    raise CheckpointUnsupported(
        what,
        path=tensor.extent.path,
        tensor=tensor.spec.name,
        expected=expected,
        found=f"{tensor.spec.dtype} {list(tensor.spec.shape)}",
        hint="dequantize it with compressed-tensors, and save that",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A weight as `experts` matrices (rows, columns), each with a grid of scales.

    A scale is for `row_block` rows and `group` columns.
    """

    outer: tuple[int, ...]
    rows: int
    columns: int
    row_block: int
    group: int
    text: str

    @property
    def experts(self) -> int:
        """How many matrices there are."""
        return math.prod(self.outer)

    @property
    def height(self) -> int:
        """The rows of a grid."""
        return ceil_div(self.rows, self.row_block)

    @property
    def width(self) -> int:
        """The columns of a grid."""
        return ceil_div(self.columns, self.group)

    def split(self, tensor: StoredTensor, *, as_dtype: Dtype | None = None) -> list[Part]:
        """Return each matrix' grid in a tensor of scales or zeros.

        Raises:
            CheckpointCorrupt: it has another shape than the grid.
        """
        shape = tensor.spec.shape
        wanted = (*self.outer, self.height, self.width)
        fits = shape == wanted
        if not fits and not self.outer and self.width == 1 and self.columns:
            ends_in_ones = all(length == 1 for length in shape[1:])
            fits = ends_in_ones and (math.prod(shape) == 1 or len(shape) > 2)
            fits = fits and math.prod(shape) == self.height
        if not fits:
            corrupt(tensor, "does not cover the weight", f"{list(wanted)} ({self.text})")
        rows = self.experts * self.height
        whole = parts.part(
            tensor,
            rows=rows,
            columns=self.width,
            dtype=as_dtype,
            is_scale=as_dtype is not None or tensor.spec.dtype is not Dtype.I8,
        )
        return parts.stacked(whole, self.experts)

    def matrices(self, tensor: StoredTensor, *, as_bytes: bool = False) -> list[Part]:
        """Return each matrix' codes."""
        rows = self.experts * self.rows
        if as_bytes:
            width = tensor.spec.shape[-1] * tensor.spec.dtype.bits // 8
            whole = parts.part(tensor, rows=rows, columns=width, dtype=Dtype.U8)
        else:
            whole = parts.part(tensor, rows=rows, columns=self.columns)
        return parts.stacked(whole, self.experts)


def grid_of(tensors: Tensors, scheme: Scheme, shape: tuple[int, ...]) -> Grid:
    """Return the grid of a weight of `shape`, two axes or more, from its scheme and its scale.

    Of a scale for all and one a row, the scale's shape decides.

    Raises:
        CheckpointCorrupt: there is no scale, or the config does not say of how many columns or
            rows a group is.
    """
    scale = tensors.scale
    stored = scale.spec.shape
    if scheme.strategy in ("tensor", "channel"):
        outer, rows, columns = _rowwise(shape, stored)
        if math.prod(stored) == 1:
            row_block, group, text = max(1, rows), max(1, columns), "one scale"
        else:
            row_block, group, text = 1, max(1, columns), "a scale a row"
        return Grid(
            outer=outer, rows=rows, columns=columns, row_block=row_block, group=group, text=text
        )
    if scheme.strategy == "block":
        if scheme.block is None:
            corrupt(scale, "has no block_structure in the config", "rows and columns", "none")
        row_block, group = scheme.block
        text = f"blocks of {row_block} x {group}"
    else:
        if scheme.group_size is None:
            corrupt(scale, "has no group_size in the config", "a number of columns", "none")
        row_block, group, text = 1, scheme.group_size, f"groups of {scheme.group_size}"
    return Grid(
        outer=shape[:-2],
        rows=shape[-2],
        columns=shape[-1],
        row_block=row_block,
        group=group,
        text=text,
    )


def _rowwise(shape: tuple[int, ...], scale: tuple[int, ...]) -> tuple[tuple[int, ...], int, int]:
    """Return outer axes, rows and columns of a weight with one scale, or one a row.

    A convolution has a scale for each place of its first axis, experts one for each row of each.
    """
    if math.prod(scale) == 1:
        return (), math.prod(shape[:-1]), shape[-1]
    if len(scale) == len(shape) > 2 and all(length == 1 for length in scale[1:]):
        return (), shape[0], math.prod(shape[1:])
    return shape[:-2], shape[-2], shape[-1]
