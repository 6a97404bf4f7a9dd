"""What a stage is: a name, options, a place in the order, and a pure function on drafts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from ckptd import units
from ckptd.checkpoint.checkpoint import Checkpoint
from ckptd.plan.draft import Draft
from ckptd.plan.nodes import Expression
from ckptd.quant.group import Stored

ByteSize = Annotated[
    int,
    BeforeValidator(units.parse_bytes),
    Field(gt=0),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "string", "pattern": r"^\d+(\.\d+)?\s*([KMGTPkmgtp][iI]?)?[bB]?$"},
            ]
        }
    ),
]
"""A size in bytes: `5GB`, `24GiB`, or a number."""

Seconds = Annotated[
    float,
    BeforeValidator(units.parse_duration),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 0},
                {"type": "string", "pattern": r"^\d+(\.\d+)?\s*(ms|s|min|m|h|d)?$"},
            ]
        }
    ),
]
"""A duration: `10s`, `5m`, or a number of seconds."""

Patterns = Annotated[tuple[str, ...], Field(strict=False)]
"""Shell patterns for tensor names: `*norm*`, `*.router.*`."""


class StageOptions(BaseModel):
    """The root of every stage's options: strict, immutable, documented field by field."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """An opened base model; `digest` is its commit, or of its content where that was taken."""

    source: Checkpoint
    name: str
    digest: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageContext:
    """What a stage may ask besides its draft and options.

    `stored` is the checkpoint as the quantization formats see it, with the small reads they make.
    `same_content` says whether two expressions of equal dtype and shape hold the same bytes, or
    None in the first pass of planning, which reads headers alone. `device_bytes` gives the memory
    of a device (`cpu`, `cuda`, `cuda:1`), or None where there is no such device. `base` is the model
    that an adapter is merged into, where one is.
    """

    source_path: Path
    stored: Stored
    same_content: Callable[[Expression, Expression], bool | None]
    device_bytes: Callable[[str], int | None]
    base: Base | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage. Stages of a lower `rank` must come before it; without a rank it stands anywhere."""

    name: str
    summary: str
    options: type[StageOptions]
    plan: Callable[[Draft, Any, StageContext], Draft]
    rank: int | None = None
    repeatable: bool = False
    computes: bool = False
    """Whether it may need torch: a runner that is started ahead imports it then."""
    takes_adapters: bool = False
    """Whether it works on an adapter, too, which has no model's config."""
    takes_parts: bool = False
    """Whether it works on what is no transformers model: a pipeline's components, a single file."""
