"""Writing GGUF files in tests, right ones and wrong ones: every field can be overridden."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ALIGNMENT = 32
LLAMA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 128,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
"""The metadata of a Llama of one layer."""


@dataclass(frozen=True)
class Entry:
    """A tensor: its shape in rows and columns, its ggml type by number, its bytes.

    `offset` overrides where its entry says that it lies.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    data: bytes
    offset: int | None = None


def text(value: str | bytes) -> bytes:
    """Return a string as GGUF has it."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def value(thing: Any) -> bytes:
    """Return a value with its type before it; `bytes` are taken as they are."""
    match thing:
        case bytes():
            return thing
        case bool():
            return struct.pack("<I?", 7, thing)
        case int():
            return struct.pack("<II", 4, thing)
        case float():
            return struct.pack("<If", 6, thing)
        case str():
            return struct.pack("<I", 8) + text(thing)
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(thing)) + b"".join(text(one) for one in thing)
        case list():
            return struct.pack(f"<IIQ{len(thing)}i", 9, 5, len(thing), *thing)
    raise TypeError(thing)


def encode(
    metadata: Mapping[str, Any] | Sequence[tuple[str, Any]] = LLAMA,
    entries: Sequence[Entry] = (),
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """Return a whole file."""
    pairs = list(metadata.items()) if isinstance(metadata, Mapping) else list(metadata)
    num_tensors, num_pairs = counts or (len(entries), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_pairs)
    head += b"".join(text(key) + value(thing) for key, thing in pairs)
    body = b""
    for entry in entries:
        offset = len(body) if entry.offset is None else entry.offset
        head += text(entry.name) + struct.pack("<I", len(entry.shape))
        head += struct.pack(f"<{len(entry.shape)}Q", *reversed(entry.shape))
        head += struct.pack("<IQ", entry.kind, offset)
        body += entry.data + bytes(-len(entry.data) % ALIGNMENT)
    return head + bytes(-len(head) % ALIGNMENT) + body


def floats(name: str, *shape: int) -> Entry:
    """Return a tensor of zeros in F32."""
    count = 1
    for length in shape:
        count *= length
    return Entry(name, shape, 0, bytes(4 * count))


def llama(*more: Entry, rows: int = 32) -> list[Entry]:
    """Return some tensors of a Llama, and `more`."""
    return [
        floats("token_embd.weight", 4, 32),
        floats("blk.0.attn_q.weight", rows, 32),
        floats("blk.0.attn_norm.weight", 32),
        *more,
    ]
