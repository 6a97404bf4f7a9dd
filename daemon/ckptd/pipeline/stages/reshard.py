"""Stage `reshard`: how large a weight file may be.

Without this stage the output is divided as the source was. Tensors keep their source order; the
limit counts tensor bytes exactly, and a single larger tensor gets a file of its own.
"""

from __future__ import annotations

from ckptd import units
from ckptd.pipeline.stage import ByteSize, Stage, StageContext, StageOptions
from ckptd.plan import expression
from ckptd.plan.draft import Draft, StageReport


class ReshardOptions(StageOptions):
    """Options of `reshard`."""

    max_shard_size: ByteSize = 5_000_000_000
    """Largest tensor bytes of a file: 5GB, 4GiB or a number of bytes. The default, 5GB, is what
    the Hub's viewers and most download tools handle well."""


def plan(draft: Draft, options: ReshardOptions, context: StageContext) -> Draft:
    """Return the draft with the limit set."""
    limit = options.max_shard_size
    if draft.adapter:
        summary = "an adapter stays one file, the only one that PEFT reads"
        return draft.with_report(StageReport(stage="reshard", summary=summary))
    if draft.parts and draft.parts[0].single:
        summary = "a single file stays one, the only one that its readers know"
        return draft.with_report(StageReport(stage="reshard", summary=summary))
    larger = [name for name, value in draft.tensors.items() if expression.nbytes(value) > limit]
    report = StageReport(
        stage="reshard",
        summary=f"files of at most {units.format_bytes(limit)}",
        facts={"max_shard_bytes": limit, "oversized_tensors": larger},
        warnings=tuple(f"{name} alone is larger than the limit" for name in larger),
    )
    return draft.with_report(report, max_shard_bytes=limit)


STAGE = Stage(
    name="reshard",
    summary="divide the weights into files of a given size",
    options=ReshardOptions,
    plan=plan,
    rank=90,
    takes_adapters=True,
    takes_parts=True,
)
