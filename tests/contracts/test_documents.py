"""What the documents say is what the code does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_ci_runs_the_readmes_test_command() -> None:
    """The line that installs and tests stands in the README and in .ci/run, to the letter."""
    wanted = [line for line in (ROOT / ".ci/run").read_text().splitlines() if "[test]" in line]
    assert len(wanted) == 1
    assert wanted[0] in (ROOT / "README.md").read_text().splitlines()


def test_the_top_level_is_the_agreed_one() -> None:
    """Nothing but the fixed files and folders, and dot files, stands at the top."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False
    )
    if listed.returncode:  # an unpacked archive: no repository to ask
        return
    top = {name.split("/")[0] for name in listed.stdout.splitlines()}
    visible = {name for name in top if not name.startswith(".")}
    assert visible == {"pyproject.toml", "daemon", "pipelines", "tests", "systemd", "README.md"}


def test_modules_stay_small() -> None:
    """No module has more than 400 lines."""
    long = {
        str(path.relative_to(ROOT)): count
        for path in (ROOT / "daemon").rglob("*.py")
        if (count := len(path.read_text().splitlines())) > 400
    }
    assert not long


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    """Importing the command line and the daemon loads neither torch nor the Hub's client."""
    code = (
        "import sys, ckptd.cli.main, ckptd.service.daemon, ckptd.runner.job\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'numpy', 'safetensors'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
