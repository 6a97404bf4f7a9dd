"""The README and the help say what the command line does."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from ckptd.cli import main

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")


def _commands() -> dict[str, Any]:
    """Return every command that help shows, by its whole name."""
    found: dict[str, Any] = {}
    for name, command in get_command(main.app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        if inner is not None:
            found |= {f"{name} {part}": sub for part, sub in inner.items()}
        elif not command.hidden:
            found[name] = command
    return found


def test_readme_is_short() -> None:
    """The README has at most 150 lines."""
    assert len(README.splitlines()) <= 150


def test_readme_names_every_command() -> None:
    """Every command stands in the README's table, and the table names no other."""
    rows = "".join(re.findall(r"^\| (`ckptd [^|]+)", README, re.MULTILINE))
    named = re.findall(r"`ckptd ([\w-]+)", rows)
    assert set(named) == {name.split()[0] for name in _commands()}


def test_readme_links_lead_somewhere() -> None:
    """What the README links to is there."""
    root = Path(__file__).parents[2]
    links = set(re.findall(r"\]\(([^)#:]+)\)", README))
    assert links
    assert [link for link in links if not (root / link).exists()] == []


@pytest.mark.parametrize("name", list(_commands()))
def test_help_has_examples_that_parse(name: str) -> None:
    """Every command's help has a first sentence and examples with options that exist."""
    command = _commands()[name]
    assert re.match(r"[A-Z][^\n]+[.]", command.help)
    examples = [line.strip() for line in command.epilog.splitlines() if "ckptd" in line]
    assert examples
    for example in examples:
        arguments = shlex.split(example)[1 + len(name.split()) :]
        assert example.startswith(f"ckptd {name}")
        command.make_context(name, arguments, resilient_parsing=False)
