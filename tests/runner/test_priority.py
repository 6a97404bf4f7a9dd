"""A runner stays behind the trainer: what it is told to leave, it leaves."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from ckptd import errors
from ckptd.jobs import progress
from ckptd.jobs.failing import Failure
from ckptd.jobs.job import JobSpec, Outcome
from ckptd.runner import __main__ as runner_main
from ckptd.runner import memory

SPEC = JobSpec(
    job_id="1", definition={}, pipeline="p", source_path="/s", pinned_path="/p", layout="hf",
    run="r", name="n", step=1, content_digest="c", pipeline_digest="d", target="", created_at=0.0,
)  # fmt: skip
_IOPRIO_GET = {"x86_64": 252, "aarch64": 31}


def _ready(*options: str) -> subprocess.Popen[bytes]:
    """Start a runner as the daemon does and wait until it takes a job."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ckptd.runner", *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert isinstance(progress.decode(process.stdout.readline()), progress.Ready)
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_limits_reach_the_process() -> None:
    """Niceness, disk priority and memory bound are those of the options, before the first job."""
    process = _ready("--nice=7", "--io-priority=idle", "--memory-bytes=3000000000")
    try:
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == 7
        assert resource.prlimit(process.pid, resource.RLIMIT_DATA)[0] == 3_000_000_000
        number = _IOPRIO_GET.get(platform.machine())
        if number is not None:
            assert ctypes.CDLL(None).syscall(number, 1, process.pid) >> 13 == 3  # the idle class
        threads = Path(f"/proc/{process.pid}/task").iterdir()
        assert {os.getpriority(os.PRIO_PROCESS, int(thread.name)) for thread in threads} == {7}
    finally:
        _end(process)


def test_priority_only_goes_down() -> None:
    """A unit that is nicer already stays so."""
    program = (
        "import os; os.nice(12)\n"
        "from ckptd.runner import priority\n"
        "assert priority.apply(priority.Priority(nice=5, io_priority='low')) == []\n"
        "print(os.getpriority(os.PRIO_PROCESS, 0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "12\n"


@pytest.mark.parametrize("what", ["bytearray(2_000_000_000)", "torch.empty(500_000_000)"])
def test_memory_bound_bites_in_words(what: str) -> None:
    """More than the bound is refused to Python and to torch, and told with the figure."""
    program = (
        "import torch\n"
        "from ckptd.runner import memory, priority\n"
        "priority.apply(priority.Priority(memory_bytes=1_000_000_000))\n"
        "try:\n"
        f"    {what}\n"
        "except (MemoryError, RuntimeError) as error:\n"
        "    assert isinstance(error, MemoryError) or memory.is_exhaustion(error)\n"
        "    print(memory.exhausted(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.startswith("out of memory (1,000,000,000 bytes): "), done.stderr
    assert "raise runner_memory" in done.stdout


def test_a_job_out_of_memory_waits_for_a_person() -> None:
    """The same job would fail the same way: it waits, visibly, and is not given up."""
    failure = Failure.of(memory.exhausted(MemoryError()))
    assert (failure.code, failure.retry) == ("NoMemory", errors.Retry.WAIT)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), "NoMemory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 GB"), "NoMemory"),
        (ValueError("odd"), "ValueError"),
        (
            ExceptionGroup("", [MemoryError(), errors.CheckFailed("no", check="verify")]),
            "CheckFailed",
        ),
    ],
)
async def test_a_job_ends_in_one_failure(
    error: Exception, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much fails at once, one failure is reported: ours before what nobody foresaw."""

    async def execute(*_: object, **__: object) -> Outcome:
        raise error

    monkeypatch.setattr(runner_main.job, "execute", execute)
    spec = dataclasses.replace(SPEC, definition={"pipeline": "p", "stages": [{"reshard": {}}]})
    reading, writing = os.pipe()
    try:
        runner = runner_main.Runner(reading, writing)
        await runner._do(progress.Start(spec=spec, work_path="/w", byte_budget=1, num_threads=1))
        (line,) = os.read(reading, 1 << 16).splitlines()
        report = progress.decode(line)
    finally:
        os.close(reading)
        os.close(writing)
    assert isinstance(report, progress.Failed)
    assert report.failure.code == code
