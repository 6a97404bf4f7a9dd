"""What a complete checkpoint is to the job store: digests, target, and the spec of its job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ckptd import errors
from ckptd.checkpoint import checkpoint, content, listing, whole
from ckptd.checkpoint.checkpoint import Checkpoint
from ckptd.checkpoint.listing import Listing
from ckptd.jobs import job
from ckptd.jobs.job import Job, JobSpec, State
from ckptd.jobs.store import JobStore
from ckptd.pipeline import bases as base_models
from ckptd.pipeline import definition as definitions
from ckptd.pipeline import origins, target
from ckptd.pipeline.definition import Definition, Push, Watch
from ckptd.telemetry import node


class KnownBases:
    """What identifies the models that adapters are merged into; shared by a daemon's intakes."""

    def __init__(self, *, endpoint: str | None) -> None:
        self.endpoint = endpoint
        """The Hub they are looked up on; None for the public one."""
        self._digests = base_models.Digests()

    def of(
        self,
        definition: Definition,
        source: Checkpoint,
        *,
        beside: Path,
        check: Callable[[], None],
    ) -> tuple[str, str, str | None] | None:
        """Return place, digest and fingerprint of what `source` is merged into; None without a merge.

        Raises:
            CheckpointRefused: the base is not there, or cannot be opened.
            HubError: its commit cannot be looked up.
        """
        place = base_models.locate(definition.stages, source, beside=beside, endpoint=self.endpoint)
        if place is None:
            return None
        fingerprint = base_models.fingerprint(place)
        return str(place), self._digests.of(place, check=check), fingerprint

    def model_type(
        self,
        push: Push,
        source: Checkpoint,
        *,
        beside: Path,
        base: tuple[str, str, str | None] | None,
    ) -> str | None:
        """Return the model_type of `source`, of an adapter that of its base; `base` as `of` said.

        Raises:
            HubError: the Hub cannot answer.
        """
        place = None if base is None else base_models.place_of(base[0])
        origin = origins.of(source, beside=beside, place=place)
        return origins.model_type(push, source, origin, endpoint=self.endpoint)


def spec_of(
    source_path: Path,
    pin_path: Path,
    *,
    definition: Definition,
    watch: Watch,
    frozen_path: Callable[[str], Path],
    bases: KnownBases,
    now: float,
    check: Callable[[], None],
) -> JobSpec:
    """Return the job of the checkpoint pinned at `pin_path`; reads every byte of it once.

    `frozen_path` gives the place of the pin for a job id; `check` is called while hashing and may
    raise to stop. Blocks.

    Raises:
        CheckpointRefused: it cannot be opened, or the push's placeholders cannot be filled; or
            the base that an adapter is merged into cannot be.
        HubError: the base's commit cannot be looked up.
        SourceChanged: it was rewritten meanwhile.
    """
    before = listing.list_files(pin_path)
    source = checkpoint.open_checkpoint(
        pin_path, layout=watch.layout, assets=definition.assets, folder=source_path
    )
    content_digest = content.digest(checkpoint.identifying_files(source), check=check)
    base = bases.of(definition, source, beside=source_path, check=check)
    if base is not None:
        content_digest = base_models.together(content_digest, base[1])
    _require_unchanged(source_path, before, listing.list_files(pin_path))
    run = source_path.parent.name
    push = definition.push
    if push is not None:
        kind = bases.model_type(push, source, beside=source_path, base=base)
        push = target.resolve(push, source, run=run, digest=content_digest, model_type=kind)
    pipeline_digest = definitions.pipeline_digest(definition)
    described = target.describe(push)
    job_id = job.job_id_of(content_digest, pipeline_digest, described)
    return JobSpec(
        job_id=job_id,
        definition=definition.dump(),
        pipeline=definition.pipeline,
        source_path=str(source_path),
        pinned_path=str(frozen_path(job_id)),
        layout=source.layout,
        run=run,
        name=source_path.name,
        step=source.step,
        content_digest=content_digest,
        fingerprint=before.fingerprint_id,
        boot_id=node.boot_id(),
        pipeline_digest=pipeline_digest,
        target=described,
        git_tag=None if push is None else push.git_tag,
        base_place=None if base is None else base[0],
        base_digest=None if base is None else base[1],
        base_fingerprint=None if base is None else base[2],
        created_at=now,
    )


def _require_unchanged(source_path: Path, before: Listing, after: Listing) -> None:
    """Refuse a digest of bytes that were rewritten while they were read.

    Raises:
        SourceChanged: says which file of the pin, and how.
    """
    rewritten = whole.changed(before, after)
    if rewritten is not None:
        raise errors.SourceChanged(
            path=source_path, expected="no write while it was identified", found=rewritten
        )


async def known_job(store: JobStore, job_id: str) -> Job | None:
    """Return the job with this id, if there is one; `stands` says what that means."""
    try:
        return await store.get(job_id)
    except errors.UsageError:
        return None


def stands(known: Job | None, definition: Definition) -> bool:
    """Return whether `known` is what became of a checkpoint under `definition`.

    One that vanished is not, for the checkpoint is there; nor is one that another state of the
    definition passed over.
    """
    if known is None or known.state is State.VANISHED:
        return False
    return known.state is not State.SKIPPED or known.spec.definition == definition.dump()
