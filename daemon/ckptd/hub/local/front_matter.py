"""The metadata at the top of a model card: reading it, and what the Hub would not take. Pure."""

from __future__ import annotations

import io
import re
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

_FRONT = re.compile(
    r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE
)
_LISTS_OF_TEXT = ("tags", "datasets", "language", "metrics", "base_model")
_TEXT = ("license", "library_name", "pipeline_tag", "license_name", "license_link")


def split(card: str) -> tuple[str | None, str]:
    """Return the YAML of a card (None where there is none) and its body."""
    match = _FRONT.match(card)
    return (match[1], card[match.end() :]) if match else (None, card)


def metadata(card: str) -> dict[str, Any]:
    """Return the metadata of a card; empty where there is none, or none that can be read."""
    try:
        return _load(split(card)[0] or "")
    except ValueError:
        return {}


def check(card: str) -> tuple[list[str], list[str]]:
    """Return the errors and the warnings about a card's metadata."""
    front, _ = split(card)
    if front is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = _load(front)
    except ValueError as exc:
        return [str(exc)], []
    errors = []
    for key in _LISTS_OF_TEXT:
        value = data.get(key)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, str) for item in listed):
            errors.append(f'"{key}" must be a string or a list of strings')
    if isinstance(data.get("tags"), str):
        errors.append('"tags" must be an array')
    errors += [
        f'"{key}" must be a string'
        for key in _TEXT
        if data.get(key) is not None and not isinstance(data[key], (str, list))
    ]
    return errors, []


def _load(front: str) -> dict[str, Any]:
    try:
        data = YAML(typ="safe", pure=True).load(io.StringIO(front))
    except (YAMLError, ValueError) as exc:
        raise ValueError("invalid YAML: " + " ".join(str(exc).split())[:300]) from exc
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ValueError("the metadata must be a mapping")
    return {str(key): value for key, value in data.items()}
