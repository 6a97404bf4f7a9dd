"""`ckptd jobs`: what became of every checkpoint, and another try or an end for a job."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckptd import errors, units
from ckptd.cli import arguments
from ckptd.cli.arguments import Json, SettingsFile, StateFolder
from ckptd.cli.output import Output

if TYPE_CHECKING:
    from ckptd.jobs.database import Database
    from ckptd.jobs.job import Job, Outcome
    from ckptd.jobs.store import Moment, Sighting

JobId = Annotated[str, typer.Argument(metavar="ID", help="Job id, or the beginning of one.")]
JobOrFolder = Annotated[
    str,
    typer.Argument(metavar="ID", help="Job id, the beginning of one, or a checkpoint's folder."),
]
OfRun = Annotated[
    str | None, typer.Option("--run", metavar="NAME", help="Only checkpoints of this run.")
]
OfStep = Annotated[
    int | None, typer.Option("--step", metavar="N", help="Only checkpoints of this training step.")
]
_REASON_CHARS = 60
_LASTING = ("commit", "pull request", "git tag", "output")
_NUMBER = re.compile(r"\d+")


def add_to(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(
        help="List jobs, show, retry or cancel one.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    group.command(
        epilog=arguments.examples(
            "ckptd jobs ls",
            "ckptd jobs ls --state failed --state waiting",
            "ckptd jobs ls --run llama-sft --step 4000",
            "ckptd jobs ls --all --json",
        )
    )(ls)
    group.command(
        epilog=arguments.examples(
            "ckptd jobs history --run llama-sft --step 4000",
            "ckptd jobs history --step 4000 --json",
        )
    )(history)
    group.command(
        epilog=arguments.examples("ckptd jobs info 3f2a", "ckptd jobs info /runs/a/checkpoint-500")
    )(info)
    group.command(epilog=arguments.examples("ckptd jobs retry 3f2a"))(retry)
    group.command(epilog=arguments.examples("ckptd jobs cancel 3f2a"))(cancel)
    app.add_typer(group, name="jobs")


def ls(
    state: Annotated[
        list[str] | None,
        typer.Option(metavar="STATE", help="Only jobs in this state; may be given several times."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also checkpoints that were seen and got no job, and why.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="The newest so many jobs. Default: all.")
    ] = None,
    run: OfRun = None,
    step: OfStep = None,
    settings: SettingsFile = None,
    state_dir: StateFolder = None,
    as_json: Json = False,
) -> None:
    """List the jobs, oldest first."""
    states = _states(state)
    output = Output(as_json=as_json)
    database = _open(settings, state_dir, output)
    if database is None:
        if as_json:
            output.value({"jobs": []} | ({"sightings": []} if everything else {}))
        return
    with database:
        found = database.list(states=states, limit=limit, run=run, step=step)
        sightings = _without_job(database, run=run, step=step) if everything else []
    if as_json:
        value: dict[str, Any] = {"jobs": [_summary(job) for job in found]}
        output.value(value | ({"sightings": sightings} if everything else {}))
        return
    if found:
        _print_jobs(found, output)
    else:
        chosen = state or run is not None or step is not None
        output.talk("no such jobs" if chosen else "no jobs yet")
    if sightings:
        output.data()
        _print_sightings(sightings, output)


def info(
    job_id: JobOrFolder,
    settings: SettingsFile = None,
    state_dir: StateFolder = None,
    as_json: Json = False,
) -> None:
    """Show one job: where it stands and why, what it did, what happened to it.

    For a checkpoint's folder, which need not have got a job: what each pipeline made of it.
    """
    output = Output(as_json=as_json)
    if os.sep in job_id:
        with _require(settings, state_dir) as database:
            _tell_seen(str(arguments.absolute(Path(job_id))), database, output)
        return
    with _require(settings, state_dir) as database:
        job = database.get(job_id)
        moments = database.history(job.job_id)
    if as_json:
        output.value({"job": job, "history": moments})
        return
    spec, waits = job.spec, job.next_try_at is not None
    output.fields(
        {
            "job": job.job_id,
            "state": job.state.value + (", asked to stop" if job.cancel_requested else ""),
            "reason": job.reason,
            "hint": job.failure.hint if job.failure is not None else None,
            "next try": _when(job.next_try_at) if waits else None,
            "checkpoint": spec.source_path,
            "step": spec.step,
            "although": "; ".join(spec.doubts) or None,
            "pipeline": f"{spec.pipeline} ({spec.pipeline_digest[:12]})",
            "target": spec.target or "nothing is pushed",
            "content": spec.content_digest,
            "attempt": job.attempt,
            "failures": job.failures or None,
            "worker": job.worker,
        }
        | outcome_fields(job.outcome)
    )
    output.data()
    _tell_moments(moments, output)


def history(
    run: OfRun = None,
    step: OfStep = None,
    settings: SettingsFile = None,
    state_dir: StateFolder = None,
    as_json: Json = False,
) -> None:
    """Tell all that happened to the checkpoints of a run or step, job by job, oldest first.

    Checkpoints that got no job are told, too, with the reason.
    """
    if run is None and step is None:
        raise errors.UsageError("whose history?", hint="name --run, --step or both")
    output = Output(as_json=as_json)
    with _require(settings, state_dir) as database:
        stories = [(job, database.history(job.job_id)) for job in database.list(run=run, step=step)]
        sightings = _without_job(database, run=run, step=step)
    if as_json:
        told = [{"job": job, "history": moments} for job, moments in stories]
        output.value({"jobs": told, "sightings": sightings})
        return
    if not stories and not sightings:
        output.talk("nothing is known of it; `ckptd jobs ls --all` shows what is")
    for job, moments in stories:
        spec = job.spec
        output.data(f"job {job.job_id}: {spec.source_path}, step {spec.step}, by {spec.pipeline}")
        _tell_moments(moments, output)
        ended = {key: v for key, v in outcome_fields(job.outcome).items() if key in _LASTING}
        for name, value in ended.items():
            if value is not None:
                output.data(f"  {name}: {value}")
    if sightings:
        _print_sightings(sightings, output)


def retry(
    job_id: JobId,
    settings: SettingsFile = None,
    state_dir: StateFolder = None,
    as_json: Json = False,
) -> None:
    """Queue a job again now, whatever became of it."""
    with _require(settings, state_dir, writing=True) as database:
        job = database.retry(database.get(job_id).job_id, now=time.time())
    _tell_moved(job, Output(as_json=as_json))


def cancel(
    job_id: JobId,
    settings: SettingsFile = None,
    state_dir: StateFolder = None,
    as_json: Json = False,
) -> None:
    """End a job; one that runs is stopped by the daemon."""
    with _require(settings, state_dir, writing=True) as database:
        job = database.cancel(database.get(job_id).job_id, now=time.time())
    _tell_moved(job, Output(as_json=as_json))


def outcome_fields(outcome: Outcome | None) -> dict[str, object]:
    """Return what a job did as named values for people; None where it does not apply."""
    if outcome is None:
        return {}
    moved = {
        "read": outcome.read_bytes,
        "computed": outcome.computed_bytes,
        "written": outcome.written_bytes,
        "uploaded": outcome.uploaded_bytes,
    }
    done = ", ".join(f"{units.format_bytes(size)} {name}" for name, size in moved.items() if size)
    return {
        "output": outcome.output_path,
        "shards": f"{outcome.num_shards} ({outcome.num_files} files)",
        "bytes": done or None,
        "took": units.format_duration(outcome.duration_s),
        "peak memory": units.format_bytes(outcome.peak_bytes) if outcome.peak_bytes else None,
        "commit": outcome.commit_url,
        "pull request": outcome.pr_url,
        "git tag": outcome.git_tag,
    }


def _tell_seen(path: str, database: Database, output: Output) -> None:
    """Show what every pipeline last made of the checkpoint at `path`."""
    seen = [sighting for sighting in database.sightings() if sighting.source_path == path]
    if not seen:
        raise errors.UsageError(
            f"{path} has not been seen as a checkpoint",
            hint="ckptd jobs ls --all shows all; ckptd status shows what is watched",
        )
    if output.as_json:
        output.value({"sightings": seen})
        return
    for number, one in enumerate(seen):
        if number:
            output.data()
        output.fields(
            {
                "checkpoint": one.source_path,
                "pipeline": one.pipeline,
                "verdict": one.verdict.value,
                "reason": one.reason,
                "job": one.job_id,
                "seen": _when(one.at),
            }
        )


def _tell_moments(moments: Sequence[Moment], output: Output) -> None:
    for moment in moments:
        why = f"  {moment.reason}" if moment.reason else ""
        output.data(f"{_when(moment.at)}  {moment.state.value:<9}  try {moment.attempt}{why}")


def _without_job(database: Database, *, run: str | None, step: int | None) -> list[Sighting]:
    """Return checkpoints that got no job; they are known by path alone: `.../RUN/NAME-STEP`."""
    found = []
    for sighting in database.sightings():
        path = Path(sighting.source_path)
        numbers = _NUMBER.findall(path.name)
        of_run = run is None or run in path.parts
        of_step = step is None or (bool(numbers) and int(numbers[-1]) == step)
        if sighting.job_id is None and of_run and of_step:
            found.append(sighting)
    return found


def _tell_moved(job: Job, output: Output) -> None:
    if output.as_json:
        output.value(_summary(job))
    elif job.cancel_requested:
        output.data(f"job {job.job_id} was asked to stop")
    else:
        output.data(f"job {job.job_id} is {job.state.value}")


def _print_jobs(found: Any, output: Output) -> None:
    output.table(
        ("JOB", "STATE", "RUN", "CHECKPOINT", "TARGET", "TRY", "SINCE", "WHY"),
        [
            (
                job.job_id,
                job.state.value,
                job.spec.run,
                job.spec.name,
                job.spec.target or "-",
                str(job.attempt),
                _when(job.updated_at),
                _short(job.reason, job.spec.source_path),
            )
            for job in found
        ],
        right=("TRY",),
    )


def _print_sightings(sightings: list[Sighting], output: Output) -> None:
    output.table(
        ("CHECKPOINT", "PIPELINE", "VERDICT", "SEEN", "WHY"),
        [
            (
                s.source_path,
                s.pipeline,
                s.verdict.value,
                _when(s.at),
                _short(s.reason, s.source_path),
            )
            for s in sightings
        ],
    )


def _summary(job: Job) -> dict[str, Any]:
    return {
        "job_id": job.job_id,
        "state": job.state,
        "reason": job.reason,
        "pipeline": job.spec.pipeline,
        "source_path": job.spec.source_path,
        "run": job.spec.run,
        "name": job.spec.name,
        "step": job.spec.step,
        "target": job.spec.target,
        "content_digest": job.spec.content_digest,
        "attempt": job.attempt,
        "failures": job.failures,
        "failure": job.failure,
        "outcome": job.outcome,
        "next_try_at": job.next_try_at,
        "cancel_requested": job.cancel_requested,
        "created_at": job.spec.created_at,
        "updated_at": job.updated_at,
    }


def _states(names: list[str] | None) -> Any:
    from ckptd.jobs.job import State

    known = {state.value: state for state in State}
    for name in names or ():
        if name not in known:
            raise errors.UsageError(f"no state {name!r}", hint=f"one of {', '.join(known)}")
    return [known[name] for name in names] if names else None


def _open(settings_path: Path | None, state_path: Path | None, output: Output) -> Database | None:
    """Return the database for reading, or None, told, where no daemon has made one."""
    from ckptd.jobs.database import Database

    path = arguments.settings(settings_path, state_path).database_path
    if not path.exists():
        output.talk(f"no jobs yet: no daemon has run with {path.parent} (--state-dir names others)")
        return None
    return Database(path, read_only=True)


def _require(
    settings_path: Path | None, state_path: Path | None, *, writing: bool = False
) -> Database:
    from ckptd.jobs.database import Database

    path = arguments.settings(settings_path, state_path).database_path
    if not path.exists():
        raise errors.UsageError(
            f"no jobs yet: no daemon has run with {path.parent}",
            hint="--state-dir names another state folder",
        )
    return Database(path, read_only=not writing)


def _when(at: float | None) -> str:
    return "" if at is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _short(text: str | None, source_path: str) -> str:
    """Return one line of bounded length, without the folder that the row names already."""
    line = " ".join((text or "").split())
    line = line.replace(f"{source_path}/", "").removeprefix(f"{source_path}: ")
    return line if len(line) <= _REASON_CHARS else line[: _REASON_CHARS - 1] + "…"
