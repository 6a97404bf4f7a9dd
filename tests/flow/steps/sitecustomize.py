"""Steps of a process under test: each change it makes to the node's disk, and what goes wrong there.

Python imports this module at its start where the tests put its folder on PYTHONPATH, in the daemon
and in its runners, so that the code under test needs no hook. Every file opened for writing, every
rename, link, removal, write, sync and committed transaction below `STEPS_ROOT` is one step with a
label, the same in every run. Steps are written to `trace` with the time; at the step that the file `arm` names,
the process is killed (`kill`, `kill both`), dies of a fault of its own (`crash`), is stopped (`stop`),
waits until the file `go` is there (`wait`), or the call fails with an error of the file system
(`fail`, time and again). `within` bounds a step to paths that contain it.
"""

# ruff: noqa: PTH104, PTH110, PTH115, PTH118, PTH123 - pathlib is among what is watched

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil  # noqa: F401 - chooses its functions at import, which must see those of before
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

ROOT = os.environ.get("STEPS_ROOT", "")
FOLDER = os.environ.get("STEPS_FOLDER", "")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_VARYING = re.compile(
    r"(?<![0-9a-z])[0-9a-f]{8,40}(?:-[0-9a-f]{8})?(?![0-9a-z])|(?<=-)\d+|(?<=probe)-.*|(?<=probed)-.*"
)
_CHANGES = {
    "os.rename": "rename",
    "os.link": "link",
    "os.remove": "remove",
    "os.mkdir": "mkdir",
    "os.rmdir": "rmdir",
}
_inside = threading.local()


def _role() -> str:
    if "ckptd.runner" in sys.orig_argv:
        return "runner"
    return "daemon" if "serve" in sys.orig_argv else ""


def _full(path: Any, dir_fd: int = -1) -> str | None:
    if isinstance(path, int):
        return _of_fd(path)
    try:
        text = os.fsdecode(path)
        if dir_fd >= 0:
            text = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), text)
    except (OSError, TypeError):
        return None
    return text


def _of_fd(fd: int) -> str | None:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)")
    except OSError:
        return None


def step(what: str, place: str, full: str) -> None:
    """One step is about to happen, at the path `full`."""
    if place.startswith(("hub/", "hf/")):
        return
    label = f"{ROLE} {what} {place}"
    fd = os.open(f"{FOLDER}/trace", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{time.monotonic():.3f} {label}\n".encode())
    os.close(fd)
    with contextlib.suppress(OSError), open(f"{FOLDER}/arm") as file:
        _meet(label, full, json.load(file))


def _meet(label: str, full: str, arm: dict[str, Any]) -> None:
    if not re.fullmatch(arm["label"], label) or arm.get("within", "") not in full:
        return
    if arm["deed"] in {"fail", "crash"}:  # time and again, until it is disarmed
        with open(f"{FOLDER}/fired", "a") as file:
            file.write(f"{label}\n")
        if arm["deed"] == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        raise _Refused(arm["errno"], os.strerror(arm["errno"]), label)
    os.rename(f"{FOLDER}/arm", f"{FOLDER}/fired")
    match arm["deed"]:
        case "wait":
            while not os.path.exists(f"{FOLDER}/go"):
                time.sleep(0.01)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "kill both":
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)


class _Refused(Exception):
    """Carries the error out of the suppression above."""


def _guarded(what: str, find: Callable[[], str | None]) -> None:
    if getattr(_inside, "on", False):
        return
    _inside.on = True
    try:
        full = find()
        if full is not None and full.startswith(ROOT) and not full.startswith(FOLDER):
            step(what, _VARYING.sub("*", full[len(ROOT) :].lstrip("/")), full)
    except _Refused as refused:
        raise OSError(*refused.args[:2]) from None
    finally:
        _inside.on = False


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if event == "open":
        path, mode, flags = args
        if isinstance(flags, int) and flags & _WRITING and (mode is None or mode != "r"):
            _guarded("open", lambda: _full(path))
    elif event in _CHANGES:
        path = args[1] if event in {"os.rename", "os.link"} else args[0]
        dir_fd = -1 if event in {"os.rename", "os.link"} else args[-1]
        _guarded(_CHANGES[event], lambda: _full(path, dir_fd))


def _wrapped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(fd: int, *args: Any) -> Any:
        _guarded(name, lambda: _of_fd(fd))
        return call(fd, *args)

    return wrapper


class _Connection(sqlite3.Connection):
    """A connection whose transactions are steps, named by what they change."""

    _what = "nothing"

    def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
        if sql.startswith("BEGIN"):
            self._what = "nothing"
        elif sql.startswith(("UPDATE jobs", "INSERT INTO jobs")):
            self._what = f"job {args[0]['state']}"
        elif sql.startswith("INSERT OR REPLACE INTO sightings"):
            self._what = f"sighting {args[0][3]}"
        if sql != "COMMIT":
            return super().execute(sql, *args)
        _guarded(f"commit ({self._what})", lambda: f"{ROOT}/state/jobs.sqlite3")
        done = super().execute(sql, *args)
        _guarded(f"committed ({self._what})", lambda: f"{ROOT}/state/jobs.sqlite3")
        return done


def _connect(*args: Any, **kwargs: Any) -> sqlite3.Connection:
    return _CONNECT(*args, **{"factory": _Connection, **kwargs})


ROLE = _role() if ROOT else ""
_CONNECT = sqlite3.connect
if ROLE:
    for _name in ("fsync", "pwrite", "posix_fallocate", "copy_file_range"):
        setattr(os, _name, _wrapped(_name, getattr(os, _name)))
    sqlite3.connect = _connect  # type: ignore[assignment] - same arguments, same result
    sys.addaudithook(_audit)
