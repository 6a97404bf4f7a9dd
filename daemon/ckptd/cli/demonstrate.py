"""`ckptd demo`: the command; `cli.demo` is what it does."""

from __future__ import annotations

from typing import Annotated

import typer

from ckptd.cli import arguments
from ckptd.cli.arguments import Json
from ckptd.cli.output import Output


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        name="demo",
        short_help="Show everything at once, on this machine alone.",
        epilog=arguments.examples("ckptd demo", "ckptd demo --keep"),
    )(_demo)


def _demo(
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave Hub and daemon running until Ctrl-C.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show everything at once: a loopback Hub, the daemon, a real tiny training run."""
    from ckptd.cli import demo

    demo.demo(Output(as_json=as_json), keep=keep)
