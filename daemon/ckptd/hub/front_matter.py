"""The metadata of a model card edited as text: values put in, changed and taken out where they stand.

Pure. Places come from the YAML parser, so that everything else keeps every byte, comments and order
included. The functions here may fail to do what is asked on YAML that is written in unusual ways;
the caller parses the result and compares.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

Value = str | tuple[str, ...]
"""What is written: a word or a sentence, or several."""

MAX_DEPTH = 64
"""Levels of mappings and lists; the results of tasks (model-index) take eight."""
BROKEN: tuple[type[Exception], ...] = (
    YAMLError,
    ValueError,
    LookupError,
    TypeError,
    RecursionError,
)
"""What the YAML reader raises: a date of no month, `!!int x` and deep nesting beside its own."""
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./+-]*")
_RESERVED = frozenset({"true", "false", "null", "yes", "no", "on", "off", "y", "n"})
_NULL_TAG = "tag:yaml.org,2002:null"


class Uneditable(Exception):
    """The front matter is written in a way that is not edited; the text says which."""


def load(front: str) -> Any:
    """Return the front matter as plain values.

    Raises:
        BROKEN: it is not YAML.
    """
    return _yaml().load(io.StringIO(front))


def put(front: str, key: str, value: Value) -> str:
    """Return the front matter with `key` set, in its place or at the end."""
    found = _pair(front, key)
    if found is None:
        return _append(front, f"{key}: {_written(value)}\n")
    start, end = found[1].start_mark.index, found[1].end_mark.index
    if not front[start:end].strip():
        at = front.index(":", found[0].end_mark.index) + 1
        return f"{front[:at]} {_written(value)}{front[at:]}"
    if isinstance(found[1], SequenceNode) and not found[1].flow_style:
        return _append(drop(front, key), f"{key}: {_written(value)}\n")
    gap = "" if front[start - 1 : start].isspace() else " "
    return front[:start] + gap + _written(value) + front[end:]


def drop(front: str, key: str) -> str:
    """Return the front matter without `key` and its value."""
    found = _pair(front, key)
    if found is None:
        return front
    return _without_lines(front, found[0].start_mark.index, _last_index(front, found[1]))


def add(front: str, key: str, values: Sequence[str]) -> str:
    """Return the front matter with `values` at the end of the list `key`, written as its others are."""
    if not values:
        return front
    found = _pair(front, key)
    if found is None:
        return _append(front, f"{key}:\n" + "".join(f"- {_scalar(one)}\n" for one in values))
    key_node, node = found
    start, end = node.start_mark.index, node.end_mark.index
    if isinstance(node, SequenceNode) and not node.flow_style:
        last = node.value[-1]
        indent = front[front.rfind("\n", 0, start) + 1 : start]
        at = front.find("\n", last.end_mark.index)
        if front[: last.end_mark.index].endswith("\n"):  # a block scalar ends after its line
            at = last.end_mark.index - 1
        head, tail = (front + "\n", "") if at < 0 else (front[: at + 1], front[at + 1 :])
        return head + "".join(f"{indent}- {_scalar(one)}\n" for one in values) + tail
    listed = ", ".join(_scalar(one) for one in values)
    if isinstance(node, SequenceNode):
        inner = front[start + 1 : end - 1].rstrip().rstrip(",")
        return front[:start] + (f"[{inner}, {listed}]" if inner else f"[{listed}]") + front[end:]
    kept = front[start:end]
    if not kept.strip() or node.tag == _NULL_TAG:
        at = front.index(":", key_node.end_mark.index) + 1
        rest = front[end:] if kept.strip() else front[at:]
        return front[:at] + f" [{listed}]" + rest
    return front[:start] + f"[{kept}, {listed}]" + front[end:]


def replace(front: str, key: str, old: str, new: str | None) -> str:
    """Return the front matter with `old` in the list `key` changed to `new`, or taken out."""
    found = _pair(front, key)
    if found is None:
        return front
    node = found[1]
    items = node.value if isinstance(node, SequenceNode) else [node]
    item = next((i for i in items if isinstance(i, ScalarNode) and i.value == old), None)
    if item is None:
        return front
    start, end = item.start_mark.index, item.end_mark.index
    if new is not None:
        return front[:start] + _scalar(new) + front[end:]
    if len(items) == 1:
        return drop(front, key)
    if isinstance(node, SequenceNode) and node.flow_style:
        rest = ", ".join(
            front[i.start_mark.index : i.end_mark.index] for i in items if i is not item
        )
        return front[: node.start_mark.index] + f"[{rest}]" + front[node.end_mark.index :]
    return _without_lines(front, start, end)


def _yaml() -> YAML:
    """Return a reader of plain values that stops where the nesting is nobody's metadata."""
    yaml = YAML(typ="safe", pure=True)
    yaml.max_depth = MAX_DEPTH
    return yaml


def _pair(front: str, key: str) -> tuple[Node, Node] | None:
    """Return the nodes of a top-level key and its value, with their places in the text."""
    try:
        root = _yaml().compose(io.StringIO(front))
    except BROKEN as exc:
        raise Uneditable("it is written in a way that cannot be edited") from exc
    if not isinstance(root, MappingNode):
        return None
    if root.flow_style:
        raise Uneditable("its front matter is written as {...}; write it as lines")
    for key_node, value_node in root.value:
        if isinstance(key_node, ScalarNode) and key_node.value == key:
            return key_node, value_node
    return None


def _last_index(front: str, node: Node) -> int:
    """Return where a value ends, without the lines between it and what comes next."""
    if isinstance(node, MappingNode) and not node.flow_style and node.value:
        return _last_index(front, node.value[-1][1])
    if isinstance(node, SequenceNode) and not node.flow_style and node.value:
        return _last_index(front, node.value[-1])
    end: int = node.end_mark.index
    return end - 1 if front[:end].endswith("\n") else end


def _without_lines(front: str, start: int, end: int) -> str:
    """Return the text without the lines from the one with `start` to the one with `end`."""
    head, at = front[: front.rfind("\n", 0, start) + 1], front.find("\n", end)
    return head + (front[at + 1 :] if at >= 0 else "")


def _append(front: str, lines: str) -> str:
    return front + ("" if not front or front.endswith("\n") else "\n") + lines


def _written(value: Value) -> str:
    if isinstance(value, str):
        return _scalar(value)
    return f"[{', '.join(_scalar(one) for one in value)}]"


def _scalar(value: str) -> str:
    """Return the value as a YAML scalar: plain where that is safe, else in single quotes."""
    if _PLAIN.fullmatch(value) and value.lower() not in _RESERVED:
        return value
    return "'" + value.replace("'", "''") + "'"
