"""Stages as a definition sees them: enough to test the reading of definitions alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ckptd import units


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Tie(_Options):
    force: bool = False


class Resize(_Options):
    to: int | None = Field(default=None, gt=0)
    pad_to_multiple_of: int | None = Field(default=None, gt=0)


class Footprint(_Options):
    max: Annotated[int, BeforeValidator(units.parse_bytes)]
    on_exceed: Literal["fail", "warn", "hold_push"] = "fail"


class Reshard(_Options):
    max_shard_size: Annotated[int, BeforeValidator(units.parse_bytes)] = 5_000_000_000


@dataclass(frozen=True)
class Kind:
    name: str
    options: type[BaseModel]
    rank: int
    repeatable: bool = False


STAGES = {
    kind.name: kind
    for kind in (
        Kind("tie", Tie, 10),
        Kind("resize", Resize, 10),
        Kind("footprint", Footprint, 10, repeatable=True),
        Kind("reshard", Reshard, 90),
    )
}


@pytest.fixture(scope="session")
def stages() -> dict[str, Kind]:
    """Four stages with the kinds of options that stages have."""
    return STAGES
