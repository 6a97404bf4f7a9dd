"""What is going on right now, as frozen values: for the command line, the web page and systemd.

The daemon makes a new `DaemonStatus` whenever it is asked; nobody holds a reference into its state.
`to_json` and `from_json` carry it to other processes. Times are wall-clock seconds since the epoch.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from pydantic import TypeAdapter

from ckptd import units

FORMAT = 1
"""Raised when a field changes its meaning; readers refuse what they do not know."""


class Phase(enum.Enum):
    """What a runner is doing with its job."""

    STARTING = "starting"
    PLANNING = "planning"
    """Reading headers and configs; no tensor byte yet."""
    FETCHING = "fetching the base model"
    """Downloading what an adapter is merged into."""
    CHECKING = "checking"
    """Everything about the Hub that can be checked before the first upload."""
    STREAMING = "streaming"
    """Reading, computing, writing and uploading, all at once."""
    UPLOADING = "uploading"
    """All is written; what is left goes to the Hub."""
    COMMITTING = "committing"
    VERIFYING = "verifying"
    FINISHING = "finishing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counter:
    """Bytes done of bytes planned; the plan may be 0 where there is nothing to do."""

    done_bytes: int = 0
    total_bytes: int = 0

    @property
    def share(self) -> float:
        """Done over total, from 0 to 1."""
        return min(1.0, self.done_bytes / self.total_bytes) if self.total_bytes else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """The ways bytes go through a job; `fetched` are those of a base model."""

    read: Counter = Counter()
    computed: Counter = Counter()
    written: Counter = Counter()
    uploaded: Counter = Counter()
    fetched: Counter = Counter()


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """One job that runs."""

    job_id: str
    pipeline: str
    run: str
    name: str
    step: int | None
    target: str
    attempt: int
    worker: str
    phase: Phase
    started_at: float
    counters: Counters = Counters()
    num_shards: int = 0
    shards_done: int = 0
    note: str | None = None
    """The last thing worth knowing: `waiting 20 s for the Hub`, counted down."""
    resumes_at: float | None = None
    """When a wait for the Hub is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchStatus:
    """One watched place."""

    pipeline: str
    pattern: str
    mode: str
    """`events`, or `polling (why)`."""
    num_candidates: int
    num_settling: int
    last_scan_at: float | None
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PinStatus:
    """What the pins of all definitions hold."""

    num_pins: int = 0
    held_bytes: int = 0
    """Bytes on disk that would be free without them: what the trainer still has costs nothing."""
    limit_bytes: int
    max_age_s: float
    """How long a failed or held job keeps its pin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DefinitionStatus:
    """One definition file: loaded, or broken with the last good one still in use."""

    path: str
    pipeline: str | None
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitStatus:
    """One limit of the settings, and how much of it is used where that can be said."""

    name: str
    """The setting's name."""
    value: str
    now: str | None = None
    reached: bool = False
    """Work waits because of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonStatus:
    """The daemon at one moment."""

    version: str
    pid: int
    state: str
    """`starting`, `running` or `stopping`."""
    started_at: float
    at: float
    endpoint: str
    slots: int
    jobs: tuple[JobStatus, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    """Jobs by state name."""
    watches: tuple[WatchStatus, ...] = ()
    definitions: tuple[DefinitionStatus, ...] = ()
    pins: PinStatus | None = None
    limits: tuple[LimitStatus, ...] = ()
    format: int = FORMAT

    @property
    def line(self) -> str:
        """The status in one line, for systemd's STATUS."""
        if self.state != "running":
            return self.state
        waiting = sum(self.counts.get(name, 0) for name in ("queued", "retrying", "waiting"))
        text = f"{len(self.watches)} watched, {len(self.jobs)} running, {waiting} waiting"
        if reached := [limit for limit in self.limits if limit.reached]:
            text += "; held back by " + ", ".join(
                f"{limit.name} {limit.value} ({limit.now})" for limit in reached
            )
        for job in self.jobs[:1]:
            written = job.counters.written
            text += f"; {job.run}/{job.name}: {job.phase.value}"
            if written.total_bytes:
                done, total = map(units.format_bytes, (written.done_bytes, written.total_bytes))
                text += f", {done} of {total} written"
            if job.note:
                text += f"; {job.note}"
        return text

    def to_json(self) -> str:
        """Return this status as one line of JSON."""
        return _DAEMON.dump_json(self).decode()

    @staticmethod
    def from_json(text: str | bytes) -> DaemonStatus:
        """Return the status that `to_json` wrote.

        Raises:
            ValueError: not the JSON of a status, or of another format.
        """
        status = _DAEMON.validate_json(text)
        if status.format != FORMAT:
            raise ValueError(f"status of format {status.format}, this ckptd reads {FORMAT}")
        return status


_DAEMON = TypeAdapter(DaemonStatus)
