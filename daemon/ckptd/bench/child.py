"""One job in a process of its own: `python -m ckptd.bench.child`, a request on standard input.

The answer, one JSON value on standard output, is the job's outcome and how many bytes each lane had
done when. Peak memory and start-up are then this job's alone.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from pathlib import Path

import anyio
from pydantic import TypeAdapter

from ckptd.checkpoint.writer import Cache
from ckptd.jobs import progress
from ckptd.jobs.job import Outcome
from ckptd.pipeline import definition as definitions
from ckptd.runner import job
from ckptd.telemetry.status import Counters

SAMPLE_S = 0.02
DIGEST = f"sha256:{0:064}"
"""What stands for the digest of the checkpoint, which is not what is measured."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The job to do."""

    checkpoint_path: Path
    definition: str
    """The text of a definition."""
    output_path: Path
    work_path: Path
    byte_budget: int
    threads: int
    cache: Cache
    endpoint: str | None
    push: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Bytes done by each lane, `at_s` seconds after the job began."""

    at_s: float
    read: int
    computed: int
    written: int
    uploaded: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the job did."""

    outcome: Outcome
    samples: tuple[Sample, ...]


def main() -> None:
    """Read the request, do the job and print the answer."""
    request = TypeAdapter(Request).validate_json(sys.stdin.read())
    samples: list[Sample] = []
    began = time.monotonic()

    def report(message: progress.Report) -> None:
        if isinstance(message, progress.BytesMoved):
            samples.append(_sample(message.counters, time.monotonic() - began))

    outcome = anyio.run(functools.partial(job.execute, _work(request), report=report))
    answer = Answer(outcome=outcome, samples=tuple(samples))
    sys.stdout.write(TypeAdapter(Answer).dump_json(answer).decode())


def _work(request: Request) -> job.Work:
    definition = definitions.parse_definition(request.definition, "bench.yaml")
    return job.Work(
        checkpoint_path=request.checkpoint_path,
        name=request.checkpoint_path.name,
        run="bench",
        layout="auto",
        definition=definition,
        content_digest=DIGEST if request.push else None,
        fingerprint=None,
        pipeline_digest=definitions.pipeline_digest(definition),
        work_path=request.work_path,
        output_path=request.output_path,
        push=request.push,
        endpoint=request.endpoint,
        within=Path("/"),
        byte_budget=request.byte_budget,
        num_threads=request.threads,
        cache=request.cache,
        sample_s=SAMPLE_S,
    )


def _sample(counters: Counters, at_s: float) -> Sample:
    return Sample(
        at_s=at_s,
        read=counters.read.done_bytes,
        computed=counters.computed.done_bytes,
        written=counters.written.done_bytes,
        uploaded=counters.uploaded.done_bytes,
    )


if __name__ == "__main__":
    main()
