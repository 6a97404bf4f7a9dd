"""The evaluator of a job, with torch imported while verbatim bytes already move.

Importing torch takes seconds. It happens in a thread of its own, begun when the plan says that
something is computed; whoever needs a value first waits for it, everything else goes on.

A device that runs out of memory gets one batch at a time from then on, and is given up for the CPU
where the definition leaves the choice (`device: auto`); so is a device that is lost.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

from ckptd.errors import CkptdError, Retry
from ckptd.plan.blocks import Block
from ckptd.plan.sources import Sources
from ckptd.plan.stream import Evaluator


class DeviceFailed(CkptdError):
    """The device is lost, or has too little memory for a single batch."""

    retry = Retry.LATER

    def __init__(self, device: str, why: str) -> None:
        super().__init__(
            f"device {device}: {why}",
            hint="free its memory, or let ckptd choose with device: auto",
        )


class ImportedMeanwhile:
    """An `Evaluator` that is ready when torch is; its methods block, as all evaluators' do.

    `num_threads` are torch's own within one operation. Where many blocks are computed at once, more
    than one only wait for each other, and on busy cores for long. `warn` is told, in any thread,
    when the device is given up.
    """

    def __init__(
        self, *, device: str, num_threads: int, sources: Sources, warn: Callable[[str], None]
    ) -> None:
        pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="torch-import")
        self._made = pool.submit(_make, device, num_threads, sources, warn)
        pool.shutdown(wait=False)

    def read(self, blocks: Sequence[Block]) -> Any:
        """Return the blocks with their source bytes in memory.

        Raises:
            CheckFailed: the device is not there.
            DeviceFailed: it is lost or full.
            SourceChanged: a source ended early.
        """
        return self._made.result().read(blocks)

    def compute(self, staged: Any) -> list[memoryview]:
        """Return the bytes of each block `read` staged.

        Raises:
            CheckFailed: a value does not fit its dtype.
            DeviceFailed: the device is lost or full.
        """
        return self._made.result().compute(staged)

    def release(self, staged: Any) -> None:
        """Take back the memory of what `read` staged and `compute` returned."""
        self._made.result().release(staged)


class Sparing:
    """An `Evaluator` on `device` that survives what happens to the device.

    `failures` are the exceptions that mean a full or lost device, `empty_cache` gives back what the
    device's allocator keeps, `spare` makes the evaluator to go on with, where that is allowed.
    Staged batches lie in host memory: any evaluator can compute them.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        *,
        device: str,
        failures: tuple[type[Exception], ...],
        empty_cache: Callable[[], None],
        spare: Callable[[], Evaluator] | None,
        warn: Callable[[str], None],
    ) -> None:
        self._evaluator = evaluator
        self._device = device
        self._failures = failures
        self._empty_cache = empty_cache
        self._spare = spare
        self._warn = warn
        self._one_at_a_time = False
        self._alone = threading.RLock()

    def read(self, blocks: Sequence[Block]) -> Any:
        """See `Evaluator.read`."""
        return self._sparingly(lambda evaluator: evaluator.read(blocks))

    def compute(self, staged: Any) -> list[memoryview]:
        """See `Evaluator.compute`."""
        made: list[memoryview] = self._sparingly(lambda evaluator: evaluator.compute(staged))
        return made

    def release(self, staged: Any) -> None:
        """See `Evaluator.release`."""
        self._evaluator.release(staged)

    def _sparingly(self, call: Callable[[Evaluator], Any]) -> Any:
        if not self._one_at_a_time:
            try:
                return call(self._evaluator)
            except self._failures:
                self._one_at_a_time = True
        with self._alone:
            evaluator = self._evaluator
            try:
                self._empty_cache()
                return call(evaluator)
            except self._failures as error:
                why = str(error).partition("\n")[0]
                if self._spare is None:
                    raise DeviceFailed(self._device, why) from error
            self._warn(f"{self._device} is given up, the job goes on on the CPU: {why}")
            self._evaluator, self._spare = self._spare(), None
            self._one_at_a_time, self._empty_cache = False, _keep
            return call(self._evaluator)


def _keep() -> None:
    """Leave the cache of a device that is not there as it is."""


def _make(
    wanted: str, num_threads: int, sources: Sources, warn: Callable[[str], None]
) -> Evaluator:
    evaluate: Any = importlib.import_module("ckptd.plan.evaluate")
    torch: Any = importlib.import_module("torch")
    evaluate.set_threads(num_threads)
    device = evaluate.choose_device(wanted)
    made: Evaluator = evaluate.Evaluator(device=device, sources=sources)
    if device == "cpu":
        return made
    return Sparing(
        made,
        device=device,
        failures=(torch.OutOfMemoryError, torch.AcceleratorError),
        empty_cache=torch.cuda.empty_cache,
        spare=(lambda: evaluate.Evaluator(device="cpu", sources=sources))
        if wanted == "auto"
        else None,
        warn=warn,
    )
