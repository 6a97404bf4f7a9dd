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
from ckptd.errors import CheckpointUnsupported
from ckptd.pipeline import devices, registry
from ckptd.pipeline.definition import StageCall
from ckptd.pipeline.stage import StageContext
from ckptd.plan import draft, plan
from ckptd.plan.draft import Draft
from ckptd.plan.nodes import Cast, Concat, Decode, Expression, Grown, Load
from ckptd.plan.plan import Plan
from ckptd.quant import formula, stored


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
        source_path=source.path,
        stored=stored.of_checkpoint(source),
        same_content=same_content,
        device_bytes=devices.memory_bytes,
    )
    _require_plain(source, stages)
    current = draft.from_checkpoint(source)
    for call in stages:
        current = registry.STAGES[call.name].plan(current, call.options, context)
    return current


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
        case Concat(parts=ours), Concat(parts=theirs) if len(ours) == len(theirs):
            pairs = zip(ours, theirs, strict=True)
            return all(_same(one, other, check) for one, other in pairs)
        case Decode(formula=ours), Decode(formula=theirs):
            if formula.settings(ours) != formula.settings(theirs) or left.first != right.first:
                return False
            parts = zip(formula.parts(ours), formula.parts(theirs), strict=True)
            return all(content.same_bytes(a.extent, b.extent, check=check) for a, b in parts)
        case Grown(), Grown():
            alike = dataclasses.replace(left, source=right.source) == right
            return alike and _same(left.source, right.source, check)
    return False
