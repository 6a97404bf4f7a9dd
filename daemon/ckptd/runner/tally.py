"""How far a job is: the counters of one job, turned into reports.

Reports go out when something happens, byte counters a few times a second while they change.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Collection
from typing import TYPE_CHECKING, Any

import anyio

from ckptd.jobs import progress
from ckptd.plan.draft import StageReport
from ckptd.plan.plan import Plan
from ckptd.plan.stream import FinishedShard, Meter
from ckptd.telemetry.status import Counter, Counters, Phase

if TYPE_CHECKING:  # the Hub's client is loaded only by jobs that push
    from ckptd.hub.push import HubEvent

SAMPLE_S = 0.25
"""Seconds between reports of byte counters."""


class Tally:
    """Counts for one job and tells `report`; belongs to the event loop, but for its meter."""

    def __init__(
        self,
        report: Callable[[progress.Report], None],
        *,
        sample_s: float = SAMPLE_S,
        is_staged: bool = True,
    ) -> None:
        self.meter = Meter()
        self._is_staged = is_staged
        self._sample_s = sample_s
        self._report = report
        self._plan: Plan | None = None
        self._todo: Plan | None = None
        self._done: set[str] = set()
        self._uploaded: dict[str, int] = {}
        self._upload_bytes = 0
        self._reused_bytes = 0
        self._told: Counters | None = None
        self._fetched = Counter()

    def enter(self, phase: Phase) -> None:
        """The job is now in `phase`."""
        shards = len(self._plan.shards) if self._plan is not None else 0
        self._report(progress.PhaseChanged(phase=phase, num_shards=shards))

    def fetching(self, done_bytes: int, total_bytes: int) -> None:
        """So much of a base model is here; may be called from any thread."""
        self._fetched = Counter(done_bytes=done_bytes, total_bytes=total_bytes)

    def planned(self, plan: Plan) -> None:
        """What will be done is decided; stage warnings are told."""
        self._plan = self._todo = plan
        small = [
            len(plan.config or b""),
            *map(len, plan.indexes.values()),
            *(f.nbytes for f in plan.side_files),
        ]
        self._upload_bytes = plan.output_bytes + sum(small)
        for stage in plan.reports:
            self.warned(stage)

    def warned(self, stage: StageReport) -> None:
        """A stage has something to say."""
        for warning in stage.warnings:
            self.told(f"{stage.stage}: {warning}")

    def told(self, warning: str) -> None:
        """Somebody should know this, though the job goes on."""
        self._report(progress.Warned(text=warning))

    def reused(self, names: Collection[str]) -> None:
        """These files were finished by an earlier attempt; comes after `planned`."""
        assert self._plan is not None
        left = tuple(shard for shard in self._plan.shards if shard.name not in names)
        self._todo = dataclasses.replace(self._plan, shards=left)
        self._reused_bytes = sum(s.nbytes for s in self._plan.shards if s.name in names)

    def finished(self, shard: FinishedShard, *, reused: bool) -> None:
        """An output file is durable."""
        self._done.add(shard.name)
        self._report(
            progress.ShardFinished(
                name=shard.name,
                nbytes=shard.nbytes,
                sha256=shard.sha256,
                shards_done=len(self._done),
                num_shards=len(self._plan.shards) if self._plan is not None else 0,
                reused=reused,
            )
        )

    def hub(self, event: HubEvent) -> None:
        """Something happened on the way to the Hub."""
        if event.path_in_repo is not None:
            done = event.done_bytes if event.done_bytes is not None else event.nbytes
            self._uploaded[event.path_in_repo] = done or 0
        if event.happening.value == "uploading":
            return
        self._report(
            progress.HubReported(
                event=event.happening.value,
                path_in_repo=event.path_in_repo,
                nbytes=event.nbytes or 0,
                text=event.text or None,
                wait_s=event.wait_s,
            )
        )

    def totals(self) -> dict[str, Any]:
        """Return the byte fields of an `Outcome`."""
        return {
            "read_bytes": self.meter.read_bytes,
            "computed_bytes": self.meter.computed_bytes,
            "written_bytes": self.meter.written_bytes,
            "uploaded_bytes": sum(self._uploaded.values()),
        }

    @contextlib.asynccontextmanager
    async def sampling(self) -> AsyncIterator[None]:
        """Report byte counters while the block runs, and once more at its end."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._sample)
            yield
            group.cancel_scope.cancel()
        self._tell()

    async def _sample(self) -> None:
        while True:
            self._tell()
            await anyio.sleep(self._sample_s)

    def _tell(self) -> None:
        plan, todo, meter, reused = self._plan, self._todo, self.meter, self._reused_bytes
        if plan is None or todo is None:
            if self._fetched.total_bytes:
                self._tell_once(Counters(fetched=self._fetched))
            return
        counters = Counters(
            fetched=self._fetched,
            read=Counter(done_bytes=meter.read_bytes, total_bytes=todo.read_bytes),
            computed=Counter(done_bytes=meter.computed_bytes, total_bytes=todo.computed_bytes),
            written=Counter(done_bytes=meter.written_bytes + reused, total_bytes=plan.output_bytes)
            if self._is_staged
            else Counter(),
            uploaded=Counter(
                done_bytes=sum(self._uploaded.values()), total_bytes=self._upload_bytes
            ),
        )
        self._tell_once(counters)

    def _tell_once(self, counters: Counters) -> None:
        if counters != self._told:
            self._told = counters
            self._report(progress.BytesMoved(counters=counters))
