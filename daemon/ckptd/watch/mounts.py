"""Which file system a path is on, as far as watching cares.

Two questions: do the writes of other hosts make events here, and does the modification time of a
folder move whenever a name comes or goes in it? The answers are looked up by the type of the mount
in /proc/self/mountinfo (format: proc(5)); what is not known for sure costs looks, never truth.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MOUNTINFO_PATH = Path("/proc/self/mountinfo")

NETWORK_TYPES = frozenset({
    "9p", "afs", "beegfs", "ceph", "cifs", "coda", "fuse", "fuseblk", "glusterfs", "gfs2", "gpfs",
    "lustre", "mmfs", "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "panfs", "prl_fs", "pvfs2",
    "smb3", "smbfs", "vboxsf", "virtiofs", "vmhgfs", "weka", "wekafs",
})  # fmt: skip
"""Types whose events tell only what this host does; `fuse.*` (object stores, sshfs) counts, too."""

EXACT_TYPES = frozenset({
    "bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "lustre", "nfs", "nfs4", "overlay",
    "ramfs", "reiserfs", "tmpfs", "xfs", "zfs",
})  # fmt: skip
"""Types where a folder's modification time moves with each name that comes or goes. Object stores
behind FUSE, FAT and some cluster file systems do not promise that: their folders are listed anew in
each scan."""

_OCTAL = re.compile(r"\\([0-7]{3})")
_OVERLAY_LAYERS = re.compile(r"(?:^|,)(?:lowerdir|upperdir)=([^,]*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSystem:
    """What watching has to know of one mount."""

    kind: str | None = None
    """The type; None where the mounts cannot be read."""
    network: str | None = None
    """The type, in words, where other hosts write, too: events alone will not do."""
    exact_mtimes: bool = False
    """Whether a folder whose modification time stands still has the names it had."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mount:
    path: Path
    kind: str
    options: str


def file_system(path: Path, *, mountinfo: str | None = None) -> FileSystem:
    """Return what `path` is on; it is absolute and without links.

    A path that does not exist yet is judged by the nearest folder that does. Where the mounts
    cannot be read, everything is taken for local, and no modification time is believed.
    """
    if mountinfo is None:
        try:
            mountinfo = MOUNTINFO_PATH.read_text("utf-8", "surrogateescape")
        except OSError:
            return FileSystem()
    mounts = list(_mounts(mountinfo))
    mount = _holding(path, mounts)
    if mount is None:
        return FileSystem()
    return FileSystem(
        kind=mount.kind, network=_network(mount, mounts), exact_mtimes=mount.kind in EXACT_TYPES
    )


def _network(mount: _Mount, mounts: list[_Mount]) -> str | None:
    """Return the network type of `mount`, also where it only overlays such a mount."""
    if mount.kind in NETWORK_TYPES or mount.kind.startswith("fuse."):
        return mount.kind
    if mount.kind == "overlay":
        for layers in _OVERLAY_LAYERS.findall(mount.options):
            for layer in layers.split(":"):
                below = _holding(Path(layer), mounts) if layer.startswith("/") else None
                if below is not None and below.kind != "overlay" and _network(below, mounts):
                    return f"overlay on {below.kind}"
    return None


def _holding(path: Path, mounts: list[_Mount]) -> _Mount | None:
    """Return the innermost of `mounts` that holds `path`; of two on one folder, the later."""
    best: _Mount | None = None
    for mount in mounts:
        if path.is_relative_to(mount.path) and (
            best is None or len(mount.path.parts) >= len(best.path.parts)
        ):
            best = mount
    return best


def _mounts(mountinfo: str) -> Iterator[_Mount]:
    for line in mountinfo.splitlines():
        left, dash, right = line.partition(" - ")
        fields, about = left.split(" "), right.split(" ")
        if dash and len(fields) >= 5:
            yield _Mount(
                path=Path(_unescaped(fields[4])),
                kind=about[0],
                options=_unescaped(about[2]) if len(about) > 2 else "",
            )


def _unescaped(text: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)
