"""Errors as a person and a program see them: message, hint, exit code.

Everything that leaves a command ends here, once. An error of ours says what to do next; one that
nobody foresaw is told in one line, with the traceback where CKPTD_DEBUG is set. With `--json` an
error is one JSON object on standard output.
"""

from __future__ import annotations

import os
import traceback
from dataclasses import dataclass
from typing import Any

from ckptd import errors
from ckptd.aio import groups
from ckptd.cli.output import Output

DEBUG_VARIABLE = "CKPTD_DEBUG"
"""Set to anything, it makes unexpected errors show their traceback."""
EXIT_USAGE = 2
EXIT_SETTINGS = 78
"""EX_CONFIG of sysexits.h: what `serve` exits with where starting again cannot help."""
EXIT_INTERRUPTED = 130


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """One failure, ready to be told."""

    code: str
    message: str
    hint: str | None
    exit_code: int
    problems: tuple[errors.Problem, ...] = ()
    trace: str | None = None

    def as_value(self) -> dict[str, Any]:
        """Return the `error` object of `--json`."""
        value: dict[str, Any] = {
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            "exit_code": self.exit_code,
        }
        if self.problems:
            value["problems"] = list(self.problems)
        return value


def of(error: BaseException) -> Told:
    """Return `error` ready to be told; groups are told as what is in them."""
    if isinstance(error, BaseExceptionGroup):
        for kind in (KeyboardInterrupt, errors.CkptdError, Exception):
            try:
                return of(groups.first(error, kind))
            except LookupError:
                continue
    if isinstance(error, errors.CkptdError):
        return Told(
            code=error.code,
            message=error.message,
            hint=error.hint,
            exit_code=error.exit_code,
            problems=error.problems if isinstance(error, errors.DefinitionError) else (),
        )
    if isinstance(error, KeyboardInterrupt):
        return Told(
            code="Interrupted", message="interrupted", hint=None, exit_code=EXIT_INTERRUPTED
        )
    return _unexpected(error)


def tell(told: Told, output: Output) -> None:
    """Tell the person, and with `--json` the program too."""
    if output.as_json:
        output.value({"error": told.as_value()})
        return
    if told.trace is not None:
        output.talk(told.trace.rstrip())
    if told.problems:
        output.talk(told.message)
    else:
        output.talk(f"ckptd: {told.message}")
    if told.hint is not None:
        output.talk(f"  hint: {told.hint}")


def _unexpected(error: BaseException) -> Told:
    from ckptd.telemetry.logs import SecretFilter

    clean = SecretFilter([os.environ.get("HF_TOKEN", "")]).text
    wanted = bool(os.environ.get(DEBUG_VARIABLE))
    text = str(error)
    return Told(
        code="Unexpected",
        message=clean(
            f"unexpected error: {type(error).__name__}: {text}"
            if text
            else f"unexpected error: {type(error).__name__}"
        ),
        hint=None if wanted else f"{DEBUG_VARIABLE}=1 shows where; please report it",
        exit_code=1,
        trace=clean("".join(traceback.format_exception(error))) if wanted else None,
    )
