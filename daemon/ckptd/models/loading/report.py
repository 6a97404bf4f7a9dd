"""What became of every name when a model was loaded: the values, and one table for people.

Rows of layers that share a fate are one row (`model.layers.{0..31}.mlp.up_proj.weight`), so that the
table of a large model stays short. Logging it, and raising, is the caller's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

Shape = tuple[int, ...]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_MOST_ROWS = 60
"""A table longer than this says only how many rows it leaves out."""


@dataclass(slots=True, kw_only=True)
class LoadingInfo:
    """The names that did not fit, in the model's spelling.

    `mismatched_keys` holds (name, shape in the checkpoint, shape in the model).
    """

    missing_keys: set[str] = field(default_factory=set)
    unexpected_keys: set[str] = field(default_factory=set)
    mismatched_keys: set[tuple[str, Shape, Shape]] = field(default_factory=set)
    error_msgs: list[str] = field(default_factory=list)

    def ignore(self, *, missing: Iterable[str], unexpected: Iterable[str]) -> None:
        """Drop the names that one of the regular expressions finds."""
        self.missing_keys -= {key for key in self.missing_keys if _found(key, missing)}
        self.unexpected_keys -= {key for key in self.unexpected_keys if _found(key, unexpected)}

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_pretrained(output_loading_info=True)` gives."""
        return {
            "missing_keys": self.missing_keys,
            "unexpected_keys": self.unexpected_keys,
            "mismatched_keys": self.mismatched_keys,
            "error_msgs": self.error_msgs,
        }

    def table(self, model_name: str, origin: str) -> str | None:
        """Return the report of a model of class `model_name` from `origin`; None if all is well."""
        rows = [(key, "missing", "new values") for key in _folded(self.missing_keys)]
        rows += [(key, "unexpected", "not used") for key in _folded(self.unexpected_keys)]
        rows += [
            (name, "mismatched", f"checkpoint {theirs}, model {ours}: new values")
            for name, theirs, ours in sorted(self.mismatched_keys)
        ]
        if not rows:
            return None
        lines = [f"{model_name} from {origin}: not every weight fits", *_table(rows[:_MOST_ROWS])]
        if len(rows) > _MOST_ROWS:
            lines.append(f"and {len(rows) - _MOST_ROWS} rows more (output_loading_info has all)")
        if self.missing_keys or self.mismatched_keys:
            lines.append("New values are random: train the model before it is used for a task.")
        return "\n".join(lines)

    def mismatches(self) -> str:
        """Return one line for each tensor whose shapes differ."""
        return "\n".join(
            f"\tsize mismatch for {name}: shape {theirs} in the checkpoint, {ours} in the model"
            for name, theirs, ours in sorted(self.mismatched_keys)
        )


def _found(key: str, patterns: Iterable[str]) -> bool:
    return any(re.search(pattern, key) for pattern in patterns)


def _folded(keys: Collection[str]) -> list[str]:
    """Return `keys` with those that differ in numbers only made one, in natural order."""
    numbers: dict[str, list[list[int]]] = {}
    for key in sorted(keys, key=_natural):
        numbers.setdefault(_NUMBER.sub("*", key), []).append(
            [int(number) for number in _NUMBER.findall(key)]
        )
    return [_spelled(pattern, values) for pattern, values in numbers.items()]


def _spelled(pattern: str, values: list[list[int]]) -> str:
    columns = iter([sorted(set(column)) for column in zip(*values, strict=True)])
    return re.sub(r"\*", _next_of(columns), pattern)


def _next_of(columns: Any) -> Callable[[re.Match[str]], str]:
    def text(_match: re.Match[str]) -> str:
        column: list[int] = next(columns)
        if len(column) == 1:
            return str(column[0])
        if column == list(range(column[0], column[-1] + 1)):
            return f"{{{column[0]}..{column[-1]}}}"
        return "{" + ",".join(map(str, column)) + "}"

    return text


def _natural(key: str) -> list[tuple[int, int, str]]:
    parts = key.split(".")
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def _table(rows: list[tuple[str, str, str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return [f"  {key:{widths[0]}}  {fate:{widths[1]}}  {what}" for key, fate, what in rows]
