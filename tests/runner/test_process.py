"""The runner as a process: whose it is, and when it ends by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ckptd.jobs import progress

COMMAND = (sys.executable, "-m", "ckptd.runner")


def test_a_runner_whose_parent_is_gone_takes_no_job() -> None:
    """The daemon died before the kernel was told to end the runner with it: no second worker."""
    done = subprocess.run(
        [*COMMAND, f"--parent={os.getpid() + 1}"], input=b"", capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, b"")


def test_a_runner_dies_before_the_daemon_where_memory_runs_out() -> None:
    """The kernel's score of it is above that of the process that started it."""
    own = int(Path("/proc/self/oom_score_adj").read_text())
    process = subprocess.Popen(
        [*COMMAND, f"--parent={os.getpid()}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert isinstance(progress.decode(process.stdout.readline()), progress.Ready)
        score = int(Path(f"/proc/{process.pid}/oom_score_adj").read_text())
        assert score == min(1000, own + 300)
    finally:
        process.stdin.close()
        process.stdout.close()
        assert process.wait(30) == 0
