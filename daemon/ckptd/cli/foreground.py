"""One job in this process, for `ckptd run`: where it is staged, what it holds, what it leaves.

The staging folder lies beside the output (one file system, so that the end is a rename), or in the
state folder where nothing but a push is wanted. Its name comes from the checkpoint's files and the
pipeline, so that a killed run goes on when it is started again, and never with the files of
another checkpoint. It is locked while it is used and removed when the work is done.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import anyio

from ckptd import errors
from ckptd.aio.backoff import Backoff
from ckptd.checkpoint import checkpoint, content, listing, writer
from ckptd.checkpoint.listing import Listing
from ckptd.cli import arguments
from ckptd.cli.display import Display
from ckptd.jobs.job import Outcome
from ckptd.pipeline import bases, staged
from ckptd.pipeline import definition as definitions
from ckptd.pipeline.definition import Definition
from ckptd.runner import job, output, unstaged
from ckptd.runner.job import Work
from ckptd.runner.staging import has_work
from ckptd.settings import Settings

STAGING_PREFIX = ".ckptd-"
"""Hidden from the globs of definitions, like everything of ckptd's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the command line asks for; paths are absolute."""

    checkpoint_path: Path
    definition: Definition
    run: str
    layout: str
    output_path: Path | None
    overwrite: bool
    push: bool
    patience_s: float
    settings: Settings

    @property
    def staging(self) -> staged.StagingKind:
        """Where weights lie until the commit."""
        return staged.kind(self.definition, self.settings.staging)


def execute(request: Request, display: Display, *, tell: Callable[[str], None]) -> Outcome:
    """Do the job and return how it ended; `tell` hears what is left for a next try. Blocks.

    Raises:
        UsageError: the output would lie in the source or replace it, another run makes it, or nothing
            is to be staged.
        StorageFailed: the output folder is in the way.
        CkptdError: see `runner.job.execute`; often in an ExceptionGroup.
    """
    if request.staging == "none":
        wanted, out_path = request.definition, request.output_path
        unstaged.require_use(wanted, output_path=out_path, push=request.push)
    files = listing.list_files(request.checkpoint_path, within=arguments.ANYWHERE)
    if request.output_path is not None:
        _protect(request, files)
        output.require_free(request.output_path, overwrite=request.overwrite)
    with _staging(request, files, tell) as staging:
        digest, fingerprint, base = None, None, None
        if request.push:
            fingerprint = listing.list_files(request.checkpoint_path).fingerprint_id
            digest, base = _digest(request, display)
        work = _work(request, staging.path, digest=digest, fingerprint=fingerprint, base=base)
        outcome = anyio.run(functools.partial(job.execute, work, report=display.report))
        staging.holds_result = request.output_path is None and outcome.output_path is not None
        return outcome


def _work(
    request: Request,
    work_path: Path,
    *,
    digest: str | None,
    fingerprint: str | None,
    base: tuple[str, str] | None,
) -> Work:
    return Work(
        checkpoint_path=request.checkpoint_path,
        name=request.checkpoint_path.name,
        run=request.run,
        layout=request.layout,
        definition=request.definition,
        content_digest=digest,
        fingerprint=fingerprint,
        pipeline_digest=definitions.pipeline_digest(request.definition),
        work_path=work_path,
        output_path=request.output_path,
        push=request.push,
        endpoint=request.settings.hub_endpoint,
        within=arguments.ANYWHERE,
        byte_budget=request.settings.byte_budget,
        num_threads=request.settings.threads,
        cache=request.settings.cache,
        staging=request.staging,
        upload_limit=request.settings.upload_limit,
        base_place=None if base is None else base[0],
        base_digest=None if base is None else base[1],
        hub_patience=Backoff(
            attempts=100, total_s=request.patience_s, asked_longest_s=request.patience_s + 1
        ),
    )


def _digest(request: Request, display: Display) -> tuple[str, tuple[str, str] | None]:
    """Return the content digest of the checkpoint; reads every byte of it once.

    An adapter's covers the base it is merged into, whose place and own digest come second.
    """
    source = checkpoint.open_checkpoint(
        request.checkpoint_path,
        layout=request.layout,
        assets=request.definition.assets,
        within=arguments.ANYWHERE,
    )
    files = checkpoint.identifying_files(source)
    total = sum(path.stat().st_size for _, path in files)
    threads = request.settings.threads
    done = 0

    def check() -> None:
        nonlocal done
        display.identified(min(done, total), total)
        done += threads * content.BLOCK_BYTES

    digest = content.digest(files, threads=threads, check=check)
    place = bases.locate(
        request.definition.stages,
        source,
        beside=request.checkpoint_path,
        endpoint=request.settings.hub_endpoint,
    )
    if place is None:
        return digest, None
    base_digest = bases.Digests().of(place)
    return bases.together(digest, base_digest), (str(place), base_digest)


def _protect(request: Request, files: Listing) -> None:
    """Refuse an output that lies in what is read, or whose replacement would remove it.

    Raises:
        UsageError: names both folders.
    """
    assert request.output_path is not None
    target = request.output_path.resolve()
    sources = {request.checkpoint_path.resolve()}
    if request.definition.assets is not None:
        sources.add(request.definition.assets.resolve())
    for source in sources:
        if target.is_relative_to(source) or source.is_relative_to(target):
            raise errors.UsageError(
                f"the output {target} and the source {source} lie in each other",
                hint="a source folder is never written to: name another folder with -o",
            )
    for file in files.files:
        if file.is_link and files.path_of(file).resolve().is_relative_to(target):
            raise errors.UsageError(
                f"{file.relpath} of the checkpoint is a link into the output {target}",
                hint="name another folder with -o",
            )


@dataclass(slots=True)
class _Staging:
    path: Path
    holds_result: bool = False
    """A push was held: the model stays here."""


@contextlib.contextmanager
def _staging(request: Request, files: Listing, tell: Callable[[str], None]) -> Iterator[_Staging]:
    """Yield the staging folder of this job, locked; it stays only where it is of use."""
    key = _key(request, files)
    if request.output_path is not None:
        out_path = request.output_path
        home_path = out_path.with_name(f"{STAGING_PREFIX}{out_path.name}")
    else:
        home_path = request.settings.state_dir / "runs" / key[:12]
    writer.make_folder(home_path)
    with _locked(home_path):
        staging = _Staging(home_path / key)
        for other in home_path.iterdir():  # killed runs of another checkpoint or pipeline
            if other != staging.path:
                shutil.rmtree(other, ignore_errors=True)
        keep = False
        try:
            yield staging
            keep = staging.holds_result
        except BaseException as error:
            keep = _can_go_on(error) and has_work(staging.path)
            if keep:
                tell(f"what is finished stays in {home_path}: the same command goes on from there")
            raise
        finally:
            if not keep:
                shutil.rmtree(home_path, ignore_errors=True)


def _key(request: Request, files: Listing) -> str:
    parts = (
        str(request.checkpoint_path),
        files.fingerprint_id,
        definitions.pipeline_digest(request.definition),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _can_go_on(error: BaseException) -> bool:
    """Say whether the same command may pass later with what is finished."""
    if isinstance(error, BaseExceptionGroup):
        return any(_can_go_on(inner) for inner in error.exceptions)
    return isinstance(error, (errors.HubError, KeyboardInterrupt, SystemExit))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder while the block runs; the kernel lets go of it when the process dies."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise writer.translated(error, folder, 0) from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise errors.UsageError(
                f"another ckptd run is at work in {folder}", hint="wait for it, or stop it"
            ) from error
        yield
    finally:
        os.close(fd)
