"""The way of hf_xet's connections out of this process while there is a cap on uploads.

hf_xet sends its bytes itself, in native code, and knows no cap. But it can send everything through
a Unix socket; here is the other end of that. Each connection is relayed byte for byte, TLS
included, to where it was going anyway: the host is in the clear at its beginning (the Host header,
or the server name of the TLS hello). What goes up waits for the pace; what comes down does not.

The socket lies in a folder that only this user may enter. TLS goes through the proxy of the
environment where there is one, as it would without the gate.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import re
import shutil
import socket
import struct
import tempfile
import threading
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ckptd.hub.pace import Pace

VARIABLE = "HF_XET_CLIENT_UNIX_SOCKET_PATH"
CONNECT_S = 30.0
ANSWER_S = 60.0
LONGEST_HEAD_BYTES = 64 * 1024
HTTP_PORT, HTTPS_PORT = 80, 443
_READ_BYTES = 256 * 1024
_TLS_HANDSHAKE = b"\x16"
_SERVER_NAME = 0
_HOST = re.compile(rb"\r\nhost:[ \t]*([^\r\n]+?)[ \t]*\r\n", re.IGNORECASE)


class UnknownPlace(Exception):
    """The beginning of a connection does not say where it goes."""


class Gate:
    """A listening socket at `path`; lives as long as the process.

    `ports` has the ports of TLS hosts that are not at 443: the hello does not name them.
    """

    def __init__(self, pace: Pace) -> None:
        self.ports: dict[str, int] = {}
        self._pace = pace
        folder = tempfile.mkdtemp(prefix="ckptd-xet-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        self.path = Path(folder, "out")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.path))
        self._listener.listen(64)
        threading.Thread(target=self._accept, name="xet-gate", daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            threading.Thread(target=self._relay, args=(near,), daemon=True).start()

    def _relay(self, near: socket.socket) -> None:
        """Carry one connection; whatever breaks it is seen by hf_xet as a broken connection."""
        with near, contextlib.suppress(OSError, UnknownPlace):
            head = read_head(near)
            host, port = place_of(head)
            is_tls = head.startswith(_TLS_HANDSHAKE)
            with _connect(host, self.ports.get(host, port), is_tls=is_tls) as far:
                down = threading.Thread(target=_pump, args=(far, near), daemon=True)
                down.start()
                for piece in self._pace.pieces([head]):
                    far.sendall(piece)
                _pump(near, far, self._pace)
                down.join(ANSWER_S)  # hf_xet is done with it; a server that hangs is not waited for
                far.shutdown(socket.SHUT_RDWR)


def read_head(near: socket.socket) -> bytes:
    """Return the beginning of a connection: HTTP headers, or the first TLS record."""
    head = bytearray()
    while len(head) < LONGEST_HEAD_BYTES:
        if head.startswith(_TLS_HANDSHAKE):
            if len(head) >= 5 and len(head) >= 5 + int.from_bytes(head[3:5], "big"):
                break
        elif b"\r\n\r\n" in head:
            break
        chunk = near.recv(4096)
        if not chunk:
            break
        head += chunk
    return bytes(head)


def place_of(head: bytes) -> tuple[str, int]:
    """Return host and port from the beginning of a connection.

    Raises:
        UnknownPlace: it is neither HTTP/1 with a Host header nor a TLS hello with a server name.
    """
    if head.startswith(_TLS_HANDSHAKE):
        return _server_name(head), HTTPS_PORT
    found = _HOST.search(head)
    parts = urlsplit("//" + found[1].decode("ascii", "replace")) if found is not None else None
    if parts is None or not parts.hostname:
        raise UnknownPlace
    return parts.hostname, parts.port or HTTP_PORT


def _server_name(record: bytes) -> str:
    """Return the name in a TLS ClientHello (RFC 8446, 4.1.2; RFC 6066, 3)."""
    try:
        at = 5 + 4 + 2 + 32  # record and handshake headers, version, random
        at += 1 + record[at]  # session id
        at += 2 + struct.unpack_from("!H", record, at)[0]  # cipher suites
        at += 1 + record[at]  # compression
        at += 2  # length of all extensions
        while at + 4 <= len(record):
            kind, length = struct.unpack_from("!HH", record, at)
            at += 4
            if kind == _SERVER_NAME:
                (name_length,) = struct.unpack_from("!H", record, at + 3)
                return record[at + 5 : at + 5 + name_length].decode("ascii")
            at += length
    except (IndexError, struct.error, UnicodeDecodeError):
        pass
    raise UnknownPlace


def _connect(host: str, port: int, *, is_tls: bool) -> socket.socket:
    """Return a connection to a host, through the environment's proxy where TLS goes there."""
    proxy = urllib.request.getproxies().get("https") if is_tls else None
    if not proxy or urllib.request.proxy_bypass(host):
        far = socket.create_connection((host, port), CONNECT_S)
        far.settimeout(None)
        return far
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    far = socket.create_connection((parts.hostname or "", parts.port or HTTP_PORT), CONNECT_S)
    request = f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n"
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        request += f"Proxy-Authorization: Basic {base64.b64encode(login).decode()}\r\n"
    far.sendall(f"{request}\r\n".encode())
    answer = b""
    while b"\r\n\r\n" not in answer and (byte := far.recv(1)):
        answer += byte
    if answer.split(b" ", 2)[1:2] != [b"200"]:
        far.close()
        raise ConnectionRefusedError
    far.settimeout(None)
    return far


def _pump(source: socket.socket, sink: socket.socket, pace: Pace | None = None) -> None:
    """Carry bytes one way until they end, or the other side is gone; then both are told so."""
    try:
        while chunk := source.recv(pace.piece_bytes if pace is not None else _READ_BYTES):
            if pace is not None:
                pace.take(len(chunk))
            sink.sendall(chunk)
    except OSError:
        with contextlib.suppress(OSError):
            source.shutdown(socket.SHUT_RD)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
