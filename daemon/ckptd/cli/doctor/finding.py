"""What a check has found: how bad, in words, and what to do about it."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Grade(enum.Enum):
    """How bad it is."""

    OK = "ok"
    SKIPPED = "skipped"
    """There is nothing to check here, and why."""
    WARNING = "warning"
    """It works, but slower, dearer or less safely than it could."""
    FAILED = "failed"
    """Something that is defined would not work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the doctor's report."""

    check: str
    """What was looked at: the same word every time."""
    grade: Grade
    what: str
    hint: str | None = None


def ok(check: str, what: str) -> Finding:
    """Return that all is well."""
    return Finding(check=check, grade=Grade.OK, what=what)


def skipped(check: str, why: str) -> Finding:
    """Return that there was nothing to look at."""
    return Finding(check=check, grade=Grade.SKIPPED, what=why)


def warning(check: str, what: str, hint: str) -> Finding:
    """Return something that could be better, and how."""
    return Finding(check=check, grade=Grade.WARNING, what=what, hint=hint)


def failed(check: str, what: str, hint: str) -> Finding:
    """Return something that would not work, and how to mend it."""
    return Finding(check=check, grade=Grade.FAILED, what=what, hint=hint)
