r"""What runner and worker tell each other: one message a line, as JSON.

A line is `{"v": 1, "type": "phase", ...}\n`. Byte counters are totals, not differences, so that a
lost or repeated message does no harm. The runner ends every job with exactly one `Finished` or
`Failed`; a runner that dies without one is a failure that the worker words itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from ckptd.checkpoint.writer import Cache
from ckptd.jobs.failing import Failure
from ckptd.jobs.job import JobSpec, Outcome
from ckptd.telemetry.status import Counters, Phase

VERSION = 1
"""Raised when runner and worker of different versions would misunderstand each other."""
MAX_LINE_BYTES = 16 << 20
"""A longer line is not ours; readers may stop at it."""


# From the worker to the runner ------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Do this job."""

    spec: JobSpec
    work_path: str
    """Staging folder of this job; what an earlier attempt left there is reused."""
    output_path: str | None = None
    """Where the finished folder is to stay, where it is asked for."""
    push: bool = True
    byte_budget: int
    """Most bytes in flight."""
    num_threads: int
    cache: Cache = Cache.DIRECT
    """How files are written."""
    staging: Literal["disk", "none"] = "disk"
    """Where weights lie until the commit, if the definition does not say."""
    endpoint: str | None = None
    upload_limit: int | None = None
    """Most bytes a second that this runner may send."""
    attempt: int = 1
    type: Literal["start"] = "start"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Stop the job that runs; answered by its `Failed` or, if it was faster, `Finished`."""

    reason: str
    type: Literal["cancel"] = "cancel"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quit:
    """Exit when idle."""

    type: Literal["quit"] = "quit"


# From the runner to the worker ------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The runner has started and takes a job."""

    pid: int
    version: str
    device: str | None = None
    type: Literal["ready"] = "ready"


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseChanged:
    """The job is now in `phase`."""

    phase: Phase
    num_shards: int = 0
    note: str | None = None
    type: Literal["phase"] = "phase"


@dataclass(frozen=True, slots=True, kw_only=True)
class BytesMoved:
    """How far the job is, in totals."""

    counters: Counters
    type: Literal["bytes"] = "bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFinished:
    """One weight file carries its final name and is durable."""

    name: str
    nbytes: int
    sha256: str | None
    shards_done: int
    num_shards: int
    reused: bool = False
    """It was finished by an earlier attempt."""
    type: Literal["shard"] = "shard"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubReported:
    """Something happened on the way to the Hub."""

    event: str
    """`uploaded`, `waiting`, `rebased`..."""
    path_in_repo: str | None = None
    nbytes: int = 0
    text: str | None = None
    wait_s: float | None = None
    type: Literal["hub"] = "hub"


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned:
    """The job goes on, but somebody should know."""

    text: str
    details: dict[str, Any] = field(default_factory=dict)
    type: Literal["warning"] = "warning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The job has done its work."""

    outcome: Outcome
    type: Literal["finished"] = "finished"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The job has failed; what it finished stays in its staging folder."""

    failure: Failure
    type: Literal["failed"] = "failed"


Command = Start | Cancel | Quit
Report = (
    Ready | PhaseChanged | BytesMoved | ShardFinished | HubReported | Warned | Finished | Failed
)

_MESSAGE: TypeAdapter[Command | Report] = TypeAdapter(
    Annotated[Command | Report, Field(discriminator="type")]
)


def encode(message: Command | Report) -> bytes:
    """Return `message` as one line, with its newline."""
    body = _MESSAGE.dump_python(message, mode="json")
    return json.dumps({"v": VERSION, **body}, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes | str) -> Command | Report:
    """Return the message that `encode` wrote.

    Raises:
        ValueError: not a message, or of another version.
    """
    try:
        body = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise ValueError(f"not a message: {_short(line)}") from exc
    if not isinstance(body, dict) or body.pop("v", None) != VERSION:
        raise ValueError(f"not a message of version {VERSION}: {_short(line)}")
    try:
        return _MESSAGE.validate_python(body)
    except ValidationError as exc:
        raise ValueError(f"not a message: {exc.errors()[0]['msg']}: {_short(line)}") from exc


def _short(line: bytes | str) -> str:
    return repr(line if len(line) <= 200 else line[:200])
