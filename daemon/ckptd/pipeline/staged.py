"""Where the weights of a job lie until the commit: on the disk, or nowhere (`staging`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, ValidationInfo

if TYPE_CHECKING:
    from ckptd.pipeline.definition import Definition, Push, StageCall

StagingKind = Literal["disk", "none"]


def kind(definition: Definition, default: StagingKind) -> StagingKind:
    """Return how the weights are staged; `default` counts where nothing is said, and nothing needs them."""
    if definition.staging is not None:
        return definition.staging
    return default if why_needed(definition.push, definition.stages) is None else "disk"


def why_needed(push: Push | None, stages: Iterable[StageCall]) -> str | None:
    """Return why a definition's weights have to be written to the disk; None where they need not."""
    if push is None:
        return "nothing is pushed"
    if any(call.name == "verify" for call in stages):
        return "the stage verify loads the written files"
    return None


def _check(kind: StagingKind | None, info: ValidationInfo) -> StagingKind | None:
    """Refuse `none` where files are needed; what is wrong itself is reported by its own field."""
    if kind == "none" and {"push", "stages"} <= info.data.keys():
        why = why_needed(info.data["push"], info.data["stages"])
        if why is not None:
            raise ValueError(f"none: the weights are never written to the disk, but {why}")
    return kind


Staging = Annotated[StagingKind | None, AfterValidator(_check)]
