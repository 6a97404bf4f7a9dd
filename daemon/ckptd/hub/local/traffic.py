"""The outermost layer: request ids, the ledger of requests, injected faults, last-resort errors.

A test (or a person) reads what really went over the wire from the `Ledger`, and makes the Hub
misbehave through one function, asked before each request:

    hub.faults = lambda request: Response(status_code=503) if request.method == "PUT" else None

It returns None (serve the request), a `Response` (give that answer instead, without doing the
work), a `Fault` or a `Slow`. It runs on the server's event loop and must not block.

It is also where a Hub on loopback refuses what only a browser would send: a page of another origin
that posts to it, or one that made its own name point here (DNS rebinding).
"""

from __future__ import annotations

import contextlib
import enum
import threading
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import anyio
import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ckptd.hub.local import origins

MOST_ENTRIES = 10_000
_log = structlog.get_logger(__name__)


class Fault(enum.Enum):
    """Ways to fail that no answer can express."""

    DROP = "drop"
    """Close the connection without doing the work."""
    LOSE_ANSWER = "lose answer"
    """Do the work, then close the connection in place of the answer."""
    STALL = "stall"
    """Read nothing, answer nothing, until the client gives up or the Hub stops."""
    BREAK_BODY = "break body"
    """Read the first piece of the body, then close the connection."""
    STALL_BODY = "stall body"
    """Read the first piece of the body, then no more until the Hub stops; the work is not done."""
    CUT_ANSWER = "cut answer"
    """Do the work, send half of the answer, then close the connection."""
    STALL_ANSWER = "stall answer"
    """Do the work, send half of the answer, then nothing more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slow:
    """Do the work, but pause before each piece of the body and of the answer."""

    pause: Callable[[], Awaitable[None]]
    piece_bytes: int = 64 * 1024
    """Of the answer; the body comes in the pieces of the server."""


FaultHook = Callable[[Request], "Response | Fault | Slow | None"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One request as it went over the wire."""

    method: str
    path: str
    """As sent, still percent-encoded, without the query."""
    query: str
    status: int
    """What was sent, or would have been for a lost answer; 0 where there was none."""
    bytes_in: int
    bytes_out: int
    seconds: float


@dataclass(slots=True)
class Ledger:
    """The last requests, oldest first. Safe to read from any thread."""

    _entries: deque[Entry] = field(default_factory=lambda: deque(maxlen=MOST_ENTRIES))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, entry: Entry) -> None:
        """Note a finished request."""
        with self._lock:
            self._entries.append(entry)

    def clear(self) -> None:
        """Forget everything so far."""
        with self._lock:
            self._entries.clear()

    def find(self, method: str | None = None, contains: str = "") -> list[Entry]:
        """Return the requests of a method whose path contains a text."""
        return [e for e in self if method in (None, e.method) and contains in e.path]

    @property
    def bytes_in(self) -> int:
        """Sum of all request bodies."""
        return sum(entry.bytes_in for entry in self)

    def __iter__(self) -> Iterator[Entry]:
        with self._lock:
            return iter(list(self._entries))

    def __len__(self) -> int:
        return len(self._entries)


class Traffic:
    """An ASGI layer around the whole app.

    Args:
        app: what serves the requests.
        ledger: gets an entry for each.
        faults: asked before each; None where nothing shall fail. May be replaced at any time.
        hosts: names under which it may be spoken to, see `origins`; None for any.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        ledger: Ledger,
        faults: FaultHook | None = None,
        hosts: Collection[str] | None = None,
    ) -> None:
        self._app = app
        self.ledger = ledger
        self.faults = faults
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        # Routing must see percent-encoded slashes: a revision like refs/pr/1 is one segment.
        raw = scope.get("raw_path") or scope["path"].encode()
        scope = {**scope, "path": raw.decode("ascii", "replace")}
        started = time.monotonic()

        def note(exchange: _Exchange) -> None:
            self.ledger.add(
                Entry(
                    method=scope["method"],
                    path=scope["path"],
                    query=scope["query_string"].decode("ascii", "replace"),
                    status=exchange.status,
                    bytes_in=exchange.bytes_in,
                    bytes_out=exchange.bytes_out,
                    seconds=time.monotonic() - started,
                )
            )

        exchange = _Exchange(receive, send, note)
        try:
            request = Request(scope)
            foreign = origins.refusal_of(request.headers, self.hosts)
            if foreign is not None:
                await self._serve(scope, exchange, _failure(403, foreign), send)
                return
            fault = self.faults(request) if self.faults is not None else None
            await self._serve(scope, exchange, fault, send)
        finally:
            exchange.finish()

    async def _serve(
        self, scope: Scope, exchange: _Exchange, fault: Response | Fault | Slow | None, send: Send
    ) -> None:
        match fault:
            case Fault.BREAK_BODY:
                await exchange.receive()
                await _drop(exchange, send)
            case Fault.STALL_BODY:
                await exchange.receive()
                await anyio.sleep_forever()  # a closed connection shows only to who reads
            case Fault.CUT_ANSWER | Fault.STALL_ANSWER:
                exchange.halve = True
                await self._answer(scope, exchange)
                if fault is Fault.CUT_ANSWER:
                    await _drop(exchange, send)
                await _gone(exchange)
            case Slow():
                exchange.slow = fault
                await self._answer(scope, exchange)
            case Fault.DROP:
                await _drop(exchange, send)
            case Fault.STALL:
                await _gone(exchange)
            case Fault.LOSE_ANSWER:
                exchange.mute = True
                await self._answer(scope, exchange)
                await _drop(exchange, send)
            case Response():
                await exchange.drain()
                await fault(scope, exchange.receive, exchange.send)
            case None:
                await self._answer(scope, exchange)

    async def _answer(self, scope: Scope, exchange: _Exchange) -> None:
        """Run the app; what it could not foresee becomes a readable 500 or 507."""
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            return
        except OSError as exc:
            _log.error("hub storage failed", path=scope["path"], error=str(exc))
            answer = _failure(507, f"The Hub's storage failed: {exc.strerror or exc}")
        except Exception as exc:  # noqa: BLE001 - a top boundary: one request must not end the Hub
            _log.error("hub request failed", path=scope["path"], exc_info=exc)
            answer = _failure(500, "Internal error")
        else:
            return
        if not exchange.status:
            await answer(scope, exchange.receive, exchange.send)


class _Exchange:
    """Receive and send of one request, counted.

    `note` is called once, before the last byte leaves: who has an answer finds it in the ledger.
    """

    def __init__(self, receive: Receive, send: Send, note: Callable[[_Exchange], None]) -> None:
        self._note: Callable[[_Exchange], None] | None = note
        self._receive = receive
        self._send = send
        self._id = uuid.uuid4().hex
        self._read = False
        self.status = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.mute = False
        self.halve = False
        self.slow: Slow | None = None

    async def receive(self) -> Message:
        if self.slow is not None and not self._read:
            await self.slow.pause()
        message = await self._receive()
        self.bytes_in += len(message.get("body", b""))
        self._read = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", []), (b"x-request-id", self._id.encode())]
            message = {**message, "headers": headers}
        self.bytes_out += len(message.get("body", b""))
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.finish()
        body = message.get("body", b"")
        if self.halve and body:
            self.halve, self.mute = False, True
            await self._send({**message, "body": body[: len(body) // 2], "more_body": True})
        elif self.slow is not None and body:
            await self._send_slowly(self.slow, message)
        elif not self.mute:
            await self._send(message)

    async def _send_slowly(self, slow: Slow, message: Message) -> None:
        body = message["body"]
        for at in range(0, len(body), slow.piece_bytes):
            await slow.pause()
            piece = body[at : at + slow.piece_bytes]
            more = at + len(piece) < len(body) or message.get("more_body", False)
            await self._send({**message, "body": piece, "more_body": more})

    def finish(self) -> None:
        """Note the request, the first time."""
        note, self._note = self._note, None
        if note is not None:
            note(self)

    async def drain(self) -> None:
        """Read and forget the rest of the body, so that the client gets to read the answer."""
        while not self._read:
            await self.receive()


async def _drop(exchange: _Exchange, send: Send) -> None:
    """Close the connection without a word."""
    cycle: Any = getattr(send, "__self__", None)
    transport = getattr(cycle, "transport", None)
    if transport is None:
        raise RuntimeError("this server gives no way to drop a connection")
    transport.abort()
    await _gone(exchange)


async def _gone(exchange: _Exchange) -> None:
    """Wait until the client is gone."""
    with contextlib.suppress(anyio.EndOfStream):
        while (await exchange.receive())["type"] != "http.disconnect":
            pass


def _failure(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status, {"X-Error-Message": message})
