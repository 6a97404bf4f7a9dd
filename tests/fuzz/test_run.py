"""The long run itself: it finds a fault that is hidden behind lines, and cuts the input down."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.checkpoint import index
from tests.fuzz import run
from tests.fuzz.targets import Target


def _reads(data: bytes, folder: Path) -> None:
    path = folder / "x.json"
    path.write_bytes(data)
    if "a/b" in index.read_json(path):
        raise ZeroDivisionError


@pytest.fixture
def fuzzer(tmp_path: Path) -> Iterator[run.Fuzzer]:
    """A run on a reader with a fault, whose time per input is not limited by a signal."""
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    target = Target(
        seeds=lambda: [b'{"a": {"b": 1}, "ccccccc": [1, 2, 3]}'], run=_reads, is_json=True
    )
    made = run.Fuzzer("planted", target, tmp_path, seed=1)
    made.begin()
    yield made
    made.close()
    signal.signal(signal.SIGALRM, before)


def test_a_planted_fault_is_found_and_cut_down(fuzzer: run.Fuzzer, tmp_path: Path) -> None:
    """The input that is saved is small, fails in the same way, and inputs that led to it are kept."""
    for _ in range(5000):
        fuzzer.step()
        if fuzzer.failures:
            break
    ((failure, data),) = fuzzer.failures.items()
    assert failure.startswith("ZeroDivisionError")
    assert len(data) <= 24  # the seed has 37
    assert [path.read_bytes() for path in (tmp_path / "planted/found").glob("*[!t]")] == [data]
    assert list((tmp_path / "planted").glob("*.input"))
