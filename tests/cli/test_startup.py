"""What starting costs, and what must not be imported for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "numpy", "transformers", "huggingface_hub", "pydantic", "rich", "anyio")
_SCRIPT = """
import json, sys
from ckptd.cli import main
code = main.call(sys.argv[1:])
print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)
"""


def _modules(*arguments: object) -> set[str]:
    """Return the modules that are loaded after a call of `ckptd` that must succeed."""
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    code, modules = json.loads(done.stderr.splitlines()[-1])
    assert code == 0, done.stderr
    return set(modules)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    """Help and version load neither tensor libraries nor the Hub's client."""
    assert not _modules(*arguments) & set(HEAVY)


def test_help_takes_under_half_a_second() -> None:
    """`ckptd --help` takes less than 0.5 s of processor time, the best of three."""
    taken = []
    for _ in range(3):
        before = os.times()
        subprocess.run(
            [sys.executable, "-c", "from ckptd.cli.main import main; main()", "--help"],
            check=True,
            capture_output=True,
        )
        after = os.times()
        taken.append(
            after.children_user + after.children_system - before.children_user
            - before.children_system
        )  # fmt: skip
    assert min(taken) < 0.5, taken


def test_verbatim_run_imports_no_torch(checkpoint: Path, silent_definition: Path) -> None:
    """A run that only moves bytes and does not push loads neither torch nor the Hub's client."""
    modules = _modules("run", checkpoint, "-p", silent_definition, "-o", "out")
    assert not modules & {"torch", "numpy", "transformers", "huggingface_hub"}
    assert Path("out/model.safetensors.index.json").exists()


@pytest.mark.parametrize("command", ["plan", "inspect", "validate"])
def test_looking_imports_no_torch(command: str, checkpoint: Path, definition: Path) -> None:
    """Commands that look at headers and definitions load neither torch nor the Hub's client."""
    arguments: dict[str, list[object]] = {
        "plan": [checkpoint, "-p", definition],
        "inspect": [checkpoint],
        "validate": [definition],
    }
    modules = _modules(command, *arguments[command])
    assert not modules & {"torch", "transformers", "huggingface_hub"}
