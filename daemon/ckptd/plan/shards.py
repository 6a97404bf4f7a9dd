"""Dividing tensors among shard files, and the files' names.

The rule is the one users of the Hub know: tensors in order; a tensor larger than the limit gets a
file of its own and leaves the current one open; a tensor that would push the current file over the
limit starts the next. The limit counts tensor bytes, not the header.
"""

from __future__ import annotations

import re
from collections.abc import Mapping


def by_size(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Return the tensors' names, file by file, none over `max_shard_bytes` unless one tensor is.

    `sizes` are their bytes, in order.
    """
    shards: list[list[str]] = []
    current: list[str] = []
    current_bytes = 0
    for name, nbytes in sizes.items():
        if nbytes > max_shard_bytes:
            shards.append([name])
            continue
        if current and current_bytes + nbytes > max_shard_bytes:
            shards.append(current)
            current, current_bytes = [], 0
        current.append(name)
        current_bytes += nbytes
    if current:
        shards.append(current)
    return shards


def by_home(homes: Mapping[str, str]) -> list[list[str]]:
    """Return the tensors' names, divided as the source was: `homes` says in which file each lay."""
    shards: dict[str, list[str]] = {}
    for name, home in homes.items():
        shards.setdefault(home, []).append(name)
    return list(shards.values())


def file_names(count: int, *, stem: str = "model", variant: str | None = None) -> list[str]:
    """Return the names of `count` weight files; a single one has no number.

    Args:
        count: how many files.
        stem: `model`, or `adapter_model` for adapter weights.
        variant: stands after the stem: `model.fp16-00001-of-00002.safetensors`.
    """
    base = stem if variant is None else f"{stem}.{variant}"
    if count == 1:
        return [f"{base}.safetensors"]
    return [f"{base}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def index_name(*, stem: str = "model", variant: str | None = None) -> str:
    """Return the index's name; the variant stands before the last suffix."""
    end = "json" if variant is None else f"{variant}.json"
    return f"{stem}.safetensors.index.{end}"


def is_weight_name(name: str, *, stem: str = "model", variant: str | None = None) -> bool:
    """Say whether `name` is a weight file or an index that a save of this variant could have made."""
    base = re.escape(stem if variant is None else f"{stem}.{variant}")
    shard = re.fullmatch(rf"{base}(-\d{{5,}}-of-\d{{5,}})?\.safetensors", name)
    return shard is not None or name == index_name(stem=stem, variant=variant)
