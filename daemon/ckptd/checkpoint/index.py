"""The index of a sharded checkpoint: which shard holds which tensor.

`model.safetensors.index.json` is `{"metadata": {...}, "weight_map": {tensor name: file name}}`.
Names of shards must be plain file names beside the index: an index that points anywhere else is
refused, whoever wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckptd.errors import CheckpointCorrupt

MAX_JSON_BYTES = 200_000_000
"""An index of a million tensors is some 100 MB; anything larger is refused before it is parsed."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file at `path`.

    Raises:
        CheckpointCorrupt: too large, not UTF-8, not JSON, not an object, or a key stands twice.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointCorrupt(
            "too large", path=path, expected=f"at most {MAX_JSON_BYTES} bytes", found=f"{size}"
        )

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(items)
        if len(entries) != len(items):
            raise CheckpointCorrupt("a key stands twice in one object", path=path)
        return entries

    raw = path.read_bytes()
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise CheckpointCorrupt(
            f"not JSON: {error}", path=path, hint="save it again, or take it from the base model"
        ) from error
    if b"\\u" in raw:
        _require_whole_characters(value, path)
    if not isinstance(value, dict):
        raise CheckpointCorrupt(
            "not a JSON object", path=path, expected="an object", found=type(value).__name__
        )
    return value


def read_weight_map(path: Path, *, suffix: str = ".safetensors") -> dict[str, str]:
    """Return tensor name -> shard file name, as the index at `path` says; shards end in `suffix`.

    Raises:
        CheckpointCorrupt: no weight_map, or a shard name that is not a plain file name.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointCorrupt(
            "the index has no weight_map", path=path, expected="an object of tensor -> shard"
        )
    sound: set[str] = set()
    for tensor, shard in weight_map.items():
        if isinstance(shard, str) and (shard in sound or _is_plain_name(shard, suffix)):
            sound.add(shard)
        else:
            raise CheckpointCorrupt(
                "its shard is not a file name beside the index",
                path=path,
                tensor=tensor,
                found=repr(shard)[:120],
                hint="paths that leave the folder are never followed",
            )
    return weight_map


def encode(weight_map: Mapping[str, str], *, total_size: int, total_parameters: int) -> bytes:
    """Return the bytes of an index file: sorted, indented by two, with a final newline."""
    value = {
        "metadata": {"total_parameters": total_parameters, "total_size": total_size},
        "weight_map": {},
    }
    frame = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    if not weight_map:
        return f"{frame}\n".encode()
    # Told to indent, the library works in Python: half a second for 100,000 names. The same indent
    # as part of the separator is left to its fast encoder.
    separators = (",\n    ", ": ")
    names = json.dumps(dict(weight_map), separators=separators, sort_keys=True, ensure_ascii=False)
    begin = frame.removesuffix("{}\n}")
    return f"{begin}{{\n    {names[1:-1]}\n  }}\n}}\n".encode()


def _require_whole_characters(value: Any, path: Path) -> None:
    """Refuse text that cannot be written again: JSON escapes can spell halves of characters."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointCorrupt("holds half a character (a lone surrogate)", path=path) from error


def _is_plain_name(name: str, suffix: str) -> bool:
    return (
        bool(name)
        and name not in {".", ".."}
        and not any(c in name for c in ("/", "\\", "\0"))
        and name.endswith(suffix)
    )
