"""Log records as entries of systemd's journal: a message, and every field under its own name.

`journalctl -u ckptd CKPTD_JOB=3f2a...` finds all that happened to one job; run, step and the others
are fields of the same kind. What is written is what the secret filter has left. Where a journal
listens is in $JOURNAL_STREAM: standard output goes there, and so do entries.

Source: systemd's "Native Journal Protocol"; systemd.journal-fields(7).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

SOCKET_PATH = Path("/run/systemd/journal/socket")
IDENTIFIER = "ckptd"
LONGEST_VALUE_BYTES = 16_384
"""More of one field is cut off: an entry is one datagram."""

_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
_DROPPED = frozenset({"timestamp"})
"""The journal has a clock of its own."""
_NOT_A_NAME = re.compile(r"[^A-Z0-9]+")


def is_stdout(stream: TextIO) -> bool:
    """Say whether `stream` goes to the journal already ($JOURNAL_STREAM: device and inode)."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return (device, inode) == (str(found.st_dev), str(found.st_ino))


def render(_logger: object, _method: str, event: Mapping[str, Any]) -> str:
    """Return one entry as text that `JournalHandler` turns into bytes: a structlog renderer."""
    fields = dict(event)
    lines = {
        "MESSAGE": _message(fields),
        "PRIORITY": str(_PRIORITIES.get(str(fields.get("level")), 6)),
        "SYSLOG_IDENTIFIER": IDENTIFIER,
    }
    for name, value in fields.items():
        if name not in _DROPPED and value is not None:
            lines[f"CKPTD_{_NOT_A_NAME.sub('_', name.upper()).strip('_')}"] = str(value)
    entry = b"".join(_field(name, value) for name, value in lines.items())
    return entry.decode("utf-8", "surrogateescape")


class JournalHandler(logging.Handler):
    """Sends entries to the journal; where it does not listen, they go to `stream`."""

    def __init__(self, stream: TextIO, socket_path: Path = SOCKET_PATH) -> None:
        super().__init__()
        self._stream = stream
        self._path = socket_path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        try:
            entry = self.format(record)
        except Exception:  # noqa: BLE001 (logging's own rule: a record that fails ends nothing)
            self.handleError(record)
            return
        try:
            self._socket.sendto(entry.encode("utf-8", "surrogateescape"), str(self._path))
        except OSError:
            with contextlib.suppress(OSError):
                self._stream.write(f"{record.levelname}: {_printable(entry)}\n")
                self._stream.flush()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
        super().close()


def _message(fields: Mapping[str, Any]) -> str:
    """Return the fixed phrase with what tells one record from another, as one line."""
    hidden = {"event", "level", "exception", *_DROPPED}
    told = " ".join(f"{k}={v}" for k, v in fields.items() if k not in hidden and v is not None)
    text = f"{fields.get('event', '')} {told}".strip()
    return text + (f"\n{fields['exception']}" if fields.get("exception") else "")


def _field(name: str, value: str) -> bytes:
    """Return one field: `NAME=value`, or with its length where the value has several lines."""
    data = value.encode("utf-8", "replace")[:LONGEST_VALUE_BYTES]
    if b"\n" not in data:
        return name.encode() + b"=" + data + b"\n"
    return name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"


def _printable(entry: str) -> str:
    return entry.partition("\n")[0].removeprefix("MESSAGE=")
