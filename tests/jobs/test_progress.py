"""The messages between runner and worker."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import Retry
from ckptd.jobs import progress
from ckptd.jobs.failing import Failure
from ckptd.jobs.job import JobSpec, Outcome, State
from ckptd.telemetry.status import Counter, Counters, Phase

MESSAGES = [
    progress.Start(
        spec=JobSpec(
            job_id="a",
            definition={"stages": [{"tie": {"force": False}}]},
            pipeline="p",
            source_path="/s",
            pinned_path="/p",
            layout="hf",
            run="r",
            name="n",
            step=None,
            content_digest="c",
            pipeline_digest="d",
            target="a/b@main",
            created_at=1.5,
        ),
        work_path="/w",
        byte_budget=1,
        num_threads=2,
    ),
    progress.Cancel(reason="asked"),
    progress.Quit(),
    progress.Ready(pid=1, version="0.1.0"),
    progress.PhaseChanged(phase=Phase.STREAMING, num_shards=3),
    progress.BytesMoved(counters=Counters(read=Counter(done_bytes=1, total_bytes=2))),
    progress.ShardFinished(name="m", nbytes=1, sha256=None, shards_done=1, num_shards=2),
    progress.HubReported(event="waiting", wait_s=2.0, text="HTTP 503\nnext line"),
    progress.Warned(text="tied differently", details={"tensor": "lm_head.weight"}),
    progress.Finished(outcome=Outcome(state=State.PUBLISHED, reports={"tie": {"tied": True}})),
    progress.Failed(failure=Failure(code="NoSpace", message="full", retry=Retry.LATER)),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.type)
def test_messages_survive_the_line(message: progress.Command | progress.Report) -> None:
    """Every message is one line, and arrives equal."""
    line = progress.encode(message)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert progress.decode(line) == message


def test_every_message_type_is_tested() -> None:
    """A new message type cannot be forgotten in the list above."""
    known = set(progress.Command.__args__) | set(progress.Report.__args__)
    assert {type(message) for message in MESSAGES} == known


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"torch says hello\n",
        b"[]",
        b'{"type": "quit"}',
        b'{"v": 2, "type": "quit"}',
        b'{"v": 1, "type": "unheard"}',
        b'{"v": 1, "type": "phase", "phase": "sleeping"}',
        b"[" * 100_000,
    ],
)
def test_other_lines_are_refused(line: bytes) -> None:
    """What a library prints, or another version says, raises ValueError and nothing else."""
    with pytest.raises(ValueError, match="not a message"):
        progress.decode(line)


@given(st.binary(max_size=100))
def test_any_line_is_read_or_refused(line: bytes) -> None:
    """No bytes make the reader fail in another way."""
    with pytest.raises(ValueError):
        progress.decode(line)


def test_unknown_fields_are_passed_over() -> None:
    """A field that a later release adds does not break an older reader."""
    body = json.loads(progress.encode(progress.Quit()))
    assert progress.decode(json.dumps({**body, "later": 1})) == progress.Quit()
