"""`ckptd run`: one job, now, in this process; the daemon is not needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ckptd import errors, units
from ckptd.cli import arguments
from ckptd.cli.arguments import (
    Assets,
    CheckpointFolder,
    Json,
    LayoutName,
    Pipeline,
    RunName,
    Sets,
    SettingsFile,
)
from ckptd.cli.output import Output

if TYPE_CHECKING:
    from ckptd.cli.foreground import Request
    from ckptd.jobs.job import Outcome


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Take one checkpoint through a pipeline, now.",
        epilog=arguments.examples(
            "ckptd run ./model -p reshard -o ./out --set reshard.max_shard_size=2GB",
            "ckptd run /runs/llama-sft/checkpoint-500 -p publish.yaml",
            "ckptd run /runs/llama-sft/checkpoint-500 -p publish.yaml --no-push -o ./look",
        ),
    )(run)


def run(
    checkpoint: CheckpointFolder,
    pipeline: Pipeline,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder that gets the finished model."),
    ] = None,
    sets: Sets = None,
    no_push: Annotated[bool, typer.Option("--no-push", help="Publish nothing; needs -o.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is in the output folder.")
    ] = False,
    assets: Assets = None,
    run_name: RunName = None,
    layout: LayoutName = "auto",
    hub_patience: Annotated[
        str,
        typer.Option(
            metavar="DURATION", help="How long a Hub that fails is tried again: 60s, 10m."
        ),
    ] = "60s",
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """Take one checkpoint through a pipeline now, with progress; the daemon is not needed.

    A run that was killed goes on where it stopped when the same command is given again.
    """
    from ckptd.cli import display, foreground

    out = Output(as_json=as_json)
    wanted = arguments.definition(pipeline, sets, assets)
    path = arguments.absolute(checkpoint)
    request = foreground.Request(
        checkpoint_path=path,
        definition=wanted,
        run=run_name or path.parent.name,
        layout=layout,
        output_path=None if output is None else arguments.absolute(output),
        overwrite=overwrite,
        push=wanted.push is not None and not no_push,
        patience_s=_seconds(hub_patience),
        settings=arguments.settings(settings),
    )
    _require_use(request, pipeline)
    with display.make(out, push=request.push) as shown:
        outcome = foreground.execute(request, shown, tell=out.talk)
    _tell(outcome, request, out)
    if request.push and outcome.commit is None:
        raise typer.Exit(errors.CheckFailed.exit_code)


def _require_use(request: Request, pipeline: str) -> None:
    """Refuse a job whose result would go nowhere.

    Raises:
        UsageError: neither an output folder nor a push.
    """
    if request.output_path is None and not request.push:
        why = "--no-push" if request.definition.push is not None else f"{pipeline} pushes nothing"
        raise errors.UsageError(
            f"nothing would be left of this run: {why}, and no output folder is named",
            hint="name a folder with -o",
        )


def _tell(outcome: Outcome, request: Request, out: Output) -> None:
    if out.as_json:
        out.value(outcome)
        return
    from ckptd.cli.jobs import outcome_fields

    held = request.push and outcome.commit is None
    note = outcome.reason if held or outcome.commit is not None else None
    out.fields({"state": "held" if held else "done", "note": note} | outcome_fields(outcome))


def _seconds(text: str) -> float:
    try:
        return units.parse_duration(text)
    except ValueError as error:
        raise errors.UsageError(f"--hub-patience: {error}") from error
