"""`ckptd bench`: this machine's limits, and how close jobs come to them."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckptd import units
from ckptd.cli import arguments
from ckptd.cli.arguments import Json, SettingsFile
from ckptd.cli.output import Output

if TYPE_CHECKING:
    from ckptd.bench.limits import Disk, Limit
    from ckptd.bench.measure import Measured
    from ckptd.settings import Settings

LIMIT_BYTES = 1 << 30
"""How much each limit moves, at most as much as the checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Machine:
    disk: Disk
    limits: Sequence[Limit]

    @property
    def by_name(self) -> dict[str, Limit]:
        return {limit.name: limit for limit in self.limits}


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Measure this machine's limits, and how close jobs come to them.",
        epilog=arguments.examples(
            "ckptd bench --folder /scratch",
            "ckptd bench /runs/llama-sft/checkpoint-500 --push --plot timeline.svg",
        ),
    )(bench)


def bench(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CHECKPOINT]", help="Folder to measure with. Default: one made up, of --size."
        ),
    ] = None,
    size: Annotated[
        str, typer.Option(metavar="BYTES", help="Size of the checkpoint that is made up.")
    ] = "2GB",
    folder: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where files are written, read and removed again. Default: the state folder.",
        ),
    ] = None,
    push: Annotated[
        bool,
        typer.Option(
            "--push", help="Push each result, to a Hub on loopback that is removed again."
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.svg", help="Draw what each lane of the jobs moved, and when."),
    ] = None,
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """Measure this machine's limits, then jobs, and name what holds each job up.

    Seconds are those of the work; what interpreter and imports take stands beside them. A share of
    100% is a job that keeps its busiest resource at its limit all the time.
    """
    from ckptd.bench import timeline

    out = Output(as_json=as_json)
    given = arguments.settings(settings)
    nbytes = _bytes(size)
    with _room(folder, given) as room:
        machine = _machine(room, min(nbytes, LIMIT_BYTES), given, out)
        measured = list(_jobs(room, checkpoint, nbytes, given, machine, push=push, out=out))
    if plot is not None:
        plot.write_text(timeline.picture(measured))
    facts = _facts(machine, measured)
    if as_json:
        out.value(facts)
    else:
        _print(facts, out)


def _bytes(size: str) -> int:
    from ckptd import errors

    try:
        return units.parse_bytes(size)
    except ValueError as error:
        raise errors.UsageError(f"--size: {error}") from error


@contextlib.contextmanager
def _room(folder: Path | None, settings: Settings) -> Iterator[Path]:
    """Yield a new folder of our own, removed afterwards."""
    from ckptd.checkpoint import writer

    parent = settings.state_dir if folder is None else arguments.absolute(folder)
    writer.make_folder(parent)
    with tempfile.TemporaryDirectory(prefix=".ckptd-bench-", dir=parent) as room:
        yield Path(room)


def _machine(room: Path, nbytes: int, settings: Settings, out: Output) -> _Machine:
    from ckptd.bench import limits

    threads = settings.threads
    out.talk("measuring the disk...")
    disk = limits.disk(room, nbytes=nbytes, threads=threads)
    out.talk("measuring memory...")
    found = [disk.write, disk.cached_write, disk.read]
    found.append(limits.memory_copy(nbytes=nbytes, threads=threads))
    found.append(limits.sha256(nbytes=nbytes, threads=threads))
    return _Machine(disk=disk, limits=(*found, *_device_limits(out)))


def _device_limits(out: Output) -> Sequence[Limit]:
    """Return the limits of the GPU that `device: auto` takes, if there is one."""
    from ckptd.plan import evaluate

    device = evaluate.choose_device("auto")
    if device == "cpu":
        return ()
    from ckptd.bench import device as devices

    out.talk("measuring the GPU...")
    return devices.measure(device)


def _jobs(
    room: Path,
    checkpoint: Path | None,
    nbytes: int,
    settings: Settings,
    machine: _Machine,
    *,
    push: bool,
    out: Output,
) -> Iterator[Measured]:
    from ckptd.bench import measure, synthetic
    from ckptd.bench.child import Request

    source = room / "checkpoint-1"
    if checkpoint is None:
        out.talk(f"writing a checkpoint of {units.format_bytes(nbytes)}...")
        specs = synthetic.llama_specs(nbytes)
        synthetic.write(source, specs, sparse=False, shard_bytes=synthetic.SHARD_BYTES)
    else:
        source = arguments.absolute(checkpoint)
    with _hub(room, push=push) as (endpoint, token):
        for name, stages in measure.JOBS.items():
            out.talk(f"{name}...")
            work_path, output_path = measure.work_paths(room, name)
            request = Request(
                checkpoint_path=source,
                definition=measure.definition(stages, push=push),
                output_path=output_path,
                work_path=work_path,
                byte_budget=settings.byte_budget,
                threads=settings.threads,
                cache=settings.cache,
                endpoint=endpoint,
                push=push,
            )
            yield measure.run(request, name=name, limits=machine.by_name, token=token)
            shutil.rmtree(output_path)


@contextlib.contextmanager
def _hub(room: Path, *, push: bool) -> Iterator[tuple[str | None, str | None]]:
    """Yield the address of a Hub on loopback and its token, or nothing where none is wanted."""
    if not push:
        yield None, None
        return
    from ckptd.hub.local import server

    with server.running(root=room / "hub") as hub:
        yield hub.url, hub.token


def _facts(machine: _Machine, measured: Sequence[Measured]) -> dict[str, Any]:
    return {
        "limits": {
            limit.name: {"bytes_per_s": limit.bytes_per_s, "how": limit.what}
            for limit in machine.limits
        },
        "reflink": machine.disk.has_reflink,
        "jobs": {
            job.name: {
                "seconds": job.seconds,
                "start_s": job.start_s,
                "peak_bytes": job.peak_bytes,
                "bottleneck": job.bottleneck.name,
                "share": job.share,
                "resources": {
                    one.name: {"bytes": one.nbytes, "seconds": one.seconds} for one in job.resources
                },
            }
            for job in measured
        },
    }


def _print(facts: Mapping[str, Any], out: Output) -> None:
    size = units.format_bytes
    out.table(
        ("LIMIT", "PER SECOND", "HOW"),
        [(name, size(one["bytes_per_s"]), one["how"]) for name, one in facts["limits"].items()],
        right=("PER SECOND",),
    )
    reflink = "yes: copies share blocks" if facts["reflink"] else "no: bytes are copied"
    out.data(f"reflink      {reflink}")
    out.data()
    out.table(
        ("JOB", "SECONDS", "START-UP", "PEAK MEMORY", "BOTTLENECK", "ITS SECONDS", "SHARE"),
        [
            (
                name,
                f"{job['seconds']:.2f}",
                f"{job['start_s']:.2f}",
                size(job["peak_bytes"]),
                job["bottleneck"],
                f"{job['resources'][job['bottleneck']]['seconds']:.2f}",
                f"{job['share']:.0%}",
            )
            for name, job in facts["jobs"].items()
        ],
        right=("SECONDS", "START-UP", "PEAK MEMORY", "ITS SECONDS", "SHARE"),
    )
