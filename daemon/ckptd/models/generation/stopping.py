"""When a sequence is finished: at a length, by a token, at a time.

A criterion is a callable `(ids_BT, scores) -> bool or (B,) bool`; those of transformers fit.

Shapes: B sequences, T tokens so far.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ckptd.models.generation.generation_config import GenerationConfig, warn_once

Criterion = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class AtLength:
    """Every sequence is finished at a length; the model's own limit is only spoken of."""

    max_length: int
    max_positions: int | None

    def __call__(self, ids_BT: torch.Tensor, _: Any) -> bool:
        """Return whether the length is reached, for all sequences alike."""
        num_tokens = ids_BT.shape[1]
        if self.max_positions is not None and self.max_positions < num_tokens < self.max_length:
            warn_once(f"generate: longer than the model's {self.max_positions} positions")
        return num_tokens >= self.max_length


@dataclass(frozen=True, slots=True)
class AtToken:
    """A sequence is finished by any of these tokens."""

    eos_token_id: torch.Tensor

    def __call__(self, ids_BT: torch.Tensor, _: Any) -> torch.Tensor:
        """Return `(B,)` bool: whether the last token is one of them."""
        return torch.isin(ids_BT[:, -1], self.eos_token_id.to(ids_BT.device))


@dataclass(frozen=True, slots=True)
class AtTime:
    """Every sequence is finished at a time of the monotonic clock."""

    deadline_s: float

    def __call__(self, _: torch.Tensor, __: Any) -> bool:
        """Return whether the time is past, for all sequences alike."""
        return time.monotonic() > self.deadline_s


def criteria(
    config: GenerationConfig,
    *,
    eos_tokens: torch.Tensor | None,
    max_positions: int | None,
    custom: Iterable[Criterion],
) -> list[Criterion]:
    """Return what ends a sequence: the settings' own criteria, then the caller's.

    `config.max_length` is decided by now. `max_time` counts from here. Any one criterion is enough,
    so a caller's longer maximum does not lift the settings'.
    """
    assert config.max_length is not None
    found: list[Criterion] = [AtLength(config.max_length, max_positions)]
    if config.max_time is not None:
        found.append(AtTime(time.monotonic() + config.max_time))
    if eos_tokens is not None:
        found.append(AtToken(eos_tokens))
    return [*found, *custom]
