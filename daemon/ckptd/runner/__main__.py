"""The runner process: started ahead by the daemon, takes one job at a time over JSON lines.

Commands come on standard input, reports go to standard output (see `jobs.progress`); anything else
that is printed goes to standard error. The process ends when its input does, and is killed by the
kernel when its parent dies, so that no job ever has two workers. `--preload` imports torch before
the first job, so that a job that computes does not wait for it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import os
import signal
import sys
from pathlib import Path

import anyio
from anyio import to_thread

from ckptd import __version__
from ckptd.aio import groups
from ckptd.errors import CkptdError
from ckptd.jobs import progress
from ckptd.jobs.failing import Failure
from ckptd.pipeline import staged
from ckptd.pipeline.definition import Definition
from ckptd.runner import job, memory, priority
from ckptd.telemetry import crashes, logs, node

_OOM_SCORE_PATH = Path("/proc/self/oom_score_adj")
_OOM_EXTRA = 300
"""Added to the kernel's score of this process: where memory runs out the runner is killed, and
neither the daemon, which goes on with the job, nor the trainer."""
_PR_SET_PDEATHSIG = 1
"""prctl of linux/prctl.h: the signal this process gets when its parent dies."""


class Runner:
    """Reads commands, does one job after the other, writes reports."""

    def __init__(self, input_fd: int, output_fd: int) -> None:
        self._input_fd = input_fd
        self._output_fd = output_fd
        self._scope: anyio.CancelScope | None = None
        self._is_settled = False

    async def run(self, *, device: str | None) -> None:
        """Serve until the input ends or a `Quit` comes."""
        self._report(progress.Ready(pid=os.getpid(), version=__version__, device=device))
        send, receive = anyio.create_memory_object_stream[progress.Start](1)
        async with anyio.create_task_group() as group:
            group.start_soon(self._read_commands, send, group.cancel_scope)
            async with receive:
                async for start in receive:
                    await self._do(start)

    async def _read_commands(
        self, send: anyio.abc.ObjectSendStream[progress.Start], everything: anyio.CancelScope
    ) -> None:
        with os.fdopen(self._input_fd, "rb") as lines:
            while True:
                line = await to_thread.run_sync(lines.readline, abandon_on_cancel=True)
                command = progress.decode(line) if line else progress.Quit()
                match command:
                    case progress.Start():
                        await send.send(command)
                    case progress.Cancel() if self._scope is not None:
                        self._scope.cancel(reason=command.reason)
                    case progress.Quit():
                        everything.cancel()
                        return
                    case _:
                        pass

    async def _do(self, start: progress.Start) -> None:
        with anyio.CancelScope() as self._scope:
            try:
                outcome = await job.execute(_work(start), report=self._report)
                self._report(progress.Finished(outcome=outcome))
            except* Exception as caught:  # noqa: BLE001 (a top boundary: the job must end in words)
                self._report(progress.Failed(failure=_failure(caught)))
        if self._scope.cancelled_caught:
            failure = Failure(code="Cancelled", message="the job was cancelled")
            self._report(progress.Failed(failure=failure))
        self._scope = None
        self._collect()

    def _collect(self) -> None:
        """Give back what the job left in cycles, which collections by count would let grow.

        It happens while nobody waits, and costs little: what the first job imported is left out.
        """
        gc.collect()
        with contextlib.suppress(AttributeError):  # of glibc alone
            ctypes.CDLL(None).malloc_trim(0)
        if not self._is_settled:
            gc.freeze()
            self._is_settled = True

    def _report(self, message: progress.Report) -> None:
        data = logs.without_kept(progress.encode(message).decode()).encode()
        while data:
            data = data[os.write(self._output_fd, data) :]


def _failure(caught: ExceptionGroup[Exception]) -> Failure:
    """Return the one failure that stands for all of `caught`: ours before what nobody foresaw."""
    found, _ = caught.split(CkptdError)
    if found is not None:
        return Failure.of(groups.first(found, CkptdError))
    error = groups.first(caught, Exception)
    if isinstance(error, MemoryError) or memory.is_exhaustion(error):
        return Failure.of(memory.exhausted(error))
    sys.stderr.write(crashes.told(caught))
    return Failure(
        code=type(error).__name__,
        message=logs.without_secrets(f"unexpected: {type(error).__name__}: {error}"),
        hint="this is a fault of ckptd: please report it with the traceback in the daemon's log",
    )


def _work(start: progress.Start) -> job.Work:
    spec = start.spec
    definition = Definition.model_validate(spec.definition)
    return job.Work(
        checkpoint_path=Path(spec.pinned_path),
        name=spec.name,
        source_path=Path(spec.source_path),
        run=spec.run,
        layout=spec.layout,
        definition=definition,
        content_digest=spec.content_digest,
        pipeline_digest=spec.pipeline_digest,
        fingerprint=spec.fingerprint or None,
        is_digest_durable=spec.boot_id == node.boot_id() != "",
        work_path=Path(start.work_path),
        output_path=Path(start.output_path) if start.output_path else None,
        push=start.push,
        endpoint=start.endpoint,
        upload_limit=start.upload_limit,
        within=None,
        byte_budget=start.byte_budget,
        num_threads=start.num_threads,
        cache=start.cache,
        staging=staged.kind(definition, start.staging),
        base_place=spec.base_place,
        base_digest=spec.base_digest,
        base_fingerprint=spec.base_fingerprint,
    )


def main() -> None:
    """Run the process."""
    parser = argparse.ArgumentParser(prog="ckptd.runner", description=__doc__)
    parser.add_argument("--preload", action="store_true", help="import torch at once")
    parser.add_argument("--parent", type=int, help="end at once where another process is")
    parser.add_argument("--nice", type=int, default=0)
    parser.add_argument("--io-priority", choices=("normal", "low", "idle"), default="normal")
    parser.add_argument("--memory-bytes", type=int)
    options = parser.parse_args()
    bounds = priority.Priority(
        nice=options.nice, io_priority=options.io_priority, memory_bytes=options.memory_bytes
    )
    for problem in priority.apply(bounds):
        sys.stderr.write(f"{problem}\n")
    crashes.contain()
    logs.configure(sys.stderr, output="json", level="warning")  # what libraries say, cleaned
    gc.set_threshold(100_000, 50, 1000)  # plans are many small values that all stay: half the time
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if options.parent not in {None, os.getppid()}:
        return  # it died before the line above: a job sent to us has another worker by now
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        score = min(1000, int(_OOM_SCORE_PATH.read_text()) + _OOM_EXTRA)
        _OOM_SCORE_PATH.write_text(str(score))
    # What libraries print must not mix with reports: standard output becomes standard error.
    output_fd = os.dup(1)
    os.dup2(2, 1)
    device = None
    if options.preload:
        device = importlib.import_module("ckptd.plan.evaluate").choose_device("auto")
    anyio.run(lambda: Runner(os.dup(0), output_fd).run(device=device))


if __name__ == "__main__":
    main()
