"""`ckptd serve`: the daemon in the foreground, as systemd starts it."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ckptd import errors
from ckptd.aio import groups
from ckptd.cli import arguments, failures
from ckptd.cli.arguments import PipelinesFolder, SettingsFile, StateFolder

if TYPE_CHECKING:
    from ckptd.settings import Settings

PUBLIC_HUB = "https://huggingface.co"
GC_THRESHOLDS = (700, 10, 10)
"""Python's own: what is left in cycles must not pile up in a process that lives for months."""


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Run the daemon in the foreground.",
        epilog=arguments.examples(
            "ckptd serve",
            "ckptd serve --settings /etc/ckptd/ckptd.yaml",
            "ckptd serve --pipelines-dir ./pipelines.d --state-dir ./state",
        ),
    )(serve)


def serve(
    settings: SettingsFile = None,
    state_dir: StateFolder = None,
    pipelines_dir: PipelinesFolder = None,
) -> None:
    """Run the daemon in the foreground until SIGTERM or Ctrl-C; logs go to standard output.

    It watches what the definitions in its pipelines.d folder name. Exit code 78 means that the
    settings or all definitions must be corrected first: starting again cannot help.
    """
    try:
        _serve(arguments.settings(settings, state_dir, pipelines_dir))
    except* (errors.SettingsError, errors.DefinitionError) as caught:
        groups.first(caught, errors.CkptdError).exit_code = failures.EXIT_SETTINGS
        raise


def _serve(settings: Settings) -> None:
    import anyio
    import structlog

    from ckptd import settings as all_settings
    from ckptd.hub import token_places
    from ckptd.service import daemon
    from ckptd.service.notify import Notifier
    from ckptd.telemetry import crashes, logs

    _require_definition(settings.pipelines_dir)
    crashes.contain()
    logs.configure(
        sys.stdout,
        output=settings.log_format,
        level=settings.log_level,
        secrets=token_places.texts(),
    )
    log = structlog.get_logger()
    given = {k: v for k, v in os.environ.items() if k != failures.DEBUG_VARIABLE}
    for warning in all_settings.unknown_variables(given):
        log.warning("variable ignored", why=warning)
    endpoint = settings.hub_endpoint or os.environ.get("HF_ENDPOINT") or PUBLIC_HUB
    log.info(
        "daemon starting",
        state_dir=str(settings.state_dir),
        pipelines_dir=str(settings.pipelines_dir),
        endpoint=endpoint,
    )
    served = daemon.Daemon(settings, endpoint=endpoint, notifier=Notifier())
    gc.freeze()  # modules stay anyway
    gc.set_threshold(*GC_THRESHOLDS)
    anyio.run(daemon.run_until_signal, served)


def _require_definition(folder: Path) -> None:
    """Refuse to start where every definition is broken; one that is good is reason enough.

    Raises:
        DefinitionError: there are definition files, and nothing in them can be used.
    """
    from ckptd.pipeline import definition, shipped

    problems: list[errors.Problem] = []
    for path in sorted(folder.glob("[!.]*")):
        if path.suffix not in shipped.SUFFIXES:
            continue
        try:
            definition.load_definition(path)
        except errors.DefinitionError as error:
            problems.extend(error.problems)
        else:
            return
    if problems:
        raise errors.DefinitionError(problems)
