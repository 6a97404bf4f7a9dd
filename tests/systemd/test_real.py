"""The unit under a real systemd, booted in namespaces of its own: only as root, and when asked.

    CKPTD_TEST_SYSTEMD=1 python -m pytest tests/systemd/test_real.py

systemd is process 1 of a PID namespace with its own mounts, cgroup namespace and copy of /etc;
nothing of it is seen outside, and it ends with the test.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptd.hub.local.server import Running
from ckptd.pipeline import shipped
from tests.conftest import WRITE_TOKEN

SYSTEMD = Path("/lib/systemd/systemd")
SHIPPED = Path("/lib/systemd/system")
REPO = Path(__file__).parents[2]
TARGETS = ("basic", "sysinit", "multi-user", "network-online", "local-fs", "sockets", "paths")
ENTER = ("--mount", "--pid", "--ipc", "--uts", "--cgroup")

pytestmark = pytest.mark.skipif(
    os.environ.get("CKPTD_TEST_SYSTEMD") != "1" or os.geteuid() != 0 or not SYSTEMD.exists(),
    reason="boots a systemd: root, systemd and CKPTD_TEST_SYSTEMD=1",
)

INIT = """#!/bin/bash
set -e
mount --make-rprivate /
umount -l /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
mount -t proc proc /proc
for folder in /run /var/lib /var/cache /var/log /srv; do
  mount -t tmpfs -o mode=755 tmpfs $folder
done
mkdir -p /run/systemd /run/lock /run/log/journal /srv/runs /srv/etc
cp -a /etc/. /srv/etc/
mount --bind /srv/etc /etc
cp -a {given}/etc/. /etc/
cp -a {given}/units /srv/units
mount --make-rshared /
export container=test SYSTEMD_UNIT_PATH=/srv/units
exec {systemd} --system --unit=test.target --show-status=false --log-target=kmsg
"""
DROP_IN = """[Service]
ExecStart=
ExecStart={python} -c "from ckptd.cli.main import main; main()" serve
Environment=PYTHONPATH={daemon} HF_ENDPOINT={endpoint} CKPTD_SCAN_INTERVAL=0.5s
ReadWritePaths=/srv/runs
WatchdogSec=8
"""
DEFINITION = """pipeline: publish
watch:
  - path: /srv/runs/*/checkpoint-*
    settle: 300ms
stages:
  - tie
  - resize: {pad_to_multiple_of: 64}
push:
  repo_id: "ckptd/{run}"
"""
WRITE = """import sys; sys.path.insert(0, {repo!r})
from pathlib import Path
from tests.flow.conftest import write_checkpoint
write_checkpoint(Path("/srv/runs/sft/checkpoint-4000"), 4000, rows=501)
"""


class Machine:
    """A booted systemd."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def run(self, *command: str) -> str:
        """Run a command in it and return what it printed."""
        done = subprocess.run(
            ["nsenter", "--target", str(self._pid), *ENTER, "--", *command],
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        return done.stdout.strip()

    def show(self, name: str) -> str:
        """Return one property of the unit."""
        return self.run("systemctl", "show", "--value", "-p", name, "ckptd@root")

    def until(self, condition: Callable[[], Any], seconds: float = 60.0) -> Any:
        """Return the first true value of `condition`; fail with the journal after `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if value := condition():
                return value
            time.sleep(0.2)
        raise AssertionError(self.run("journalctl", "--no-pager", "-n", "40"))


def _write_units(folder: Path, hub: Running) -> None:
    folder.mkdir()
    for name in TARGETS:
        (folder / f"{name}.target").write_text("[Unit]\nDefaultDependencies=no\n")
    (folder / "test.target").write_text(
        "[Unit]\nWants=systemd-journald.service\nAfter=systemd-journald.service\n"
    )
    for name in ("systemd-journald.service", "systemd-journald.socket", "shutdown.target"):
        shutil.copy(SHIPPED / name, folder / name)
    shutil.copy(shipped.folder("systemd") / "ckptd@.service", folder)
    drop_in = folder / "ckptd@root.service.d" / "test.conf"
    drop_in.parent.mkdir()
    drop_in.write_text(
        DROP_IN.format(python=sys.executable, daemon=REPO / "daemon", endpoint=hub.url)
    )


def _remove(cgroup: Path) -> None:
    """Remove a cgroup and those below it once their processes, which were killed, are gone."""
    deadline = time.monotonic() + 30
    while cgroup.exists() and time.monotonic() < deadline:
        for folder, _, _ in os.walk(cgroup, topdown=False):
            with contextlib.suppress(OSError):
                Path(folder).rmdir()
        time.sleep(0.05)


@pytest.fixture
def machine(tmp_path: Path, hub: Running) -> Iterator[Machine]:
    """A systemd that has booted, with the unit installed for root."""
    _write_units(tmp_path / "units", hub)
    etc = tmp_path / "etc" / "ckptd-root"
    (etc / "pipelines.d").mkdir(parents=True)
    (etc / "pipelines.d" / "publish.yaml").write_text(DEFINITION)
    (etc / "hf-token").write_text(WRITE_TOKEN)
    init = tmp_path / "init.sh"
    init.write_text(INIT.format(given=tmp_path, systemd=SYSTEMD))
    init.chmod(0o755)
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    cgroup = Path(next(m[1] for m in mounts if m[2] == "cgroup2")) / f"ckptd-test-{os.getpid()}"
    cgroup.mkdir()
    flags = [flag for flag in ENTER if flag != "--pid"]
    script = f"echo $$ > {cgroup}/cgroup.procs; exec unshare {' '.join(flags)} --pid --fork --kill-child {init}"
    booting = subprocess.Popen(["bash", "-c", script], stdout=subprocess.DEVNULL, text=True)
    try:
        children = Path(f"/proc/{booting.pid}/task/{booting.pid}/children")
        deadline = time.monotonic() + 30
        while not (found := children.read_text().split()) and time.monotonic() < deadline:
            time.sleep(0.05)
        machine = Machine(int(found[0]))
        machine.until(lambda: machine.run("systemctl", "is-active", "test.target") == "active", 30)
        yield machine
    finally:
        booting.kill()
        booting.wait()
        _remove(cgroup)


def test_unit(machine: Machine, hub: Running) -> None:
    """Hardened as it ships, it computes, pushes with the credential, reloads, survives a hang."""
    machine.run("systemctl", "start", "ckptd@root")
    assert machine.show("ActiveState") == "active"
    assert machine.show("StatusText") == "1 watched, 0 running, 0 waiting"

    program = WRITE.format(repo=str(REPO))
    machine.run("env", f"PYTHONPATH={REPO / 'daemon'}", sys.executable, "-c", program)
    fields = ("CKPTD_STEP=4000", "CKPTD_RUN=sft", "CKPTD_EVENT=job published")
    machine.until(lambda: machine.run("journalctl", "-q", "--no-pager", "-o", "cat", *fields))

    machine.run("systemctl", "reload", "ckptd@root")
    assert machine.show("ActiveState") == "active"
    assert "definitions reloaded" in machine.run("journalctl", "--no-pager", "-u", "ckptd@root")

    pid = machine.show("MainPID")
    machine.run("kill", "-STOP", pid)
    machine.until(lambda: machine.show("NRestarts") == "1" and machine.show("MainPID") != pid)
    machine.until(lambda: machine.show("ActiveState") == "active")

    machine.run("systemctl", "stop", "ckptd@root")
    assert (machine.show("ActiveState"), machine.show("Result")) == ("inactive", "success")
    definition = "/etc/ckptd-root/pipelines.d/publish.yaml"
    machine.run("sh", "-c", f"echo 'pipeline: x' > {definition}")
    machine.run("systemctl", "start", "ckptd@root")
    machine.until(lambda: machine.show("ActiveState") == "failed")
    assert machine.show("ExecMainStatus") == "78"
