"""`ckptd schema`: the JSON schema of definition files, for editors."""

from __future__ import annotations

import typer

from ckptd.cli.output import Output


def add_to(app: typer.Typer) -> None:
    """Add the command, which the list of commands does not show."""
    app.command(hidden=True)(schema)


def schema() -> None:
    """Print the JSON schema of definition files."""
    from ckptd.pipeline import schema as schemas

    Output().data(schemas.text().rstrip("\n"))
