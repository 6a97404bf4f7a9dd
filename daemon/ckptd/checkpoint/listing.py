"""The files of a checkpoint as `stat` sees them, and their fingerprint.

This module owns one question: which regular files lie under this path right now, and have they
changed since? It opens no file. The watcher compares fingerprints to find out when a folder is
quiet; completeness and pin work from the same list, so that all three speak of the same files.

What is listed: regular files, in folders at most `MAX_DEPTH` deep, sorted by name. A symbolic link
to a regular file is listed with the size and times of its target while the target stays inside the
folder (or inside `within`). Everything else (links that leave, links to folders, sockets, devices)
is left out and named in `Listing.ignored`. Folders whose name starts with a dot are invisible, but
for those in which a trainer keeps what belongs to the model;
files with such names are listed, for `.metadata` and `.tmpXXXXXX` tell whether a save is whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ckptd import errors

MAX_DEPTH = 8
"""Folders below the checkpoint that are looked into; the deepest known layout has four."""
MAX_FILES = 200_000
"""Files after which a folder is no checkpoint: a glob that hit a data set must not stall a scan."""

VISIBLE = frozenset({".hf_metadata"})
"""Folders with a dot that are looked into: NeMo Automodel keeps config and tokenizer there."""

Fingerprint = tuple[tuple[str, int, int, int], ...]
"""(relpath, inode, size, mtime_ns) of every file, sorted. The change time is left out: our own hard
links move it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedFile:
    """One regular file: where it stands and what `stat` said about it."""

    relpath: str
    """Path below the checkpoint, with `/` between its parts."""
    dev: int
    ino: int
    size: int
    """Bytes, as of the moment of the listing."""
    mtime_ns: int
    is_link: bool = False
    """A symbolic link whose target (which the other fields describe) stays inside the folder."""
    ctime_ns: int = 0
    """The change time: moves with every write, and also with each hard link, ours among them."""
    num_links: int = 1
    """Hard links to the file; where it moved together with `ctime_ns`, nothing was written."""
    access: tuple[int, int, int] = (0, 0, 0)
    """Mode, owner and group: who may read it."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Every file of one checkpoint at one moment."""

    path: Path
    """What was asked for, with links resolved: a folder or a single file."""
    base_path: Path
    """What `relpath` is relative to: the folder itself, or the parent of a single file."""
    files: tuple[ListedFile, ...]
    """Sorted by `relpath`."""
    ignored: tuple[str, ...] = ()
    """Names that are there but are not listed (links that leave the folder, sockets...), sorted."""
    folders: tuple[str, ...] = ()
    """The folders that were looked into, as `relpath`s, `.` for the checkpoint itself; none for a
    single file."""

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """What must stay equal while nobody writes here."""
        return tuple((file.relpath, file.ino, file.size, file.mtime_ns) for file in self.files)

    @cached_property
    def fingerprint_id(self) -> str:
        """SHA-256 of the fingerprint as hexadecimal text: short enough for a database row."""
        digest = hashlib.sha256()
        for relpath, *numbers in self.fingerprint:
            digest.update(os.fsencode(relpath) + b"\0")
            digest.update(b"%d %d %d\n" % tuple(numbers))
        return digest.hexdigest()

    @cached_property
    def access_id(self) -> str:
        """SHA-256 of who may read each file, as hexadecimal text; our own links do not move it."""
        told = [(file.relpath, *file.access) for file in self.files]
        return hashlib.sha256(repr(told).encode("utf-8", "surrogateescape")).hexdigest()

    @cached_property
    def by_name(self) -> dict[str, ListedFile]:
        """The same files by `relpath`."""
        return {file.relpath: file for file in self.files}

    @property
    def nbytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)

    def below(self, folder: str) -> Listing:
        """Return the files in `folder` (a relative path; empty for all), named as seen from there."""
        if not folder:
            return self
        inner = folder.rstrip("/") + "/"
        files = tuple(
            dataclasses.replace(file, relpath=file.relpath.removeprefix(inner))
            for file in self.files
            if file.relpath.startswith(inner)
        )
        base_path = self.base_path / folder
        return Listing(path=base_path, base_path=base_path, files=files)

    def path_of(self, file: ListedFile) -> Path:
        """Return the absolute path of `file`."""
        return self.base_path / file.relpath


def list_files(path: Path, *, within: Path | None = None) -> Listing:
    """Return the files under `path` (a folder, or a single file) as they are now.

    Links are followed to targets inside `within`, by default the folder itself; a model cache whose
    snapshot links to its blobs is listed with `within` set to the cache. Files that disappear
    while the listing is made are simply absent from it. Blocks on the file system; calling it
    again is always safe.

    Raises:
        CheckpointVanished: there is nothing at `path` (any more).
        CheckpointRefused: `path` may not be read, is neither a folder nor a regular file, or holds
            more than `MAX_FILES` files.
    """
    try:
        real_path = path.resolve(strict=True)
        status = real_path.stat()
        if stat.S_ISREG(status.st_mode):
            file = _listed(real_path.name, status, is_link=False)
            return Listing(path=real_path, base_path=real_path.parent, files=(file,))
        if not stat.S_ISDIR(status.st_mode):
            raise errors.CheckpointUnsupported("neither a folder nor a regular file", path=path)
        walk = _Walk(base_path=real_path, within=(within or real_path).resolve())
        files = tuple(sorted(walk.files(real_path, "", 0), key=lambda file: file.relpath))
        return Listing(
            path=real_path,
            base_path=real_path,
            files=files,
            ignored=tuple(sorted(walk.ignored)),
            folders=tuple(walk.folders),
        )
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise errors.CheckpointVanished(path=path) from exc
    except PermissionError as exc:
        raise errors.CheckpointRefused(
            "may not be read by this user",
            path=exc.filename or path,
            hint="run ckptd as the user who trains, or give its group access",
        ) from exc
    except OSError as exc:
        raise errors.CheckpointRefused(f"cannot be listed: {exc.strerror}", path=path) from exc


class _Walk:
    """One walk through one folder; collects what it leaves out."""

    def __init__(self, *, base_path: Path, within: Path) -> None:
        self.base_path = base_path
        self.within = within
        self.ignored: list[str] = []
        self.folders: list[str] = []
        self._num_files = 0

    def files(self, folder: Path, prefix: str, depth: int) -> Iterator[ListedFile]:
        """Yield the files of `folder` and of the folders in it, unsorted."""
        try:
            entries = list(os.scandir(folder))
        except FileNotFoundError:
            if depth == 0:
                raise
            return
        self.folders.append(prefix.rstrip("/") or ".")
        for entry in entries:
            relpath = prefix + entry.name
            try:
                if entry.is_dir(follow_symlinks=False):
                    if not entry.name.startswith(".") or entry.name in VISIBLE:
                        yield from self._folder(entry, relpath, depth + 1)
                    continue
                file = self._file(entry, relpath)
            except FileNotFoundError:
                continue
            if file is None:
                self.ignored.append(relpath)
                continue
            self._num_files += 1
            if self._num_files > MAX_FILES:
                raise errors.CheckpointUnsupported(
                    f"holds more than {MAX_FILES:,} files",
                    path=self.base_path,
                    hint="point the watch at checkpoint folders, not at what holds them",
                )
            yield file

    def _folder(self, entry: os.DirEntry[str], relpath: str, depth: int) -> Iterator[ListedFile]:
        if depth > MAX_DEPTH:
            self.ignored.append(relpath)
            return
        yield from self.files(Path(entry.path), relpath + "/", depth)

    def _file(self, entry: os.DirEntry[str], relpath: str) -> ListedFile | None:
        if not entry.is_symlink():
            status = entry.stat(follow_symlinks=False)
            return _listed(relpath, status, is_link=False) if _is_file(status) else None
        try:
            target = Path(entry.path).resolve(strict=True)
            status = target.stat()
        except (OSError, RuntimeError):  # dangling, or a loop of links
            return None
        if not target.is_relative_to(self.within) or not _is_file(status):
            return None
        return _listed(relpath, status, is_link=True)


def _is_file(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode)


def _listed(relpath: str, status: os.stat_result, *, is_link: bool) -> ListedFile:
    return ListedFile(
        relpath=relpath,
        dev=status.st_dev,
        ino=status.st_ino,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        is_link=is_link,
        ctime_ns=status.st_ctime_ns,
        num_links=status.st_nlink,
        access=(status.st_mode, status.st_uid, status.st_gid),
    )
