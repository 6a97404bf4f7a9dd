"""The plan: every output file, with its size and header, and every byte's place and origin.

Made from a draft by pure arithmetic on headers. Each tensor becomes segments, verbatim (an extent
copied as it is) or computed (an expression evaluated); verbatim segments that are adjacent in
source and output are merged into long runs. The plan's digest covers all of it, so that files
finished by an earlier, killed attempt are reused only under the very same plan.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ckptd.checkpoint import adapter_files, header, index
from ckptd.checkpoint.beside import SideFile
from ckptd.checkpoint.header import Extent, TensorSpec
from ckptd.checkpoint.parts import Part
from ckptd.plan import expression, nodes, shards
from ckptd.plan.draft import Draft, StageReport, Verification
from ckptd.plan.nodes import Concat, Expression, Load, View
from ckptd.quant.formula import describe

CONFIG_NAME = "config.json"
FORMAT = "ckptd plan 1"
"""Part of every plan's digest; changes when the same plan would be executed differently."""
METADATA = {"format": "pt"}
"""What transformers wants to read in the header of each of its files."""
_HASHES = frozenset({"sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"})
"""Metadata that speaks of the very bytes of the tensors: it goes when any of them is computed."""


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes copied as they are: `nbytes` from `source` to `offset` of the output file."""

    source: Extent
    offset: int

    @property
    def nbytes(self) -> int:
        """The bytes of the run."""
        return self.source.nbytes


@dataclass(frozen=True, slots=True)
class Computed:
    """Bytes that are the value of `value`, at `offset` of the output file."""

    tensor: str
    value: Expression
    offset: int
    nbytes: int


Segment = Run | Computed


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """One output file: its first bytes, then segments without gap up to `nbytes`."""

    name: str
    head: bytes
    nbytes: int
    tensors: tuple[TensorSpec, ...]
    segments: tuple[Segment, ...]

    @property
    def tensor_bytes(self) -> int:
        """The bytes of its tensors."""
        return self.nbytes - len(self.head)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that will be written, and what was decided on the way.

    An adapter that stays one has no `config`, nor have weights in parts. `indexes` are those of sets
    of several files, by name. `others` are the draft's.
    """

    shards: tuple[ShardPlan, ...]
    indexes: Mapping[str, bytes]
    config: bytes | None
    side_files: tuple[SideFile, ...]
    reports: tuple[StageReport, ...]
    hold_push: str | None
    verification: Verification | None = None
    others: tuple[str, ...] = ()

    @cached_property
    def tensor_bytes(self) -> int:
        """The bytes of all tensors: `total_size` of the index."""
        return sum(shard.tensor_bytes for shard in self.shards)

    @cached_property
    def num_parameters(self) -> int:
        """The elements of all tensors: `total_parameters` of the index."""
        return sum(spec.numel for shard in self.shards for spec in shard.tensors)

    @cached_property
    def output_bytes(self) -> int:
        """The bytes of all weight files, headers included."""
        return sum(shard.nbytes for shard in self.shards)

    @cached_property
    def computed_bytes(self) -> int:
        """The output bytes that are computed rather than copied."""
        return sum(part.nbytes for part in self._segments() if isinstance(part, Computed))

    @cached_property
    def read_bytes(self) -> int:
        """The source bytes that will be read."""
        total = 0
        for part in self._segments():
            if isinstance(part, Run):
                total += part.nbytes
            else:
                total += sum(reading.nbytes for reading in expression.readings(part.value))
        return total

    @property
    def needs_torch(self) -> bool:
        """Whether any byte is computed."""
        return any(isinstance(part, Computed) for part in self._segments())

    @property
    def grows_rows(self) -> bool:
        """Whether rows are made from statistics of others: few large products, not many blocks."""
        computed = (part for part in self._segments() if isinstance(part, Computed))
        return any(isinstance(expression.made_by_rows(p.value), nodes.Grown) for p in computed)

    @cached_property
    def sources(self) -> frozenset[Path]:
        """The weight files that will be read."""
        paths = set()
        for part in self._segments():
            if isinstance(part, Run):
                paths.add(part.source.path)
            else:
                paths |= {reading.path for reading in expression.readings(part.value)}
        return frozenset(paths)

    @cached_property
    def digest(self) -> str:
        """`sha256:...` of the whole plan but the folder the source lies in."""
        value = hashlib.sha256(FORMAT.encode())
        for shard in self.shards:
            value.update(f"{shard.name}\n".encode() + shard.head)
            for part in shard.segments:
                value.update(_describe(part).encode() + b"\n")
        value.update(b"".join(self.indexes.values()) + (self.config or b""))
        for other in self.others:
            value.update(f"{other}\n".encode())
        return "sha256:" + value.hexdigest()

    def _segments(self) -> Iterator[Segment]:
        for shard in self.shards:
            yield from shard.segments


def make(draft: Draft) -> Plan:
    """Return the plan for a finished draft; reads nothing."""
    stem = adapter_files.STEM if draft.adapter else "model"
    planned: list[ShardPlan] = []
    indexes: dict[str, bytes] = {}
    for part in draft.parts or (Part(folder="", stem=stem, metadata=METADATA),):
        made = _files_of(part, draft)
        planned += made
        if len(made) > 1:
            name = part.folder + shards.index_name(stem=part.stem, variant=part.variant)
            indexes[name] = _index(part, made)
    return Plan(
        shards=tuple(planned),
        indexes=indexes,
        config=None if draft.adapter or draft.parts else _config_bytes(draft),
        side_files=draft.side_files,
        reports=draft.reports,
        hold_push=draft.hold_push,
        verification=draft.verification,
        others=draft.others,
    )


def _files_of(part: Part, draft: Draft) -> list[ShardPlan]:
    """Return the weight files of a part of the output."""
    own = [name for name in draft.tensors if name.startswith(part.folder)]
    if draft.max_shard_bytes is None or part.single:
        groups = shards.by_home({name: draft.home[name] for name in own})
    else:
        sizes = {name: expression.nbytes(draft.tensors[name]) for name in own}
        groups = shards.by_size(sizes, draft.max_shard_bytes)
    names = shards.file_names(len(groups), stem=part.stem, variant=part.variant)
    return [
        _shard(part.folder + name, group, draft, part)
        for name, group in zip(names, groups, strict=True)
    ]


def _index(part: Part, planned: list[ShardPlan]) -> bytes:
    weight_map: dict[str, str] = {}
    for shard in planned:
        names = (spec.name for spec in shard.tensors)
        weight_map |= dict.fromkeys(names, shard.name.removeprefix(part.folder))
    return index.encode(
        weight_map,
        total_size=sum(shard.tensor_bytes for shard in planned),
        total_parameters=sum(spec.numel for shard in planned for spec in shard.tensors),
    )


def _shard(name: str, tensors: list[str], draft: Draft, part: Part) -> ShardPlan:
    specs = [
        TensorSpec(tensor, draft.tensors[tensor].dtype, draft.tensors[tensor].shape)
        for tensor in tensors
    ]
    # A reader views tensors in place, so wider elements come first; equal ones keep their order.
    if len({spec.dtype for spec in specs}) > 1:
        specs.sort(key=lambda spec: -spec.dtype.alignment)
    merged = list(segments_of((spec.name, draft.tensors[spec.name]) for spec in specs))
    longest = max(
        (one for one in merged if isinstance(one, Run)), key=lambda run: run.nbytes, default=None
    )
    like = 0 if longest is None else longest.source.offset - longest.offset
    inner = specs
    if part.folder:
        inner = [TensorSpec(s.name.removeprefix(part.folder), s.dtype, s.shape) for s in specs]
    head = header.encode(inner, metadata=_metadata(part, merged), data_offset_like=like)
    return ShardPlan(
        name=name,
        head=head,
        nbytes=len(head) + (merged[-1].offset + merged[-1].nbytes if merged else 0),
        tensors=tuple(inner),
        segments=tuple(_moved(one, len(head)) for one in merged),
    )


def _metadata(part: Part, segments: list[Segment]) -> Mapping[str, str]:
    """Return the metadata of a part's header, without hashes of tensors that have changed."""
    if not any(isinstance(one, Computed) for one in segments):
        return part.metadata or METADATA
    kept = {key: value for key, value in part.metadata.items() if key not in _HASHES}
    return kept or METADATA


def segments_of(tensors: Iterable[tuple[str, Expression]]) -> Iterator[Segment]:
    """Yield what makes up `tensors`, one after the other from 0 on.

    Extents that follow each other in one file are one run, also those of different tensors.
    """
    first: Extent | None = None  # where a run begins that may go on
    end = 0  # where it ends in its file
    offset = 0
    for tensor, value in tensors:
        for part in _parts(value):
            nbytes = part.nbytes if isinstance(part, Extent) else expression.nbytes(part)
            if not nbytes:
                continue
            if first is not None and not _goes_on(first, end, part):
                yield _run(first, end, offset)
                first = None
            if not isinstance(part, Extent):
                yield Computed(tensor, part, offset, nbytes)
            elif first is None:
                first, end = part, part.offset
            end += nbytes
            offset += nbytes
    if first is not None:
        yield _run(first, end, offset)


def _parts(value: Expression) -> Iterable[Extent | Expression]:
    """Return what the bytes of a tensor are, one after the other: copied or computed."""
    match value:
        case Load(extent=extent):
            return (extent,)
        case Concat(parts=parts):
            return itertools.chain.from_iterable(map(_parts, parts))
        case View(source=source):
            return _parts(source)
        case _:
            return (value,)


def _goes_on(first: Extent, end: int, part: Extent | Expression) -> bool:
    """Say whether `part` lies behind the run that begins with `first` and ends at `end`."""
    return isinstance(part, Extent) and part.offset == end and part.path == first.path


def _run(first: Extent, end: int, stop: int) -> Run:
    """Return the run that begins with `first` and ends at `end` in its file, at `stop` in ours."""
    nbytes = end - first.offset
    return Run(Extent(first.path, first.offset, nbytes), stop - nbytes)


def _moved(part: Segment, by: int) -> Segment:
    if isinstance(part, Run):
        return Run(part.source, part.offset + by)
    return Computed(part.tensor, part.value, part.offset + by, part.nbytes)


def _config_bytes(draft: Draft) -> bytes:
    if draft.config == draft.source_config and draft.config_path.name == CONFIG_NAME:
        return draft.config_path.read_bytes()
    return (json.dumps(draft.config, indent=2, ensure_ascii=False) + "\n").encode()


def _describe(part: Segment) -> str:
    if isinstance(part, Run):
        return f"{part.source.path.name} {part.source.offset} {part.nbytes} -> {part.offset}"
    return f"{part.tensor} {_describe_value(part.value)} -> {part.offset}"


def _describe_value(value: Expression) -> str:
    match value:
        case Load(extent=extent):
            return f"load({extent.path.name},{extent.offset},{extent.nbytes},{value.dtype})"
        case Concat(parts=parts):
            return f"concat({value.axis},{','.join(_describe_value(part) for part in parts)})"
        case nodes.Cast(source=source):
            return f"cast({value.dtype},{_describe_value(source)})"
        case nodes.Grown(source=source):
            how = (
                f"{value.shape},{value.axis},{value.first},{value.method},{value.std},{value.seed}"
            )
            return f"grown({how},{_describe_value(source)})"
        case nodes.Decode(formula=formula, first=first):
            return f"decode({value.shape},{value.axis},{first},{describe(formula)})"
        case View(source=source):
            return f"view({value.shape},{_describe_value(source)})"
        case nodes.Tiles(parts=tiles):
            boxes = (f"{tile.at}:{_describe_value(tile.source)}" for tile in tiles)
            return f"tiles({value.shape},{','.join(boxes)})"
        case nodes.Columns(source=source, first=first, step=step, count=count):
            return f"columns({first},{step},{count},{value.turned},{_describe_value(source)})"
        case nodes.LowRank():
            given = (value.base, value.down, value.up, value.magnitude)
            factors = ",".join("none" if one is None else _describe_value(one) for one in given)
            way = "rows" if value.whole is None else "columns"
            return f"lowrank({factors},{value.scale},{value.dtype},{way})"
        case nodes.Changed():
            parts = (value.base, *value.by_row, *value.whole)
            described = ",".join(_describe_value(part) for part in parts)
            return f"changed({value.change},{described},{value.scale},{value.dtype},{value.first},{value.width},{value.numbers})"
