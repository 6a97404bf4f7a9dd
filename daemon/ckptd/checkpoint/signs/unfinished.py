"""Names by which a writer says that it has not ended: temporary files, negative markers, folders.

A temporary file of a writer that was killed stays for ever; whoever judges compares its time with
that of the files that were written after it. A negative marker (`.incomplete`, `NAME-unfinished`)
and the name of the folder itself are statements, and hold as long as they are there.
Sources: safetensors, torch DCP, transformers, NeMo, Automodel, orbax, SimpleTuner, rsync, AWS CLI.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ckptd.checkpoint.listing import ListedFile

_TEMPORARY = (
    ".tmp*",
    "*.tmp",
    "*.temp",
    "*.part",
    "*.partial",
    "*.filepart",
    "*.crdownload",
    "*.incomplete",
    ".nfs*",
    "*.lock",
)
_COPYING = re.compile(
    r"^(\..+\.(safetensors|json|bin|pt|pth|ckpt|distcp|metadata|gguf)\.[A-Za-z0-9]{6}"
    r"|.+\.(safetensors|json|bin|pt|pth|ckpt|distcp|metadata|gguf)\.[0-9a-fA-F]{8})$"
)
"""`.model.safetensors.aB3dE5` of rsync, `model.safetensors.6eF4a1Bc` of the AWS command line."""
_STATEMENTS = (".incomplete", "*-unfinished")
_FOLDERS = (
    "tmp-checkpoint-*",
    "*-tmp",
    "*.tmp",
    "*.part",
    "*.partial",
    "*.incomplete",
    "*.orbax-checkpoint-tmp*",
    "*-unfinished",
)
_UNFINISHED = "-unfinished"
_BASENAMES = (".nemo", ".ckpt", "-EMA")
"""What NeMo takes off a checkpoint's name before it adds `-unfinished`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """Something that says a write is going on; `mtime_ns` is None for what is never a leftover."""

    name: str
    mtime_ns: int | None


def signs(folder: Path, files: Iterable[ListedFile]) -> tuple[Sign, ...]:
    """Return what says that the checkpoint that the trainer calls `folder` is being written."""
    found = []
    if _matches(folder.name, _FOLDERS):
        found.append(Sign(name=folder.name, mtime_ns=None))
    there = [name for name in _beside(folder) if (folder.parent / name).exists()]
    found += [Sign(name=f"../{name}", mtime_ns=None) for name in there]
    for file in files:
        *folders, name = file.relpath.split("/")
        if _matches(name, _STATEMENTS) or any(_matches(part, _FOLDERS) for part in folders):
            found.append(Sign(name=file.relpath, mtime_ns=None))
        elif _matches(name, _TEMPORARY) or _COPYING.match(name):
            found.append(Sign(name=file.relpath, mtime_ns=file.mtime_ns))
    return tuple(found)


def _beside(folder: Path) -> list[str]:
    name = folder.name
    for ending in _BASENAMES:
        name = name.removesuffix(ending)
    return sorted({folder.name + _UNFINISHED, name + _UNFINISHED})


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
