"""Reading and writing values of a config.json by dotted key, such as `text_config.vocab_size`.

Pure: a write returns a new configuration. The keys are Hugging Face's and are kept exactly.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_TEXT_PARTS = ("text_encoder", "decoder", "generator", "text_config")
"""Where transformers looks for the text model of a composite one (`get_text_config`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """A value to stand at a dotted key of config.json."""

    key: str
    value: Any


def get(config: Mapping[str, Any], key: str) -> Any:
    """Return the value at a dotted key, or None where it or a configuration above it is absent."""
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, Mapping):
            return None
        node = node.get(part)
    return node


def written(config: Mapping[str, Any], writes: Iterable[Write]) -> dict[str, Any]:
    """Return a copy of `config` with every write done; sub-configurations are made as needed."""
    result = copy.deepcopy(dict(config))
    for write in writes:
        *above, leaf = write.key.split(".")
        node = result
        for part in above:
            if not isinstance(node.get(part), dict):
                node[part] = {}
            node = node[part]
        node[leaf] = write.value
    return result


def beside(key: str, other: str) -> str:
    """Return the key `other` in the same (sub-)configuration as `key`."""
    path, _, _ = key.rpartition(".")
    return f"{path}.{other}" if path else other


def text_path(config: Mapping[str, Any]) -> str | None:
    """Return the path of the text model's configuration: "" where it is the top one.

    None where config.json has several candidates, in which case nobody can say.
    """
    found = [part for part in _TEXT_PARTS if isinstance(config.get(part), Mapping)]
    if len(found) > 1:
        return None
    return found[0] if found else ""


def integers(config: Mapping[str, Any]) -> dict[str, int]:
    """Return every integer of the configuration by its dotted key."""
    found: dict[str, int] = {}

    def walk(node: Any, key: str) -> None:
        if isinstance(node, Mapping):
            for name, value in node.items():
                walk(value, f"{key}.{name}" if key else str(name))
        elif isinstance(node, list):
            for index, value in enumerate(node):
                walk(value, f"{key}.{index}")
        elif isinstance(node, int) and not isinstance(node, bool):
            found[key] = node

    walk(config, "")
    return found
