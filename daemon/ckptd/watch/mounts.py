"""Which file system a path is on, as far as watching cares: do other hosts' writes make events?"""

from __future__ import annotations

import re
from pathlib import Path

MOUNTINFO_PATH = Path("/proc/self/mountinfo")

NETWORK_TYPES = frozenset({
    "9p", "afs", "beegfs", "ceph", "cifs", "fuse", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs",
    "nfs4", "ocfs2", "orangefs", "panfs", "smb3", "smbfs", "virtiofs", "weka", "wekafs",
})  # fmt: skip
"""Types whose events tell only what this host does; `fuse.*` (object stores, sshfs) counts, too."""

_OCTAL = re.compile(r"\\([0-7]{3})")


def network_type(path: Path, *, mountinfo: str | None = None) -> str | None:
    """Return the type of the network file system that `path` is on; None where it is local.

    A path that does not exist yet is judged by the nearest folder that does. Where the mounts
    cannot be read, everything is taken for local.
    """
    if mountinfo is None:
        try:
            mountinfo = MOUNTINFO_PATH.read_text("utf-8", "surrogateescape")
        except OSError:
            return None
    kind = file_system_type(path.resolve(), mountinfo)
    is_network = kind is not None and (kind in NETWORK_TYPES or kind.startswith("fuse."))
    return kind if is_network else None


def file_system_type(path: Path, mountinfo: str) -> str | None:
    """Return the type of the mount that holds the absolute `path` (format: proc(5), mountinfo)."""
    best: tuple[int, str] | None = None
    for line in mountinfo.splitlines():
        left, dash, right = line.partition(" - ")
        fields = left.split(" ")
        if not dash or len(fields) < 5:
            continue
        mount_path = Path(_OCTAL.sub(lambda match: chr(int(match[1], 8)), fields[4]))
        # Of two mounts on one folder the later hides the earlier.
        depth = len(mount_path.parts)
        if path.is_relative_to(mount_path) and (best is None or depth >= best[0]):
            best = (depth, right.split(" ")[0])
    return best[1] if best else None
