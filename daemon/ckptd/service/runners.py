"""A runner process as the daemon holds it: started ahead, spoken to in JSON lines, killed for sure."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Sequence

import anyio
from anyio.abc import Process

from ckptd.jobs import progress

_READ_BYTES = 64 << 10


class RunnerProcess:
    """One process; owned by one task. `close` is safe to call at any time, any number of times."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, *, preload: bool, bounds: Sequence[str] = ()) -> RunnerProcess:
        """Start a process that waits for a job; with `preload` it imports torch meanwhile.

        `bounds` are the runner's options about what it may take of the node.
        """
        command = [sys.executable, "-m", "ckptd.runner", f"--parent={os.getpid()}", *bounds]
        command += ["--preload"] if preload else []
        # Standard error is ours: what a library prints there belongs to the daemon's log.
        process = await anyio.open_process(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None
        )
        return cls(process)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether the process is known to have ended."""
        return self._process.returncode is not None

    async def send(self, command: progress.Command) -> bool:
        """Send a command; return False if the process no longer listens."""
        assert self._process.stdin is not None
        try:
            await self._process.stdin.send(progress.encode(command))
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            return False
        return True

    async def reports(self) -> AsyncGenerator[progress.Report, None]:
        """Yield what the process reports until its output ends.

        Raises:
            ValueError: the process wrote something that is not a report.
        """
        assert self._process.stdout is not None
        pending = bytearray()
        while True:
            try:
                pending += await self._process.stdout.receive(_READ_BYTES)
            except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                return
            while (end := pending.find(b"\n")) >= 0:
                message = progress.decode(bytes(pending[:end]))
                del pending[: end + 1]
                if not isinstance(message, progress.Start | progress.Cancel | progress.Quit):
                    yield message
            if len(pending) > progress.MAX_LINE_BYTES:
                raise ValueError("a report is too long")

    async def exit_status(self) -> int:
        """Wait for the end of the process; return its status, negative for a signal."""
        return await self._process.wait()

    async def close(self) -> None:
        """Kill the process and wait for its end."""
        with anyio.CancelScope(shield=True):
            if self._process.returncode is None:
                # Not `Process.kill`: it takes the status of a process that has just ended away
                # from the event loop, which then knows no better than 255.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._process.pid, signal.SIGKILL)
            await self._process.wait()
            await self._process.aclose()
