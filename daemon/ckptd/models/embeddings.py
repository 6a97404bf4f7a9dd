"""Every tensor that has one row for each token, and what config.json says about their number.

Pure: names, dtypes, shapes and config.json. `find` answers what a resize must change; what cannot
be placed is refused by name, because a model with one table of the old size does not load.
The number of rows is what the tensors have, which padding may have made larger than `vocab_size`.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptd import errors
from ckptd.models import architectures, configuration, unfamiliar
from ckptd.models.architectures import Architecture, Role, Row
from ckptd.models.unfamiliar import Shaped

STAGE = "resize"
_MAX_FACTOR = 8
"""Multiples of a configured size up to which a dimension counts as explained by it (fused
projections: 3 for q, k, v; 4 for feed-forward and gates; 8 with both)."""


class Fill(enum.StrEnum):
    """What new rows are made of."""

    ROWS = "rows"
    """Like the tensor's own rows: their mean and spread, or the initial distribution."""
    MEAN = "mean"
    """The mean of a bias's own elements (or zero without mean resizing)."""
    ZEROS = "zeros"
    """Zero: a bias whose head is tied, and the buffer added to the logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyTensor:
    """A tensor with vocabulary rows, as it is on disk."""

    name: str
    role: Role
    axis: int
    rows: int
    """The size of that axis now."""
    key: str
    """The dotted key of config.json with its vocabulary's size."""
    fill: Fill


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The text vocabulary of a checkpoint."""

    architecture: Architecture
    rows: int
    """The rows of the input embedding: the base that padding starts from."""
    size: int | None
    """`vocab_size` as config.json has it, where it has it."""
    tensors: tuple[VocabularyTensor, ...]
    """Everything that must have the new number of rows, in the order of the checkpoint."""
    keys: tuple[str, ...]
    """The dotted keys of config.json that hold the size."""

    def writes(self, rows: int) -> tuple[configuration.Write, ...]:
        """Return what config.json must say once every tensor has `rows` rows."""
        return tuple(configuration.Write(key=key, value=rows) for key in self.keys)


def find(
    config: Mapping[str, Any], tensors: Mapping[str, Shaped], *, path: Path | str
) -> Vocabulary:
    """Return the text vocabulary of a checkpoint. `path` is the checkpoint's, for messages.

    Raises:
        StageRefused: the class has no text vocabulary or none that can be resized coherently; its
            embedding is not in the checkpoint; a tensor of it is quantized or has other dimensions
            than it should; or a tensor outside it looks as if it had vocabulary rows too.
    """
    known = architectures.find(config)
    found = known if known is not None else unfamiliar.infer(config, tensors, STAGE, path)
    if (why := found.not_resizable or found.unplaced) is not None:
        raise _refused(f"{found.name} cannot be resized: {why}", path)
    rows = [row for row in found.rows if row.key in found.resize_keys]
    placed = {}
    for row in rows:
        name = found.locate(row.name, tensors)
        if name is not None:
            placed[name] = row
        elif packed := _packed(found, row, tensors):
            raise _refused("is quantized", path, packed)
    embedding = next((n for n, r in placed.items() if r.role is Role.INPUT), None)
    if embedding is None:  # a tied model may hold its one matrix under the head's name
        embedding = next((n for n, r in placed.items() if r.role is Role.HEAD), None)
    if embedding is None:
        expected = [c for r in rows if r.role is Role.INPUT for c in found.candidates(r.name)]
        raise _refused(
            f"{found.name} has no vocabulary to resize"
            if not rows
            else "the input embedding is absent (expected " + " or ".join(expected) + ")",
            path,
        )
    width = tensors[embedding].shape[0]
    _check_output(tensors, placed, embedding, path)
    others = {found.locate(row.name, tensors) for row in found.rows if row not in rows}
    _check_others(config, tensors, {*placed, *others}, embedding, path)
    return Vocabulary(
        architecture=found,
        rows=width,
        size=_size(config, placed[embedding].key),
        tensors=tuple(
            _tensor(name, row, tensors[name], _fill(row, placed, found, config), path)
            for name, row in ((name, placed[name]) for name in tensors if name in placed)
        ),
        keys=_keys(config, found),
    )


def _refused(what: str, path: Path | str, tensor: str | None = None) -> errors.StageRefused:
    return errors.StageRefused(what, stage=STAGE, path=path, tensor=tensor)


def _size(config: Mapping[str, Any], key: str) -> int | None:
    value = configuration.get(config, key)
    return value if isinstance(value, int) else None


def _keys(config: Mapping[str, Any], found: Architecture) -> tuple[str, ...]:
    """Return the keys to write; a second key only where its rows or its value are there."""
    first, *more = found.resize_keys
    return (first, *(key for key in more if configuration.get(config, key) is not None))


def _packed(found: Architecture, row: Row, tensors: Mapping[str, Shaped]) -> str | None:
    """Return a tensor that shows that the row's module is there in a quantized form."""
    for candidate in found.candidates(row.name):
        module = candidate.removesuffix("weight")
        if module == candidate or module == "":
            continue
        for name in tensors:
            if name.startswith(module) and name not in (candidate, f"{module}bias"):
                return name
    return None


def _tensor(
    name: str,
    row: Row,
    tensor: Shaped,
    fill: Fill,
    path: Path | str,
) -> VocabularyTensor:
    dims = {Role.BIAS: 1, Role.LOGITS_BIAS: 2}.get(row.role, 2)
    if not tensor.dtype.is_plain_float:
        raise _refused(f"is {tensor.dtype}: quantized rows cannot be added", path, name)
    if len(tensor.shape) != dims:
        raise errors.StageRefused(
            "has other dimensions than a tensor with vocabulary rows",
            stage=STAGE,
            path=path,
            tensor=name,
            expected=f"{dims} dimensions",
            found=str(tuple(tensor.shape)),
        )
    return VocabularyTensor(
        name=name,
        role=row.role,
        axis=row.axis,
        rows=tensor.shape[row.axis],
        key=row.key,
        fill=fill,
    )


def _fill(
    row: Row, placed: Mapping[str, Row], found: Architecture, config: Mapping[str, Any]
) -> Fill:
    """Return how a row grows; a bias takes its mean only where its head is not tied."""
    if row.role is Role.LOGITS_BIAS:
        return Fill.ZEROS
    if row.role is not Role.BIAS:
        return Fill.ROWS
    heads = any(other.role is Role.HEAD for other in placed.values())
    tied = any(
        tie.flag.value(config) and found.role_of.get(tie.target) is Role.HEAD for tie in found.ties
    )
    return Fill.MEAN if heads and not tied else Fill.ZEROS


def _check_output(
    tensors: Mapping[str, Shaped], placed: Mapping[str, Row], embedding: str, path: Path | str
) -> None:
    """Refuse an output side that has a vocabulary, and a size, of its own (Marian, T5Gemma)."""
    rows, key = tensors[embedding].shape[0], placed[embedding].key
    for name, row in placed.items():
        if row.role not in (Role.HEAD, Role.BIAS, Role.LOGITS_BIAS) or row.key == key:
            continue
        shape = tensors[name].shape
        if row.axis < len(shape) and shape[row.axis] != rows:
            raise errors.StageRefused(
                f"belongs to another vocabulary ({row.key}) than the embedding ({key})",
                stage=STAGE,
                path=path,
                tensor=name,
                expected=f"{rows} rows",
                found=f"{shape[row.axis]}",
                hint="one number of rows cannot serve both: leave `resize` out",
            )


def _check_others(
    config: Mapping[str, Any],
    tensors: Mapping[str, Shaped],
    known: Collection[str | None],
    embedding: str,
    path: Path | str,
) -> None:
    """Refuse a tensor that seems to have the vocabulary's rows, and of which nothing is known.

    Names that mean embeddings and heads are enough; other names only where no size in config.json
    explains the dimension and the tensor could be a table, a head or a bias beside this embedding.
    """
    rows, width = tensors[embedding].shape[0], tensors[embedding].shape[-1]
    explained = _explained(config, rows)
    for name, tensor in tensors.items():
        if name in known or rows not in tensor.shape:
            continue
        *_, module, _leaf = ("", "", *name.split("."))
        called = module in unfamiliar.INPUT_MODULES | unfamiliar.HEAD_MODULES
        shaped = tuple(tensor.shape) in ((rows, width), (rows,), (1, rows))
        if (called and tensor.shape[0] == rows) or (shaped and not explained):
            raise errors.StageRefused(
                "has as many rows as the vocabulary but no known place in it",
                stage=STAGE,
                path=path,
                tensor=name,
                found=f"{tuple(tensor.shape)} beside {embedding} {tuple(tensors[embedding].shape)}",
            )


def _explained(config: Mapping[str, Any], rows: int) -> bool:
    """Return whether some other size of config.json, or a small multiple, is `rows`."""
    sizes = {
        value
        for key, value in configuration.integers(config).items()
        if "vocab" not in key and not key.endswith("_token_id") and value > 1
    }
    if any(rows == size * factor for size in sizes for factor in range(1, _MAX_FACTOR + 1)):
        return True
    return any(rows % size == 0 and rows // size in sizes for size in sizes)
