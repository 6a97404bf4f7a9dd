"""Placeholders in the texts of `push`: which there are, what they may stand in, how they resolve.

`{run}` becomes the name of the run, and so on; `{{` and `}}` are literal braces. Formats and
conversions (`{step:06d}`, `{run!r}`) are not taken. The same checkpoint must resolve to the same
texts each time it is seen (the target is part of a job's key), so no value may come from the clock.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ckptd import errors
from ckptd.pipeline import locate

KNOWN = ("run", "name", "step", "model_type", "digest", "date")
"""Every placeholder, by the field of `Values` it takes."""

_WHERE = {
    "model_type": ", or name the base of an adapter so that it is found: merge: {base: PATH or "
    "owner/name@revision}"
}
"""Where a value would come from that a checkpoint does not have itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """What the placeholders of one checkpoint stand for."""

    source_path: Path
    """The checkpoint, for messages."""
    run: str
    """The folder that holds the checkpoint: `llama-sft` of /runs/llama-sft/checkpoint-20."""
    name: str
    """The checkpoint itself: `checkpoint-20`."""
    step: int | None
    model_type: str | None
    digest: str
    """The first twelve hexadecimal digits of the content digest."""
    date: str
    """The day (UTC) of the newest file of the checkpoint, as 2026-01-31."""


def used(text: str) -> tuple[str, ...]:
    """Return the placeholders of `text` in their order.

    Raises:
        ValueError: an unknown placeholder, a format or conversion, or a single brace.
    """
    return tuple(name for _, name in _parts(text) if name is not None)


def sample(text: str) -> str:
    """Return `text` with `0` for each placeholder: what its form can be checked on.

    Raises:
        ValueError: as `used`.
    """
    return "".join(literal + ("0" if name else "") for literal, name in _parts(text))


def resolve(
    text: str, values: Values, *, field: str, clean: Callable[[str], str] | None = None
) -> str:
    """Return `text` with every placeholder replaced by its value, each passed through `clean`
    (by default `clean_text`).

    Raises:
        CheckpointUnsupported: the checkpoint has no such value (no step, no model_type).
    """
    resolved = ""
    for literal, name in _parts(text):
        resolved += literal
        if name is None:
            continue
        value = getattr(values, name)
        if value is None:
            raise errors.CheckpointUnsupported(
                f"has no {name}, which {field} of the definition asks for ({text!r})",
                path=values.source_path,
                hint=f"use another placeholder than {{{name}}} in {field}" + _WHERE.get(name, ""),
            )
        resolved += (clean or clean_text)(str(value))
    return resolved


def clean_text(value: str) -> str:
    """Return `value` on one line."""
    return " ".join(value.split())


def clean_repo_name(value: str) -> str:
    """Return `value` with what a repo name may not hold replaced by `-`: `my run!` is `my-run`."""
    text = re.sub(r"[^A-Za-z0-9_.-]+", "-", value)
    return re.sub(r"\.{2,}", ".", re.sub(r"-{2,}", "-", text)).strip("-.")


def clean_ref_name(value: str) -> str:
    """Return `value` with what a branch or tag name may not hold replaced by `-`."""
    text = re.sub(r"[^A-Za-z0-9_./+=-]+", "-", value)
    return re.sub(r"\.{2,}", ".", re.sub(r"/{2,}", "/", text)).strip("-./")


def _parts(text: str) -> list[tuple[str, str | None]]:
    """Return (literal, placeholder after it) pairs."""
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as exc:
        raise ValueError(f"{exc} in {text!r} (write {{{{ and }}}} for literal braces)") from exc
    parts = []
    for literal, name, form, conversion in parsed:
        if name is not None and name not in KNOWN:
            raise ValueError(locate.unknown("placeholder", name, KNOWN))
        if form or conversion:
            raise ValueError(f"{{{name}}} takes no format: write {{{name}}} alone")
        parts.append((literal, name))
    return parts
