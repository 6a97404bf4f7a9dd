"""The model card: tags and library name merged into a README.md, everything else kept.

Pure. The front matter is edited as text, at the places the YAML parser points to, so that the body
and all other metadata keep every byte, comments and order included. After the edit the result is
parsed again and must be the old metadata plus exactly what was asked for; a card that cannot be
edited this way is refused, never rewritten.

Format: https://huggingface.co/docs/hub/model-cards (YAML between two `---` lines at the top).
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from ckptd import errors

CARD_NAME = "README.md"
LIBRARY = "transformers"

_SECTION_BEGIN = "<!-- ckptd: what was verified; written anew with each publication -->"
_SECTION_END = "<!-- ckptd: end -->"
_FRONT_MATTER = re.compile(
    r"\A(?P<open>\ufeff?\s*---[ \t]*(?P<eol>\r\n|\n))(?P<yaml>.*?)(?P<close>^---[ \t]*(?:\r?\n|\Z))",
    re.DOTALL | re.MULTILINE,
)
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./+-]*")
_MAX_VALUES = 200_000
"""Values of a front matter, aliases written out; the results of hundreds of tasks have 20,000."""
_BROKEN = (ValueError, LookupError, TypeError, RecursionError)
"""What the YAML reader raises besides its own errors: a date of no month, `!!int x`, deep nesting."""
_RESERVED = frozenset({"true", "false", "null", "yes", "no", "on", "off", "y", "n"})


def merge(text: str | None, *, tags: Sequence[str], library: str = LIBRARY, name: str = "") -> str:
    """Return the card with `tags` added to its tags, and `library_name` where it has none.

    Tags already there keep their place and are not repeated. `text` None makes a short new card
    called `name`. Calling it on its own result changes nothing; no tags change nothing either.

    Raises:
        errors.HubRejected: the front matter is not YAML, not a mapping, or cannot be edited safely.
    """
    if text is None:
        body = f"\n# {name}\n\nPublished by ckptd.\n" if name else ""
        return merge("---\n---\n" + body, tags=tags, library=library)
    if not tags:
        return text
    match = _FRONT_MATTER.match(text)
    if match is None:
        return merge(f"---\n---\n{text}", tags=tags, library=library)
    eol, before = match["eol"], match["yaml"].replace("\r\n", "\n")
    front, old = before, _load(before)
    if not old.get("library_name"):
        front = _set_library(front, library)
    front = _add_tags(front, [tag for tag in dict.fromkeys(tags) if tag not in _tags_of(old)])
    _check(front, old, tags=tags, library=library)
    if front == before:
        return text
    return match["open"] + front.replace("\n", eol) + match["close"] + text[match.end() :]


def with_section(text: str, section: str) -> str:
    """Return the card with ckptd's own section at its end, or in the place of an earlier one.

    Comments mark where it begins and ends; everything outside of them keeps every byte. Calling it
    on its own result with the same section changes nothing.
    """
    own = f"{_SECTION_BEGIN}\n{section.strip()}\n{_SECTION_END}"
    begin, end = text.find(_SECTION_BEGIN), text.find(_SECTION_END)
    if 0 <= begin < end:
        return text[:begin] + own + text[end + len(_SECTION_END) :]
    return f"{text.rstrip()}\n\n{own}\n"


def _load(front: str) -> dict[str, Any]:
    """Return the front matter as plain values."""
    try:
        data = YAML(typ="safe", pure=True).load(io.StringIO(front))
    except (YAMLError, *_BROKEN) as exc:
        raise _refused(f"its front matter is not valid YAML: {_one_line(exc)}") from exc
    _require_bounded(data)
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise _refused(f"its front matter is a {type(data).__name__}, not a mapping")
    return data


def _tags_of(data: dict[str, Any]) -> list[Any]:
    tags = data.get("tags")
    if tags is None:
        return []
    return tags if isinstance(tags, list) else [tags]


def _check(front: str, old: dict[str, Any], *, tags: Sequence[str], library: str) -> None:
    """Refuse an edit whose result is not the old metadata plus exactly what was asked for."""
    had = _tags_of(old)
    wanted = dict(old)
    wanted["library_name"] = old.get("library_name") or library
    added = [tag for tag in dict.fromkeys(tags) if tag not in had]
    if added:
        wanted["tags"] = [*had, *added]
    if _comparable(_load(front)) != _comparable(wanted):
        raise _refused("its tags are written in a way that cannot be edited without rewriting it")


def _comparable(data: dict[str, Any]) -> dict[str, str]:
    """Return the values as text, in which a metric that is not a number equals itself."""
    return {str(key): repr(value) for key, value in data.items()}


def _value_node(front: str, key: str) -> tuple[Node, Node] | None:
    """Return the nodes of a top-level key and its value, with their places in the text."""
    try:
        root = YAML(typ="safe", pure=True).compose(io.StringIO(front))
    except (YAMLError, *_BROKEN) as exc:
        raise _refused("it is written in a way that cannot be edited") from exc
    if not isinstance(root, MappingNode):
        return None
    if root.flow_style:
        raise _refused("its front matter is written as {...}; write it as lines")
    for key_node, value_node in root.value:
        if isinstance(key_node, ScalarNode) and key_node.value == key:
            return key_node, value_node
    return None


def _set_library(front: str, library: str) -> str:
    found = _value_node(front, "library_name")
    if found is None:
        return _append(front, f"library_name: {_scalar(library)}\n")
    _, value = found
    start, end = value.start_mark.index, value.end_mark.index
    gap = "" if front[start - 1 : start].isspace() else " "
    return front[:start] + gap + _scalar(library) + front[end:]


def _add_tags(front: str, added: Sequence[str]) -> str:
    """Return the front matter with the tags written the way its other tags are."""
    if not added:
        return front
    found = _value_node(front, "tags")
    if found is None:
        return _append(front, "tags:\n" + "".join(f"- {_scalar(tag)}\n" for tag in added))
    key, value = found
    start, end = value.start_mark.index, value.end_mark.index
    if isinstance(value, SequenceNode) and not value.flow_style:
        last = value.value[-1]
        indent = front[front.rfind("\n", 0, start) + 1 : start]
        at = front.find("\n", last.end_mark.index)
        if front[: last.end_mark.index].endswith("\n"):  # a block scalar ends after its line
            at = last.end_mark.index - 1
        head, tail = (front + "\n", "") if at < 0 else (front[: at + 1], front[at + 1 :])
        return head + "".join(f"{indent}- {_scalar(tag)}\n" for tag in added) + tail
    listed = ", ".join(_scalar(tag) for tag in added)
    if isinstance(value, SequenceNode):
        inner = front[start + 1 : end - 1].rstrip().rstrip(",")
        return front[:start] + (f"[{inner}, {listed}]" if inner else f"[{listed}]") + front[end:]
    kept = front[start:end]
    if not kept.strip() or value.tag == "tag:yaml.org,2002:null":
        at = front.index(":", key.end_mark.index) + 1
        rest = front[end:] if kept.strip() else front[at:]
        return front[:at] + f" [{listed}]" + rest
    return front[:start] + f"[{kept}, {listed}]" + front[end:]


def _append(front: str, lines: str) -> str:
    return front + ("" if not front or front.endswith("\n") else "\n") + lines


def _scalar(value: str) -> str:
    """Return the value as a YAML scalar: plain where that is safe, else in single quotes."""
    if _PLAIN.fullmatch(value) and value.lower() not in _RESERVED:
        return value
    return "'" + value.replace("'", "''") + "'"


def _refused(why: str) -> errors.HubRejected:
    return errors.HubRejected(
        f"{CARD_NAME}: {why}",
        hint="correct the card on the Hub, or leave `tags` out of the definition's push",
    )


def _require_bounded(data: Any) -> None:
    """Refuse aliases that make a few lines into millions of values, or a value hold itself."""
    left = _MAX_VALUES
    waiting = [data]
    while waiting:
        value = waiting.pop()
        left -= 1
        if left < 0:
            raise _refused(f"its front matter has more than {_MAX_VALUES:,} values")
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple | set):
            waiting += value


def _one_line(exc: Exception) -> str:
    return " ".join(str(exc).split())[:300]
