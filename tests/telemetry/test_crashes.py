"""What a dying process leaves behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOKEN = "Sentinel+not/like-a-token=="
PROGRAM = f"""
import os, threading
from ckptd.telemetry import crashes, logs
crashes.contain()
logs.keep_secret({TOKEN!r})
def fail():
    raise ValueError("told {TOKEN} by a thread")
thread = threading.Thread(target=fail)
thread.start()
thread.join()
if os.environ.get("HOW") == "abort":
    os.abort()
raise KeyError("told {TOKEN} at the end")
"""


def died(folder: Path, how: str) -> subprocess.CompletedProcess[str]:
    env = {"HOW": how, "PYTHONPATH": ":".join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_tracebacks_that_end_a_process_tell_no_secret(tmp_path: Path) -> None:
    """In the main thread and in others: the traceback is there, the token is not."""
    done = died(tmp_path, "raise")
    assert done.returncode == 1
    assert "ValueError: told [hidden] by a thread" in done.stderr
    assert "KeyError: 'told [hidden] at the end'" in done.stderr
    assert "Sentinel" not in done.stderr


def test_a_crash_leaves_no_image_of_the_memory(tmp_path: Path) -> None:
    """SIGABRT, as native code does it: no core dump beside the process."""
    done = died(tmp_path, "abort")
    assert done.returncode == -6
    assert list(tmp_path.iterdir()) == []
