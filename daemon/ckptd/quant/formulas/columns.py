"""Integer codes packed down the columns of a matrix, with scales and packed zeros of row groups.

The stored matrix is `(inputs, outputs)`: words hold codes of one output one below the other. With
the group g of an input, `k // group` or `g_idx[k]`,

    w[k, n] = (code[k, n] - zero[g, n]) * scale[g, n]

and the result is its transpose, `(outputs, inputs)`, or itself where not `transposed`.
Source: the packing of AutoGPTQ, GPTQModel and AutoRound, as their files show it.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from ckptd.checkpoint.dtypes import Dtype
from ckptd.quant.formula import Arith, ceil_div
from ckptd.quant.parts import Part, Window

BLOCK = 32
"""Codes after which one begins at the first bit of a word again, whatever their width."""


class Packing(enum.StrEnum):
    """How codes lie in words."""

    STREAM = "stream"
    """A little-endian stream of bits: codes may straddle words."""
    PLANES = "planes"
    """In each block the low bits of all its codes come first, then the planes of higher bits."""


class Zeros(enum.StrEnum):
    """What a stored zero means."""

    STORED = "stored"
    """The zero."""
    WORDS = "words"
    """The zero after 1 was added to each field by one sum of whole words: carries go on into the
    next field, which undoes the borrows of the writer's subtraction."""
    FIELDS = "fields"
    """One less than the zero, which wraps within its field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Packed codes with a scale and a zero for each output and each `group` of inputs.

    `codes` are words (`I8` to `I64`) of (ceil(inputs * bits / word), outputs), `zeros` words of the
    same type of (groups, ceil(outputs * bits / word)), `scale` floats of (groups, outputs). `g_idx`
    (`I32`, 1 x inputs) gives each input's group.
    """

    codes: Part
    zeros: Part
    scale: Part
    g_idx: Part | None = None
    bits: int
    inputs: int
    group: int
    packing: Packing = Packing.STREAM
    zero_rule: Zeros = Zeros.STORED
    transposed: bool = True
    dtype: Dtype
    arith: Arith = Arith.FLOAT32

    @property
    def outputs(self) -> int:
        """The columns of the stored matrix."""
        return self.scale.columns

    @property
    def rows(self) -> int:
        """The rows of the result."""
        return self.outputs if self.transposed else self.inputs

    @property
    def columns(self) -> int:
        """The columns of the result."""
        return self.inputs if self.transposed else self.outputs

    @property
    def granule(self) -> int:
        """Whole words of zeros, or of codes and whole groups."""
        if self.transposed or self.g_idx is not None or self.scale.rows <= 1:
            return BLOCK
        return math.lcm(BLOCK, self.group)

    def words(self, codes: range) -> range:
        """Return the words that hold `codes`, which begin at a block's begin."""
        stop = codes.stop
        if self.packing is Packing.PLANES:
            stop = ceil_div(stop, BLOCK) * BLOCK
        width = self.codes.dtype.bits
        return range(codes.start * self.bits // width, ceil_div(stop * self.bits, width))

    def groups(self, inputs: range) -> range:
        """Return the rows of zeros and scales that `inputs` need."""
        if self.g_idx is not None or self.scale.rows <= 1:
            return range(self.scale.rows)
        return range(inputs.start // self.group, ceil_div(inputs.stop, self.group))

    def windows(self, rows: range) -> tuple[Window, ...]:
        """Return codes, zeros, scales and, where there is one, the groups of inputs."""
        outputs = rows if self.transposed else range(self.outputs)
        inputs = range(self.inputs) if self.transposed else rows
        groups = self.groups(inputs)
        wanted = (
            self.codes.window(self.words(inputs), outputs),
            self.zeros.window(groups, self.words(outputs)),
            self.scale.window(groups, outputs),
        )
        if self.g_idx is None:
            return wanted
        return (*wanted, self.g_idx.window(columns=inputs))
