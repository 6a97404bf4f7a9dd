"""Dividing computed segments into blocks that fit a byte budget, and small ones into batches.

A block is a slice of rows of one computed tensor; a batch is a few blocks that are read, computed
and written together, so that tens of thousands of small tensors do not cost a round trip each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ckptd.checkpoint.dtypes import Dtype
from ckptd.plan import expression
from ckptd.plan.expression import Concat, Expression, Grown, Load
from ckptd.plan.plan import Computed, Run, Segment

BLOCK_BYTES = 8 << 20
"""Output bytes per block: small enough for a CPU's last cache, large enough for a GPU copy."""
GROWN_GROUP_ROWS = 64
"""New rows share a generator in groups of this many; part of the definition of their values."""


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
        """Host memory while the block is in flight: sources, result, float32 workspace."""
        source = sum(extent.nbytes for extent in expression.loads(self.value))
        workspace = 12 * expression.numel(self.value) if isinstance(self.value, Grown) else 0
        return source + self.nbytes + workspace


def batches(segments: Iterable[Segment]) -> Iterator[list[Block]]:
    """Yield the blocks of `segments` in order, small neighbours together."""
    batch: list[Block] = []
    size = 0
    for segment in segments:
        for block in _blocks(segment):
            if batch and size + block.nbytes > BLOCK_BYTES:
                yield batch
                batch, size = [], 0
            batch.append(block)
            size += block.nbytes
    if batch:
        yield batch


def _blocks(segment: Segment) -> Iterator[Block]:
    if isinstance(segment, Run):
        raw = Load(segment.source, Dtype.U8, (segment.nbytes,))
        yield Block("", raw, segment.offset, segment.nbytes)
        return
    value, offset = segment.value, segment.offset
    axis = _row_axis(segment)
    if axis is None:
        yield Block(segment.tensor, value, offset, segment.nbytes)
        return
    num_rows = value.shape[axis]
    step = _rows_per_block(value, segment.nbytes, num_rows)
    for start in range(0, num_rows, step):
        part = expression.rows(value, start, min(start + step, num_rows), axis=axis)
        nbytes = expression.nbytes(part)
        yield Block(segment.tensor, part, offset, nbytes)
        offset += nbytes


def _row_axis(segment: Computed) -> int | None:
    if segment.nbytes <= BLOCK_BYTES and not isinstance(segment.value, Grown):
        return None
    if isinstance(segment.value, Grown | Concat):
        return segment.value.axis
    return next((axis for axis, length in enumerate(segment.value.shape) if length != 1), None)


def _rows_per_block(value: Expression, nbytes: int, num_rows: int) -> int:
    rows = max(1, BLOCK_BYTES * num_rows // max(1, nbytes))
    if not isinstance(value, Grown):
        return rows
    # Each block of grown rows is one more pass over the source: as few as memory allows.
    rows = 4 * rows
    return max(GROWN_GROUP_ROWS, rows - rows % GROWN_GROUP_ROWS)
