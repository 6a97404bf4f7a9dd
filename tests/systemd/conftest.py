"""A socket on which a service manager listens, and a daemon that talks to it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest


class Manager:
    """The service manager's end of the notification socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.heard: list[dict[str, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))

    def hear(self, seconds: float = 60.0) -> dict[str, str]:
        """Return the next message, field by field."""
        self._socket.settimeout(seconds)
        message = dict(
            line.split("=", 1) for line in self._socket.recv(65536).decode().splitlines()
        )
        self.heard.append(message)
        return message

    def hear_until(self, field: str, start: str = "") -> dict[str, str]:
        """Return the next message that has `field` with a value that begins with `start`."""
        while True:
            message = self.hear()
            if field in message and message[field].startswith(start):
                return message

    def hear_rest(self) -> list[dict[str, str]]:
        """Return what is left to be heard."""
        rest = []
        try:
            while True:
                rest.append(self.hear(seconds=0.0))
        except BlockingIOError:
            return rest

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    """A service manager's notification socket."""
    found = Manager(tmp_path / "notify.sock")
    yield found
    found.close()


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service manager of the tests themselves is none of theirs."""
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "JOURNAL_STREAM"):
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in os.environ if name.startswith("CKPTD_")]:
        monkeypatch.delenv(name)
