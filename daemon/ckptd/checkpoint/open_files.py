"""Open files as pins: a descriptor keeps the bytes of a file that somebody deletes.

For files that can be neither cloned nor linked (another mount, a file of another user under
`fs.protected_hardlinks`, file systems without links). Unlike the other ways this one ends with the
process: what is held is copied as soon as the folder is quiet or gone. On NFS a file that another
host deletes is lost all the same; reading it then fails and the checkpoint counts as vanished.
"""

from __future__ import annotations

import errno
import os
import resource
import threading
from dataclasses import dataclass
from pathlib import Path

_SHARE = 0.5
"""Of the descriptors this process may have; the rest is for everything else."""
_MOST = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    fd: int
    dev: int
    ino: int


class OpenFiles:
    """Descriptors held for pins, by the pin's folder and the file's name in it; thread-safe."""

    def __init__(self, *, most: int | None = None) -> None:
        """Hold at most `most` files, by default half of what the process may open."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = min(_MOST, int(soft * _SHARE)) if most is None else most
        self._held: dict[Path, dict[str, _Held]] = {}
        self._lock = threading.Lock()

    def hold(self, pin_path: Path, relpath: str, source: Path) -> bool:
        """Keep the file at `source` open in place of one held by that name; False: too many are.

        Raises:
            OSError: it is gone, a link, or may not be read.
        """
        stat = source.lstat()
        known = self._held.get(pin_path, {}).get(relpath)
        if known is not None and (known.dev, known.ino) == (stat.st_dev, stat.st_ino):
            return True
        with self._lock:
            if known is None and sum(map(len, self._held.values())) >= self._most:
                return False
            fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            stat = os.fstat(fd)
            held = _Held(fd=fd, dev=stat.st_dev, ino=stat.st_ino)
            self._held.setdefault(pin_path, {})[relpath] = held
            if known is not None:
                os.close(known.fd)
        return True

    def path_of(self, pin_path: Path, relpath: str) -> Path | None:
        """Return where a held file can be opened, deleted or not; None where it is not held."""
        held = self._held.get(pin_path, {}).get(relpath)
        return None if held is None else Path(f"/proc/self/fd/{held.fd}")

    def names(self, pin_path: Path) -> tuple[str, ...]:
        """Return the names of what is held for a pin."""
        return tuple(self._held.get(pin_path, {}))

    def release(self, pin_path: Path) -> None:
        """Close what is held for a pin; nothing happens where nothing is."""
        with self._lock:
            for held in self._held.pop(pin_path, {}).values():
                os.close(held.fd)

    def deleted_bytes(self) -> int:
        """Return the bytes on disk that exist only because they are held: their names are gone."""
        with self._lock:
            stats = [os.fstat(one.fd) for held in self._held.values() for one in held.values()]
        by_inode = {(s.st_dev, s.st_ino): s.st_blocks * 512 for s in stats if s.st_nlink == 0}
        return sum(by_inode.values())


def works(folder: Path) -> bool:
    """Return whether a file in `folder` can still be read through /proc after it was deleted."""
    path = folder / f".probe-open-{os.getpid()}"
    try:
        path.write_bytes(b"x" * 64)
        fd = os.open(path, os.O_RDONLY)
        try:
            path.unlink()
            return Path(f"/proc/self/fd/{fd}").read_bytes() == b"x" * 64
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE, errno.EACCES, errno.EPERM, errno.EROFS):
            return False
        raise
    finally:
        path.unlink(missing_ok=True)
