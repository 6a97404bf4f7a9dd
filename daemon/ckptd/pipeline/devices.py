"""How much memory a device has, without torch: /proc and cgroup for the CPU, NVML for GPUs."""

from __future__ import annotations

import ctypes

from ckptd.telemetry import node


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
        return node.memory_bytes() or None
    kind, _, number = device.partition(":")
    if kind == "cuda" and (not number or number.isdigit()):
        return _gpu_bytes(int(number or 0))
    return None


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
