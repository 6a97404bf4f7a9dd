"""What a process that dies may leave behind: tracebacks without secrets, and no image of its memory.

A core dump holds the token in the clear, and lies for months where other people look.
"""

from __future__ import annotations

import resource
import sys
import threading
import traceback
from types import TracebackType

from ckptd.telemetry import logs

_NO_DUMP_BYTES = 1
"""Too small for any file, and the one value at which the kernel does not pipe a dump to a program
either (core(5): with 0 it still would)."""


def contain() -> None:
    """Make this process and its children leave no core dump, and clean tracebacks that end it."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    if hard == resource.RLIM_INFINITY or hard >= _NO_DUMP_BYTES:
        resource.setrlimit(resource.RLIMIT_CORE, (_NO_DUMP_BYTES, _NO_DUMP_BYTES))
    sys.excepthook = _show
    threading.excepthook = _show_of_thread


def told(error: BaseException) -> str:
    """Return the traceback of `error` as text without secrets."""
    return logs.without_secrets("".join(traceback.format_exception(error)))


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    del kind, trace
    sys.stderr.write(told(error))


def _show_of_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        sys.stderr.write(told(args.exc_value))
