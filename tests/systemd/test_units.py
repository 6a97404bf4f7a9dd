"""The units that ship are what systemd takes, and say what ckptd promises."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ckptd.cli import failures
from ckptd.pipeline import shipped

UNIT_PATH = shipped.folder("systemd") / "ckptd.service"


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed here"
)
def test_verify(tmp_path: Path) -> None:
    """`systemd-analyze verify` has nothing to say about the unit."""
    text = UNIT_PATH.read_text("utf-8")
    pointed = text.replace("/usr/bin/env ckptd serve", f"{sys.executable} -m ckptd serve")
    assert pointed != text
    copy_path = tmp_path / UNIT_PATH.name
    copy_path.write_text(pointed, "utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_promises() -> None:
    """The unit stops and restarts ckptd the way the daemon expects it."""
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(UNIT_PATH.read_text("utf-8"))
    service = parser["Service"]
    assert service["Type"] == "notify"
    assert service["KillMode"] == "mixed"
    assert service["RestartPreventExitStatus"] == str(failures.EXIT_SETTINGS)
    assert service["StateDirectory"] == service["ConfigurationDirectory"] == "ckptd"
