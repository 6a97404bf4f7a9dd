"""From a checkpoint and a list of stages to a plan, in two passes.

The first pass reads headers alone and raises everything they can show. Where a stage must know
whether two tensors hold the same bytes, it goes on with an assumption and counts the bytes that
are undecided. The second pass compares, in bounded memory and only those tensors, and is final.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from ckptd.checkpoint import content
from ckptd.checkpoint.checkpoint import Checkpoint
from ckptd.pipeline import devices, registry
from ckptd.pipeline.definition import StageCall
from ckptd.pipeline.stage import StageContext
from ckptd.plan import draft, plan
from ckptd.plan.draft import Draft
from ckptd.plan.expression import Cast, Concat, Expression, Grown, Load
from ckptd.plan.plan import Plan


def from_headers(source: Checkpoint, stages: Sequence[StageCall]) -> Plan:
    """Return the plan as far as headers decide it; reads no tensor byte.

    Raises:
        StageRefused: a stage cannot do what its options ask on this checkpoint.
        CheckFailed: a check of the definition does not hold.
    """
    return plan.make(_compose(source, stages, lambda left, right: None))


def decided(
    source: Checkpoint, stages: Sequence[StageCall], *, check: Callable[[], None] = lambda: None
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

    composed = _compose(source, stages, ask)
    if asked:
        composed = _compose(source, stages, lambda left, right: _same(left, right, check))
    return plan.make(composed)


def _compose(
    source: Checkpoint,
    stages: Sequence[StageCall],
    same_content: Callable[[Expression, Expression], bool | None],
) -> Draft:
    context = StageContext(
        source_path=source.path, same_content=same_content, device_bytes=devices.memory_bytes
    )
    current = draft.from_checkpoint(source)
    for call in stages:
        current = registry.STAGES[call.name].plan(current, call.options, context)
    return current


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
        case Concat(parts=ours), Concat(parts=theirs) if len(ours) == len(theirs):
            pairs = zip(ours, theirs, strict=True)
            return all(_same(one, other, check) for one, other in pairs)
        case Grown(), Grown():
            alike = dataclasses.replace(left, source=right.source) == right
            return alike and _same(left.source, right.source, check)
    return False
