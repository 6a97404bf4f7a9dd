"""Pins: a second name for a checkpoint's files, so that the trainer's rotation cannot take them.

A pin is a folder `<root>/.ckptd/pins/<id>/` on the same mount as the checkpoint. Each file is
reflinked where the filesystem can (safe from deletion and from rewriting), else hard-linked (safe
from deletion; a rewrite in place shows in the file's stamp), else copied once the folder is quiet.
Under hard links, files other than weights are copied all the same: trainers rewrite them in place.
`refresh` may be called again and again while the folder grows; it never touches the source, and a
file that the trainer has deleted stays pinned.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ckptd.checkpoint import sidefiles
from ckptd.checkpoint.listing import Listing
from ckptd.errors import NoSpace, StorageFailed

FOLDER_NAME = ".ckptd"
"""The folder beside the watched checkpoints that holds pins; invisible to the globs."""
ORIGIN_NAME = ".ckptd-origin.json"
"""The file in a pin that says which folder it is a pin of."""
_FICLONE = 0x40049409
"""ioctl of linux/fs.h: make one file a reflink of another."""
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS, errno.EACCES}


class PinMethod(enum.StrEnum):
    """How a pin holds its files, best first."""

    REFLINK = "reflink"
    HARD_LINK = "hard link"
    COPY = "copy"


@dataclass(frozen=True, slots=True, kw_only=True)
class PinReport:
    """What one refresh did: files linked or copied, and those that went away before it."""

    linked: int
    vanished: tuple[str, ...]


def probe(root: Path) -> PinMethod:
    """Return the best method that works below `root`, by trying it on a file of ours.

    Raises:
        StorageFailed: nothing can be written below `root`.
    """
    folder = root / FOLDER_NAME
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        source, target = folder / f".probe-{os.getpid()}", folder / f".probed-{os.getpid()}"
        source.write_bytes(b"x" * 4096)
    except OSError as error:
        raise StorageFailed(
            f"pins cannot be written here: {error.strerror}",
            path=folder,
            hint="give ckptd write access to the watched root, or watch another one",
        ) from error
    try:
        for method in (PinMethod.REFLINK, PinMethod.HARD_LINK):
            try:
                _ACTS[method](source, target)
            except OSError:
                continue
            finally:
                target.unlink(missing_ok=True)
            return method
        return PinMethod.COPY
    finally:
        source.unlink(missing_ok=True)


def wanted(relpath: str) -> bool:
    """Return whether a file is worth pinning: weights, config, markers and what travels."""
    name = Path(relpath).name
    if name.startswith(".tmp") or name.endswith((".tmp", ".part")):
        return False
    fate = sidefiles.fate(relpath)
    if fate is sidefiles.Fate.TRAINER_STATE:
        return name == "trainer_state.json"
    return True


def refresh(source: Path, listing: Listing, pin_path: Path, method: PinMethod) -> PinReport:
    """Bring the pin at `pin_path` up to the `listing` of `source`; safe to call twice.

    Raises:
        NoSpace: a copy does not fit.
        StorageFailed: the pin folder cannot be written.
    """
    linked, vanished = 0, []
    for file in listing.files:
        if not wanted(file.relpath):
            continue
        target = pin_path / file.relpath
        how = _method_for(file.relpath, method)
        if _is_current(target, file.ino, file.size, file.mtime_ns, how):
            continue
        try:
            path = source / file.relpath
            _pin_file(path.resolve(strict=True) if file.is_link else path, target, how)
            linked += 1
        except FileNotFoundError:
            vanished.append(file.relpath)
        except OSError as error:
            raise _translated(error, pin_path, file.size) from error
    return PinReport(linked=linked, vanished=tuple(vanished))


def prune(pin_path: Path, listing: Listing) -> None:
    """Remove pinned files that `listing`, the final state of the source, no longer has."""
    names = {file.relpath for file in listing.files}
    names.add(ORIGIN_NAME)
    for path in sorted(pin_path.rglob("*"), reverse=True):
        if not path.is_dir() and path.relative_to(pin_path).as_posix() not in names:
            path.unlink(missing_ok=True)


def write_origin(pin_path: Path, origin: Mapping[str, str]) -> None:
    """Note in the pin where it comes from, so that a restart can tell.

    Raises:
        NoSpace, StorageFailed: the pin folder cannot be written.
    """
    try:
        pin_path.mkdir(parents=True, exist_ok=True)
        (pin_path / ORIGIN_NAME).write_text(json.dumps(dict(origin)))
    except OSError as error:
        raise _translated(error, pin_path, 0) from error


def read_origin(pin_path: Path) -> dict[str, str] | None:
    """Return what `write_origin` noted; None where there is nothing readable."""
    try:
        value = json.loads((pin_path / ORIGIN_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def release(pin_path: Path) -> None:
    """Remove the pin; nothing happens if it is gone already."""
    shutil.rmtree(pin_path, ignore_errors=True)


def _method_for(relpath: str, method: PinMethod) -> PinMethod:
    if method is PinMethod.HARD_LINK and sidefiles.fate(relpath) is not sidefiles.Fate.WEIGHTS:
        return PinMethod.COPY
    return method


def _is_current(target: Path, ino: int, size: int, mtime_ns: int, method: PinMethod) -> bool:
    try:
        stat = target.lstat()
    except OSError:
        return False
    if method is PinMethod.HARD_LINK:
        return stat.st_ino == ino
    return stat.st_size == size and stat.st_mtime_ns == mtime_ns


def _pin_file(source: Path, target: Path, method: PinMethod) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.pinning")
    temporary.unlink(missing_ok=True)
    try:
        try:
            _ACTS[method](source, temporary)
        except OSError as error:
            if error.errno not in _NO_LINK or method is PinMethod.COPY:
                raise
            _copy(source, temporary)
        temporary.rename(target)
    finally:
        temporary.unlink(missing_ok=True)


def _reflink(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("xb") as write:
        fcntl.ioctl(write.fileno(), _FICLONE, read.fileno())
        stat = os.fstat(read.fileno())
    os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _hard_link(source: Path, target: Path) -> None:
    os.link(source, target, follow_symlinks=False)


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target, follow_symlinks=False)
    stat = source.lstat()
    os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))


_ACTS: dict[PinMethod, Callable[[Path, Path], None]] = {
    PinMethod.REFLINK: _reflink,
    PinMethod.HARD_LINK: _hard_link,
    PinMethod.COPY: _copy,
}


def _translated(error: OSError, pin_path: Path, needed_bytes: int) -> NoSpace | StorageFailed:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        free = shutil.disk_usage(pin_path.parent).free
        return NoSpace(path=pin_path, needed_bytes=needed_bytes, free_bytes=free)
    return StorageFailed(f"cannot pin: {error.strerror}", path=pin_path)
