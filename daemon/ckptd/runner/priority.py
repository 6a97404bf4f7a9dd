"""This process behind the trainer: CPU and disk priority, and a bound on its own memory.

Set at the start, before there are threads: each thread inherits what its maker had. Everything only
goes down, so that calling it twice, or under a stricter unit, does no harm.

Source: setpriority(2), ioprio_set(2) (glibc has no wrapper), getrlimit(2).
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
from dataclasses import dataclass
from typing import Literal

IoPriority = Literal["normal", "low", "idle"]

_IOPRIO_SET: dict[str, int] = {"x86_64": 251, "aarch64": 30, "riscv64": 30, "ppc64le": 273}
"""Number of the system call, by machine."""
_WHO_PROCESS = 1
_CLASS_SHIFT = 13
_VALUES: dict[str, int] = {"low": (2 << _CLASS_SHIFT) | 7, "idle": 3 << _CLASS_SHIFT}
"""Best effort's last level; the idle class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Priority:
    """What a runner may take of the node."""

    nice: int = 0
    io_priority: IoPriority = "normal"
    memory_bytes: int | None = None
    """Most memory of its own (heap and private mappings), or no bound."""


def apply(wanted: Priority) -> list[str]:
    """Set the priority of this process and return what could not be set, each as a sentence."""
    problems = []
    try:
        if wanted.nice > os.getpriority(os.PRIO_PROCESS, 0):
            os.setpriority(os.PRIO_PROCESS, 0, wanted.nice)
    except OSError as error:
        problems.append(f"CPU niceness {wanted.nice} could not be set: {error.strerror}")
    if wanted.io_priority != "normal":
        why = _set_io(_VALUES[wanted.io_priority])
        if why is not None:
            problems.append(f"disk priority {wanted.io_priority} could not be set: {why}")
    if wanted.memory_bytes is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        most = (
            wanted.memory_bytes
            if hard == resource.RLIM_INFINITY
            else min(wanted.memory_bytes, hard)
        )
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    return problems


def _set_io(value: int) -> str | None:
    """Set the I/O priority of the calling thread; return why not."""
    number = _IOPRIO_SET.get(platform.machine())
    if number is None:
        return f"unknown on {platform.machine()}"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, _WHO_PROCESS, 0, value) != 0:
        return os.strerror(ctypes.get_errno())
    return None
