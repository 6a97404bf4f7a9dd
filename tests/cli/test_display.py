"""What is shown while a job runs."""

from __future__ import annotations

import io

import pytest

from ckptd.cli import display
from ckptd.cli.output import Output
from ckptd.jobs import progress
from ckptd.telemetry.status import Counter, Counters, Phase

WAITING = progress.HubReported(event="waiting", text="no answer; next try in 8s", wait_s=8.0)
MOVED = progress.BytesMoved(
    counters=Counters(
        read=Counter(done_bytes=500_000, total_bytes=1_000_000),
        written=Counter(done_bytes=400_000, total_bytes=1_000_000),
        uploaded=Counter(done_bytes=0, total_bytes=1_000_000),
    )
)


def _output(*, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[Output, io.StringIO]:
    talk = io.StringIO()
    monkeypatch.setattr(talk, "isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "100")
    return Output(data_stream=io.StringIO(), talk_stream=talk), talk


def test_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal there is a plain line for everything worth one."""
    output, talk = _output(terminal=False, monkeypatch=monkeypatch)
    with display.make(output, push=True) as shown:
        shown.report(progress.PhaseChanged(phase=Phase.STREAMING))
        shown.report(MOVED)
        shown.report(
            progress.ShardFinished(
                name="a.safetensors", nbytes=2000, sha256=None, shards_done=1, num_shards=2
            )
        )
        shown.report(WAITING)
        shown.report(progress.Warned(text="odd"))
    assert talk.getvalue().splitlines() == [
        "streaming...",
        "shard 1 of 2: a.safetensors, 2 KB",
        "the Hub: no answer; next try in 8s",
        "warning: odd",
    ]


def test_lines_about_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes get a line when some time has passed; uploads only where something is pushed."""
    output, talk = _output(terminal=False, monkeypatch=monkeypatch)
    monkeypatch.setattr(display, "LINE_EVERY_S", 0.0)
    display.make(output, push=False).report(MOVED)
    assert talk.getvalue() == "500 KB of 1 MB read, 400 KB of 1 MB written\n"


def test_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal there is a bar for each way that bytes go, and a countdown for the Hub."""
    output, talk = _output(terminal=True, monkeypatch=monkeypatch)
    with display.make(output, push=True) as shown:
        shown.identified(1, 10)
        shown.report(progress.PhaseChanged(phase=Phase.PLANNING))
        shown.report(MOVED)
        shown.report(WAITING)
    text = talk.getvalue()
    for word in ("read", "written", "uploaded", "no answer; next try in 8 s"):
        assert word in text
    assert "computed" not in text
