"""How much memory a job will take at most: planned from the same numbers the stream obeys.

A fixed part for the interpreter and what is imported, a part for the headers (plans of 60,000
tensors are not free), and the buffers in flight, which the byte budget bounds. The model's size is
not in it. The fixed parts were measured on Linux, CPython 3.11 to 3.13, and rounded up.
"""

from __future__ import annotations

from ckptd.plan import blocks, buffers, transfer
from ckptd.plan.plan import Computed, Plan

INTERPRETER_BYTES = 75_000_000
"""Python with ckptd, before a checkpoint is opened."""
TORCH_BYTES = 260_000_000
"""torch on the CPU, imported and used once; a CUDA context takes more, outside of this."""
HUB_BYTES = 60_000_000
"""The Hub's client, connected."""
TENSOR_BYTES = 4_000
"""Headers, draft, plan and index, for each tensor."""


def planned_peak_bytes(plan: Plan, *, byte_budget: int, num_threads: int, push: bool) -> int:
    """Return the resident memory that executing `plan` will take at most, in bytes."""
    num_tensors = sum(len(shard.tensors) for shard in plan.shards)
    total = INTERPRETER_BYTES + num_tensors * TENSOR_BYTES
    total += num_threads * transfer.BUFFER_BYTES
    if push:
        total += HUB_BYTES
    if plan.needs_torch:
        in_flight = _in_flight_bytes(plan, byte_budget)
        total += TORCH_BYTES + in_flight + min(in_flight, buffers.MAX_IDLE_BYTES)
    return total


def _in_flight_bytes(plan: Plan, byte_budget: int) -> int:
    """Return what computed blocks may cost at once: what they cost together, up to the budget."""
    total = 0
    for shard in plan.shards:
        for batch in blocks.batches(s for s in shard.segments if isinstance(s, Computed)):
            total += sum(block.cost_bytes for block in batch)
            if total >= byte_budget:
                return byte_budget
    return total
