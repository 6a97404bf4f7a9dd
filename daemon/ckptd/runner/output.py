"""What a job leaves beside the weights, and where the finished folder ends up.

`ckptd.json` says where a published model comes from. It holds no time and no host: the same content
through the same pipeline gives the same bytes, so that a second run changes nothing on the Hub.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptd import __version__
from ckptd.checkpoint import writer
from ckptd.checkpoint.beside import SideFile
from ckptd.checkpoint.checkpoint import Checkpoint
from ckptd.errors import SourceChanged, StorageFailed
from ckptd.hub.card import CARD_NAME
from ckptd.plan.plan import CONFIG_NAME, Plan
from ckptd.plan.stream import FinishedShard
from ckptd.runner.staging import Staging

PROVENANCE_NAME = "ckptd.json"
PROVENANCE_FORMAT = 1
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
"""renameat2(2): both paths as they are; they change places."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFile:
    """A finished file of the output; `sha256` in hexadecimal where it is known."""

    path: Path
    name: str
    nbytes: int
    sha256: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What identifies the work behind an output."""

    run: str
    content_digest: str | None
    pipeline: str
    pipeline_digest: str
    base: Mapping[str, str | None] | None = None
    """Name and digest (or commit) of the model that an adapter was merged into."""


def of_shard(shard: FinishedShard) -> OutputFile:
    """Return a finished weight file as a file of the output."""
    return OutputFile(path=shard.path, name=shard.name, nbytes=shard.nbytes, sha256=shard.sha256)


def write_side_files(
    folder: Path,
    *,
    plan: Plan,
    card: Callable[[bytes | None], bytes | None] = lambda readme: readme,
) -> tuple[OutputFile, ...]:
    """Put what a reader of the model needs beside the weights into `folder`, indexes last.

    `card` makes the README.md of what the trainer wrote, or of nothing.

    Raises:
        NoSpace, StorageFailed: the folder cannot be written.
        SourceChanged: a file of the source is gone or has another size than it was planned with.
    """
    config = plan.config
    contents: list[tuple[str, Callable[[], bytes]]] = []
    if config is not None:
        contents.append((CONFIG_NAME, lambda: config))
    files = {file.relpath: file for file in plan.side_files}
    readme = files.pop(CARD_NAME, None)
    contents += [(name, functools.partial(_read, file)) for name, file in files.items()]
    made = card(None if readme is None else _read(readme))
    if made is not None:
        contents.append((CARD_NAME, lambda: made))
    contents += [(name, functools.partial(bytes, index)) for name, index in plan.indexes.items()]
    return tuple(_written(folder, name, content()) for name, content in contents)


def write_provenance(
    folder: Path,
    *,
    source: Checkpoint,
    plan: Plan,
    shards: Sequence[FinishedShard],
    side_files: Sequence[OutputFile],
    provenance: Provenance,
) -> OutputFile:
    """Put `ckptd.json` into `folder`; it names every other file but the model card.

    Raises:
        NoSpace, StorageFailed: the folder cannot be written.
    """
    return _written(folder, PROVENANCE_NAME, _encode(provenance, source, plan, shards, side_files))


def _written(folder: Path, name: str, content: bytes) -> OutputFile:
    path = folder / name
    writer.make_folder(path.parent)
    writer.write_file(path, content)
    sha256 = hashlib.sha256(content).hexdigest()
    return OutputFile(path=path, name=name, nbytes=len(content), sha256=sha256)


def _read(file: SideFile) -> bytes:
    try:
        content = file.path.read_bytes()
    except OSError as error:
        reason = error.strerror or "an error"
        raise SourceChanged(path=file.path, expected="a readable file", found=reason) from error
    if len(content) != file.nbytes:
        sizes = f"{file.nbytes} bytes", f"{len(content)}"
        raise SourceChanged(path=file.path, expected=sizes[0], found=sizes[1])
    return content


def require_free(folder: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that holds something, unless it may be replaced.

    Raises:
        StorageFailed: it is a file, or a folder that is not empty.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise StorageFailed("is a file", path=folder, hint="name a folder with -o")
    if any(folder.iterdir()) and not overwrite:
        raise StorageFailed(
            "is not empty", path=folder, hint="name another folder, or pass --overwrite"
        )


def keep(staging: Staging, folder: Path | None) -> Path:
    """Move the finished output to `folder`, replacing what is there; return where it is.

    Both must lie on one file system. Where the kernel can, the two change places at once, so that
    a reader finds the one or the other; what was replaced goes with the staging folder. Without a
    folder the output stays in the staging folder.

    Raises:
        NoSpace, StorageFailed: the folder cannot be replaced; what was there is there still.
    """
    if folder is None:
        return staging.out_path
    try:
        writer.make_folder(folder.parent)
        if not folder.exists():
            staging.out_path.rename(folder)
        elif not _exchange(staging.out_path, folder):
            _replace(staging.out_path, folder)
        writer.sync_folder(folder.parent)
    except OSError as error:
        raise writer.translated(error, folder, 0) from error
    shutil.rmtree(staging.out_path, ignore_errors=True)
    return folder


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False where kernel or file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    done: int = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return done == 0


def _replace(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder` in two steps; the old one comes back if that fails."""
    retired = folder.with_name(f"{writer.TEMPORARY_PREFIX}{folder.name}.old")
    shutil.rmtree(retired, ignore_errors=True)
    folder.rename(retired)
    try:
        new.rename(folder)
    except OSError:
        retired.rename(folder)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def _encode(
    provenance: Provenance,
    source: Checkpoint,
    plan: Plan,
    shards: Sequence[FinishedShard],
    side_files: Sequence[OutputFile],
) -> bytes:
    value = {
        "format": PROVENANCE_FORMAT,
        "ckptd": __version__,
        "source": {
            "run": provenance.run,
            "name": source.name,
            "step": source.step,
            "layout": source.layout,
            "digest": provenance.content_digest,
            **({} if provenance.base is None else {"base": provenance.base}),
        },
        "pipeline": {
            "name": provenance.pipeline,
            "digest": provenance.pipeline_digest,
            "stages": [
                {
                    "stage": report.stage,
                    "summary": report.summary,
                    "facts": dict(report.facts),
                    "warnings": list(report.warnings),
                }
                for report in plan.reports
            ],
        },
        "weights": [_named(of_shard(shard)) for shard in shards],
        "files": [
            _named(file)
            for file in sorted(side_files, key=lambda file: file.name)
            if file.name != CARD_NAME
        ],
        "total_size": plan.tensor_bytes,
        "total_parameters": plan.num_parameters,
    }
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _named(file: OutputFile) -> dict[str, Any]:
    return {"name": file.name, "nbytes": file.nbytes, "sha256": file.sha256}
