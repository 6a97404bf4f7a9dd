"""The cap on uploads: arithmetic with a clock of its own, and both ways of sending over a socket."""

from __future__ import annotations

import hashlib
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _xet

from ckptd.hub import session, xet_gate
from ckptd.hub.client import HubClient
from ckptd.hub.pace import PIECE_BYTES, Pace
from ckptd.hub.publisher import Happening, HubEvent, LocalFile, Publisher, Target

LIMIT = 4_000_000
TARGET = Target(repo_id="acme/run", commit_message="run at step 100")


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def now_s(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def paced(bytes_per_s: float | None) -> tuple[Pace, Clock]:
    clock = Clock()
    return Pace(bytes_per_s, now_s=clock.now_s, sleep=clock.sleep), clock


@pytest.mark.parametrize("rate", [1_000, 50_000_000])
def test_bytes_come_at_the_pace(rate: int) -> None:
    """Whatever the chunks, what is sent by any moment is the rate times the time, and one piece."""
    pace, clock = paced(rate)
    sent = 0
    for piece in pace.pieces([bytes(3 * rate), b"", bytes(rate // 7), bytes(rate)]):
        sent += len(piece)
        assert sent <= rate * (clock.now - 100) + min(PIECE_BYTES, rate / 16) + 1
    assert sent == 4 * rate + rate // 7
    assert clock.now - 100 == pytest.approx(sent / rate, abs=0.1)


def test_a_pause_is_not_made_up_for() -> None:
    """After a minute without uploads the next second is as slow as any other."""
    pace, clock = paced(1_000)
    pace.take(1_000)
    clock.now += 60
    began = clock.now
    for _ in range(10):
        pace.take(100)
    assert clock.now - began == pytest.approx(0.9)


def test_no_cap_costs_nothing() -> None:
    """Without a cap chunks pass as they are, and nobody sleeps."""
    pace, clock = paced(None)
    chunk = bytes(10_000_000)
    assert list(pace.pieces([chunk])) == [chunk]
    assert clock.now == 100


@pytest.fixture
def unlimited() -> Iterator[None]:
    """Take the cap away again after the test, and hf_xet's way out with it."""
    before = dict(os.environ)
    yield
    session.limit_uploads(None)
    for name in set(os.environ) - set(before):
        del os.environ[name]
    _xet._GLOBAL_XET_HOLDER._session = None


def shards(folder: Path, count: int, nbytes: int) -> list[LocalFile]:
    made = []
    for number in range(1, count + 1):
        path = folder / f"model-{number:05d}-of-{count:05d}.safetensors"
        content = os.urandom(nbytes)  # hf_xet sends nothing that it has sent before, or can pack
        path.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        made.append(LocalFile(path=path, path_in_repo=path.name, nbytes=nbytes, sha256=digest))
    return made


async def push(hub: Any, files: list[LocalFile]) -> tuple[float, list[HubEvent]]:
    """Return the seconds from the first upload to the last, and what happened."""
    events: list[HubEvent] = []
    limited = HubClient(endpoint=hub.url, token=hub.token, upload_limit=LIMIT)
    publisher = Publisher(target=TARGET, push_id="p", hub=limited, report=events.append)
    await publisher.open()
    began = time.monotonic()
    async with anyio.create_task_group() as group:
        for file in files:
            group.start_soon(publisher.upload, file)
    took_s = time.monotonic() - began
    await publisher.commit(files)
    return took_s, events


@pytest.mark.usefixtures("unlimited")
async def test_shards_in_flight_share_the_cap_over_lfs(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four shards at once take as long as their bytes need under the one cap."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    files = shards(tmp_path, 4, 1_000_000)
    took_s, _ = await push(hub, files)
    puts = hub.ledger.find("PUT")
    assert sum(entry.bytes_in for entry in puts) == 4_000_000
    assert took_s >= 0.95 * 4_000_000 / LIMIT
    assert sum(entry.seconds for entry in puts) > 1.5 * took_s  # several at a time


@pytest.mark.usefixtures("unlimited")
async def test_the_cap_holds_for_xet(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hf_xet's own connections are slowed down to the cap, and every byte arrives."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    _xet._GLOBAL_XET_HOLDER._session = None
    files = shards(tmp_path, 2, 2_000_000)
    took_s, events = await push(hub, files)
    assert [event for event in events if event.happening is Happening.XET_OFF] == []
    xorbs = hub.ledger.find("POST", "/xorbs/")
    assert hub.ledger.find("PUT") == []
    assert sum(entry.bytes_in for entry in xorbs) > 3_900_000
    assert took_s >= 0.95 * 3_900_000 / LIMIT
    assert max(entry.seconds for entry in xorbs) > 0.3  # not in one go at the end


def hello(name: str, session_id: bytes = b"x" * 32) -> bytes:
    """A TLS hello with this server name behind another extension."""
    server_name = struct.pack("!HBH", len(name) + 3, 0, len(name)) + name.encode()
    extensions = struct.pack("!HH", 16, 2) + b"h2"
    extensions += struct.pack("!HH", 0, len(server_name)) + server_name
    body = b"\x03\x03" + bytes(32) + bytes([len(session_id)]) + session_id
    body += struct.pack("!H", 4) + bytes(4) + b"\x01\x00"
    body += struct.pack("!H", len(extensions)) + extensions
    handshake = b"\x01" + len(body).to_bytes(3, "big") + body
    return b"\x16\x03\x01" + struct.pack("!H", len(handshake)) + handshake


@pytest.mark.parametrize(
    ("head", "place"),
    [
        (hello("cas.example"), ("cas.example", 443)),
        (hello("cas.example", b""), ("cas.example", 443)),
        (b"POST /v1 HTTP/1.1\r\nA: b\r\nHost: cas.example\r\n\r\n", ("cas.example", 80)),
        (b"POST /v1 HTTP/1.1\r\nhost:127.0.0.1:81\r\n\r\n", ("127.0.0.1", 81)),
        (b"POST /v1 HTTP/1.1\r\nHost: [::1]:81\r\n\r\n", ("::1", 81)),
    ],
)
def test_a_connection_says_where_it_goes(head: bytes, place: tuple[str, int]) -> None:
    """The name stands in the hello or in the Host header."""
    assert xet_gate.place_of(head) == place


@pytest.mark.parametrize(
    "head", [b"", b"\x16", hello("x")[:60], b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 90]
)
def test_a_connection_that_says_nothing_is_refused(head: bytes) -> None:
    """Cut or foreign beginnings lead nowhere, and break nothing."""
    with pytest.raises(xet_gate.UnknownPlace):
        xet_gate.place_of(head)


def test_a_real_hello_is_understood() -> None:
    """What a TLS library of today sends says the name where we look for it."""
    sent = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(
        ssl.MemoryBIO(), sent, server_hostname="cas.example"
    )
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    assert xet_gate.place_of(sent.read()) == ("cas.example", 443)


def test_tls_goes_through_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As hf_xet would do it without the gate: CONNECT, with the login of the proxy's URL."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        port = proxy.getsockname()[1]
        monkeypatch.setenv("https_proxy", f"http://me:pass@127.0.0.1:{port}")
        monkeypatch.delenv("no_proxy", raising=False)
        got: list[bytes] = []

        def serve() -> None:
            near, _ = proxy.accept()
            with near:
                got.append(xet_gate.read_head(near))
                near.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                got.append(near.recv(5))

        thread = threading.Thread(target=serve)
        thread.start()
        with xet_gate._connect("cas.example", 443, is_tls=True) as far:
            far.sendall(b"hello")
            thread.join(10)
    assert got[0].startswith(b"CONNECT cas.example:443 HTTP/1.1\r\n")
    assert b"Proxy-Authorization: Basic bWU6cGFzcw==" in got[0]
    assert got[1] == b"hello"


def test_only_this_user_may_use_the_way_out() -> None:
    """The folder of the socket is closed to others."""
    gate = xet_gate.Gate(Pace())
    assert gate.path.parent.stat().st_mode & 0o077 == 0
