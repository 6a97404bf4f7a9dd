"""Which files go over LFS and which are ignored: .gitattributes, .gitignore, size, content. Pure.

Pattern language: gitignore(5), the subset that both files share; no character classes beyond [...]
and no attribute macros.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from ckptd.hub.local.values import LONGEST_REGULAR_BYTES

_SUFFIXES = [
    "7z",
    "arrow",
    "bin",
    "bz2",
    "ckpt",
    "ftz",
    "gguf",
    "gz",
    "h5",
    "joblib",
    "lfs.*",
    "mlmodel",
    "model",
    "msgpack",
    "npy",
    "npz",
    "onnx",
    "ot",
    "parquet",
    "pb",
    "pickle",
    "pkl",
    "pt",
    "pth",
    "rar",
    "safetensors",
    "tar",
    "tar.*",
    "tflite",
    "tgz",
    "wasm",
    "xz",
    "zip",
    "zst",
]

DEFAULT_GITATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n"
    for pattern in (*(f"*.{suffix}" for suffix in _SUFFIXES), "saved_model/**/*", "*tfevents*")
)
"""What a new repo begins with."""


def is_lfs(path: str, *, size: int, sample: bytes, gitattributes: str) -> bool:
    """Say whether a file must be uploaded over LFS; `sample` is its first bytes."""
    return (
        size > LONGEST_REGULAR_BYTES
        or _last_filter(path, gitattributes) == "lfs"
        or not _is_text(sample)
    )


def is_ignored(path: str, gitignore: str) -> bool:
    """Say whether .gitignore excludes a file, or a folder above it."""
    rules = [line.rstrip() for line in gitignore.splitlines()]
    rules = [line for line in rules if line and not line.startswith("#")]
    parts = path.split("/")
    return any(
        _decides("/".join(parts[:depth]), rules, is_folder=depth < len(parts))
        for depth in range(1, len(parts) + 1)
    )


def _decides(path: str, rules: Sequence[str], *, is_folder: bool) -> bool:
    ignored = False
    for rule in rules:
        negated = rule.startswith("!")
        pattern = rule.removeprefix("!").removeprefix("\\")
        if pattern.endswith("/") and not is_folder:
            continue
        if _matches(path, pattern.rstrip("/")):
            ignored = not negated
    return ignored


def _last_filter(path: str, gitattributes: str) -> str | None:
    found = None
    for line in gitattributes.splitlines():
        words = line.split()
        if len(words) < 2 or words[0].startswith("#") or not _matches(path, words[0]):
            continue
        for word in words[1:]:
            if word.startswith("filter="):
                found = word.removeprefix("filter=")
            elif word in ("-filter", "!filter"):
                found = None
    return found


def _matches(path: str, pattern: str) -> bool:
    """Match the whole path where the pattern has a slash, else its last part."""
    subject = path if "/" in pattern else path.rpartition("/")[2]
    return _compiled(pattern.removeprefix("/")).fullmatch(subject) is not None


@functools.lru_cache(maxsize=512)
def _compiled(pattern: str) -> re.Pattern[str]:
    pieces = []
    for piece in re.findall(r"/\*\*/|\*\*/|/\*\*|\*+|\?|\[[^\]/]+\]|[^*?\[/]+|.", pattern):
        match piece:
            case "/**/":
                pieces.append("/(?:.*/)?")
            case "**/":
                pieces.append("(?:.*/)?")
            case "/**":
                pieces.append("/.*")
            case "?":
                pieces.append("[^/]")
            case _ if set(piece) == {"*"}:
                pieces.append("[^/]*")
            case _ if piece.startswith("[") and piece.endswith("]") and len(piece) > 2:
                inner = re.sub(r"([\\\[&~|])", r"\\\1", piece[1:-1])
                pieces.append("[^" + inner[1:] + "]" if inner[0] in "!^" else f"[{inner}]")
            case _:
                pieces.append(re.escape(piece))
    try:
        return re.compile("".join(pieces), re.DOTALL)
    except re.error:
        return re.compile(re.escape(pattern))


def _is_text(sample: bytes) -> bool:
    """Say whether the beginning of a file is UTF-8 text; a character cut at the end is fine."""
    if b"\0" in sample:
        return False
    for cut in range(4):
        try:
            sample[: len(sample) - cut].decode()
        except UnicodeDecodeError:
            continue
        return True
    return False
