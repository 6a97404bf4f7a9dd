"""The draft: what the output will be, while the stages are still changing it.

A draft is immutable; a stage is a function from a draft to another one. It knows nothing of
shards' offsets: the plan does that, once, at the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptd.checkpoint import adapter_files, layouts, pieces
from ckptd.checkpoint.beside import SideFile
from ckptd.checkpoint.checkpoint import Checkpoint
from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import StoredTensor
from ckptd.checkpoint.parts import Part
from ckptd.checkpoint.pieces import Box, Tensor
from ckptd.errors import CheckpointCorrupt
from ckptd.plan import expression
from ckptd.plan.nodes import Columns, Expression, Load, Tile

CONSOLIDATED_SHARD_BYTES = 5_000_000_000
"""Tensor bytes of an output file where the source's own division is by ranks: reshard's default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReport:
    """What a stage decided: one sentence for people, facts for programs (JSON values)."""

    stage: str
    summary: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What shall be checked on the written output before it is published.

    `tokens` are ids to run, empty for a fixed sequence; `tolerance` is the largest difference of
    logits as a share of the largest one; `on_failure` is `fail`, `hold_push` or `warn`.
    """

    forward: bool
    tokens: tuple[int, ...]
    compare: bool
    tolerance: float
    generate: int
    on_failure: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """The output so far.

    `max_shard_bytes` None keeps the source's division into files; `home` says in which source
    file a tensor lay. `config` is a fresh dict in each draft that changes it. `undecided` names
    tensors that may still go away when contents are compared. `hold_push` is a reason not to
    publish; `verification` is asked of the output before it is. `adapter` says that these are an
    adapter's tensors, without a model's config. `others` identify what else than the source goes in.
    `in_pieces` says that the source is consolidated here: nothing else loads it as it is.
    With `parts` these are no transformers model's tensors: no config goes with them, and each part
    has weight files of its own.
    """

    tensors: Mapping[str, Expression]
    home: Mapping[str, str]
    config: Mapping[str, Any]
    source_config: Mapping[str, Any]
    config_path: Path
    side_files: tuple[SideFile, ...]
    max_shard_bytes: int | None = None
    undecided: frozenset[str] = frozenset()
    hold_push: str | None = None
    verification: Verification | None = None
    reports: tuple[StageReport, ...] = ()
    adapter: bool = False
    others: tuple[str, ...] = ()
    in_pieces: bool = False
    parts: tuple[Part, ...] = ()

    @property
    def tensor_bytes(self) -> int:
        """The bytes of all tensors together."""
        return sum(expression.nbytes(value) for value in self.tensors.values())

    @property
    def undecided_bytes(self) -> int:
        """The bytes of the tensors that may still go away."""
        names = self.undecided & self.tensors.keys()
        return sum(expression.nbytes(self.tensors[name]) for name in names)

    def with_report(self, report: StageReport, **changes: Any) -> Draft:
        """Return this draft with `changes` made and `report` added."""
        return dataclasses.replace(self, reports=(*self.reports, report), **changes)


def from_checkpoint(source: Checkpoint) -> Draft:
    """Return the draft that is the checkpoint as it is.

    Raises:
        CheckpointCorrupt: the pieces of a tensor overlap.
    """
    return Draft(
        tensors={name: _value(tensor) for name, tensor in source.tensors.items()},
        home={name: pieces.files_of(tensor)[0].name for name, tensor in source.tensors.items()},
        config=source.config,
        source_config=source.config,
        config_path=source.config_path,
        side_files=source.side_files,
        adapter=source.config_path.name == adapter_files.CONFIG_NAME,
        max_shard_bytes=CONSOLIDATED_SHARD_BYTES if source.layout in layouts.FAMILIES else None,
        in_pieces=source.layout in layouts.FAMILIES,
        parts=source.parts,
    )


def _value(tensor: Tensor) -> Expression:
    if isinstance(tensor, StoredTensor):
        return expression.load(tensor)
    boxes = [Tile(_box(box, tensor.spec.dtype), box.at) for box in tensor.boxes]
    try:
        whole = expression.tiles(boxes, tensor.grid)
    except ValueError as error:
        raise CheckpointCorrupt(
            f"its pieces do not fit: {error}",
            path=tensor.boxes[0].extent.path,
            tensor=tensor.spec.name,
        ) from error
    same = whole.shape == tensor.spec.shape
    return whole if same else expression.view(whole, tensor.spec.shape)


def _box(box: Box, dtype: Dtype) -> Expression:
    if box.step == 1:
        return Load(box.extent, dtype, box.shape)
    rows, width = box.shape
    whole = Load(box.extent, dtype, (rows, box.step * width))
    return Columns(whole, count=width, first=box.first * width)
