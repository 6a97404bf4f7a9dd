"""`ckptd validate`: is a definition right, and if not, everything that is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ckptd import errors
from ckptd.cli import arguments, failures
from ckptd.cli.arguments import Json
from ckptd.cli.output import Output


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Check pipeline definitions.",
        epilog=arguments.examples(
            "ckptd validate publish.yaml",
            "ckptd validate /etc/ckptd/pipelines.d",
        ),
    )(validate)


def validate(
    pipelines: Annotated[
        list[str],
        typer.Argument(
            metavar="PIPELINE...", help="Definition files, folders of them, or names that ship."
        ),
    ],
    as_json: Json = False,
) -> None:
    """Check definitions; say each problem as path:line:column: field: what is wrong."""
    from ckptd.pipeline import shipped

    output = Output(as_json=as_json)
    paths = [path for text in pipelines for path in _files(text, shipped.SUFFIXES) or [_one(text)]]
    answers = [_check(path) for path in paths]
    problems = [problem for answer in answers for problem in answer["problems"]]
    if as_json:
        value: dict[str, Any] = {"files": answers}
        if problems:
            value["error"] = failures.of(errors.DefinitionError(problems)).as_value()
        output.value(value)
    else:
        for answer in answers:
            for problem in answer["problems"]:
                output.data(str(problem))
            if answer["ok"]:
                stages = ", ".join(answer["stages"])
                output.data(f"{answer['path']}: OK: {answer['pipeline']} ({stages})")
    if problems:
        raise typer.Exit(errors.DefinitionError.exit_code)


def _files(text: str, suffixes: frozenset[str]) -> list[Path]:
    """Return the definition files in a folder; none if `text` names no folder."""
    folder = Path(text)
    if not folder.is_dir():
        return []
    found = sorted(path for path in folder.iterdir() if path.suffix in suffixes)
    if not found:
        raise errors.UsageError(f"{text}: a folder without definition files (*.yaml, *.yml)")
    return found


def _one(text: str) -> Path:
    from ckptd.pipeline import shipped

    return shipped.definition_path(text)


def _check(path: Path) -> dict[str, Any]:
    from ckptd.pipeline import definition

    try:
        found = definition.load_definition(path)
    except errors.DefinitionError as error:
        return {"path": str(path), "ok": False, "problems": list(error.problems)}
    return {
        "path": str(path),
        "ok": True,
        "problems": [],
        "pipeline": found.pipeline,
        "stages": [call.name for call in found.stages],
    }
