"""Stage `verify`: load what was written before it is published, and look whether it works.

Planning only notes what shall be checked; the runner does it once every file is written, before the
commit. It holds the whole model in memory, so it is for models that the node can load.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ckptd.errors import StageRefused
from ckptd.pipeline.stage import Stage, StageContext, StageOptions
from ckptd.plan.draft import Draft, StageReport, Verification


class VerifyOptions(StageOptions):
    """Options of `verify`."""

    forward: bool = True
    """Run a forward on `tokens`. Architectures without a native module run in transformers where
    ckptd[transformers] is installed, and are only loaded where it is not."""
    tokens: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)] = ()
    """Token ids to run; none stands for a fixed short sequence."""
    compare: bool = False
    """Run the source checkpoint on the same tokens, too, and compare the logits."""
    tolerance: Annotated[float, Field(ge=0)] = 1e-3
    """Largest difference of two logits that counts as equal, as a share of the largest logit."""
    generate: Annotated[int, Field(ge=0, le=1024)] = 0
    """Tokens to generate, greedily, for the report and the model card."""
    on_failure: Literal["fail", "hold_push", "warn"] = "fail"
    """What happens when something is wrong: the job fails, goes on without publishing, or goes on
    with a warning."""


def plan(draft: Draft, options: VerifyOptions, context: StageContext) -> Draft:
    """Return the draft with the checks noted.

    Raises:
        StageRefused: it shall be compared with a source that is no model, or is in pieces.
    """
    if options.compare and draft.others:
        raise StageRefused(
            "there is no source to compare with: it is an adapter",
            stage="verify",
            path=context.source_path,
            hint="leave compare out; the merged model is loaded and run all the same",
        )
    if options.compare and draft.in_pieces:
        raise StageRefused(
            "there is no source to compare with: it is loaded nowhere before it is consolidated",
            stage="verify",
            path=context.source_path,
            hint="leave compare out; the consolidated model is loaded and run all the same",
        )
    checks = ["load"]
    checks += ["forward"] * (options.forward or options.compare or options.generate > 0)
    checks += ["compare with the source"] * options.compare
    checks += [f"generate {options.generate} tokens"] * (options.generate > 0)
    report = StageReport(
        stage="verify",
        summary=f"{', '.join(checks)} before publishing",
        facts={"checks": checks, "on_failure": options.on_failure},
    )
    wanted = Verification(
        forward=len(checks) > 1,
        tokens=options.tokens,
        compare=options.compare,
        tolerance=options.tolerance,
        generate=options.generate,
        on_failure=options.on_failure,
    )
    return draft.with_report(report, verification=wanted)


STAGE = Stage(
    name="verify",
    summary="load and run what was written, before it is published",
    options=VerifyOptions,
    plan=plan,
    rank=100,
    computes=True,
)
