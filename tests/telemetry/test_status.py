"""Status values."""

from __future__ import annotations

import dataclasses

import pytest

from ckptd.telemetry import status


def snapshot() -> status.DaemonStatus:
    job = status.JobStatus(
        job_id="abc",
        pipeline="publish",
        run="sft",
        name="checkpoint-20",
        step=20,
        target="acme/sft@main",
        attempt=1,
        worker="w1",
        phase=status.Phase.STREAMING,
        started_at=100.0,
        counters=status.Counters(
            written=status.Counter(done_bytes=1_000_000_000, total_bytes=4_000_000_000)
        ),
    )
    return status.DaemonStatus(
        version="0.1.0",
        pid=1,
        state="running",
        started_at=1.0,
        at=2.0,
        endpoint="https://huggingface.co",
        slots=1,
        jobs=(job,),
        counts={"queued": 2, "published": 5, "retrying": 1},
        definitions=(status.DefinitionStatus(path="/p.yaml", pipeline="publish"),),
    )


def test_status_survives_json() -> None:
    """A status read by another process is equal to what the daemon made."""
    assert status.DaemonStatus.from_json(snapshot().to_json()) == snapshot()


def test_status_of_another_format_is_refused() -> None:
    """A reader never guesses what a later daemon means."""
    later = dataclasses.replace(snapshot(), format=2)
    with pytest.raises(ValueError, match="format 2"):
        status.DaemonStatus.from_json(later.to_json())


def test_one_line_says_what_goes_on() -> None:
    """systemd shows what is watched, running and waiting, and how far the first job is."""
    assert snapshot().line == (
        "0 watched, 1 running, 3 waiting; sft/checkpoint-20: streaming, 1 GB of 4 GB written"
    )


def test_share_is_between_nothing_and_all() -> None:
    """A progress bar never overflows and never divides by nothing."""
    assert status.Counter().share == 0.0
    assert status.Counter(done_bytes=3, total_bytes=2).share == 1.0
