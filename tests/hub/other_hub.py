"""Another Hub's manners on a real socket: a server that hands requests on to ours and words the answers.

Whatever is done to an answer happens here, byte by byte, so that nothing of our own server's
manners (header case, lengths, absolute links) is taken for granted by the client.
"""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

ELSEWHERE = "/elsewhere"
"""Where redirects lead: the same things, one folder down."""
_PER_HOP = {"connection", "content-length", "transfer-encoding", "date", "server", "keep-alive"}


@dataclass(frozen=True)
class Answer:
    """What goes back, and how."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    chunked: bool = False
    piece_bytes: int = 1 << 16
    """Bytes that go out at a time."""

    def says(self, value: Any) -> Answer:
        """Return this answer with another JSON value in it."""
        kept = [(k, v) for k, v in self.headers if k.lower() != "content-type"]
        return replace(
            self,
            headers=[*kept, ("content-type", "application/json")],
            body=json.dumps(value).encode(),
        )

    def page(self, status: int | None = None) -> Answer:
        """Return a web page in place of this answer."""
        text = "<!DOCTYPE html><html><body><h1>Something</h1></body></html>"
        return Answer(status or self.status, [("content-type", "text/html")], text.encode())


Reword = Callable[[str, str, Answer], Answer]
"""Is told method, path with query, and our Hub's answer; returns what is sent."""


def same(method: str, path: str, answer: Answer) -> Answer:
    """Say it as our Hub does."""
    return answer


def to(
    method: str, part: str, change: Callable[[Answer], Answer], *, times: int = 1 << 30
) -> Reword:
    """Return a rewording of the next `times` good answers to requests that match."""
    left = [times]

    def reword(asked: str, path: str, answer: Answer) -> Answer:
        if asked != method or not re.search(part, path) or answer.status >= 400 or not left[0]:
            return answer
        left[0] -= 1
        return change(answer)

    return reword


@dataclass(frozen=True)
class Redirect:
    """Requests that are sent elsewhere, and how."""

    method: str
    part: str
    status: int
    to: str = ELSEWHERE
    """What comes before the path; empty for no Location at all."""
    reads_body: bool = True


@dataclass
class OtherHub:
    """A running one."""

    port: int
    upstream: str
    reword: Reword = same
    redirect: Redirect | None = None
    seen: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    """Method, path and headers (lower case) of each request."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def count(self, method: str, part: str) -> int:
        return sum(1 for asked, path, _ in self.seen if asked == method and re.search(part, path))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 0
    other: OtherHub

    def _serve(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.other.seen.append((self.command, self.path, headers))
        redirect = self.other.redirect
        if (
            redirect is not None
            and redirect.method == self.command
            and re.search(redirect.part, self.path)
            and not self.path.startswith(ELSEWHERE)
        ):
            self._send_away(redirect, headers)
            return
        path = self.path.removeprefix(ELSEWHERE)
        answer = self._forward(path, headers, self._body(headers))
        self._send(self.other.reword(self.command, path, answer))

    def _send_away(self, redirect: Redirect, headers: dict[str, str]) -> None:
        if redirect.reads_body:
            self._body(headers)
        where = [("Location", redirect.to + self.path)] if redirect.to else []
        self._send(Answer(redirect.status, where, b""))
        if not redirect.reads_body:
            self._body(headers)
            self.close_connection = True

    def _body(self, headers: dict[str, str]) -> bytes:
        if "chunked" not in headers.get("transfer-encoding", ""):
            return self.rfile.read(int(headers.get("content-length", 0)))
        body = b""
        while length := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _forward(self, path: str, headers: dict[str, str], body: bytes) -> Answer:
        sent = {name: text for name, text in headers.items() if name not in _PER_HOP}
        sent["accept-encoding"] = "identity"
        ours = http.client.HTTPConnection(urlsplit(self.other.upstream).netloc, timeout=30)
        with contextlib.closing(ours):
            ours.request(self.command, path, body=body or None, headers=sent)
            got = ours.getresponse()
            kept = [(k, v) for k, v in got.getheaders() if k.lower() not in _PER_HOP]
            return Answer(got.status, kept, got.read())

    def _send(self, answer: Answer) -> None:
        lines = [f"HTTP/1.1 {answer.status} whatever"]
        lines += [f"{name}: {value}" for name, value in answer.headers]
        if answer.chunked:
            lines.append("Transfer-Encoding: chunked")
        elif answer.status != 204:
            lines.append(f"Content-Length: {len(answer.body)}")
        self.wfile.write("\r\n".join([*lines, "", ""]).encode())
        if self.command == "HEAD" or answer.status == 204:
            return
        for at in range(0, len(answer.body), answer.piece_bytes):
            piece = answer.body[at : at + answer.piece_bytes]
            if answer.chunked:
                piece = b"%x\r\n%b\r\n" % (len(piece), piece)
            self.wfile.write(piece)
        if answer.chunked:
            self.wfile.write(b"0\r\n\r\n")

    def __getattr__(self, name: str) -> Any:
        """Serve whatever method it is: the base class asks for `do_GET` and so on."""
        if name.startswith("do_"):
            return self._serve
        raise AttributeError(name)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error."""


@contextlib.contextmanager
def running(upstream: str) -> Iterator[OtherHub]:
    """Run one before the Hub at `upstream`."""
    handler = type("Handler", (_Handler,), {})
    with _Server(("127.0.0.1", 0), handler) as server:
        server.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        handler.other = OtherHub(port=server.server_address[1], upstream=upstream)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield handler.other
        finally:
            server.shutdown()
            thread.join()


def zipped(answer: Answer) -> Answer:
    """Return the answer packed with gzip."""
    return replace(
        answer,
        headers=[*answer.headers, ("Content-Encoding", "gzip")],
        body=gzip.compress(answer.body),
    )


def shouted(answer: Answer) -> Answer:
    """Return the answer with its headers in capitals."""
    return replace(answer, headers=[(name.upper(), value) for name, value in answer.headers])


def whispered(answer: Answer) -> Answer:
    """Return the answer with its headers in small letters."""
    return replace(answer, headers=[(name.lower(), value) for name, value in answer.headers])
