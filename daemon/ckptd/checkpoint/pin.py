"""Pins: a second name for a checkpoint's files, so that the trainer's rotation cannot take them.

A pin is a folder `<root>/.ckptd/pins/<id>/` on the same mount as the checkpoint. Each file is
reflinked where the filesystem can (safe from deletion and from rewriting), else hard-linked (safe
from deletion; a rewrite in place shows in the file's stamp), else held open (safe from deletion
while the daemon lives) and copied once the folder is quiet or gone. `probe` tries which of these
work below a root; what fails for one file (another mount below, a file of another user) goes one
step down for that file. Under hard links, files other than weights are copied all the same:
trainers rewrite them in place. `refresh` may be called again and again while the folder grows; it
never touches the source, and a file that the trainer has deleted stays pinned, unless the folder's
weights have come in another form (a ZeRO checkpoint, whose gathered weights are written last).
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ckptd.checkpoint import layouts, open_files, origin, sidefiles, weights, whole, writer
from ckptd.checkpoint.consolidate import assets
from ckptd.checkpoint.consolidate.gathered import Family
from ckptd.checkpoint.listing import ListedFile, Listing
from ckptd.checkpoint.open_files import OpenFiles
from ckptd.errors import CheckpointUnsupported, CkptdError, StorageFailed

FOLDER_NAME = ".ckptd"
"""The folder beside the watched checkpoints that holds pins; invisible to the globs."""
NOTES = frozenset({origin.NAME, whole.NOTE_NAME})
"""Files in a pin that are our own."""
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
_VANISHED = frozenset({errno.ENOENT, errno.ESTALE})
_COPY_BYTES = 1 << 20
_MARKERS = frozenset({"trainer_state.json", "training_args.bin", "latest"})
"""Trainer state by which a layout and its end are told; never published."""


class PinMethod(enum.StrEnum):
    """How a pin holds its files, best first."""

    REFLINK = "reflink"
    HARD_LINK = "hard link"
    OPEN_FILES = "open files"
    COPY = "copy"


@dataclass(frozen=True, slots=True, kw_only=True)
class PinReport:
    """What one refresh did: files linked or copied, those that went away before it, and those that
    are neither that nor held open and wait for the copy."""

    linked: int
    vanished: tuple[str, ...]
    left: tuple[str, ...] = ()


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
        return PinMethod.OPEN_FILES if open_files.works(folder) else PinMethod.COPY
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


def refresh(
    source: Path,
    listing: Listing,
    pin_path: Path,
    method: PinMethod,
    *,
    held: OpenFiles | None = None,
    early: bool = False,
) -> PinReport:
    """Bring the pin at `pin_path` up to the `listing` of `source`; safe to call twice.

    Weights that can be neither cloned nor linked are kept open in `held` where this is `early`, and
    else copied, from there if the trainer has deleted them since. Where config and tokenizer may be
    those of the run's folder, these are copied too.

    Raises:
        CheckpointUnsupported: this user may not read a file that must be copied.
        NoSpace: a copy does not fit.
        StorageFailed: the pin folder cannot be written.
    """
    family = layouts.family_of(source.name, listing)
    work = _Refresh(source, pin_path, method, held=held if held is not None else OpenFiles(most=0))
    for file in listing.files:
        if wanted(file.relpath, family):
            is_weights = _is_weights(file.relpath, family)
            work.take(file, is_weights=is_weights, holding=early and is_weights)
    if family is None:
        _drop_unwanted(pin_path)
    if family is not None or weights.CONFIG_NAME not in listing.by_name:
        _pin_run_files(listing.path.parent, pin_path)
    return PinReport(linked=work.linked, vanished=tuple(work.vanished), left=tuple(work.left))


def materialize(pin_path: Path, held: OpenFiles) -> None:
    """Copy into the pin what is only held open, and let go of it: the source is gone.

    Raises:
        NoSpace, StorageFailed: a copy could not be written.
    """
    for relpath in held.names(pin_path):
        path, target = held.path_of(pin_path, relpath), pin_path / relpath
        assert path is not None
        try:
            _pin_file(path, target, PinMethod.COPY)
        except OSError as error:
            if error.errno == errno.ESTALE:  # of NFS, where another host has deleted it
                continue
            raise _translated(error, target, path.stat().st_size) from error
    held.release(pin_path)


def prune(pin_path: Path, listing: Listing) -> None:
    """Remove pinned files that `listing`, the final state of the source, no longer has."""
    names = {file.relpath for file in listing.files} | NOTES
    for path in _pinned(pin_path):
        if path.relative_to(pin_path).as_posix() not in names:
            path.unlink(missing_ok=True)


def lacking(pin_path: Path, listing: Listing) -> tuple[str, ...]:
    """Return the files of `listing` that are worth pinning and are not, or not so, in the pin."""
    family = layouts.family_of(listing.path.name, listing)
    files = (file for file in listing.files if wanted(file.relpath, family))
    return tuple(file.relpath for file in files if not _is_pinned(pin_path / file.relpath, file))


def release(pin_path: Path) -> None:
    """Remove the pin, and last of it what says whose it is; nothing happens if it is gone already."""
    with contextlib.suppress(OSError):
        for path in pin_path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != origin.NAME:
                path.unlink(missing_ok=True)
    shutil.rmtree(pin_path, ignore_errors=True)


def _target_of(path: Path, file: ListedFile) -> Path:
    """Return where the link at `path` leads, if that is still the file that was listed."""
    target = path.resolve(strict=True)
    stat = target.stat()
    if (stat.st_dev, stat.st_ino) != (file.dev, file.ino):
        raise FileNotFoundError(errno.ENOENT, "the link leads elsewhere now", str(path))
    return target


class _Refresh:
    """One refresh of one pin: what to do with each file, and what came of it."""

    def __init__(self, source: Path, pin_path: Path, method: PinMethod, *, held: OpenFiles) -> None:
        self._source = source
        self._pin_path = pin_path
        self._method = method
        self._held = held
        self.linked = 0
        self.vanished: list[str] = []
        self.left: list[str] = []

    def take(self, file: ListedFile, *, is_weights: bool, holding: bool) -> None:
        """Pin one file, unless it is already; `holding` keeps it open where it cannot be linked."""
        target = self._pin_path / file.relpath
        how = self._method
        if how is PinMethod.HARD_LINK and not is_weights:
            how = PinMethod.COPY
        if _is_current(target, file, how):
            return
        try:
            self._act(file, target, how, holding=holding)
        except OSError as error:
            if error.errno not in _VANISHED:
                raise _translated(error, target, file.size) from error
            self._from_held(file, target)

    def _act(self, file: ListedFile, target: Path, how: PinMethod, *, holding: bool) -> None:
        path = self._source / file.relpath
        path = _target_of(path, file) if file.is_link else path
        if how in (PinMethod.REFLINK, PinMethod.HARD_LINK):
            try:
                _pin_file(path, target, how)
            except OSError as error:
                if error.errno not in _NO_LINK:
                    raise
            else:
                self.linked += 1
                return
        if holding:
            if how is PinMethod.COPY or not self._held.hold(self._pin_path, file.relpath, path):
                self.left.append(file.relpath)
            return
        _pin_file(path, target, PinMethod.COPY)
        self.linked += 1

    def _from_held(self, file: ListedFile, target: Path) -> None:
        """Pin a file that is gone from what is held of it."""
        path = self._held.path_of(self._pin_path, file.relpath)
        if path is None:
            self.vanished.append(file.relpath)
            return
        try:
            _pin_file(path, target, PinMethod.COPY)
        except OSError as error:
            if error.errno not in _VANISHED:
                raise _translated(error, target, file.size) from error
            self.vanished.append(file.relpath)
        else:
            self.linked += 1


def _is_weights(relpath: str, family: Family | None) -> bool:
    return sidefiles.fate(relpath) is sidefiles.Fate.WEIGHTS or (
        family is not None and family.holds(relpath)
    )


def _is_current(target: Path, file: ListedFile, method: PinMethod) -> bool:
    if method is PinMethod.HARD_LINK:
        with contextlib.suppress(OSError):
            stat = target.lstat()
            if (stat.st_dev, stat.st_ino) == (file.dev, file.ino):
                return True
    return _is_pinned(target, file)


def _is_pinned(target: Path, file: ListedFile) -> bool:
    """Whether the pinned file is the one that was listed, by its size and time."""
    try:
        stat = target.lstat()
    except OSError:
        return False
    return (stat.st_size, stat.st_mtime_ns) == (file.size, file.mtime_ns)


def _pin_run_files(run: Path, pin_path: Path) -> None:
    """Copy what of the model lies in the run's folder; what went there since stays as it was.

    Where there is nothing the folder in the pin says so: what comes later is not of this save.
    """
    writer.make_folder(pin_path / assets.RUN_NAME)
    for path in assets.in_run(run):
        target = pin_path / assets.RUN_NAME / path.name
        try:
            stat, known = path.stat(), target.stat() if target.exists() else None
            if known is None or (stat.st_size, stat.st_mtime_ns) != (
                known.st_size,
                known.st_mtime_ns,
            ):
                _pin_file(path, target, PinMethod.COPY)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise _translated(error, target, 0) from error


def _drop_unwanted(pin_path: Path) -> None:
    """Remove what was pinned while the folder looked like another layout (shards of ZeRO)."""
    for path in _pinned(pin_path):
        if not wanted(path.relative_to(pin_path).as_posix()):
            path.unlink(missing_ok=True)


def _pinned(pin_path: Path) -> list[Path]:
    """Return the files that a pin has of the checkpoint itself, and our notes."""
    return [
        path
        for path in sorted(pin_path.rglob("*"), reverse=True)
        if path.relative_to(pin_path).parts[0] != assets.RUN_NAME and not path.is_dir()
    ]


def _pin_file(source: Path, target: Path, method: PinMethod) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.pinning")
    temporary.unlink(missing_ok=True)
    try:
        _ACTS[method](source, temporary)
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
    """Open the file itself: a link put in its place since the listing is not followed.

    The links of /proc are: what is held open is reached through them, deleted or not.
    """
    follow = 0 if source.is_relative_to("/proc/self/fd") else os.O_NOFOLLOW
    return os.fdopen(os.open(source, os.O_RDONLY | follow), "rb")


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
