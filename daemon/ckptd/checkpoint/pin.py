"""Pins: a second name for a checkpoint's files, so that the trainer's rotation cannot take them.

A pin is a folder `<root>/.ckptd/pins/<id>/` on the same mount as the checkpoint. Each file is
reflinked where the filesystem can (safe from deletion and from rewriting), else hard-linked (safe
from deletion; a rewrite in place shows in the file's stamp), else copied once the folder is quiet.
Under hard links, files other than weights are copied all the same: trainers rewrite them in place.
`refresh` may be called again and again while the folder grows; it never touches the source, and a
file that the trainer has deleted stays pinned.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ckptd.checkpoint import layouts, sidefiles, writer
from ckptd.checkpoint.consolidate.gathered import Family
from ckptd.checkpoint.listing import ListedFile, Listing
from ckptd.errors import CheckpointUnsupported, CkptdError, StorageFailed

FOLDER_NAME = ".ckptd"
"""The folder beside the watched checkpoints that holds pins; invisible to the globs."""
ORIGIN_NAME = ".ckptd-origin.json"
"""The file in a pin that says which folder it is a pin of."""
_FICLONE = 0x40049409
"""ioctl of linux/fs.h: make one file a reflink of another."""
_NO_LINK = frozenset(
    {
        errno.EXDEV,
        errno.EPERM,
        errno.EACCES,
        errno.EOPNOTSUPP,
        errno.ENOSYS,
        errno.ENOTTY,
        errno.EINVAL,
        errno.EMLINK,
    }
)
_COPY_BYTES = 1 << 20
_MARKERS = frozenset({"trainer_state.json", "training_args.bin", "latest"})
"""Trainer state by which a layout and its end are told; never published."""


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
        _sweep_probes(folder)
        mine = f"{os.uname().nodename}-{os.getpid()}"
        source, target = folder / f".probe-{mine}", folder / f".probed-{mine}"
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


def _sweep_probes(folder: Path) -> None:
    """Remove what a probe left whose process was killed on this host."""
    for path in folder.glob(f".prob*-{os.uname().nodename}-*"):
        pid = path.name.rpartition("-")[2]
        if not Path(f"/proc/{pid}").exists():
            path.unlink(missing_ok=True)


def wanted(relpath: str, family: Family | None = None) -> bool:
    """Return whether a file is worth pinning: weights, config, markers and what travels.

    `family` knows the weights of its layout where they are named like the trainer's state.
    """
    name = Path(relpath).name
    if name.startswith(".tmp") or name.endswith((".tmp", ".part")):
        return False
    if family is not None and family.holds(relpath):
        return True
    fate = sidefiles.fate(relpath)
    if fate is sidefiles.Fate.TRAINER_STATE:
        return name in _MARKERS
    return True


def refresh(source: Path, listing: Listing, pin_path: Path, method: PinMethod) -> PinReport:
    """Bring the pin at `pin_path` up to the `listing` of `source`; safe to call twice.

    Raises:
        CheckpointUnsupported: this user may not read a file that must be copied.
        NoSpace: a copy does not fit.
        StorageFailed: the pin folder cannot be written.
    """
    linked, vanished = 0, []
    family = layouts.family_of(source.name, listing)
    for file in listing.files:
        if not wanted(file.relpath, family):
            continue
        target = pin_path / file.relpath
        how = _method_for(file.relpath, method, family)
        if _is_current(target, file.ino, file.size, file.mtime_ns, how):
            continue
        try:
            path = source / file.relpath
            _pin_file(_target_of(path, file) if file.is_link else path, target, how)
            linked += 1
        except FileNotFoundError:
            vanished.append(file.relpath)
        except OSError as error:
            raise _translated(error, target, file.size) from error
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
    writer.make_folder(pin_path)
    writer.write_file(pin_path / ORIGIN_NAME, json.dumps(dict(origin)).encode())


def read_origin(pin_path: Path) -> dict[str, str] | None:
    """Return what `write_origin` noted; None where there is nothing readable."""
    try:
        value = json.loads((pin_path / ORIGIN_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def release(pin_path: Path) -> None:
    """Remove the pin, and last of it what says whose it is; nothing happens if it is gone already."""
    with contextlib.suppress(OSError):
        for path in pin_path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != ORIGIN_NAME:
                path.unlink(missing_ok=True)
    shutil.rmtree(pin_path, ignore_errors=True)


def _target_of(path: Path, file: ListedFile) -> Path:
    """Return where the link at `path` leads, if that is still the file that was listed."""
    target = path.resolve(strict=True)
    stat = target.stat()
    if (stat.st_dev, stat.st_ino) != (file.dev, file.ino):
        raise FileNotFoundError(errno.ENOENT, "the link leads elsewhere now", str(path))
    return target


def _method_for(relpath: str, method: PinMethod, family: Family | None) -> PinMethod:
    is_weights = sidefiles.fate(relpath) is sidefiles.Fate.WEIGHTS or (
        family is not None and family.holds(relpath)
    )
    return PinMethod.COPY if method is PinMethod.HARD_LINK and not is_weights else method


def _is_current(target: Path, ino: int, size: int, mtime_ns: int, method: PinMethod) -> bool:
    try:
        stat = target.lstat()
    except OSError:
        return False
    if method is PinMethod.HARD_LINK and stat.st_ino == ino:
        return True
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
    with _opened(source) as read, target.open("xb") as write:
        # The times of before: a source that changes meanwhile must show as changed afterwards.
        stat = os.fstat(read.fileno())
        fcntl.ioctl(write.fileno(), _FICLONE, read.fileno())
    os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _hard_link(source: Path, target: Path) -> None:
    os.link(source, target, follow_symlinks=False)


def _copy(source: Path, target: Path) -> None:
    with _opened(source) as read, target.open("wb") as write:
        stat = os.fstat(read.fileno())
        shutil.copyfileobj(read, write, _COPY_BYTES)
    os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _opened(source: Path) -> BinaryIO:
    """Open the file itself: a link put in its place since the listing is not followed."""
    return os.fdopen(os.open(source, os.O_RDONLY | os.O_NOFOLLOW), "rb")


_ACTS: dict[PinMethod, Callable[[Path, Path], None]] = {
    PinMethod.REFLINK: _reflink,
    PinMethod.HARD_LINK: _hard_link,
    PinMethod.COPY: _copy,
}


def _translated(error: OSError, target: Path, needed_bytes: int) -> CkptdError:
    ours = error.filename is not None and Path(error.filename).is_relative_to(target.parent)
    if error.errno == errno.EACCES and error.filename is not None and not ours:
        return CheckpointUnsupported(
            "may not be read by this user",
            path=error.filename,
            hint="safetensors 0.8 writes files of mode 0600: run ckptd as the training user",
        )
    return writer.translated(error, target, needed_bytes)
