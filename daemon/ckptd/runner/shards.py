"""How a job's weight files come about: by way of the disk, or on their way to the Hub.

Either way they are made from the same plan and are the same bytes; what differs is where they lie
until the commit. The sources stay open until then, for what has to be sent again.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import anyio
from anyio import from_thread, to_thread
from anyio.abc import TaskGroup
from anyio.lowlevel import current_token

from ckptd.aio.budget import ByteBudget
from ckptd.checkpoint.header import FileStamp
from ckptd.plan.plan import Plan
from ckptd.plan.shard_file import Feed
from ckptd.plan.sources import Sources
from ckptd.plan.stream import Evaluator, FinishedShard, Stream
from ckptd.runner import output
from ckptd.runner.evaluator import ImportedMeanwhile
from ckptd.runner.staging import Staging
from ckptd.runner.tally import Tally
from ckptd.runner.unstaged import Sending, Sink

if TYPE_CHECKING:
    from ckptd.runner.job import Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """All weight files of a job, in the plan's order; `num_reused` are of earlier attempts."""

    files: tuple[FinishedShard, ...]
    num_reused: int


class Maker(Protocol):
    """Makes the weight files of one job."""

    async def make(self, uploads: TaskGroup) -> Shards:
        """Return them when all are made; what is still to be sent then is so in `uploads`.

        Raises:
            ExceptionGroup: of SourceChanged, CheckFailed, NoSpace, HubError and the like.
        """


@contextlib.asynccontextmanager
async def maker(
    work: Work,
    plan: Plan,
    stamps: Mapping[Path, FileStamp],
    *,
    staging: Staging,
    push: Sink | None,
    tally: Tally,
) -> AsyncIterator[Maker]:
    """Yield what makes the shards of `plan`; they can be sent again until the block is left."""
    with Sources(stamps, cache=work.cache) as sources:
        evaluator = _evaluator(work, plan, sources, tally)
        if work.staging == "disk":
            stream = Stream(
                plan,
                staging.out_path,
                sources=sources,
                evaluator=evaluator,
                budget=ByteBudget(work.byte_budget),
                threads=work.num_threads,
                hashing=push is not None,
                cache=work.cache,
                meter=tally.meter,
            )
            yield _Staged(plan, stream, staging=staging, push=push, tally=tally)
            return
        assert push is not None  # `unstaged.require_use`, and a held job has ended before
        feed = Feed(
            sources=sources,
            evaluator=evaluator,
            byte_budget=work.byte_budget,
            threads=work.num_threads,
            meter=tally.meter,
        )
        try:
            yield _Unstaged(plan, feed, staging=staging, push=push, tally=tally)
        finally:
            # Threads of abandoned requests may still read: not from descriptors that are closed.
            with anyio.CancelScope(shield=True):
                await to_thread.run_sync(feed.close)


class _Staged:
    """Writes shards into the staging folder, and sends each as soon as it is durable."""

    def __init__(
        self, plan: Plan, stream: Stream, *, staging: Staging, push: Sink | None, tally: Tally
    ) -> None:
        self._plan = plan
        self._stream = stream
        self._staging = staging
        self._push = push
        self._tally = tally

    async def make(self, uploads: TaskGroup) -> Shards:
        """See `Maker`."""
        staging, push, tally = self._staging, self._push, self._tally
        finished = await to_thread.run_sync(
            lambda: staging.resume(self._plan, hashed=push is not None)
        )
        tally.reused(finished)

        async def on_shard(shard: FinishedShard) -> None:
            if shard.name not in finished:
                await to_thread.run_sync(staging.record, shard)
            tally.finished(shard, reused=shard.name in finished)
            if push is not None:
                uploads.start_soon(push.upload, output.of_shard(shard))

        files = await self._stream.run(
            finished=finished, on_shard=on_shard, on_synced=staging.announce
        )
        return Shards(files=files, num_reused=len(finished))


class _Unstaged:
    """Sends shards that are made while they are read."""

    def __init__(
        self, plan: Plan, feed: Feed, *, staging: Staging, push: Sink, tally: Tally
    ) -> None:
        self._plan = plan
        self._feed = feed
        self._staging = staging
        self._push = push
        self._tally = tally

    async def make(self, uploads: TaskGroup) -> Shards:
        """See `Maker`; nothing is left for `uploads`."""
        known = await to_thread.run_sync(lambda: self._staging.recall(self._plan))
        sending = Sending(self._plan, staging=self._staging, feed=self._feed, tally=self._tally)
        files = await sending.run(self._push, known)
        return Shards(files=files, num_reused=len(sending.reused))


def _evaluator(work: Work, plan: Plan, sources: Sources, tally: Tally) -> Evaluator | None:
    """Return what computes the plan's values; None where there are none."""
    if not plan.needs_torch:
        return None
    token = current_token()  # blocks are computed in threads that no event loop knows of
    return ImportedMeanwhile(
        device=work.definition.device,
        num_threads=work.num_threads if plan.grows_rows else 1,
        sources=sources,
        warn=lambda text: from_thread.run_sync(tally.told, text, token=token),
    )
