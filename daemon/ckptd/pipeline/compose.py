"""From a checkpoint and a list of stages to a plan, in two passes.

The first pass reads headers alone and raises everything they can show. Where a stage must know
whether two tensors hold the same bytes, it goes on with an assumption and counts the bytes that
are undecided. The second pass compares, in bounded memory and only those tensors, and is final.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from ckptd.checkpoint import content
from ckptd.checkpoint.checkpoint import Checkpoint
from ckptd.errors import CheckpointUnsupported, StageRefused
from ckptd.pipeline import devices, masters, registry
from ckptd.pipeline.definition import StageCall
from ckptd.pipeline.stage import Base, Stage, StageContext
from ckptd.plan import draft, expression, plan
from ckptd.plan.draft import Draft
from ckptd.plan.nodes import (
    Cast,
    Changed,
    Columns,
    Concat,
    Decode,
    Expression,
    Grown,
    Load,
    LowRank,
    Tiles,
    View,
)
from ckptd.plan.plan import Plan
from ckptd.quant import formula, stored


def from_headers(
    source: Checkpoint, stages: Sequence[StageCall], *, base: Base | None = None
) -> Plan:
    """Return the plan as far as headers decide it; reads no tensor byte.

    Raises:
        StageRefused: a stage cannot do what its options ask on this checkpoint.
        CheckFailed: a check of the definition does not hold.
    """
    return plan.make(_compose(source, stages, lambda left, right: None, base))


def decided(
    source: Checkpoint,
    stages: Sequence[StageCall],
    *,
    base: Base | None = None,
    check: Callable[[], None] = lambda: None,
) -> Plan:
    """Return the final plan: the first pass, and the second one where a stage must compare.

    What headers can show is raised before a tensor byte is read. `check` is called while comparing
    and may raise to stop.

    Raises:
        StageRefused, CheckFailed: as `from_headers`.
        CheckpointCorrupt: a source file ended early.
    """
    asked = []

    def ask(left: Expression, right: Expression) -> bool | None:
        asked.append((left, right))
        return None

    composed = _compose(source, stages, ask, base)
    if asked:
        composed = _compose(source, stages, lambda left, right: _same(left, right, check), base)
    return plan.make(composed)


def _compose(
    source: Checkpoint,
    stages: Sequence[StageCall],
    same_content: Callable[[Expression, Expression], bool | None],
    base: Base | None,
) -> Draft:
    context = StageContext(
        source_path=source.path,
        stored=stored.of_checkpoint(source),
        same_content=same_content,
        device_bytes=devices.memory_bytes,
        base=base,
    )
    _require_plain(source, stages)
    current = masters.cast(draft.from_checkpoint(source), source, stages)
    for call in stages:
        stage = registry.STAGES[call.name]
        _require_taken(current, stage, source)
        current = stage.plan(current, call.options, context)
    return current


def _require_taken(current: Draft, stage: Stage, source: Checkpoint) -> None:
    """Refuse a stage that needs a whole model of transformers where there is none.

    Raises:
        StageRefused: names the stage and what there is instead.
    """
    if current.adapter and not stage.takes_adapters:
        raise StageRefused(
            "is an adapter, and the stage needs a whole model",
            stage=stage.name,
            path=source.path,
            hint="put the stage merge first, or leave this one out to publish the adapter",
        )
    if current.parts and not stage.takes_parts:
        what = "a single file" if current.parts[0].single else "components of diffusers"
        raise StageRefused(
            f"is {what}, and the stage is for models of transformers",
            stage=stage.name,
            path=source.path,
            hint="leave the stage out; cast, reshard and footprint work on it",
        )


def _require_plain(source: Checkpoint, stages: Sequence[StageCall]) -> None:
    """Refuse a model whose tensors have names and blocks that only GGUF files have.

    Raises:
        CheckpointUnsupported: nothing makes plain weights of it.
    """
    if source.layout == "gguf" and all(call.name != "dequantize" for call in stages):
        raise CheckpointUnsupported(
            "a GGUF model must be dequantized before it is anything else",
            path=source.path,
            hint="put the stage dequantize first, or use the pipeline of that name",
        )


def _same(left: Expression, right: Expression, check: Callable[[], None]) -> bool:
    if left == right:
        return True
    if left.dtype is not right.dtype or left.shape != right.shape:
        return False
    match left, right:
        case Load(extent=ours), Load(extent=theirs):
            return content.same_bytes(ours, theirs, check=check)
        case Cast(source=ours), Cast(source=theirs):
            return _same(ours, theirs, check)
        case ((Concat() | View() | Load() | Cast()), (Concat() | View() | Load() | Cast())):
            return _same_parts(left, right, check)
        case Tiles(parts=ours), Tiles(parts=theirs):
            if [tile.at for tile in ours] != [tile.at for tile in theirs]:
                return False
            pairs = zip(ours, theirs, strict=True)
            return all(_same(one.source, other.source, check) for one, other in pairs)
        case Decode(formula=ours), Decode(formula=theirs):
            if formula.settings(ours) != formula.settings(theirs) or left.first != right.first:
                return False
            parts = zip(formula.parts(ours), formula.parts(theirs), strict=True)
            return all(content.same_bytes(a.extent, b.extent, check=check) for a, b in parts)
        case Columns(source=ours), Columns(source=theirs):
            alike = dataclasses.replace(left, source=theirs) == right
            return alike and _same(ours, theirs, check)
        case Changed(), Changed():
            return _same_change(left, right, check)
        case LowRank(), LowRank():
            return _same_sum(left, right, check)
        case Grown(), Grown():
            alike = dataclasses.replace(left, source=right.source) == right
            return alike and _same(left.source, right.source, check)
    return False


def _same_parts(left: Expression, right: Expression, check: Callable[[], None]) -> bool:
    """Compare what is made of parts one after the other, however differently it is divided."""
    try:
        ours, theirs = expression.flat(left), expression.flat(right)
    except ValueError:  # a part is made row by row: it must be divided alike
        if not isinstance(left, Concat) or not isinstance(right, Concat):
            return False
        alike = len(left.parts) == len(right.parts)
        pairs = zip(left.parts, right.parts, strict=False)
        return alike and all(_same(one, other, check) for one, other in pairs)
    ends = {0, expression.numel(ours)}
    for value in (ours, theirs):
        end = 0
        for part in value.parts if isinstance(value, Concat) else (value,):
            end += expression.numel(part)
            ends.add(end)
    return all(
        _same_run(expression.rows(ours, begin, end), expression.rows(theirs, begin, end), check)
        for begin, end in itertools.pairwise(sorted(ends))
    )


def _same_run(left: Expression, right: Expression, check: Callable[[], None]) -> bool:
    """Compare two stretches that lie in one place each, cast alike or not at all."""
    match left, right:
        case Load(extent=ours), Load(extent=theirs):
            return left.dtype is right.dtype and content.same_bytes(ours, theirs, check=check)
        case Cast(source=ours), Cast(source=theirs):
            return left.dtype is right.dtype and _same_run(ours, theirs, check)
    return False


def _same_change(left: Changed, right: Changed, check: Callable[[], None]) -> bool:
    hows = ((one.change, one.width, one.scale, one.first, one.numbers) for one in (left, right))
    sizes = ((len(one.by_row), len(one.whole)) for one in (left, right))
    if len({*hows}) > 1 or len({*sizes}) > 1:
        return False
    ours, theirs = ((one.base, *one.by_row, *one.whole) for one in (left, right))
    return all(_same(one, other, check) for one, other in zip(ours, theirs, strict=True))


def _same_sum(left: LowRank, right: LowRank, check: Callable[[], None]) -> bool:
    if left.scale != right.scale or (left.whole is None) != (right.whole is None):
        return False
    pairs = (
        (left.base, right.base),
        (left.up, right.up),
        (left.down, right.down),
        (left.magnitude, right.magnitude),
    )
    for one, other in pairs:
        if one is None or other is None:
            if one is not other:
                return False
        elif not _same(one, other, check):
            return False
    return True
