"""Byte sizes and durations: the only place that parses or prints them.

Decimal units are powers of ten (`5GB` is 5,000,000,000 bytes, as on the Hub and in transformers),
binary ones powers of two (`24GiB`). A bare number is bytes, or seconds. Only exact values pass:
`0.5B` is refused, `1.5GB` is 1,500,000,000.
"""

from __future__ import annotations

import re
from fractions import Fraction

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*$")
_DURATION = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(ms|s|min|m|h|d)?\s*$")
_SECONDS: dict[str, Fraction] = {
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "m": Fraction(60),
    "min": Fraction(60),
    "h": Fraction(3600),
    "d": Fraction(86400),
}

_BYTES: dict[str, int] = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGTP", start=1):
    _BYTES[f"{_letter}B"] = 1000**_power
    _BYTES[f"{_letter}IB"] = 1024**_power


def parse_bytes(text: str | int) -> int:
    """Return the number of bytes `text` names: `5GB`, `24GiB`, `1.5 MB`, `1048576`.

    Raises:
        ValueError: not a size, an unknown unit, a negative number, or not a whole number of bytes.
    """
    if isinstance(text, bool) or not isinstance(text, (str, int)):
        raise ValueError(f"not a size: {text!r} (write 5GB, 24GiB or a number of bytes)")
    if isinstance(text, int):
        if text < 0:
            raise ValueError(f"a size cannot be negative: {text}")
        return text
    match = _SIZE.match(text)
    factor = _BYTES.get(match[2].upper()) if match else None
    if match is None or factor is None:
        raise ValueError(f"not a size: {text!r} (write 5GB, 24GiB or a number of bytes)")
    value = Fraction(match[1]) * factor
    if value.denominator != 1:
        raise ValueError(f"not a whole number of bytes: {text!r}")
    return int(value)


def parse_duration(text: str | float) -> float:
    """Return the seconds `text` names: `10s`, `250ms`, `5m`, `2h`, `1d`, `10`.

    Raises:
        ValueError: not a duration, an unknown unit, or a negative number.
    """
    if isinstance(text, bool) or not isinstance(text, (str, int, float)):
        raise ValueError(f"not a duration: {text!r} (write 10s, 5m or a number of seconds)")
    if isinstance(text, (int, float)):
        if not 0 <= text < float("inf"):
            raise ValueError(f"a duration cannot be negative or endless: {text}")
        return float(text)
    match = _DURATION.match(text)
    if match is None:
        raise ValueError(f"not a duration: {text!r} (write 10s, 5m or a number of seconds)")
    return float(Fraction(match[1]) * _SECONDS[match[2] or "s"])


def format_bytes(num_bytes: float) -> str:
    """Return `num_bytes` for people, in decimal units with three digits: `3.15 GB`."""
    value = float(num_bytes)
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(value) < 999.5 or unit == "TB":
            return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    raise AssertionError("the loop returns at TB")


def format_duration(seconds: float) -> str:
    """Return `seconds` for people: `0.42s`, `12.3s`, `4m05s`, `2h07m`."""
    if seconds < 10:
        return f"{seconds:.2f}s"
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"
