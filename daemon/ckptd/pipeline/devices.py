"""How much memory a device has, without torch: /proc and cgroup for the CPU, NVML for GPUs."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path


class _Memory(ctypes.Structure):
    """`nvmlMemory_t` of the NVIDIA management library: bytes."""

    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


def memory_bytes(device: str) -> int | None:
    """Return the memory of `cpu`, `cuda` or `cuda:N` in bytes; None if there is no such device."""
    if device == "cpu":
        return _host_bytes()
    kind, _, number = device.partition(":")
    if kind == "cuda" and (not number or number.isdigit()):
        return _gpu_bytes(int(number or 0))
    return None


def _host_bytes() -> int | None:
    limits = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        total = next(line for line in lines if line.startswith("MemTotal:"))
        limits.append(int(total.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits, default=None)


def _gpu_bytes(number: int) -> int | None:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle, memory = ctypes.c_void_p(), _Memory()
    if nvml.nvmlInit_v2() != 0:
        return None
    try:
        if nvml.nvmlDeviceGetHandleByIndex_v2(number, ctypes.byref(handle)) != 0:
            return None
        if nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) != 0:
            return None
        return int(memory.total)
    finally:
        nvml.nvmlShutdown()
