"""What is shown on standard error while a job runs: bars on a terminal, plain lines elsewhere.

A display is a context manager that takes the job's reports. It shows bytes in all their ways at
once, since they overlap, and counts down where the Hub is waited for.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from ckptd import units
from ckptd.cli.output import Output
from ckptd.jobs import progress
from ckptd.telemetry.status import Counter, Counters, Phase

if TYPE_CHECKING:
    from rich.progress import TaskID

LINE_EVERY_S = 10.0
"""Seconds between two lines about bytes where there are no bars."""
_IDENTIFYING = "identifying"


class Display(AbstractContextManager["Display"], Protocol):
    """Shows one job."""

    def report(self, report: progress.Report) -> None:
        """Show what the job reports."""

    def identified(self, done_bytes: int, total_bytes: int) -> None:
        """Show how much of the checkpoint was read to identify it."""


def make(output: Output, *, push: bool) -> Display:
    """Return the display that fits where standard error goes; `push` adds uploads to it."""
    return Bars(output, push=push) if output.talk_is_terminal else Lines(output, push=push)


class Lines:
    """One line for everything worth a line; bytes every few seconds."""

    def __init__(self, output: Output, *, push: bool) -> None:
        self._output = output
        self._push = push
        self._told_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        return

    def report(self, report: progress.Report) -> None:
        """See `Display.report`."""
        match report:
            case progress.PhaseChanged(phase=phase):
                self._output.talk(f"{phase.value}...")
            case progress.BytesMoved(counters=counters) if self._due():
                moved = [
                    f"{_amount(counter)} {name}"
                    for name, counter in _counters(counters, push=self._push)
                ]
                self._output.talk(", ".join(moved))
            case _:
                text = describe(report)
                if text is not None:
                    self._output.talk(text)

    def identified(self, done_bytes: int, total_bytes: int) -> None:
        """See `Display.identified`."""
        if self._due():
            counter = Counter(done_bytes=done_bytes, total_bytes=total_bytes)
            self._output.talk(f"{_IDENTIFYING}: {_amount(counter)} read")

    def _due(self) -> bool:
        if time.monotonic() - self._told_at < LINE_EVERY_S:
            return False
        self._told_at = time.monotonic()
        return True


class Bars:
    """A bar for each way that bytes go, and a line for what is going on."""

    def __init__(self, output: Output, *, push: bool) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._console = Console(file=output.talk_stream, highlight=False, markup=False)
        self._progress = Progress(
            TextColumn("{task.description:<11}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
        )
        self._push = push
        self._tasks: dict[str, TaskID] = {}
        self._status = _Status(self._console)
        from rich.console import Group
        from rich.live import Live

        self._live = Live(
            Group(self._progress, self._status),
            console=self._console,
            refresh_per_second=8,
            transient=True,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._live.stop()

    def report(self, report: progress.Report) -> None:
        """See `Display.report`."""
        match report:
            case progress.PhaseChanged(phase=phase):
                self._drop(_IDENTIFYING)
                self._status.say(phase.value)
            case progress.BytesMoved(counters=counters):
                for name, counter in _counters(counters, push=self._push):
                    self._show(name, counter)
            case progress.HubReported(event="waiting"):
                self._status.wait(report.text or "", report.wait_s or 0.0)
            case progress.Warned():
                self._console.print(describe(report))
            case progress.ShardFinished():
                self._status.say(f"{report.shards_done} of {report.num_shards} shards written")
            case progress.HubReported():
                self._status.say(describe(report) or report.event)

    def identified(self, done_bytes: int, total_bytes: int) -> None:
        """See `Display.identified`."""
        self._show(_IDENTIFYING, Counter(done_bytes=done_bytes, total_bytes=total_bytes))

    def _show(self, name: str, counter: Counter) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=counter.total_bytes)
        self._progress.update(
            self._tasks[name], completed=counter.done_bytes, total=counter.total_bytes
        )

    def _drop(self, name: str) -> None:
        if name in self._tasks:
            self._progress.remove_task(self._tasks.pop(name))


class _Status:
    """The line below the bars; while the Hub is waited for, it counts down at every redraw."""

    def __init__(self, console: object) -> None:
        self._text = Phase.STARTING.value
        self._until: float | None = None

    def say(self, text: str) -> None:
        self._text, self._until = text, None

    def wait(self, text: str, wait_s: float) -> None:
        self._text, self._until = text.partition("; next try")[0], time.monotonic() + wait_s

    def __rich__(self) -> str:
        if self._until is None:
            return self._text
        left_s = max(0.0, self._until - time.monotonic())
        return f"{self._text}; next try in {left_s:.0f} s"


def describe(report: progress.Report) -> str | None:
    """Return a report as one line, or None where it is not worth one."""
    match report:
        case progress.ShardFinished():
            again = " (from an earlier run)" if report.reused else ""
            return (
                f"shard {report.shards_done} of {report.num_shards}: {report.name}, "
                f"{units.format_bytes(report.nbytes)}{again}"
            )
        case progress.HubReported(event="waiting"):
            return f"the Hub: {report.text}"
        case progress.HubReported(event="uploaded"):
            return f"uploaded {report.path_in_repo}, {units.format_bytes(report.nbytes)}"
        case progress.HubReported():
            words = report.event.replace("_", " ")
            return f"the Hub: {words}" + (f": {report.text}" if report.text else "")
        case progress.Warned():
            return f"warning: {report.text}"
    return None


def _counters(counters: Counters, *, push: bool) -> list[tuple[str, Counter]]:
    """Return the ways that bytes really go in this job."""
    ways = [
        ("fetched", counters.fetched),
        ("read", counters.read),
        ("computed", counters.computed),
        ("written", counters.written),
        ("uploaded", counters.uploaded),
    ]
    return [
        (name, counter)
        for name, counter in ways
        if counter.total_bytes > 0 and (push or name != "uploaded")
    ]


def _amount(counter: Counter) -> str:
    done, total = map(units.format_bytes, (counter.done_bytes, counter.total_bytes))
    return f"{done} of {total}"
