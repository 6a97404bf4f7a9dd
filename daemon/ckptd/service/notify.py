"""What systemd is told: READY, STATUS, WATCHDOG, RELOADING, EXTEND_TIMEOUT, STOPPING.

Outside systemd nothing happens. Nothing is waited for: a service manager that does not read its
socket must not hold up the daemon, and a lost line of status is no loss.

Source: sd_notify(3), sd_watchdog_enabled(3); datagrams of `KEY=VALUE` lines to the socket that
$NOTIFY_SOCKET names.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time


class Notifier:
    """The notification socket of this process, if it has one.

    Args:
        address: the socket; None takes $NOTIFY_SOCKET, an empty one is nobody.
        watchdog_s: how long systemd waits for a sign of life; None takes $WATCHDOG_USEC where
            it is meant for this process.
    """

    def __init__(self, address: str | None = None, *, watchdog_s: float | None = None) -> None:
        self._address = address if address is not None else os.environ.get("NOTIFY_SOCKET")
        self.watchdog_s = watchdog_s if watchdog_s is not None else _watchdog_s()
        """Seconds until systemd takes this process for dead; None where it does not watch."""

    def ready(self) -> None:
        """The daemon is up, or has reloaded: what is defined is watched."""
        self._send("READY=1")

    def reloading(self) -> None:
        """Definitions are being read again; `ready` ends it."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def status(self, line: str) -> None:
        """Show `line` in `systemctl status`."""
        self._send("STATUS=" + " ".join(line.split()))

    def watchdog(self) -> None:
        """Work progresses."""
        self._send("WATCHDOG=1")

    def extend(self, seconds: float) -> None:
        """Starting or stopping takes at least `seconds` more."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def stopping(self) -> None:
        """The daemon has begun to stop."""
        self._send("STOPPING=1")

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        name = self._address
        address = "\0" + name[1:] if name.startswith("@") else name
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.setblocking(False)
            out.sendto("\n".join(lines).encode(), address)


def _watchdog_s() -> float | None:
    """Return systemd's watchdog period; a variable meant for another process is not ours."""
    text, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not text.isdecimal() or int(text) == 0 or pid not in {"", str(os.getpid())}:
        return None
    return int(text) / 1e6
