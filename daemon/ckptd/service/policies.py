"""What a definition's policies for busy runs mean for one checkpoint: taken, or passed over and why.

`take` decides which checkpoints become jobs and which queued jobs give way; `push.forward_only`
keeps a branch from going back. All pure: jobs and steps in, a reason (for people, naming the job
that stands in the way) or None out. Steps are compared within one run only, the folder that the
checkpoints lie in: steps of different runs say nothing about each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ckptd.checkpoint import layouts
from ckptd.jobs.job import ACQUIRABLE, Job, JobSpec, State
from ckptd.pipeline.take import Every, Take
from ckptd.watch import scan

_STANDS = ACQUIRABLE | {State.RUNNING, State.PUBLISHED, State.HELD}
"""A job in one of these is still to be published, or was."""


def passed_over(take: Take, *, step: int | None) -> str | None:
    """Return why `take` leaves out a checkpoint of this step, None where it does not."""
    if not isinstance(take, Every) or step is None or step % take.every == 0:
        return None
    return f"step {step} is not taken: take is {{every: {take.every}}}"


def step_in_name(source_path: Path) -> int | None:
    """Return the step that the checkpoint's name gives; nothing on disk is looked at."""
    name = source_path.stem if source_path.suffix in scan.WEIGHT_SUFFIXES else source_path.name
    return layouts.step_of(Path("/dev/null"), name)


def outdated(
    take: Take,
    jobs: Iterable[Job],
    *,
    pipeline: str,
    source_path: Path,
    step: int | None,
    written_at: float,
) -> str | None:
    """Return why a checkpoint that is complete only now is passed over, or None.

    Under `newest` it is where a newer step of its run became a job after this one was written
    (`written_at`, seconds since the epoch): a run that was set back and writes small steps again is
    not outdated by the steps it once had.
    """
    if take != "newest" or step is None:
        return None
    newer = [
        job
        for job in jobs
        if job.state in _STANDS
        and job.spec.pipeline == pipeline
        and _run_of(job.spec) == source_path.parent
        and _step(job) > step
        and job.spec.created_at > written_at
    ]
    return _why_newest(max(newer, key=_step)) if newer else None


def superseded(take: Take, jobs: Iterable[Job], *, by: Job) -> Sequence[tuple[Job, str]]:
    """Return the jobs that give way to `by`, which was just queued, each with the reason.

    Under `newest` those are the older steps of its run that do not run: queued, waiting, retrying.
    """
    if take != "newest" or by.spec.step is None:
        return ()
    return [
        (job, _why_newest(by))
        for job in jobs
        if job.state in ACQUIRABLE
        and job.spec.pipeline == by.spec.pipeline
        and _run_of(job.spec) == _run_of(by.spec)
        and job.spec.step is not None
        and job.spec.step < by.spec.step
    ]


def goes_back(job: Job, published: Iterable[Job]) -> str | None:
    """Return why `job` may not be published now: its branch has a newer step, and only goes forward.

    `published` are jobs that were; those of other targets and runs are ignored.
    """
    spec = job.spec
    if not moves_forward_only(spec) or spec.step is None:
        return None
    newer = [
        other
        for other in published
        if other.state is State.PUBLISHED
        and other.spec.target == spec.target
        and _run_of(other.spec) == _run_of(spec)
        and _step(other) > spec.step
    ]
    if not newer:
        return None
    newest = max(newer, key=_step)
    return (
        f"{spec.target} holds step {newest.spec.step} already (job {newest.job_id}): "
        "push.forward_only does not let it go back"
    )


def moves_forward_only(spec: JobSpec) -> bool:
    """Return whether the job's own definition lets its branch move forward only."""
    push = spec.definition.get("push")
    return bool(push and push.get("forward_only"))


def second_tag(known: Job, spec: JobSpec) -> str | None:
    """Return the tag that `spec` gives the commit of `known`, whose content it has at another step."""
    if known.spec.step == spec.step or known.spec.git_tag == spec.git_tag:
        return None
    return spec.git_tag


def is_to_come(known: Job) -> bool:
    """Whether the job may still be published without a person."""
    return known.state in ACQUIRABLE or known.state is State.RUNNING


def same_bytes(known: Job) -> str:
    """Return in words that a checkpoint has the content of `known`, and is published once."""
    return (
        f"holds the same bytes as step {known.spec.step} (job {known.job_id}, "
        f"{known.spec.source_path}): it is published once"
    )


def _why_newest(newer: Job) -> str:
    return f"step {newer.spec.step} is newer and complete (job {newer.job_id}): take is newest"


def _run_of(spec: JobSpec) -> Path:
    return Path(spec.source_path).parent


def _step(job: Job) -> int:
    return -1 if job.spec.step is None else job.spec.step
