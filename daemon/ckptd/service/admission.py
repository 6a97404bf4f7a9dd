"""Which queued job may begin: caps per repo and per accelerator, and room on the disk.

The rule is pure; a look takes what it needs to know of the node beforehand, so that the store can
ask it for one job after the other within one transaction. A job that may not begin stays queued,
with the reason in its row, and those behind it are asked.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio
from anyio import to_thread

from ckptd import units
from ckptd.jobs.job import ACQUIRABLE, JobSpec, State
from ckptd.jobs.store import Admit, JobStore
from ckptd.pipeline import registry
from ckptd.telemetry import node

UNFINISHED = ACQUIRABLE | {State.RUNNING}
"""States of jobs that count for `max_queued`."""
ROOM_S = 2.0
"""How often it is asked whether the queue has room again."""
PATIENCE_S = 5.0
"""How long a disk may take to say how full it is; nobody waits for one that hangs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    """What jobs may take together."""

    per_repo: int
    per_device: int
    min_free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What is known of the node at one moment."""

    free_bytes: int | None
    """On the disk of the state folder; None where it did not say."""
    accelerators: tuple[str, ...]


def why_not(spec: JobSpec, running: Sequence[JobSpec], caps: Caps, found: Node) -> str | None:
    """Return why `spec` may not begin beside `running`, or None where it may."""
    if found.free_bytes is not None and found.free_bytes < caps.min_free_bytes:
        # No figure of the moment: the row would be written again and again.
        return f"waits for disk space (min_free: {units.format_bytes(caps.min_free_bytes)})"
    repo = repo_of(spec)
    if repo and sum(repo_of(other) == repo for other in running) >= caps.per_repo:
        return f"waits for another job on {repo} (jobs_per_repo: {caps.per_repo})"
    device = device_of(spec, found.accelerators)
    if device is not None:
        busy = sum(device_of(other, found.accelerators) == device for other in running)
        if busy >= caps.per_device:
            return f"waits for another job on {device} (jobs_per_device: {caps.per_device})"
    return None


def repo_of(spec: JobSpec) -> str:
    """Return the repo a job pushes to; empty where it pushes nothing."""
    return spec.target.partition("@")[0]


def device_of(spec: JobSpec, accelerators: Sequence[str]) -> str | None:
    """Return the accelerator a job computes on, or None: it only copies, or computes on the CPU."""
    asked = str(spec.definition.get("device", "auto"))
    if asked == "cpu" or (asked == "auto" and not accelerators) or not _computes(spec):
        return None
    return "cuda:0" if asked in {"auto", "cuda"} else asked


def _computes(spec: JobSpec) -> bool:
    calls = spec.definition.get("stages", ())
    names = {name for call in calls for name in call}
    return any(name in registry.STAGES and registry.STAGES[name].computes for name in names)


class Admission:
    """The rule with the caps of one daemon; safe to ask from several slots."""

    def __init__(
        self,
        caps: Caps,
        *,
        state_path: Path,
        free_bytes: Callable[[Path], int] = node.free_bytes,
    ) -> None:
        self._caps = caps
        self._state_path = state_path
        self._free_bytes = free_bytes
        self._accelerators = node.accelerators()
        self.found = Node(free_bytes=None, accelerators=self._accelerators)
        """What the last look saw."""

    async def look(self) -> Admit:
        """Look at the node and return the rule for this moment."""
        free_bytes = None
        with anyio.move_on_after(PATIENCE_S):
            free_bytes = await to_thread.run_sync(self._free, abandon_on_cancel=True)
        found = Node(free_bytes=free_bytes, accelerators=self._accelerators)
        self.found = found
        return lambda spec, running: why_not(spec, running, self._caps, found)

    def _free(self) -> int | None:
        try:
            return self._free_bytes(self._state_path)
        except OSError:
            return None  # a disk that says nothing keeps nothing: the job meets it and tells


class QueueRoom:
    """Holds checkpoints back while there are jobs enough; used by one task.

    What waits stays pinned as it was seen; what the trainer makes of it meanwhile is judged afterwards.
    """

    def __init__(self, store: JobStore, *, max_queued: int) -> None:
        self._store = store
        self._max_queued = max_queued
        self.is_full = False
        """Whether somebody waits."""

    async def wait(self, tell: Callable[[str], Awaitable[None]]) -> None:
        """Return when there is room; `tell` hears why not, once each time the queue fills."""
        while True:
            counts = await self._store.counts()
            if sum(counts.get(state, 0) for state in UNFINISHED) < self._max_queued:
                self.is_full = False
                return
            if not self.is_full:
                self.is_full = True
                await tell(
                    f"{self._max_queued} jobs are unfinished (max_queued): waits for its own"
                )
            await anyio.sleep(ROOM_S)
