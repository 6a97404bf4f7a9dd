"""`ckptd hub serve`: the loopback Hub, for trying things out and for machines without network."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ckptd.cli import arguments
from ckptd.cli.arguments import Json
from ckptd.cli.output import Output

if TYPE_CHECKING:
    from anyio import CancelScope

    from ckptd.hub.local.server import Running

DEFAULT_PORT = 8765


def add_to(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(
        help="A Hub of your own, on loopback.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    group.command(
        epilog=arguments.examples("ckptd hub serve", "ckptd hub serve --root /tmp/hub --port 0")
    )(serve)
    app.add_typer(group, name="hub")


def serve(
    root: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where it keeps everything. Default: in the state folder."
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")
    ] = DEFAULT_PORT,
    as_json: Json = False,
) -> None:
    """Serve a Hub on loopback until Ctrl-C; prints its URL, a token and how to use them."""
    import anyio

    from ckptd import settings
    from ckptd.hub.local import server
    from ckptd.telemetry import logs

    output = Output(as_json=as_json)
    logs.configure(output.talk_stream, level="warning")
    root_path = arguments.absolute(root or settings.default_state_path() / "hub")

    async def serve_until_signal() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(_stop_on_signal, group.cancel_scope)
            await server.serve(
                root=root_path, port=port, ready=lambda running: _announce(running, output)
            )

    anyio.run(serve_until_signal)


async def _stop_on_signal(everything: CancelScope) -> None:
    import anyio

    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            everything.cancel()
            return


def _announce(running: Running, output: Output) -> None:
    variables = {"HF_ENDPOINT": running.url, "HF_TOKEN": running.token}
    if output.as_json:
        output.value(
            {
                "url": running.url,
                "token": running.token,
                "root": running.root,
                "environment": variables,
            }
        )
        return
    output.fields({"url": running.url, "token": running.token, "root": running.root})
    output.data()
    for name, value in variables.items():
        output.data(f"export {name}={value}")
    output.talk("\nuse these lines in another shell; Ctrl-C stops the Hub, its content stays")
