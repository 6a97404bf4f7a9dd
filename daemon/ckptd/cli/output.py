"""The single way out: data to standard output, talk to standard error.

Data is what a program may read (a result, a table, one JSON value with `--json`); talk is what a
person wants to know meanwhile. A reader that goes away (`| head -1`) stops the output, not the
work.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from ckptd import errors

Row = Sequence[str]


class Output:
    """The output of one command; `as_json` makes its result one JSON value instead of text."""

    def __init__(
        self,
        *,
        as_json: bool = False,
        data_stream: TextIO | None = None,
        talk_stream: TextIO | None = None,
    ) -> None:
        self.as_json = as_json
        self.closed = False
        """Nobody reads the data any more."""
        self._data = data_stream if data_stream is not None else sys.stdout
        self._talk = talk_stream if talk_stream is not None else sys.stderr

    @property
    def talk_stream(self) -> TextIO:
        """Standard error, for progress bars."""
        return self._talk

    @property
    def data_is_terminal(self) -> bool:
        """Whether a person reads the data on a screen."""
        return self._data.isatty()

    @property
    def talk_is_terminal(self) -> bool:
        """Whether a person reads the talk on a screen."""
        return self._talk.isatty()

    def data(self, text: str = "") -> None:
        """Write a line of data.

        Raises:
            StorageFailed: standard output is a file on a full disk.
        """
        if self.closed:
            return
        try:
            self._data.write(text + "\n")
            self._data.flush()
        except BrokenPipeError:
            self.closed = True
            self._silence()
        except OSError as error:
            self._silence()
            raise errors.StorageFailed(
                f"cannot be written: {error.strerror}", path="standard output"
            ) from error

    def value(self, value: object) -> None:
        """Write one JSON value, on one line; dataclasses, enums and paths are taken as they are."""
        self.data(json.dumps(plain(value), ensure_ascii=False))

    def talk(self, text: str) -> None:
        """Tell the person something; lost where nobody listens."""
        try:
            self._talk.write(text + "\n")
            self._talk.flush()
        except OSError:
            return

    def fields(self, pairs: Mapping[str, object]) -> None:
        """Write named values as aligned lines; those that are None are left out."""
        there = {name: str(value) for name, value in pairs.items() if value is not None}
        width = max((len(name) for name in there), default=0)
        for name, text in there.items():
            first, *more = text.splitlines() or [""]
            self.data(f"{name:<{width}}  {first}".rstrip())
            for line in more:
                self.data(f"{'':<{width}}  {line}")

    def table(self, headings: Row, rows: Sequence[Row], *, right: Sequence[str] = ()) -> None:
        """Write a table: fitted to the screen on a terminal, else aligned and never cut.

        `right` names the columns of numbers.
        """
        if self.data_is_terminal:
            self._rich_table(headings, rows, right)
            return
        widths = [max(len(row[i]) for row in (headings, *rows)) for i in range(len(headings))]
        for row in (headings, *rows):
            cells = [
                f"{cell:>{width}}" if heading in right else f"{cell:<{width}}"
                for cell, width, heading in zip(row, widths, headings, strict=True)
            ]
            self.data("  ".join(cells).rstrip())

    def _rich_table(self, headings: Row, rows: Sequence[Row], right: Sequence[str]) -> None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for number, heading in enumerate(headings):
            side: Literal["left", "right"] = "right" if heading in right else "left"
            # What a row is called is copied to other commands: the first column is never broken.
            table.add_column(Text(heading), justify=side, no_wrap=number == 0)
        for row in rows:
            table.add_row(*(Text(cell, overflow="fold") for cell in row))
        console = Console(file=self._data, highlight=False)
        with console.capture() as captured:
            console.print(table)
        self.data(captured.get().rstrip("\n"))

    def _silence(self) -> None:
        """Point the descriptor elsewhere, or Python complains once more when it exits."""
        try:
            fd = self._data.fileno()
        except (OSError, ValueError):
            return
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, fd)
        os.close(null)


def plain(value: Any) -> Any:
    """Return `value` as JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    return value
