"""Dividing computed segments into blocks that fit a byte budget, and small ones into batches.

A block is a part of one computed tensor: a range of elements where each is computed for itself, a
group of rows where rows are grown or decoded. A batch is a few blocks that are read, computed and written
together, so that tens of thousands of small tensors do not cost a round trip each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ckptd.checkpoint.dtypes import Dtype
from ckptd.plan import expression
from ckptd.plan.nodes import Cast, Changed, Concat, Decode, Expression, Grown, Load, LowRank, Tiles
from ckptd.plan.plan import Computed, Run, Segment

BLOCK_BYTES = 8 << 20
"""Bytes per block, on its wider side: enough for a GPU copy, and a CPU keeps up."""
GROWN_GROUP_ROWS = 64
"""New rows share a generator in groups of this many; part of the definition of their values."""
STATISTICS_BYTES = 4 << 20
"""Source rows per statistics step, as float32 bytes; fixed, so that sums never depend on memory."""
_GROWN_BLOCK_BYTES = 4 * BLOCK_BYTES
"""Each block of grown rows is one more pass over the source: larger blocks, fewer passes."""
_DECODED_BLOCK_BYTES = 2 * BLOCK_BYTES
"""Rows of a weight packed along its other axis are narrow columns in the file: wider blocks."""
_MERGED_BLOCK_BYTES = 2 << 20
"""Merging takes twice this in float32: more than 32 MB at a time is memory the C library gives back
after each block, and page faults cost more than the mathematics."""
_DECODE_WORKSPACE_BYTES = 8 << 20
"""What a kernel takes besides its sources and its result, at most."""
_SMALL_RUN_BYTES = 1 << 20
"""A shorter run between computed segments goes through the same pipeline as they do."""
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
        return sum(reading.nbytes for reading in expression.readings(self.value))

    @property
    def cost_bytes(self) -> int:
        """Host memory while the block is in flight: sources, result, workspace."""
        if isinstance(self.value, Load):
            return self.nbytes
        made = expression.made_by_rows(self.value)
        if isinstance(made, Grown):
            # Values in float32, and a statistics step as read, in float32 and in float64.
            return self.nbytes + 4 * expression.numel(made) + 4 * STATISTICS_BYTES
        cost = self.nbytes + _loaded_bytes(self.value)
        if made is None or isinstance(made, Tiles):
            return cost
        workspace = min(_DECODE_WORKSPACE_BYTES, 16 * expression.numel(made))
        if not isinstance(made, Decode):
            whole = isinstance(made, LowRank) and made.whole is not None
            each = 16 if isinstance(made, Changed) else 8  # what is added lies beside the sum
            return cost + each * expression.numel(made) + (4 * STATISTICS_BYTES if whole else 0)
        whole = made is self.value and len(made.span) == made.shape[made.axis]
        return cost + workspace + (0 if whole else _span_bytes(made))


def batches(segments: Iterable[Segment]) -> Iterator[list[Block]]:
    """Yield the blocks of `segments` in order, small neighbours together."""
    batch: list[Block] = []
    size = 0
    for segment in segments:
        for block in _blocks(segment):
            wider = max(block.nbytes, _loaded_bytes(block.value))
            if batch and size + wider > BLOCK_BYTES:
                yield batch
                batch, size = [], 0
            batch.append(block)
            size += wider
    if batch:
        yield batch


def groups(segments: Sequence[Segment]) -> Iterator[tuple[bool, list[Segment]]]:
    """Yield neighbouring segments that go the same way: copied (False) or computed (True)."""
    group: list[Segment] = []
    computed = False
    for segment in segments:
        small = isinstance(segment, Run) and segment.nbytes < _SMALL_RUN_BYTES
        kind = isinstance(segment, Computed) or (small and computed)
        if group and kind is not computed:
            yield computed, group
            group = []
        group.append(segment)
        computed = kind
    if group:
        yield computed, group


def _blocks(segment: Segment) -> Iterator[Block]:
    if isinstance(segment, Run):
        raw = Load(segment.source, Dtype.U8, (segment.nbytes,))
        yield Block("", raw, segment.offset, segment.nbytes)
        return
    value, axis, step = _division(segment)
    num_rows = value.shape[axis]
    offset = segment.offset
    start = 0
    # A part of a decoded weight may begin within a granule: the first block ends where one does.
    stop = step - _first_row(value) % step
    while start < num_rows:
        part = expression.rows(value, start, min(stop, num_rows), axis=axis)
        nbytes = expression.nbytes(part)
        yield Block(segment.tensor, part, offset, nbytes)
        offset += nbytes
        start, stop = stop, stop + step


def _division(segment: Computed) -> tuple[Expression, int, int]:
    """Return the value to divide, the axis along which, and the length of a block there."""
    made = expression.made_by_rows(segment.value)
    if made is None:
        value = expression.flat(segment.value)
        step = BLOCK_BYTES * 8 // _widest_bits(value)
        return value, 0, max(_ELEMENTS_UNIT, step - step % _ELEMENTS_UNIT)
    if isinstance(made, Grown):
        unit, wanted = GROWN_GROUP_ROWS, _GROWN_BLOCK_BYTES
        nbytes = segment.nbytes
    else:
        decoded = _decoded_in(made)
        unit, wanted = 1 if decoded is None else decoded.formula.granule, _DECODED_BLOCK_BYTES
        if isinstance(made, LowRank | Changed) and decoded is None:
            wanted = _MERGED_BLOCK_BYTES
        nbytes = max(segment.nbytes, _loaded_bytes(made))
    step = wanted * made.shape[made.axis] // max(1, nbytes)
    return segment.value, made.axis, max(unit, step - step % unit)


def _first_row(value: Expression) -> int:
    decoded = _decoded_in(value)
    return 0 if decoded is None else decoded.first


def _decoded_in(value: Expression) -> Decode | None:
    """Return the decoded rows that `value` is, or that an adapter is merged into."""
    made = expression.made_by_rows(value)
    if isinstance(made, LowRank | Changed):
        return _decoded_in(made.base)
    return made if isinstance(made, Decode) else None


def _loaded_bytes(value: Expression) -> int:
    return sum(reading.nbytes for reading in expression.loads(value))


def _span_bytes(made: Decode) -> int:
    return len(made.span) * made.formula.columns * made.dtype.bits // 8


def _widest_bits(value: Expression) -> int:
    match value:
        case Cast(source=source):
            return max(value.dtype.bits, _widest_bits(source))
        case Concat(parts=parts):
            return max(_widest_bits(part) for part in parts)
        case _:
            return value.dtype.bits
