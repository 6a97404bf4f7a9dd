"""Jobs measured against the limits: how long each took, of what, and what held it up.

A job's share is the time that its busiest resource needs alone, at its limit, over the time that
the job took: 1.0 is a job that is never idle where it matters. A disk that is read and written has
to do both; a copy within memory reads and writes each byte.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from ckptd import errors
from ckptd.bench import child
from ckptd.bench.child import Answer, Request, Sample
from ckptd.bench.limits import Limit

SHARD_SIZE = "1GB"
_PUSH = """
push:
  repo_id: bench/model
  commit_message: measured
"""
JOBS: Mapping[str, str] = {
    "copy": f"  - reshard: {{max_shard_size: {SHARD_SIZE}}}\n",
    "resize": "  - resize: {pad_to_multiple_of: 1024}\n"
    f"  - reshard: {{max_shard_size: {SHARD_SIZE}}}\n",
    "cast": f"  - cast: {{dtype: float16}}\n  - reshard: {{max_shard_size: {SHARD_SIZE}}}\n",
}
"""What is measured, as the stages of a definition: bytes copied, some rows computed, all computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """What a job asked of one resource: bytes, and the seconds they take at its limit."""

    name: str
    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One job."""

    name: str
    seconds: float
    """Of the work, from opening the checkpoint to the finished folder."""
    start_s: float
    """Of the process before and after: interpreter, imports."""
    peak_bytes: int
    resources: tuple[Resource, ...]
    samples: tuple[Sample, ...]

    @property
    def bottleneck(self) -> Resource:
        """The resource that is busy longest."""
        return max(self.resources, key=lambda resource: resource.seconds)

    @property
    def share(self) -> float:
        """The bottleneck's seconds over the job's."""
        return self.bottleneck.seconds / self.seconds


def definition(stages: str, *, push: bool) -> str:
    """Return the text of a definition with `stages`."""
    return f"pipeline: bench\nstages:\n{stages}{_PUSH if push else ''}"


def run(request: Request, *, name: str, limits: Mapping[str, Limit], token: str | None) -> Measured:
    """Do the job in a process of its own and set it against `limits`, by their names.

    Raises:
        CheckFailed: the job failed; with the end of what it said.
    """
    environment = dict(os.environ) | ({} if token is None else {"HF_TOKEN": token})
    os.sync()
    _forget(request.checkpoint_path)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", child.__name__],
        input=TypeAdapter(Request).dump_json(request),
        capture_output=True,
        env=environment,
        check=False,
    )
    wall_s = time.monotonic() - began
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        why = said[-1] if said else f"exit code {done.returncode}"
        raise errors.CheckFailed(f"the job {name!r} failed: {why}", check="bench")
    answer = TypeAdapter(Answer).validate_json(done.stdout)
    seconds = answer.outcome.duration_s
    return Measured(
        name=name,
        seconds=seconds,
        start_s=wall_s - seconds,
        peak_bytes=answer.outcome.peak_bytes,
        resources=tuple(_resources(answer, limits)),
        samples=answer.samples,
    )


def _forget(folder: Path) -> None:
    """Drop the files of `folder` from the page cache, so that reading them is the disk's work."""
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _resources(answer: Answer, limits: Mapping[str, Limit]) -> Sequence[Resource]:
    outcome = answer.outcome
    read, written = outcome.read_bytes, outcome.written_bytes
    reading, writing = limits["disk read"], limits["disk write"]
    disk_s = read / reading.bytes_per_s + written / writing.bytes_per_s
    found = [Resource(name="disk", nbytes=read + written, seconds=disk_s)]
    copied = read + outcome.computed_bytes
    found.append(_resource(limits["memory copy"], copied, "memory"))
    if outcome.uploaded_bytes:
        found.append(_resource(limits["sha256"], outcome.uploaded_bytes, "sha256"))
    return found


def _resource(limit: Limit, nbytes: int, name: str) -> Resource:
    return Resource(name=name, nbytes=nbytes, seconds=nbytes / limit.bytes_per_s)


def work_paths(folder: Path, name: str) -> tuple[Path, Path]:
    """Return where a job is staged and where its result goes."""
    return folder / f"work-{name}", folder / f"out-{name}"
