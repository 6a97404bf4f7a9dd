"""The evaluator of a job, with torch imported while verbatim bytes already move.

Importing torch takes seconds. It happens in a thread of its own, begun when the plan says that
something is computed; whoever needs a value first waits for it, everything else goes on.
"""

from __future__ import annotations

import concurrent.futures
import importlib
from collections.abc import Sequence
from typing import Any

from ckptd.plan.blocks import Block
from ckptd.plan.sources import Sources
from ckptd.plan.stream import Evaluator


class ImportedMeanwhile:
    """An `Evaluator` that is ready when torch is; its methods block, as all evaluators' do.

    `num_threads` are torch's own within one operation. Where many blocks are computed at once, more
    than one only wait for each other, and on busy cores for long.
    """

    def __init__(self, *, device: str, num_threads: int, sources: Sources) -> None:
        pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="torch-import")
        self._made = pool.submit(_make, device, num_threads, sources)
        pool.shutdown(wait=False)

    def read(self, blocks: Sequence[Block]) -> Any:
        """Return the blocks with their source bytes in memory.

        Raises:
            CheckFailed: the device is not there.
            SourceChanged: a source ended early.
        """
        return self._made.result().read(blocks)

    def compute(self, staged: Any) -> list[memoryview]:
        """Return the bytes of each block `read` staged.

        Raises:
            CheckFailed: a value does not fit its dtype.
        """
        return self._made.result().compute(staged)

    def release(self, staged: Any) -> None:
        """Take back the memory of what `read` staged and `compute` returned."""
        self._made.result().release(staged)


def _make(device: str, num_threads: int, sources: Sources) -> Evaluator:
    evaluate: Any = importlib.import_module("ckptd.plan.evaluate")
    evaluate.set_threads(num_threads)
    made: Evaluator = evaluate.Evaluator(device=evaluate.choose_device(device), sources=sources)
    return made
