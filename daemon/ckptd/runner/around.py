"""What a job needs besides its checkpoint: an adapter's base, where it is pushed, its model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from anyio import to_thread

from ckptd.checkpoint.checkpoint import Checkpoint
from ckptd.hub.card import LIBRARY
from ckptd.pipeline import bases, definition, origins, target
from ckptd.pipeline.bases import Place
from ckptd.pipeline.origins import Origin
from ckptd.pipeline.stage import Base
from ckptd.plan.plan import Plan
from ckptd.runner.card import DIFFUSERS_LIBRARY, PEFT_LIBRARY, Card
from ckptd.runner.tally import Tally
from ckptd.telemetry.status import Phase

if TYPE_CHECKING:
    from ckptd.runner.job import Work


def locate_base(work: Work, source: Checkpoint) -> Place | None:
    """Return where the model is that the adapter `source` is merged into. Blocks.

    Raises:
        CheckpointRefused, HubError: see `bases.locate`.
    """
    return bases.locate(
        work.definition.stages,
        source,
        beside=beside(work),
        endpoint=work.endpoint,
        pinned=work.base_place,
    )


def beside(work: Work) -> Path:
    """Return the trainer's own folder, from which relative names of a base are looked up."""
    return work.source_path or work.checkpoint_path


async def base_at(work: Work, place: Place | None, tally: Tally) -> Base | None:
    """Return the opened base model at `place`; it may be fetched first, which is told.

    Raises:
        CheckpointRefused, HubError, StorageFailed: see `bases.open_base`.
    """
    if place is None:
        return None
    if place.folder is None:
        tally.enter(Phase.FETCHING)
    async with tally.sampling():
        base = await to_thread.run_sync(
            lambda: bases.open_base(
                place,
                endpoint=work.endpoint,
                digest=work.base_digest,
                expected=work.base_fingerprint,
                report=tally.fetching,
            ),
            abandon_on_cancel=True,
        )
    if place.folder is None:
        tally.enter(Phase.PLANNING)
    return base


async def push_of(work: Work, source: Checkpoint, origin: Origin | None) -> definition.Push | None:
    """Return where the output is to be published; None where it is not."""
    wanted = work.definition.push
    if wanted is None or not work.push:
        return None
    kind = await to_thread.run_sync(
        lambda: origins.model_type(wanted, source, origin, endpoint=work.endpoint)
    )
    return target.resolve(wanted, source, run=work.run, digest=work.content_digest, model_type=kind)


async def card_of(
    work: Work,
    source: Checkpoint,
    plan: Plan,
    origin: Origin | None,
    *,
    base: Base | None,
    push: definition.Push | None,
) -> Card:
    """Return what goes into the model card; the Hub is asked only where the output is pushed.

    Raises:
        HubError: it cannot answer.
    """
    facts = await to_thread.run_sync(
        lambda: origins.card_facts(
            source,
            origin,
            merged=base is not None,
            endpoint=work.endpoint,
            online=push is not None,
        )
    )
    return Card(
        facts=facts,
        library=_library(source, plan),
        repo_id=None if push is None else push.repo_id,
        run=work.run,
    )


def _library(source: Checkpoint, plan: Plan) -> str:
    """Return what loads the output, for its model card."""
    if source.parts:
        return DIFFUSERS_LIBRARY
    return LIBRARY if plan.config is not None else PEFT_LIBRARY
