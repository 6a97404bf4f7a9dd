"""Does a Jinja template close what it opens? Enough to tell one that was cut; nothing is run."""

from __future__ import annotations

import re
from collections import Counter

_OPEN = re.compile(r"\{[%{#]")
_CLOSING = {"{%": "%}", "{{": "}}", "{#": "#}"}
_TOKEN = re.compile(
    r"""'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+"|[-+]?[%}]\}|[\[({]|[\])}]|['"]""",
    re.DOTALL,
)
_PAIRED = ("if", "for", "macro")
"""Tags that are closed by `end` and their name, without exception."""
_TAG = re.compile(r"\{%[-+]?\s*(\w+)")


def is_closed(text: str) -> bool:
    """Return whether every tag, expression, comment and block that begins in `text` ends there."""
    tags: Counter[str] = Counter()
    at = 0
    while (opened := _OPEN.search(text, at)) is not None:
        end = _end(text, opened)
        if end is None:
            return False
        if (tag := _TAG.match(text, opened.start())) is not None:
            tags[tag[1]] += 1
        at = end
    return all(tags[name] <= tags[f"end{name}"] for name in _PAIRED)


def _end(text: str, opened: re.Match[str]) -> int | None:
    """Return where what was opened has ended, None if it does not; strings and brackets count."""
    closing = _CLOSING[opened[0]]
    if closing == "#}":
        found = text.find(closing, opened.end())
        return None if found < 0 else found + len(closing)
    depth, at = 0, opened.end()
    while (token := _TOKEN.search(text, at)) is not None:
        said = token[0]
        if depth == 0 and said.endswith(closing):
            return token.end()
        if said in {"'", '"'}:
            return None  # a string without an end
        if said in {"[", "(", "{"}:
            depth += 1
        elif said[0] in "])}%-+":
            at = token.start() + 1 if len(said) > 1 else token.end()
            depth -= said[0] in "])}"
            continue
        at = token.end()
    return None
