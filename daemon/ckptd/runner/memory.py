"""How much memory a job will take at most, by the numbers the stream obeys, and how much it took.

A fixed part for the interpreter and what is imported, a part for the headers (plans of 60,000
tensors are not free), and the buffers in flight, which the byte budget bounds. The model's size is
not in it. The fixed parts were measured on Linux with CPython 3.11 and rounded up.
"""

from __future__ import annotations

import importlib.util
import os
import resource
from pathlib import Path

from ckptd.errors import NoMemory
from ckptd.plan import blocks, transfer
from ckptd.plan.plan import Computed, Plan

INTERPRETER_BYTES = 75_000_000
"""Python with ckptd, before a checkpoint is opened."""
TORCH_BYTES = 260_000_000
"""torch on the CPU, imported and used once; a CUDA context takes more, outside of this."""
ALLOCATOR_BYTES = 64_000_000
"""What the C library keeps of torch's temporary values between blocks."""
HUB_BYTES = 30_000_000
"""The Hub's client, connected."""
XET_BYTES = 350_000_000
"""hf_xet while it sends new content: its own buffers, which ckptd's budget does not reach."""
TENSOR_BYTES = 2_000
"""Headers, draft, plan and index, for each tensor."""


def planned_peak_bytes(plan: Plan, *, byte_budget: int, num_threads: int, push: bool) -> int:
    """Return the resident memory that executing `plan` will take at most, in bytes.

    Where it is pushed, Xet is counted in unless it is switched off or not installed.
    """
    num_tensors = sum(len(shard.tensors) for shard in plan.shards)
    total = INTERPRETER_BYTES + num_tensors * TENSOR_BYTES
    total += num_threads * transfer.BUFFER_BYTES
    if push:
        total += HUB_BYTES + (XET_BYTES if _has_xet() else 0)
    if plan.needs_torch:
        in_flight = _in_flight_bytes(plan, byte_budget)
        total += TORCH_BYTES + in_flight + min(in_flight, ALLOCATOR_BYTES)
    return total


def used_peak_bytes() -> int:
    """Return the most resident memory this program had; getrusage counts its parent's, too."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def is_exhaustion(error: BaseException) -> bool:
    """Say whether `error` is torch's CPU allocator that got no memory.

    It raises a plain RuntimeError: its text is the only mark it bears (c10/core/impl/alloc_cpu.cpp).
    """
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def exhausted(error: BaseException) -> NoMemory:
    """Return what ran out, with the bound of this process."""
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    what = (
        " ".join(str(error).split()).partition("DefaultCPUAllocator: ")[2] or "an allocation failed"
    )
    return NoMemory(what, limit_bytes=None if limit == resource.RLIM_INFINITY else limit)


def _has_xet() -> bool:
    disabled = os.environ.get("HF_HUB_DISABLE_XET", "").upper() in {"1", "ON", "YES", "TRUE"}
    return not disabled and importlib.util.find_spec("hf_xet") is not None


def _in_flight_bytes(plan: Plan, byte_budget: int) -> int:
    """Return what computed blocks may cost at once: what they cost together, up to the budget."""
    total = 0
    for shard in plan.shards:
        for batch in blocks.batches(s for s in shard.segments if isinstance(s, Computed)):
            total += sum(block.cost_bytes for block in batch)
            if total >= byte_budget:
                return byte_budget
    return total
