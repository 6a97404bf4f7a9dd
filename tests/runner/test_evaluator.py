"""A device that is full or lost: one batch at a time, then the CPU, or a failure that says so."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from ckptd.errors import Retry
from ckptd.jobs.job import State
from ckptd.plan import evaluate
from ckptd.runner import evaluator as runner_evaluator
from ckptd.runner.evaluator import DeviceFailed, Sparing
from tests.runner.conftest import tensors, weights

FAILURES = (torch.OutOfMemoryError, torch.AcceleratorError)
COMPUTED = "- cast: {dtype: float16}\n- reshard: {max_shard_size: 4KB}"


class Full:
    """An evaluator on the CPU whose memory is as full as `fits` says, asked with each batch."""

    def __init__(self, inner: evaluate.Evaluator, fits: Callable[[int], bool]) -> None:
        self._inner = inner
        self._fits = fits
        self._lock = threading.Lock()
        self.at_once = self.calls = 0

    def read(self, blocks):
        return self._inner.read(blocks)

    def compute(self, staged):
        with self._lock:
            self.calls += 1
            self.at_once += 1
        try:
            if not self._fits(self.at_once):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return self._inner.compute(staged)
        finally:
            with self._lock:
                self.at_once -= 1

    def release(self, staged):
        self._inner.release(staged)


@pytest.fixture
def full(monkeypatch):
    """Jobs whose device is full as `full.fits` says; `full.caches` counts emptied caches."""

    class Setup:
        fits = staticmethod(lambda at_once: True)
        wanted = "auto"
        caches = 0

    setup = Setup()

    def make(wanted, num_threads, sources, warn):
        def count() -> None:
            setup.caches += 1

        return Sparing(
            Full(evaluate.Evaluator(device="cpu", sources=sources), setup.fits),
            device="cuda",
            failures=FAILURES,
            empty_cache=count,
            spare=(lambda: evaluate.Evaluator(device="cpu", sources=sources))
            if setup.wanted == "auto"
            else None,
            warn=warn,
        )

    monkeypatch.setattr(runner_evaluator, "_make", make)
    return setup


def _check(bench) -> None:
    made = weights(bench.out)
    assert all(
        np.array_equal(made[name], value.astype(np.float16)) for name, value in tensors().items()
    )


def test_a_full_device_gets_one_batch_at_a_time(full, bench) -> None:
    """What did not fit beside others is computed alone, after the cache was emptied."""
    tries = iter([False])
    full.fits = lambda at_once: next(tries, at_once == 1)
    full.wanted = "cuda"
    assert bench.run(COMPUTED, num_threads=3).state is State.HELD
    assert full.caches >= 1
    _check(bench)


def test_a_device_that_is_too_small_is_given_up_for_the_cpu(full, bench) -> None:
    """device: auto goes on where there is room, says so once, and gives the same bytes."""
    full.fits = lambda at_once: False
    assert bench.run(COMPUTED).state is State.HELD
    warnings = [r.text for r in bench.reports if getattr(r, "type", "") == "warning"]
    (text,) = (text for text in warnings if "the job goes on on the CPU" in text)
    assert text.endswith("CUDA out of memory. Tried to allocate 2.00 GiB")
    _check(bench)


def test_a_device_that_is_asked_for_by_name_is_not_replaced(full, bench) -> None:
    """device: cuda fails with the figures, and is tried again later."""
    full.fits = lambda at_once: False
    full.wanted = "cuda"
    with pytest.raises(DeviceFailed, match=r"Tried to allocate 2\.00 GiB"):
        bench.run(COMPUTED)
    assert DeviceFailed.retry is Retry.LATER
