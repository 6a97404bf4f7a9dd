"""Dividing computed segments into blocks that fit a byte budget, and small ones into batches.

A block is a part of one computed tensor: a range of elements where each is computed for itself, a
group of rows where rows are grown or decoded. Small casts that lie side by side are one block, read,
computed and written at once; a batch is a few blocks that go together. So tens of thousands of small
tensors do not cost a round trip each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import Extent
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
"""Elements per block, and per tensor in a block of several, are a multiple of this: whole bytes in
any dtype, whole vectors of the processor. Behind its last whole vector torch casts number by number,
which can give another NaN (of float16 in float32): no tensor's values may depend on its neighbours."""


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a computed tensor: its expression and where its bytes go.

    `joined` are the segments of several small tensors that are one block, the first of them `tensor`.
    """

    tensor: str
    value: Expression
    offset: int
    nbytes: int
    joined: tuple[Computed, ...] = ()

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
    for block in _all_blocks(segments):
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


@dataclass(slots=True)
class _Stretch:
    """Small casts side by side in the source and in the output: one cast is enough for them."""

    casts: list[Computed]
    sources: list[Load]
    nbytes: int

    def takes(self, cast: Computed, source: Load) -> bool:
        """Say whether another cast can become the end of this stretch."""
        last, before, behind = self.casts[-1], self.sources[-1].extent, source.extent
        return (
            last.offset + last.nbytes == cast.offset
            and before.offset + before.nbytes == behind.offset
            and before.path == behind.path
            and last.value.dtype is cast.value.dtype
            and self.sources[-1].dtype is source.dtype
            and self.nbytes + _wider_bytes(cast, source) <= BLOCK_BYTES
        )

    def append(self, cast: Computed, source: Load) -> None:
        """Make another cast the end of this stretch."""
        self.casts.append(cast)
        self.sources.append(source)
        self.nbytes += _wider_bytes(cast, source)

    def block(self) -> Block:
        """Return the block that all of them are."""
        first, source = self.casts[0], self.sources[0]
        nbytes = sum(one.extent.nbytes for one in self.sources)
        extent = Extent(source.extent.path, source.extent.offset, nbytes)
        flat = Load(extent, source.dtype, (nbytes * 8 // source.dtype.bits,))
        value = expression.cast(flat, first.value.dtype)
        joined = tuple(self.casts) if len(self.casts) > 1 else ()
        return Block(first.tensor, value, first.offset, expression.nbytes(value), joined)


def _all_blocks(segments: Iterable[Segment]) -> Iterator[Block]:
    """Yield the blocks of `segments` in order, small casts that are neighbours as one."""
    stretch: _Stretch | None = None
    for segment in segments:
        small = _small_cast(segment)
        if stretch is not None and small is not None and stretch.takes(*small):
            stretch.append(*small)
            continue
        if stretch is not None:
            yield stretch.block()
            stretch = None
        if small is None:
            yield from _blocks(segment)
        else:
            stretch = _Stretch([small[0]], [small[1]], _wider_bytes(*small))
    if stretch is not None:
        yield stretch.block()


def _small_cast(segment: Segment) -> tuple[Computed, Load] | None:
    """Return a segment that is the cast of whole vectors and fits a block, and what is cast."""
    if isinstance(segment, Run) or not isinstance(segment.value, Cast):
        return None
    source = segment.value.source
    if not isinstance(source, Load) or expression.numel(source) % _ELEMENTS_UNIT:
        return None
    return (segment, source) if _wider_bytes(segment, source) <= BLOCK_BYTES else None


def _wider_bytes(cast: Computed, source: Load) -> int:
    return max(cast.nbytes, source.extent.nbytes)


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
