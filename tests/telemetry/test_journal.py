"""Entries of systemd's journal, as the journal takes them."""

from __future__ import annotations

import io
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from ckptd.telemetry import journal, logs


@pytest.fixture
def heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A journal's socket; logging is as it was afterwards."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listening.bind(str(tmp_path / "journal"))
    listening.settimeout(10)
    monkeypatch.setattr(journal.JournalHandler.__init__, "__defaults__", (tmp_path / "journal",))
    root = logging.getLogger()
    before = list(root.handlers), root.level
    yield listening
    for handler in root.handlers:
        handler.close()
    root.handlers[:], root.level = before
    structlog.reset_defaults()
    listening.close()


def _entry(data: bytes) -> dict[str, str]:
    """Read one datagram by the rules of the native protocol."""
    fields = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            size = int.from_bytes(data[:8], "little")
            value, data = data[8 : 8 + size], data[8 + size + 1 :]
        fields[name.decode()] = value.decode()
    return fields


def test_fields(heard: socket.socket) -> None:
    """Job, run and step are fields of their own, beside a message that a person can read."""
    logs.configure(io.StringIO(), output="journal")
    log = structlog.get_logger().bind(job="3f2a", run="llama-sft", step=4000)
    log.warning("job retrying", reason="the Hub\nis away", target=None)
    entry = _entry(heard.recv(65536))
    assert entry.pop("MESSAGE").startswith("job retrying job=3f2a run=llama-sft step=4000 reason=")
    assert entry == {
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "ckptd",
        "CKPTD_JOB": "3f2a",
        "CKPTD_RUN": "llama-sft",
        "CKPTD_STEP": "4000",
        "CKPTD_REASON": "the Hub\nis away",
        "CKPTD_EVENT": "job retrying",
        "CKPTD_LEVEL": "warning",
    }


def test_no_secret(heard: socket.socket) -> None:
    """A token reaches neither message nor field, nor the traceback."""
    logs.configure(io.StringIO(), output="journal")
    secret = "hf_abcdefghijklmnop"
    try:
        raise ValueError(secret)
    except ValueError:
        structlog.get_logger().exception("odd", header=f"Bearer {secret}", why=secret)
    data = heard.recv(65536)
    assert b"ValueError" in data
    assert b"abcdefgh" not in data


def test_long_and_strange_values(heard: socket.socket) -> None:
    """A value is cut where a datagram ends, and bytes that are no text pass."""
    logs.configure(io.StringIO(), output="journal")
    structlog.get_logger().info("x", long="é" * 100_000, bad="\udcff", many="a\n" * 300)
    entry = heard.recv(1 << 20)
    assert len(entry) < 8 * journal.LONGEST_VALUE_BYTES
    assert b"CKPTD_BAD=?\n" in entry
    assert b"CKPTD_MANY\n" + (600).to_bytes(8, "little") + b"a\n" in entry


def test_without_a_journal(heard: socket.socket) -> None:
    """Where nobody listens any more, the message goes to the stream."""
    stream = io.StringIO()
    logs.configure(stream, output="journal")
    heard.close()
    structlog.get_logger().error("job failed", job="3f2a")
    assert stream.getvalue() == "ERROR: job failed job=3f2a\n"


def test_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output that goes to the journal is known by its device and inode."""
    with (tmp_path / "out").open("w") as stream:
        found = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        assert journal.is_stdout(stream)
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino + 1}")
        assert not journal.is_stdout(stream)
    assert not journal.is_stdout(io.StringIO())
