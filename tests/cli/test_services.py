"""`ckptd serve` and `ckptd hub serve`: processes that run until they are told to stop."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import urllib.request
from pathlib import Path

import pytest

from tests.cli.conftest import Call, Start, lines_until

SETTINGS = ("--pipelines-dir", "pipelines.d", "--state-dir", "state")


@pytest.fixture
def pipelines_dir() -> Path:
    """An empty pipelines.d folder."""
    path = Path("pipelines.d")
    path.mkdir()
    return path


def test_serve_refuses_settings(process: Call) -> None:
    """Wrong settings end the daemon with 78, on which systemd does not start it again."""
    Path("s.yaml").write_text("slots: many\n")
    result = process("serve", "--settings", "s.yaml")
    assert (result.code, result.out) == (78, "")
    assert "s.yaml:1:8: slots" in result.err


def test_serve_refuses_broken_definitions(process: Call, pipelines_dir: Path) -> None:
    """Where every definition is broken the daemon does not start, and says all problems."""
    (pipelines_dir / "a.yaml").write_text("pipeline: a\n")
    result = process("serve", *SETTINGS)
    assert (result.code, result.out) == (78, "")
    assert "a.yaml:1:1: stages" in result.err


@pytest.mark.usefixtures("pipelines_dir")
def test_serve_refuses_a_second_daemon(process: Call) -> None:
    """Two daemons never share a state folder."""
    Path("state").mkdir()
    fd = os.open("state/lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        result = process("serve", *SETTINGS)
    finally:
        os.close(fd)
    assert result.code == 78
    assert "another ckptd daemon" in result.err
    assert "Traceback" not in result.err


def test_serve(start: Start, ckptd: Call, pipelines_dir: Path) -> None:
    """The daemon starts beside a broken definition, logs JSON only, is seen, and stops with 0."""
    (pipelines_dir / "bad.yaml").write_text("pipeline: a\n")
    (pipelines_dir / "good.yaml").write_text("pipeline: good\nstages: [reshard]\n")
    daemon = start("serve", *SETTINGS, HF_TOKEN="a-token-of-another-form", CKPTD_SLOT="2")
    lines = lines_until(daemon.stdout, "daemon ready")
    assert ckptd("status", "--state-dir", "state", "--json").value["running"] is True
    daemon.send_signal(signal.SIGTERM)
    out, err = daemon.communicate(timeout=60)
    assert daemon.returncode == 0
    events = [json.loads(line)["event"] for line in [*lines, *out.splitlines()]]
    assert {"daemon starting", "variable ignored", "definition broken"} <= set(events)
    assert events[-1] == "daemon stopped"
    assert err == ""
    assert "a-token-of-another-form" not in "".join(lines) + out


def test_hub_serve(start: Start) -> None:
    """The Hub prints URL, token and variables as one JSON value, answers, and stops with 0."""
    hub = start("hub", "serve", "--root", "hub", "--port", "0", "--json")
    assert hub.stdout is not None
    told = json.loads(hub.stdout.readline())
    assert told["environment"] == {"HF_ENDPOINT": told["url"], "HF_TOKEN": told["token"]}
    request = urllib.request.Request(
        f"{told['url']}/api/whoami-v2", headers={"Authorization": f"Bearer {told['token']}"}
    )
    with urllib.request.urlopen(request) as answer:
        assert json.load(answer)["name"] == "ckptd"
    hub.send_signal(signal.SIGINT)
    assert hub.communicate(timeout=30) == ("", "")
    assert hub.returncode == 0


def test_hub_serve_on_a_taken_port(start: Start, process: Call) -> None:
    """A port that is taken is a usage error, told as text."""
    hub = start("hub", "serve", "--root", "hub", "--port", "0")
    lines = lines_until(hub.stdout, "export HF_TOKEN=")
    url = next(line.split()[1] for line in lines if line.startswith("url"))
    result = process("hub", "serve", "--root", "other", "--port", url.rpartition(":")[2])
    assert result.code == 2
    assert "another --port" in result.err
