"""Running the Hub: `serve` inside an event loop, `running` beside synchronous code.

uvicorn without its signal handlers, so that an embedding daemon keeps SIGTERM; without lifespan,
access log and logging set-up. The port is bound here, before anything answers, so that the address
is known and a taken port is an error of ours.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import anyio.to_thread
import uvicorn
from anyio.abc import TaskStatus
from anyio.from_thread import start_blocking_portal

from ckptd import errors
from ckptd.hub.local import accounts, origins
from ckptd.hub.local.accounts import Account
from ckptd.hub.local.app import create_app
from ckptd.hub.local.options import Choices
from ckptd.hub.local.store import Store
from ckptd.hub.local.traffic import FaultHook, Ledger, Traffic

LOOPBACK = "127.0.0.1"
STOP_S = 2
"""How long requests may go on after the Hub was told to stop."""


@dataclass(slots=True, kw_only=True)
class Running:
    """A Hub that answers requests. All of it may be used from any thread."""

    url: str
    accounts: Mapping[str, Account]
    """Token -> account."""
    store: Store
    traffic: Traffic

    @property
    def root(self) -> Path:
        """The folder it keeps everything in."""
        return self.store.root

    @property
    def ledger(self) -> Ledger:
        """The requests so far."""
        return self.traffic.ledger

    @property
    def token(self) -> str:
        """A token that may write, the first one there is."""
        return next(token for token, who in self.accounts.items() if who.role != "read")

    @property
    def faults(self) -> FaultHook | None:
        """The function that makes it misbehave, see `traffic`."""
        return self.traffic.faults

    @faults.setter
    def faults(self, hook: FaultHook | None) -> None:
        self.traffic.faults = hook


async def serve(
    *,
    root: Path,
    host: str = LOOPBACK,
    port: int = 0,
    tokens: Mapping[str, Account] | None = None,
    choices: Choices | None = None,
    faults: FaultHook | None = None,
    ready: Callable[[Running], None] | None = None,
    task_status: TaskStatus[Running] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the Hub in `root` until cancelled, then let requests end for `STOP_S` seconds.

    Start it with `running = await task_group.start(functools.partial(serve, root=...))`.

    Raises:
        errors.StorageFailed: the folder cannot be used, or another Hub serves it.
        errors.UsageError: host and port cannot be bound.
    """
    listener = _bind(host, port)
    with contextlib.closing(listener):
        store = await anyio.to_thread.run_sync(Store, root)
        with contextlib.closing(store):
            tokens = accounts.open_accounts(store.root, tokens)
            traffic = create_app(
                store, tokens=tokens, choices=choices, faults=faults, hosts=origins.names_of(host)
            )
            hub = Running(url=_url(listener), accounts=tokens, store=store, traffic=traffic)

            def announce() -> None:
                if ready is not None:
                    ready(hub)
                task_status.started(hub)

            await _run(_Server(traffic, announce), listener)


@contextmanager
def running(
    *,
    root: Path,
    host: str = LOOPBACK,
    port: int = 0,
    tokens: Mapping[str, Account] | None = None,
    choices: Choices | None = None,
    faults: FaultHook | None = None,
) -> Iterator[Running]:
    """Serve the Hub in a thread of its own while the `with` block runs. Raises as `serve`."""

    async def start(*, task_status: TaskStatus[Running] = anyio.TASK_STATUS_IGNORED) -> None:
        await serve(
            root=root,
            host=host,
            port=port,
            tokens=tokens,
            choices=choices,
            faults=faults,
            task_status=task_status,
        )

    with start_blocking_portal() as portal:
        future, value = portal.start_task(start)
        try:
            yield value
        finally:
            future.cancel()


class _Server(uvicorn.Server):
    """uvicorn that leaves the process's signals alone and says when it answers."""

    def __init__(self, app: Traffic, announce: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                date_header=False,
                ws="none",
                timeout_keep_alive=75,
                timeout_graceful_shutdown=STOP_S,
            )
        )
        self._announce = announce
        self.stop = anyio.Event()

    # uvicorn's is a generator made a context manager, and typed as that; any context manager does.
    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """Install nothing."""
        return contextlib.nullcontext()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, then tell."""
        await super().startup(sockets)
        self._announce()

    async def main_loop(self) -> None:
        """Wait for `stop`, in place of looking ten times a second."""
        await self.stop.wait()


async def _run(server: _Server, listener: socket.socket) -> None:
    """Run uvicorn until cancelled; it must see its own way to stop, or it leaks connections."""
    stopped = anyio.Event()

    async def run() -> None:
        with anyio.CancelScope(shield=True):
            await server.serve([listener])
        stopped.set()

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        try:
            await stopped.wait()
        finally:
            server.stop.set()


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as exc:
        listener.close()
        raise errors.UsageError(
            f"cannot listen on {host}:{port}: {exc.strerror}", hint="choose another --port"
        ) from exc
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
