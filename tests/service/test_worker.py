"""What a job is given that has lost runners before."""

from __future__ import annotations

import pytest

from ckptd.errors import Retry
from ckptd.jobs.failing import RUNNER_DIED, Failure
from ckptd.service import worker


@pytest.mark.parametrize(
    ("crashes", "budget"), [(0, 256_000_000), (1, 128_000_000), (2, 64_000_000), (9, 16_000_000)]
)
def test_a_job_that_crashed_its_runner_gets_less_memory(crashes: int, budget: int) -> None:
    """Half the bytes in flight for each crash, down to what one block needs; kills change nothing."""
    failure = Failure(code=RUNNER_DIED, message="x", retry=Retry.LATER, losses=9, crashes=crashes)
    assert worker._budget(256_000_000, failure) == budget


def test_a_budget_that_is_small_already_stays() -> None:
    """Less than the least is never given, and never more than the settings say."""
    failure = Failure(code=RUNNER_DIED, message="x", retry=Retry.LATER, crashes=3)
    assert worker._budget(10_000_000, failure) == 10_000_000
    assert worker._budget(10_000_000, None) == 10_000_000
