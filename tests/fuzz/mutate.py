"""Changing inputs: bytes of any kind, and the parts that headers, texts and archives are made of.

Pure but for the random source that is passed in; both the hypothesis tests and the long run use it.
"""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Sequence
from typing import Any

MAX_BYTES = 1 << 16
"""Inputs do not grow past this: a fault in a larger one is one of size, which tests show by name."""
NUMBERS = (
    0, 1, 2, 7, 8, 127, 128, 255, 256, 4096, 65535, 1 << 31, (1 << 32) - 1, 1 << 53, (1 << 62) - 1,
    (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**53, 2**63, 2**64, 10**300, 1e400, float("nan"), 0.5, "", "..",
    "../x", "/etc/passwd", "a\0b", "\ud800", "\u202e", "x" * 300, [], {}, [[]], [None], {"": []},
    [2**40, 2**40], "F4", "BF16", "F128",
)  # fmt: skip
TOKENS = (
    b"!!int x", b"!!float x", b"!!bool x", b"!!binary '*'", b"!!set {a}", b"!!omap", b"!!python/name:os.x",
    b"!!timestamp 2024-02-31", b"2024-02-31", b"&a [*a]", b"*a", b"<<: *a", b"<<: {a: 1}", b"? [a]",
    b"%YAML 9.9\n---\n", b"---\n", b"...\n", b"0x", b"0o9", b"1_0", b"1e999", b".nan", b"\t", b"\xff",
    b"\xed\xa0\x80", b'"\\ud800"', b"9" * 5000, b"[" * 500, b"{" * 500, b"- " * 300, b"PK\x01\x02", b"PK\x05\x06",
    b"PK\x03\x04", b"\n", b"\r\n", b"\0", b"\x80\x02", b"cos\nsystem\n", b"\x8c\x02os\x8c\x06system\x93",
    b"}", b"]", b"(", b")R", b"\x85R", b"b", b"u.", b"1", b"0", b"\x94", b"h\x00",
)  # fmt: skip
_NUMBER = re.compile(rb"-?\d+")


def mutate(data: bytes, source: random.Random, others: Sequence[bytes] = ()) -> bytes:
    """Return `data` after a few random changes, some of them with parts of `others`."""
    for _ in range(source.choice((1, 1, 1, 2, 3, 6))):
        change = source.choice(_CHANGES)
        data = change(data, source, others)[:MAX_BYTES]
    return data


def mutate_json(value: Any, source: random.Random, depth: int = 0) -> Any:
    """Return a JSON value with one place in it changed, removed, doubled or put a level deeper."""
    if not isinstance(value, dict | list) or not value or source.random() < 0.15:
        return source.choice((*VALUES, [value], {"a": value}, str(value)))
    if isinstance(value, list):
        at = source.randrange(len(value))
        made = list(value)
        if source.random() < 0.3:
            made[at : at + 1] = source.choice(([], [made[at]] * 2, made[::-1]))
        else:
            made[at] = mutate_json(made[at], source, depth + 1)
        return made
    key = source.choice(list(value))
    rest = {name: one for name, one in value.items() if name != key}
    how = source.random()
    if how < 0.1:
        return rest
    if how < 0.25:
        return rest | {source.choice(("", "..", "\ud800", "a/b", key + "x")): value[key]}
    return value | {key: mutate_json(value[key], source, depth + 1)}


def json_bytes(value: Any, source: random.Random) -> bytes:
    """Return a JSON value as bytes, at times with a key that stands twice."""
    raw = json.dumps(value).encode()
    if source.random() < 0.1:
        raw = raw.replace(b"{", b'{"a": 1, "a": 2, ', 1)
    return raw


def _flip(data: bytes, source: random.Random, others: Sequence[bytes]) -> bytes:
    made = bytearray(data or b"\0")
    made[source.randrange(len(made))] ^= 1 << source.randrange(8)
    return bytes(made)


def _overwrite(data: bytes, source: random.Random, others: Sequence[bytes]) -> bytes:
    at = source.randrange(len(data) + 1)
    form = source.choice(("<B", "<H", "<I", "<Q"))
    width = struct.calcsize(form)
    number = source.choice(NUMBERS) % (1 << 8 * width)
    return data[:at] + struct.pack(form, number) + data[at + width :]


def _nudge(data: bytes, source: random.Random, others: Sequence[bytes]) -> bytes:
    if len(data) < 8:
        return data + b"\0"
    at = source.randrange(len(data) - 7)
    width = source.choice((1, 2, 4, 8))
    number = int.from_bytes(data[at : at + width], "little") + source.randint(-16, 16)
    return data[:at] + (number % (1 << 8 * width)).to_bytes(width, "little") + data[at + width :]


def _cut(data: bytes, source: random.Random, others: Sequence[bytes]) -> bytes:
    begin = source.randrange(len(data) + 1)
    return data[:begin] + data[begin + source.choice((1, 2, 4, 8, 30, len(data))) :]


def _repeat(data: bytes, source: random.Random, others: Sequence[bytes]) -> bytes:
    begin = source.randrange(len(data) + 1)
    part = data[begin : begin + source.choice((1, 4, 16, 64))]
    return data[:begin] + part * source.choice((2, 3, 40)) + data[begin:]


def _insert(data: bytes, source: random.Random, others: Sequence[bytes]) -> bytes:
    at = source.randrange(len(data) + 1)
    after = at + source.choice((0, 0, 1, 4))
    return data[:at] + source.choice(TOKENS) + data[after:]


def _renumber(data: bytes, source: random.Random, others: Sequence[bytes]) -> bytes:
    found = list(_NUMBER.finditer(data))
    if not found:
        return data
    one = source.choice(found)
    number = source.choice((*NUMBERS, int(one[0][:18]) + 1, -1))
    return data[: one.start()] + str(number).encode() + data[one.end() :]


def _splice(data: bytes, source: random.Random, others: Sequence[bytes]) -> bytes:
    other = source.choice(others) if others else data
    begin = source.randrange(len(other) + 1)
    part = other[begin : begin + source.choice((4, 16, 64, 256))]
    at = source.randrange(len(data) + 1)
    return data[:at] + part + data[at + source.choice((0, len(part))) :]


_CHANGES = (_flip, _overwrite, _nudge, _cut, _repeat, _insert, _renumber, _splice)
