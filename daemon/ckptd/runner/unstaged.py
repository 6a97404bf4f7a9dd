"""Shards that go to the Hub without ever lying on a disk (`staging: none`).

Each is a `ShardFile` over the plan, read by the upload itself: once where hf_xet takes it, twice over
LFS, whose Hub wants the sha256 first. The ledger of the staging folder keeps the sha256 of each shard
that was read through and whether the Hub has it, so that after a kill nothing is computed or sent
again. The small files are staged as ever.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import anyio
from anyio import to_thread

from ckptd.checkpoint import checkpoint
from ckptd.errors import CkptdError, UsageError
from ckptd.pipeline import staged
from ckptd.pipeline.definition import Definition
from ckptd.plan import expression
from ckptd.plan.plan import Plan, Run, ShardPlan
from ckptd.plan.shard_file import Feed, Progress, ShardFile
from ckptd.plan.stream import FinishedShard
from ckptd.runner.output import OutputFile
from ckptd.runner.staging import Sent, Staging
from ckptd.runner.tally import Tally

if TYPE_CHECKING:  # the Hub's client is loaded only by jobs that push
    from ckptd.hub.push import Content

SHARDS_AT_ONCE = 4
"""Shards that are read and sent side by side: one that is hashed leaves the link to the others."""
_PIECE_BYTES = 1 << 20


class Sink(Protocol):
    """Where shards go; `runner.publish.HubPush` is the one on the Hub."""

    async def upload(self, file: OutputFile, content: Content | None = None) -> str | None:
        """Send one file and return its sha256."""


def require_use(definition: Definition, *, output_path: Path | None, push: bool) -> None:
    """Refuse a job that wants files which would never be written.

    Raises:
        UsageError: names what contradicts `staging: none`.
    """
    why = staged.why_needed(definition.push if push else None, definition.stages)
    if output_path is not None:
        why = f"the output folder {output_path} would get none"
    if why is not None:
        raise UsageError(
            f"staging: none writes no weights to disk, but {why}",
            hint="set staging: disk in the definition, or leave that out",
        )


class ShardContent:
    """The bytes of one shard, for `hub.push.LocalFile`; the sha256 is noted as soon as it is known."""

    def __init__(self, shard: ShardPlan, feed: Feed, staging: Staging, known: Sent | None) -> None:
        self.shard = shard
        self.sha256 = None if known is None else known.sha256
        self.failure: Exception | None = None
        self._was_sent = known is not None and known.is_sent
        self._feed = feed
        self._staging = staging
        self._progress = Progress(feed.meter)
        self._stamps = {path: feed.sources.stamp(path) for path in _sources(shard)}
        self._hashing = threading.Lock()

    @property
    def was_read(self) -> bool:
        """Whether it was made here, be it in part; what the Hub has is not."""
        return self._progress.has_begun

    def open(self) -> io.BufferedIOBase:
        """See `Content`."""
        self.failure = None
        return ShardFile(self.shard, self._feed, progress=self._progress, failed=self._failed)

    def digest(self) -> str:
        """See `Content`."""
        with self._hashing:
            if self.sha256 is None:
                value = hashlib.sha256()
                piece = memoryview(bytearray(_PIECE_BYTES))
                with self.open() as file:
                    while got := file.readinto(piece):
                        value.update(piece[:got])
                self.check()
                self.sha256 = value.hexdigest()
                self._staging.note(self.shard.name, Sent(sha256=self.sha256, is_sent=False))
            return self.sha256

    def was_sent(self) -> bool:
        """See `Content`."""
        was_sent, self._was_sent = self._was_sent, False
        return was_sent

    def check(self) -> None:
        """See `Content`."""
        checkpoint.check_unchanged(self._stamps)

    def _failed(self, error: Exception) -> None:
        self.failure = error


class Sending:
    """One job's shards on their way; `feed` is closed by the caller, once the commit is made."""

    def __init__(self, plan: Plan, *, staging: Staging, feed: Feed, tally: Tally) -> None:
        self._plan = plan
        self._staging = staging
        self._feed = feed
        self._tally = tally
        self._room = anyio.Semaphore(SHARDS_AT_ONCE)
        self._done: dict[str, FinishedShard] = {}
        self.reused: set[str] = set()
        """The shards that the Hub had; what is not sent yet counts as such if an attempt sent it."""

    async def run(self, sink: Sink, known: Mapping[str, Sent]) -> tuple[FinishedShard, ...]:
        """Send every shard, and return them in the plan's order; `known` is of earlier attempts.

        Raises:
            ExceptionGroup: of SourceChanged, CheckFailed, HubError and the like.
        """
        self.reused = {name for name, one in known.items() if one.is_sent}
        self._tally.reused(self.reused)
        async with anyio.create_task_group() as group:
            for shard in self._plan.shards:
                await self._room.acquire()
                group.start_soon(self._send, shard, sink, known.get(shard.name))
        await to_thread.run_sync(self._feed.sources.check)
        return tuple(self._done[shard.name] for shard in self._plan.shards)

    async def _send(self, shard: ShardPlan, sink: Sink, known: Sent | None) -> None:
        content = ShardContent(shard, self._feed, self._staging, known)
        path = self._staging.out_path / shard.name  # nothing ever lies there
        file = OutputFile(path=path, name=shard.name, nbytes=shard.nbytes, sha256=content.sha256)
        try:
            sha256 = await sink.upload(file, content)
        except CkptdError as error:
            # Not "the content failed", but why.
            if error.__cause__ is not None and error.__cause__ is content.failure:
                raise content.failure from None
            raise
        finally:
            self._room.release()
        assert sha256 is not None, shard.name  # only small files have to wait for the commit
        if content.was_read is (shard.name in self.reused):
            self.reused ^= {shard.name}
            self._tally.reused(self.reused)
        if known is None or not known.is_sent:
            await to_thread.run_sync(
                self._staging.note, shard.name, Sent(sha256=sha256, is_sent=True)
            )
        made = FinishedShard(name=shard.name, path=path, nbytes=shard.nbytes, sha256=sha256)
        self._done[shard.name] = made
        self._tally.finished(made, reused=not content.was_read)


def _sources(shard: ShardPlan) -> set[Path]:
    """Return the files that a shard is made from."""
    paths: set[Path] = set()
    for part in shard.segments:
        if isinstance(part, Run):
            paths.add(part.source.path)
        else:
            paths |= {reading.path for reading in expression.readings(part.value)}
    return paths
