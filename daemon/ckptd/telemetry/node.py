"""Facts about the machine this process is on, read from the kernel when asked; nothing is kept.

Pure reading of /proc, /sys and /dev, without torch: what a GPU can do is for the runner to say.
"""

from __future__ import annotations

import os
from pathlib import Path

LOW_WATER_BYTES = 2_000_000_000
LOW_WATER_PARTS = 20
"""A twentieth of a small disk is enough."""
_CGROUPS = Path("/sys/fs/cgroup")


def memory_bytes(*, meminfo: Path = Path("/proc/meminfo"), cgroups: Path = _CGROUPS) -> int:
    """Return the memory that processes here may use together: the node's, or the cgroup's."""
    total = 0
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemTotal:"):
            total = int(line.split()[1]) * 1024
    limits = [total] if total else []
    for path in _memory_limits(cgroups):
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.isdecimal():
            limits.append(int(text))
    return min(limits, default=0)


def boot_id() -> str:
    """Return what names this start of the machine; empty where it is hidden (ProcSubset=pid).

    While it is the same, what the kernel shows of a file is what was written last, synced or not.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def free_bytes(path: Path) -> int:
    """Return what this user may still write on the disk of `path`, or of what is to hold it.

    Raises:
        OSError: the disk does not answer.
    """
    while not path.exists() and path != path.parent:
        path = path.parent
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def low_water_bytes(path: Path) -> int:
    """Return how much of the disk of `path` is better left free: 2 GB, less on a small disk.

    Raises:
        OSError: the disk does not answer.
    """
    while not path.exists() and path != path.parent:
        path = path.parent
    found = os.statvfs(path)
    return min(LOW_WATER_BYTES, found.f_blocks * found.f_frsize // LOW_WATER_PARTS)


def accelerators(devices: Path = Path("/dev")) -> tuple[str, ...]:
    """Return the accelerators whose device files are here, as torch counts them: `cuda:0`, ..."""
    files = [path for path in devices.glob("nvidia*") if path.name[len("nvidia") :].isdecimal()]
    return tuple(f"cuda:{number}" for number in range(len(files)))


def _memory_limits(cgroups: Path) -> list[Path]:
    """Return the files that may bound this process's memory, from its own cgroup upwards."""
    own = "/"
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                own = line[3:]
    except OSError:
        pass
    folder = cgroups / own.lstrip("/")
    found = [path / "memory.max" for path in (folder, *folder.parents) if cgroups in path.parents]
    return [*found, cgroups / "memory.max", cgroups / "memory/memory.limit_in_bytes"]
