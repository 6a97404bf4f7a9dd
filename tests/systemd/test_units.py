"""The units that ship are what systemd takes, closed as far as torch and CUDA allow."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ckptd.cli import failures
from ckptd.pipeline import shipped

FOLDER = shipped.folder("systemd")
UNITS = ("ckptd.service", "ckptd@.service")
MOST_EXPOSED = 20
"""Ten times the score of `systemd-analyze security`."""

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed here"
)


def _copy(name: str, folder: Path, *drop_ins: str) -> Path:
    """Return a copy of a unit that starts a program which exists, with drop-ins at its end."""
    text = (FOLDER / name).read_text("utf-8")
    pointed = text.replace("/usr/bin/env ckptd serve", f"{sys.executable} -m ckptd serve")
    assert pointed != text
    path = folder / name
    added = [(FOLDER / drop_in).read_text("utf-8") for drop_in in drop_ins]
    path.write_text("\n".join([pointed, *added]), "utf-8")
    return path


def _analyze(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *map(str, arguments)], capture_output=True, text=True, check=False
    )


@needs_systemd
@pytest.mark.parametrize("drop_ins", [(), ("cpu.conf",)], ids=["gpu", "cpu"])
@pytest.mark.parametrize("name", UNITS)
def test_verify(name: str, drop_ins: tuple[str, ...], tmp_path: Path) -> None:
    """`systemd-analyze verify` has nothing to say about a unit."""
    done = _analyze("verify", "--man=no", _copy(name, tmp_path, *drop_ins))
    assert (done.returncode, done.stderr) == (0, "")


@needs_systemd
@pytest.mark.parametrize("drop_ins", [(), ("cpu.conf",)], ids=["gpu", "cpu"])
@pytest.mark.parametrize("name", UNITS)
def test_security(name: str, drop_ins: tuple[str, ...], tmp_path: Path) -> None:
    """`systemd-analyze security` gives a unit 2.0 or better."""
    path = _copy(name, tmp_path, *drop_ins)
    done = _analyze("security", "--offline=true", f"--threshold={MOST_EXPOSED}", path)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout


def _service(name: str) -> dict[str, list[str]]:
    """Return the [Service] section, every value of every key."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in (FOLDER / name).read_text("utf-8").splitlines():
        if line.startswith("["):
            section = line
        elif section == "[Service]" and "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("name", UNITS)
def test_promises(name: str) -> None:
    """A unit stops, restarts and watches ckptd the way the daemon expects it."""
    service = _service(name)
    assert service["Type"] == ["notify"]
    assert service["KillMode"] == ["mixed"]
    assert service["RestartPreventExitStatus"] == [str(failures.EXIT_SETTINGS)]
    assert service["ExecReload"][0].endswith("-HUP $MAINPID")
    assert "WatchdogSec" in service
    assert service["StateDirectory"] == service["ConfigurationDirectory"]
    assert service["StateDirectoryMode"] == ["0700"]
    assert service["OOMPolicy"] == ["continue"]


@pytest.mark.parametrize("name", UNITS)
def test_torch_can_work(name: str) -> None:
    """What breaks torch or hides the GPU is not in a unit."""
    service = _service(name)
    assert not {"MemoryDenyWriteExecute", "PrivateDevices", "ProcSubset"} & set(service)
    assert "char-nvidia-uvm rw" in service["DeviceAllow"]


@pytest.mark.parametrize("name", UNITS)
def test_token(name: str) -> None:
    """The token is a credential of systemd, never a text in the unit or the environment."""
    service = _service(name)
    assert service["LoadCredential"][0].startswith("hf-token:/etc/")
    assert "HF_TOKEN_PATH=%d/hf-token" in service["Environment"]
    assert not any(value.startswith("HF_TOKEN=") for value in service["Environment"])


def test_units_differ_in_user_and_places_alone() -> None:
    """What one unit does, the other does for the user in its name."""
    own, of_user = _service("ckptd.service"), _service("ckptd@.service")
    assert own["User"] == ["ckptd"]
    as_user = {
        key: [value.replace("ckptd-%i", "ckptd") for value in values]
        for key, values in of_user.items()
    }
    assert as_user | {"User": ["ckptd"]} == own


@pytest.mark.skipif(
    shutil.which("systemd-sysusers") is None, reason="systemd-sysusers is not installed here"
)
def test_sysusers(tmp_path: Path) -> None:
    """The user of the system unit is made."""
    done = subprocess.run(
        ["systemd-sysusers", "--dry-run", f"--root={tmp_path}", FOLDER / "ckptd.sysusers"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "user 'ckptd'" in done.stdout + done.stderr


@pytest.mark.skipif(
    shutil.which("systemd-tmpfiles") is None, reason="systemd-tmpfiles is not installed here"
)
def test_tmpfiles(tmp_path: Path) -> None:
    """The folder of definitions is made, open to read."""
    lines = (FOLDER / "ckptd.tmpfiles").read_text("utf-8")
    mine = tmp_path / "ckptd.conf"
    mine.write_text(lines.replace(" root root ", " - - "))  # owners need root, which tests are not
    root = tmp_path / "root"
    root.mkdir()
    subprocess.run(["systemd-tmpfiles", "--create", f"--root={root}", mine], check=True)
    assert (root / "etc/ckptd/pipelines.d").stat().st_mode & 0o777 == 0o755


def test_drop_in_is_ini() -> None:
    """The drop-in for nodes without a GPU takes the devices away."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((FOLDER / "cpu.conf").read_text("utf-8"))
    assert dict(parser["Service"]) == {"DeviceAllow": "", "PrivateDevices": "yes"}
