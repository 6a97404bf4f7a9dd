"""The work of one job: open, plan, stream, publish.

Nothing here knows the daemon: `ckptd run` and the runner process call the same function. Uploads
start as soon as a file is durable, while later ones are still being made; the one commit comes when
all are. The staging folder survives a failure, so that the next attempt goes on where this one
stopped, and is the caller's to remove.
"""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import anyio
from anyio import from_thread, to_thread

from ckptd.aio.backoff import Backoff
from ckptd.checkpoint import checkpoint, content, listing, whole
from ckptd.checkpoint.checkpoint import Checkpoint
from ckptd.checkpoint.writer import Cache
from ckptd.errors import SourceChanged
from ckptd.jobs import progress
from ckptd.jobs.job import Outcome, State
from ckptd.pipeline import bases, compose, definition, origins
from ckptd.pipeline.definition import Definition
from ckptd.pipeline.stage import Base
from ckptd.plan.plan import Plan
from ckptd.runner import around, memory, output, shards, unstaged
from ckptd.runner.card import Card
from ckptd.runner.output import OutputFile
from ckptd.runner.shards import Maker
from ckptd.runner.staging import Staging
from ckptd.runner.tally import SAMPLE_S, Tally
from ckptd.telemetry.status import Phase

if TYPE_CHECKING:  # the Hub's client is loaded only by jobs that push
    from ckptd.hub.push import Content

Report = Callable[[progress.Report], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one job needs to know.

    `checkpoint_path` is what is read (a pin, or the folder itself), `name` what the trainer called
    it, `run` the run it belongs to. `content_digest` is None where nothing is pushed, and holds
    while the folder's files have the `fingerprint`. `within` as in `open_checkpoint`. `byte_budget` bounds what computed blocks may hold in memory at once.
    """

    checkpoint_path: Path
    name: str
    run: str
    layout: str
    definition: Definition
    content_digest: str | None
    fingerprint: str | None
    pipeline_digest: str
    work_path: Path
    output_path: Path | None
    push: bool
    endpoint: str | None
    within: Path | None
    byte_budget: int
    num_threads: int
    cache: Cache = Cache.DIRECT
    staging: Literal["disk", "none"] = "disk"
    """Whether weights are written before they are sent (see `runner.unstaged`)."""
    sample_s: float = SAMPLE_S
    """Seconds between reports of byte counters."""
    source_path: Path | None = None
    """The trainer's own place of what is read; None where that is the same."""
    base_place: str | None = None
    """What an adapter is merged into, where that was settled with the digest, which covers it."""
    base_digest: str | None = None
    base_fingerprint: str | None = None
    is_digest_durable: bool = True
    """False where the machine was started anew since `content_digest` was taken: it is taken again."""
    hub_patience: Backoff | None = None
    """How long a Hub that fails is tried again within the job; None for the publisher's default."""
    upload_limit: int | None = None
    """Most bytes a second that the push may send; None for no limit."""


class Push(Protocol):
    """Where the output is published; `runner.publish` has the one on the Hub."""

    async def open(self) -> None:
        """Check everything that can be checked before the first upload."""

    async def upload(self, file: OutputFile, content: Content | None = None) -> str | None:
        """Send one finished file; may be called concurrently and again."""

    async def commit(
        self, files: tuple[OutputFile, ...], *, card_section: str | None = None
    ) -> dict[str, Any]:
        """Publish exactly these files; return the fields of an `Outcome`."""


async def execute(work: Work, *, report: Report) -> Outcome:
    """Do the whole job and return how it ended: published, or held with the reason.

    Raises:
        CheckpointRefused: the checkpoint, or a stage's view of it.
        UsageError: nothing is to be staged, and something needs the files.
        CheckFailed: a check of the definition.
        SourceChanged, NoSpace, StorageFailed, HubError: as named; often in an ExceptionGroup.
    """
    began = time.monotonic()
    if work.staging == "none":
        unstaged.require_use(work.definition, output_path=work.output_path, push=work.push)
    tally = Tally(report, sample_s=work.sample_s, is_staged=work.staging == "disk")
    tally.enter(Phase.PLANNING)
    source = await to_thread.run_sync(lambda: open_source(work))
    place = await to_thread.run_sync(
        lambda: around.locate_base(work, source), abandon_on_cancel=True
    )
    base = await around.base_at(work, place, tally)
    origin = origins.of(source, beside=around.beside(work), place=place)
    if not work.is_digest_durable:
        await to_thread.run_sync(lambda: check_digest(work, source, from_thread.check_cancelled))
    plan = await to_thread.run_sync(
        lambda: compose.decided(
            source, work.definition.stages, base=base, check=from_thread.check_cancelled
        )
    )
    tally.planned(plan)
    if plan.hold_push is not None and work.staging == "none":
        reason = f"{plan.hold_push}; nothing was made, for staging: none keeps no output"
        return _outcome(plan, tally, began, state=State.HELD, reason=reason)
    wanted = None if plan.hold_push is not None else await around.push_of(work, source, origin)
    written = await around.card_of(work, source, plan, origin, base=base, push=wanted)
    push = None if wanted is None else await _push(work, wanted, written, tally)
    if push is not None:
        tally.enter(Phase.CHECKING)
        await push.open()
    staging = Staging(work.work_path, check=from_thread.check_cancelled)
    stamps = {**source.stamps, **({} if base is None else base.source.stamps)}
    async with (
        tally.sampling(),
        shards.maker(work, plan, stamps, staging=staging, push=push, tally=tally) as maker,
    ):
        made = await _produce(work, source, base, plan, staging, push, written, tally, maker)
        plan = made.plan
        published: dict[str, Any] = {}
        if plan.hold_push is not None:
            push = None
        if push is not None:
            tally.enter(Phase.COMMITTING)
            published = await push.commit(made.files, card_section=made.card_section)
    tally.enter(Phase.FINISHING)
    kept_path = await to_thread.run_sync(lambda: output.keep(staging, work.output_path))
    where = None if push is not None and work.output_path is None else str(kept_path)
    published = published or {"reason": _why_held(work, plan)}
    return _outcome(
        plan,
        tally,
        began,
        made=made,
        state=State.PUBLISHED if push is not None else State.HELD,
        output_path=where,
        **published,
    )


def open_source(work: Work) -> Checkpoint:
    """Return the opened checkpoint of `work`; reads headers and JSON only.

    Raises:
        CheckpointRefused: see `checkpoint.open_checkpoint`.
        SourceChanged: the folder is not what was identified when the job was made.
    """
    if work.fingerprint is not None:
        found = listing.list_files(work.checkpoint_path)
        if found.fingerprint_id != work.fingerprint:
            raise SourceChanged(
                path=work.checkpoint_path,
                expected="the files that were identified",
                found=whole.since_noted(work.checkpoint_path, found),
            )
    return checkpoint.open_checkpoint(
        work.checkpoint_path,
        layout=work.layout,
        assets=work.definition.assets,
        name=work.name,
        folder=work.source_path,
        within=work.within,
    )


def check_digest(work: Work, source: Checkpoint, check: Callable[[], None] = lambda: None) -> None:
    """Verify that `source` still is what was identified when the job was made; reads all of it.

    Raises:
        SourceChanged: a crash of the machine, say, took some of what was hashed then.
    """
    found = content.digest(checkpoint.identifying_files(source), check=check)
    if work.base_digest is not None:
        found = bases.together(found, work.base_digest)
    if found != work.content_digest:
        raise SourceChanged(
            path=work.checkpoint_path, expected=str(work.content_digest)[:19], found=found[:19]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """The finished output; `plan` with what was found in it."""

    files: tuple[OutputFile, ...]
    num_reused: int
    plan: Plan
    card_section: str | None


async def _produce(
    work: Work,
    source: Checkpoint,
    base: Base | None,
    plan: Plan,
    staging: Staging,
    push: Push | None,
    card: Card,
    tally: Tally,
    maker: Maker,
) -> _Made:
    """Make every output file, uploading each as soon as it is made."""
    tally.enter(Phase.STREAMING)
    async with anyio.create_task_group() as uploads:
        made = await maker.make(uploads)
        small = await to_thread.run_sync(
            lambda: output.write_side_files(staging.out_path, plan=plan, card=card.written)
        )
        plan, card_section = await _verified(work, source, plan, staging, tally)
        provenance = await to_thread.run_sync(
            lambda: output.write_provenance(
                staging.out_path,
                source=source,
                plan=plan,
                shards=made.files,
                side_files=small,
                provenance=output.Provenance(
                    run=work.run,
                    content_digest=work.content_digest,
                    pipeline=work.definition.pipeline,
                    pipeline_digest=work.pipeline_digest,
                    base=None if base is None else {"name": base.name, "digest": base.digest},
                ),
            )
        )
        small = (*small, provenance)
        if push is not None and plan.hold_push is None:
            tally.enter(Phase.UPLOADING)
            for file in small:
                uploads.start_soon(push.upload, file)
    files = (*(output.of_shard(shard) for shard in made.files), *small)
    return _Made(files=files, num_reused=made.num_reused, plan=plan, card_section=card_section)


async def _verified(
    work: Work, source: Checkpoint, plan: Plan, staging: Staging, tally: Tally
) -> tuple[Plan, str | None]:
    """Return the plan with the verdict on its output, and what the model card says of it.

    Raises:
        CheckFailed: something is wrong, and the definition says that the job fails then.
    """
    wanted = plan.verification
    if wanted is None:
        return plan, None
    tally.enter(Phase.VERIFYING)
    verification = await to_thread.run_sync(importlib.import_module, "ckptd.runner.verification")
    verdict = await to_thread.run_sync(
        lambda: verification.verify(
            staging.out_path,
            wanted,
            source_path=source.path,
            device=work.definition.device,
            check=from_thread.check_cancelled,
        )
    )
    tally.warned(verdict.report)
    hold = plan.hold_push
    if verdict.problems and wanted.on_failure == "hold_push":
        hold = f"verify: {verdict.report.summary}"
    reports = tuple(verdict.report if r.stage == "verify" else r for r in plan.reports)
    return dataclasses.replace(plan, reports=reports, hold_push=hold), verdict.card_section


async def _push(work: Work, wanted: definition.Push, card: Card, tally: Tally) -> Push:
    publish: Any = await to_thread.run_sync(importlib.import_module, "ckptd.runner.publish")
    made: Push = publish.HubPush(
        push=wanted,
        content_digest=work.content_digest,
        pipeline_digest=work.pipeline_digest,
        endpoint=work.endpoint,
        upload_limit=work.upload_limit,
        patience=work.hub_patience,
        library=card.library,
        card_facts=card.facts,
        report=tally.hub,
    )
    return made


def _outcome(
    plan: Plan, tally: Tally, began: float, *, made: _Made | None = None, **fields: Any
) -> Outcome:
    """Return how a job ended, with what was counted; `made` is None where nothing was."""
    return Outcome(
        **fields,
        num_shards=len(plan.shards),
        num_files=0 if made is None else len(made.files),
        **tally.totals(),
        peak_bytes=memory.used_peak_bytes(),
        duration_s=time.monotonic() - began,
        reports={
            report.stage: {"summary": report.summary, "warnings": list(report.warnings)}
            | dict(report.facts)
            for report in plan.reports
        }
        | {"job": {"reused_shards": 0 if made is None else made.num_reused}},
    )


def _why_held(work: Work, plan: Plan) -> str:
    if plan.hold_push is not None:
        return plan.hold_push
    if work.definition.push is None:
        return "the definition has no push"
    return "not pushed, as asked"
