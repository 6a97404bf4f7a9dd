"""`ckptd`: the commands put together, and the one place where errors become exit codes."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Sequence
from typing import Annotated

import typer

from ckptd import __version__, errors
from ckptd.cli import (
    bench,
    demonstrate,
    failures,
    hub,
    inspect,
    jobs,
    plan,
    run,
    schema,
    serve,
    status,
    validate,
    verify_remote,
)
from ckptd.cli.doctor import command as doctor
from ckptd.cli.output import Output

app = typer.Typer(
    name="ckptd",
    help="The checkpoint daemon: training writes a checkpoint, a verified, sharded model stands "
    "on the Hub.",
    epilog="Exit codes: 0 done, 1 unexpected, 2 usage, 3 definition or settings, 4 checkpoint "
    "refused, 5 a check failed, 6 Hub, 7 no space, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

GROUPS = (
    serve,
    run,
    plan,
    inspect,
    validate,
    jobs,
    status,
    bench,
    verify_remote,
    doctor,
    hub,
    demonstrate,
    schema,
)
for group in GROUPS:
    group.add_to(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        Output().data(f"ckptd {__version__}")
        raise typer.Exit


@app.callback()
def _ckptd(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


def call(arguments: Sequence[str]) -> int:
    """Do what `arguments` say and return the exit code; errors are told, never raised."""
    before_dashes = arguments[: arguments.index("--")] if "--" in arguments else arguments
    output = Output(as_json="--json" in before_dashes)
    try:
        code = app(list(arguments), prog_name="ckptd", standalone_mode=False)
        if code == failures.EXIT_INTERRUPTED:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - a top boundary
        told = failures.of(_known(error))
        failures.tell(told, output)
        return told.exit_code
    return code if isinstance(code, int) else 0


def main() -> None:
    """Run the command line and end the process."""
    gc.set_threshold(100_000, 50, 1000)  # plans are many small values that all stay: half the time
    code = call(sys.argv[1:])
    if code and _threads_linger():
        # A call to a Hub that does not answer cannot be taken out of its thread.
        os._exit(code)
    sys.exit(code)


def _known(error: BaseException) -> BaseException:
    """Return what the argument parser raises as one of ours."""
    if isinstance(error, typer.Abort):
        return KeyboardInterrupt()
    if not hasattr(error, "format_message"):
        return error
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "ckptd"
    return errors.UsageError(error.format_message(), hint=f"{path} --help")


def _threads_linger() -> bool:
    here = threading.current_thread()
    return any(t is not here and t.is_alive() and not t.daemon for t in threading.enumerate())
