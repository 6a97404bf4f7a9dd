"""YAML with places: every value knows its line and column, every problem is reported with them.

This module reads YAML 1.2 (ruamel.yaml) into plain values and remembers where each key and value
stands, so that what pydantic says about `("stages", 2, "resize", "to")` can be told as
`publish.yaml:14:19: stages[2].resize.to: must be greater than 0, found 0`. It knows nothing about
definitions or settings; both use it. Aliases, merge keys and tags are refused: a definition says
what it means in place, and no text can make the reader build anything but plain values.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, StringMark, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from ckptd import errors

MAX_BYTES = 1 << 20
"""A definition larger than this is something else."""
MAX_DEPTH = 32
"""Levels of mappings and lists; a definition has five."""
MAX_VALUES = 5000
"""Keys and values; a definition that names each tensor of a model has some hundreds."""

Loc = tuple[int | str, ...]
"""A place as pydantic names it: keys and list positions from the outside in."""

_LARGEST = (1 << 64) - 1
"""Whole numbers beyond this are no size, count or duration, and some do not fit a float."""
_TAG = "tag:yaml.org,2002:"
_SCALAR_TAGS = {_TAG + name for name in ("str", "int", "float", "bool", "null")}
_MUST_BE = {
    "string_type": "text",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "list_type": "a list (lines that start with -)",
    "dict_type": "a mapping (lines of key: value)",
    "model_type": "a mapping (lines of key: value)",
    "model_attributes_type": "a mapping (lines of key: value)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where something stands, both counted from 1."""

    line: int
    column: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One YAML file as plain values, with the place of each."""

    path: str
    """As it is written in problems."""
    data: dict[str, Any]
    keys: Mapping[Loc, Place] = field(repr=False)
    values: Mapping[Loc, Place] = field(repr=False)

    def place(self, loc: Loc, *, of_key: bool = False) -> Place:
        """Return where the value (or its key) at `loc` stands, or the nearest thing around it."""
        while loc:
            for places in (self.keys, self.values) if of_key else (self.values, self.keys):
                if loc in places:
                    return places[loc]
            loc, of_key = loc[:-1], True
        return Place(line=1, column=1)

    def problem(self, loc: Loc, what: str, *, of_key: bool = False) -> errors.Problem:
        """Return `what` as the problem of `loc`."""
        place = self.place(loc, of_key=of_key)
        return errors.Problem(
            path=self.path, line=place.line, column=place.column, field=field_name(loc), what=what
        )


def read(path: Path) -> str:
    """Return the text of the file at `path`.

    Raises:
        DefinitionError: it cannot be read, is larger than `MAX_BYTES`, or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise _syntax_error(path, "larger than 1 MiB: not a definition")
        return content.decode("utf-8-sig")
    except OSError as exc:
        raise _syntax_error(path, f"cannot be read: {exc.strerror or exc}") from exc
    except UnicodeDecodeError as exc:
        line = content.count(b"\n", 0, exc.start) + 1
        raise _syntax_error(path, "not UTF-8 text", line=line) from exc


def parse(text: str, path: Path | str) -> Document:
    """Return the mapping that `text` holds, with the place of every key and value.

    Raises:
        DefinitionError: not YAML, not one mapping, or with duplicate keys, keys that are not text,
            aliases or tags; all of these at once, but for what makes the text unreadable, or deeper
            or longer than any definition is (`MAX_DEPTH`, `MAX_VALUES`).
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _Bounded
    try:
        node = yaml.compose(text)
    except _Excess as exc:
        raise _syntax_error(path, exc.problem, mark=exc.problem_mark) from exc
    except MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        what = " ".join(part for part in (exc.context, exc.problem) if part)
        raise _syntax_error(path, f"not YAML: {what}", mark=mark) from exc
    except YAMLError as exc:
        raise _syntax_error(path, f"not YAML: {str(exc).splitlines()[0]}") from exc
    except (ValueError, LookupError) as exc:  # ruamel's own, for `%YAML 9.9`
        raise _syntax_error(path, f"not YAML: {exc}") from exc
    if not isinstance(node, MappingNode):
        mark = node.start_mark if node is not None else None
        raise _syntax_error(path, "must be a mapping (lines of key: value)", mark=mark)
    reading = _Reading(str(path), yaml.constructor.construct_object)
    reading.visit(node, ())
    if reading.problems:
        raise errors.DefinitionError(reading.problems)
    return Document(
        path=str(path),
        data=yaml.constructor.construct_document(node),
        keys=reading.keys,
        values=reading.values,
    )


def problems(
    error: ValidationError, document: Document, known_keys: Callable[[Loc], Collection[str]]
) -> list[errors.Problem]:
    """Return every complaint of pydantic as a problem of `document`, in the order of the file.

    `known_keys(loc)` names the keys that the mapping at `loc` may have, for suggestions.
    """
    found = []
    for detail in error.errors():
        loc = detail["loc"]
        if detail["type"] == "extra_forbidden":
            what = unknown("key", str(loc[-1]), known_keys(loc[:-1]))
            found.append(document.problem(loc, what, of_key=True))
        else:
            of_key = detail["type"] in ("missing", "unknown_stage")
            found.append(document.problem(loc, explain(detail), of_key=of_key))
    return sorted(found, key=lambda problem: (problem.line, problem.column, problem.field))


def explain(detail: ErrorDetails) -> str:
    """Return what pydantic found wrong, in our words and with what was found."""
    kind, value = detail["type"], detail.get("input")
    if kind == "missing":
        return "required, but absent"
    if kind == "too_short":
        return "at least one is needed"
    if kind in _MUST_BE:
        what = f"must be {_MUST_BE[kind]}, found {_shown(value)}"
        return what + " (put it in quotes)" if kind == "string_type" and _is_number(value) else what
    message = detail["msg"].removeprefix("Value error, ")
    if message.startswith("Input should be "):
        return f"must be {message.removeprefix('Input should be ')}, found {_shown(value)}"
    return message


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the text for an unknown `name`, with the closest known one where one is close."""
    names = sorted(known)
    by_lower = {known_name.lower(): known_name for known_name in names}
    close = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=1)]
    text = f"unknown {kind} {name!r}"
    if close:
        return f"{text}; did you mean {close[0]!r}?"
    return f"{text} (known: {', '.join(names)})" if names else text


def field_name(loc: Loc) -> str:
    """Return `loc` as people write it: `stages[2].resize.to`."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


class _Excess(MarkedYAMLError):
    """The text is YAML, but too much of it; tells where."""


class _Bounded(Composer):
    """Composes nodes up to a depth and a number, so that what lies beyond costs nothing."""

    def __init__(self, loader: Any = None) -> None:
        super().__init__(loader)
        self._num_nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Return the next node with everything in it."""
        self._num_nodes += 1
        if self.depth >= MAX_DEPTH:
            self._refuse(f"nested more than {MAX_DEPTH} levels deep")
        if self._num_nodes > MAX_VALUES:
            self._refuse(f"more than {MAX_VALUES} keys and values: not a definition")
        return super().compose_node(parent, index)

    def _refuse(self, what: str) -> NoReturn:
        raise _Excess(problem=what, problem_mark=self.parser.peek_event().start_mark)


class _Reading:
    """One walk over the nodes of a document; collects places and problems."""

    def __init__(self, path: str, construct: Callable[[Node], Any]) -> None:
        self.path = path
        self._construct = construct
        self.keys: dict[Loc, Place] = {}
        self.values: dict[Loc, Place] = {}
        self.problems: list[errors.Problem] = []
        self._visited: set[int] = set()

    def visit(self, node: Node, loc: Loc) -> None:
        """Note the place of `node` and of everything in it."""
        if id(node) in self._visited:
            # The node is that of the anchor: the alias itself has no place but its key.
            place = self.keys.get(loc, _place(node.start_mark))
            self._refuse(place, loc, "aliases are not taken: write the value out")
            return
        self._visited.add(id(node))
        self.values[loc] = _place(node.start_mark)
        if isinstance(node, ScalarNode):
            self._scalar(node, loc)
        elif isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
            for position, item in enumerate(node.value):
                self.visit(item, (*loc, position))
        elif isinstance(node, MappingNode) and node.tag == _TAG + "map":
            self._mapping(node, loc)
        else:
            self._refuse(_place(node.start_mark), loc, f"the tag {node.tag} is not taken")

    def _scalar(self, node: ScalarNode, loc: Loc) -> None:
        if node.tag == _TAG + "timestamp":  # a date is text to us, as it is in YAML 1.2
            node.tag = _TAG + "str"
        elif node.tag not in _SCALAR_TAGS:
            self._refuse(_place(node.start_mark), loc, f"the tag {node.tag} is not taken")
            return
        try:
            value = self._construct(node)
        except (ValueError, LookupError):  # ruamel's own, for `!!int x` and a million digits
            value = None
            kind = node.tag.removeprefix(_TAG)
            self._refuse(_place(node.start_mark), loc, f"is no {kind}: {_shown(node.value)}")
        if isinstance(value, int) and abs(value) > _LARGEST:
            self._refuse(_place(node.start_mark), loc, f"a number beyond {_LARGEST}")

    def _mapping(self, node: MappingNode, loc: Loc) -> None:
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode) or key_node.tag != _TAG + "str":
                self._refuse(_place(key_node.start_mark), loc, "a key must be text")
                continue
            key_loc = (*loc, str(key_node.value))
            if key_loc in self.keys:
                first = self.keys[key_loc]
                self._refuse(
                    _place(key_node.start_mark), key_loc, f"given twice, first in line {first.line}"
                )
                continue
            self.keys[key_loc] = _place(key_node.start_mark)
            self.visit(value_node, key_loc)

    def _refuse(self, place: Place, loc: Loc, what: str) -> None:
        self.problems.append(
            errors.Problem(
                path=self.path,
                line=place.line,
                column=place.column,
                field=field_name(loc),
                what=what,
            )
        )


def _place(mark: StringMark | None) -> Place:
    return Place(line=mark.line + 1, column=mark.column + 1) if mark else Place(line=1, column=1)


def _syntax_error(
    path: Path | str, what: str, *, mark: StringMark | None = None, line: int = 1
) -> errors.DefinitionError:
    place = _place(mark) if mark else Place(line=line, column=1)
    problem = errors.Problem(
        path=str(path), line=place.line, column=place.column, field="", what=what
    )
    return errors.DefinitionError([problem])


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
