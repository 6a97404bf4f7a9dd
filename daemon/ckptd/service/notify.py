"""What systemd is told: READY, STATUS, STOPPING. Outside systemd nothing happens.

Source: sd_notify(3); datagrams of `KEY=VALUE` lines to the socket that $NOTIFY_SOCKET names.
"""

from __future__ import annotations

import contextlib
import os
import socket


class Notifier:
    """The notification socket of this process, if it has one."""

    def __init__(self, address: str | None = None) -> None:
        self._address = address if address is not None else os.environ.get("NOTIFY_SOCKET")

    def ready(self) -> None:
        """The daemon is up: what it watches is watched."""
        self._send("READY=1")

    def status(self, line: str) -> None:
        """Show `line` in `systemctl status`."""
        self._send(f"STATUS={line}")

    def stopping(self) -> None:
        """The daemon has begun to stop."""
        self._send("STOPPING=1")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        name = self._address
        address = "\0" + name[1:] if name.startswith("@") else name
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.sendto(message.encode(), address)
