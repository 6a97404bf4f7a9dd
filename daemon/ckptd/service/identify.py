"""What a complete checkpoint is to the job store: digests, target, and the spec of its job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ckptd import errors
from ckptd.checkpoint import checkpoint, content, listing
from ckptd.checkpoint.checkpoint import Checkpoint
from ckptd.jobs import job
from ckptd.jobs.job import Job, JobSpec, State
from ckptd.jobs.store import JobStore
from ckptd.pipeline import bases as base_models
from ckptd.pipeline import definition as definitions
from ckptd.pipeline import target
from ckptd.pipeline.definition import Definition, Watch
from ckptd.telemetry import node


class KnownBases:
    """What identifies the models that adapters are merged into; shared by a daemon's intakes."""

    def __init__(self, *, endpoint: str | None) -> None:
        self._endpoint = endpoint
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
        place = base_models.locate(
            definition.stages, source, beside=beside, endpoint=self._endpoint
        )
        if place is None:
            return None
        fingerprint = base_models.fingerprint(place)
        return str(place), self._digests.of(place, check=check), fingerprint


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
    before = listing.list_files(pin_path).fingerprint_id
    source = checkpoint.open_checkpoint(
        pin_path, layout=watch.layout, assets=definition.assets, folder=source_path
    )
    content_digest = content.digest(checkpoint.identifying_files(source), check=check)
    base = bases.of(definition, source, beside=source_path, check=check)
    if base is not None:
        content_digest = base_models.together(content_digest, base[1])
    after = listing.list_files(pin_path).fingerprint_id
    if after != before:
        raise errors.SourceChanged(path=source_path, expected=before[:12], found=after[:12])
    run = source_path.parent.name
    push = definition.push
    if push is not None:
        push = target.resolve(push, source, run=run, digest=content_digest)
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
        fingerprint=after,
        boot_id=node.boot_id(),
        pipeline_digest=pipeline_digest,
        target=described,
        base_place=None if base is None else base[0],
        base_digest=None if base is None else base[1],
        base_fingerprint=None if base is None else base[2],
        created_at=now,
    )


async def known_job(store: JobStore, job_id: str) -> Job | None:
    """Return the job with this id that still stands for its checkpoint, if there is one."""
    try:
        known = await store.get(job_id)
    except errors.UsageError:
        return None
    return None if known.state is State.VANISHED else known
