"""Dividing computed segments into blocks that fit a byte budget, and small ones into batches.

A block is a part of one computed tensor: a range of elements where each is computed for itself, a
group of rows where rows are grown. A batch is a few blocks that are read, computed and written
together, so that tens of thousands of small tensors do not cost a round trip each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ckptd.checkpoint.dtypes import Dtype
from ckptd.plan import expression
from ckptd.plan.expression import Cast, Concat, Expression, Grown, Load
from ckptd.plan.plan import Computed, Run, Segment

BLOCK_BYTES = 8 << 20
"""Bytes per block, on its wider side: enough for a GPU copy, and a CPU keeps up."""
GROWN_GROUP_ROWS = 64
"""New rows share a generator in groups of this many; part of the definition of their values."""
STATISTICS_BYTES = 4 << 20
"""Source rows per statistics step, as float32 bytes; fixed, so that sums never depend on memory."""
_GROWN_BLOCK_BYTES = 4 * BLOCK_BYTES
"""Each block of grown rows is one more pass over the source: larger blocks, fewer passes."""
_ELEMENTS_UNIT = 64
"""Elements per block are a multiple of this: whole bytes in any dtype."""


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a computed tensor: its expression and where its bytes go."""

    tensor: str
    value: Expression
    offset: int
    nbytes: int

    @property
    def source_bytes(self) -> int:
        """The source bytes that go into the block."""
        return sum(extent.nbytes for extent in expression.extents(self.value))

    @property
    def cost_bytes(self) -> int:
        """Host memory while the block is in flight: sources, result, workspace of grown rows."""
        grown = expression.grown_in(self.value)
        if grown is not None:
            # Values in float32, and a statistics step as read, in float32 and in float64.
            return self.nbytes + 4 * expression.numel(grown) + 4 * STATISTICS_BYTES
        source = sum(extent.nbytes for extent in expression.loads(self.value))
        return source if isinstance(self.value, Load) else source + self.nbytes


def batches(segments: Iterable[Segment]) -> Iterator[list[Block]]:
    """Yield the blocks of `segments` in order, small neighbours together."""
    batch: list[Block] = []
    size = 0
    for segment in segments:
        for block in _blocks(segment):
            wider = max(block.nbytes, sum(e.nbytes for e in expression.loads(block.value)))
            if batch and size + wider > BLOCK_BYTES:
                yield batch
                batch, size = [], 0
            batch.append(block)
            size += wider
    if batch:
        yield batch


def _blocks(segment: Segment) -> Iterator[Block]:
    if isinstance(segment, Run):
        raw = Load(segment.source, Dtype.U8, (segment.nbytes,))
        yield Block("", raw, segment.offset, segment.nbytes)
        return
    value, axis, step = _division(segment)
    num_rows = value.shape[axis]
    offset = segment.offset
    for start in range(0, num_rows, step):
        part = expression.rows(value, start, min(start + step, num_rows), axis=axis)
        nbytes = expression.nbytes(part)
        yield Block(segment.tensor, part, offset, nbytes)
        offset += nbytes


def _division(segment: Computed) -> tuple[Expression, int, int]:
    """Return the value to divide, the axis along which, and the length of a block there."""
    grown = expression.grown_in(segment.value)
    if grown is None:
        value = expression.flat(segment.value)
        step = BLOCK_BYTES * 8 // _widest_bits(value)
        return value, 0, max(_ELEMENTS_UNIT, step - step % _ELEMENTS_UNIT)
    step = _GROWN_BLOCK_BYTES * grown.shape[grown.axis] // max(1, segment.nbytes)
    return segment.value, grown.axis, max(GROWN_GROUP_ROWS, step - step % GROWN_GROUP_ROWS)


def _widest_bits(value: Expression) -> int:
    match value:
        case Load() | Grown():
            return value.dtype.bits
        case Cast(source=source):
            return max(value.dtype.bits, _widest_bits(source))
        case Concat(parts=parts):
            return max(_widest_bits(part) for part in parts)
