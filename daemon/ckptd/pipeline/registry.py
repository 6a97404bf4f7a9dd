"""Every stage by its name in a definition."""

from __future__ import annotations

from ckptd.pipeline.stage import Stage
from ckptd.pipeline.stages import cast, dequantize, footprint, merge, reshard, resize, tie, verify

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        merge.STAGE,
        tie.STAGE,
        resize.STAGE,
        dequantize.STAGE,
        cast.STAGE,
        footprint.STAGE,
        reshard.STAGE,
        verify.STAGE,
    )
}
