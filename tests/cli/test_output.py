"""The sink: where text goes, and what happens when nobody takes it."""

from __future__ import annotations

import enum
import io
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from ckptd.cli.output import Output, plain
from tests.cli.conftest import COMMAND


class Colour(enum.Enum):
    """Some enum."""

    RED = "red"


@dataclass(frozen=True)
class Thing:
    """Some value."""

    path: Path
    colour: Colour
    parts: tuple[int, ...]


def _output(**options: bool) -> tuple[Output, io.StringIO, io.StringIO]:
    data, talk = io.StringIO(), io.StringIO()
    return Output(data_stream=data, talk_stream=talk, **options), data, talk


def test_streams() -> None:
    """Data and talk go different ways."""
    output, data, talk = _output()
    output.data("result")
    output.talk("hello")
    assert (data.getvalue(), talk.getvalue()) == ("result\n", "hello\n")


def test_value() -> None:
    """A value is one line of JSON, whatever it is made of."""
    output, data, _ = _output(as_json=True)
    output.value(Thing(Path("/a"), Colour.RED, (1, 2)))
    assert json.loads(data.getvalue()) == {"path": "/a", "colour": "red", "parts": [1, 2]}
    assert data.getvalue().count("\n") == 1


def test_plain_keys() -> None:
    """Keys become text."""
    assert plain({Path("/a"): {1}}) == {"/a": [1]}


def test_table() -> None:
    """Where no person reads, a table is aligned and nothing of it is cut."""
    output, data, _ = _output()
    long = "x" * 300
    output.table(("NAME", "BYTES"), [("a", "1"), (long, "22")], right=("BYTES",))
    lines = data.getvalue().splitlines()
    assert lines[0].split() == ["NAME", "BYTES"]
    assert lines[1].endswith("    1")
    assert lines[2] == f"{long}     22"


def test_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a screen a table is folded to its width, its first column whole and never markup."""
    monkeypatch.setenv("COLUMNS", "40")
    output, data, _ = _output()
    monkeypatch.setattr(data, "isatty", lambda: True)
    output.table(("NAME", "WHY"), [("[red]a[/red]", "because " * 10)])
    lines = data.getvalue().splitlines()[1:]
    assert max(map(len, lines)) <= 40
    assert lines[0].startswith("[red]a[/red]")


def test_fields() -> None:
    """Named values are aligned, further lines indented, absent ones left out."""
    output, data, _ = _output()
    output.fields({"a": 1, "long": "x\ny", "gone": None})
    assert data.getvalue() == "a     1\nlong  x\n      y\n"


def test_nobody_reads() -> None:
    """A reader that goes away stops the data, not the command."""
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    with os.fdopen(write_fd, "w") as stream:
        output = Output(data_stream=stream, talk_stream=io.StringIO())
        output.data("one")
        output.data("two")
        assert output.closed


def test_full_disk() -> None:
    """Output that cannot be written is a failure of the storage, told without a traceback."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*COMMAND, "validate", "publish"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 7
    assert "standard output: cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
