"""`take` in a definition: which checkpoints of a busy run become jobs.

    take: all                 every complete checkpoint, in order (the default)
    take: newest              a step that has not been started is skipped once a newer one is complete
    take: {every: 500}        only steps that are multiples of 500; one without a step is taken

This module owns the spelling; `service.policies` decides what follows from it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_FORMS = "all, newest or {every: N}"


class Every(BaseModel):
    """Only steps that are multiples of a number."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True
    )

    every: int = Field(ge=1)
    """Training steps between two checkpoints that are taken, counted from step 0. A checkpoint
    whose step is not known (a final save) is always taken."""


def _checked(value: object) -> object:
    """Return `value` where it has one of the forms; one problem instead of one for each form."""
    match value:
        case "all" | "newest" | Every():
            return value
        case {"every": int(number), **rest} if not rest and not isinstance(number, bool):
            if number < 1:
                raise ValueError(f"every: must be at least 1, found {number}")
            return value
    raise ValueError(f"must be {_FORMS}, found {value!r}")


Take = Annotated[Literal["all", "newest"] | Every, BeforeValidator(_checked)]
"""The option's type."""
