"""What the checks need to know, read from the node: the doctor's only look at the world.

Nothing of the trainer's is changed: a trial of links is made with a file of ours in `.ckptd`, and
that folder is removed again where it was not there before.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from ckptd import errors
from ckptd.checkpoint import pin
from ckptd.cli.doctor.device import Torch
from ckptd.cli.doctor.hub import Reached, TokenFound
from ckptd.cli.doctor.node import Inotify, Unit
from ckptd.cli.doctor.places import Root, State
from ckptd.telemetry import node
from ckptd.watch import mounts, scan
from ckptd.watch.scan import Place
from ckptd.watch.tree import Tree

TORCH_PATIENCE_S = 120.0
MOST_LOOKED_AT = 20
"""Checkpoints of one place whose files are looked at, the newest: a network has many and is slow."""
_PROTECTED = Path("/proc/sys/fs/protected_hardlinks")
_TRY_TORCH = """
import json, time
began = time.monotonic()
import torch
found = {"version": torch.__version__, "cuda_build": torch.version.cuda,
         "import_s": time.monotonic() - began}
torch.nn.functional.conv2d(torch.ones(1, 3, 32, 32), torch.ones(4, 3, 3, 3))
try:
    torch.cuda.init()
    names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    for n in range(len(names)):
        torch.ones(8, device=f"cuda:{n}").sum().item()
    found["devices"] = names
except Exception as error:
    found["cuda_error"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


def inotify() -> Inotify | None:
    """Return the limits of inotify, or None where this kernel has none."""
    folder = Path("/proc/sys/fs/inotify")
    try:
        return Inotify(
            max_watches=int((folder / "max_user_watches").read_text()),
            max_instances=int((folder / "max_user_instances").read_text()),
            used_instances=_used_instances(),
        )
    except (OSError, ValueError):
        return None


def _used_instances() -> int:
    """Count the inotify instances of this user's processes, those that can be seen."""
    used = 0
    for process in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):
            if process.stat().st_uid != os.geteuid():
                continue
            for file in process.iterdir():
                with contextlib.suppress(OSError):
                    used += str(file.readlink()) == "anon_inode:inotify"
    return used


def open_files() -> int:
    """Return how many files this process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def unit() -> Unit:
    """Return what systemd gave this process."""
    return Unit(
        notify_socket=os.environ.get("NOTIFY_SOCKET"),
        watchdog_usec=os.environ.get("WATCHDOG_USEC"),
        state_directory=os.environ.get("STATE_DIRECTORY"),
        memory_max_bytes=node.memory_bytes() or None,
    )


def cached_bytecode(
    packages: Iterable[str] = ("ckptd", "torch", "huggingface_hub"),
) -> dict[str, bool]:
    """Say for each package that is installed whether its first module's bytecode is cached."""
    found = {}
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            found[package] = Path(importlib.util.cache_from_source(spec.origin)).exists()
    return found


def torch() -> Torch:
    """Import torch and compute a little, in a process of its own: it may crash."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TRY_TORCH],
            capture_output=True,
            text=True,
            timeout=TORCH_PATIENCE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Torch(error=str(error))
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return Torch(error=last)
    said = json.loads(done.stdout.strip().splitlines()[-1])
    return Torch(**{**said, "devices": tuple(said.get("devices", ()))})


def root(pattern: str) -> Root:
    """Return what is at the root of a watched glob."""
    place = scan.parse(pattern)
    path = place.root_path
    on = mounts.file_system(path.resolve())
    absent = Root(
        path=str(path), is_there=path.exists(), can_list=False, file_system=on.kind,
        network=on.network, pin_method=None,
    )  # fmt: skip
    if not absent.is_there or not os.access(path, os.R_OK | os.X_OK):
        return absent
    method, why = _pin_method(path)
    candidates = sorted(_looked_at(place).candidates, key=scan.natural_key)
    seen = _Seen(path)
    for candidate in candidates[-MOST_LOOKED_AT:]:
        seen.look(candidate)
    return Root(
        path=str(path),
        is_there=True,
        can_list=True,
        file_system=on.kind,
        network=on.network,
        pin_method=method,
        why_not_written=why,
        num_checkpoints=len(candidates),
        foreign_files=seen.foreign,
        unreadable=seen.unreadable,
        other_mount=seen.other_mount,
        largest_bytes=seen.largest_bytes,
        device=path.stat().st_dev,
    )


class _Seen:
    """What checkpoints of one root have in common with what ckptd needs; the first of each kind."""

    def __init__(self, root_path: Path) -> None:
        self._dev = root_path.stat().st_dev
        self._protected = _PROTECTED.exists() and _PROTECTED.read_text().strip() == "1"
        self.foreign: str | None = None
        self.unreadable: str | None = None
        self.other_mount: str | None = None
        self.largest_bytes = 0

    def look(self, path: Path) -> None:
        """Take one checkpoint in."""
        files = [path, *path.rglob("*")] if path.is_dir() else [path]
        total = 0
        for file in files:
            try:
                found = file.stat()
            except OSError:
                continue  # gone again, or dangling
            total += 0 if file.is_dir() else found.st_size
            if found.st_dev != self._dev:
                self.other_mount = self.other_mount or str(path)
            if pin.wanted(file.name) and not os.access(file, os.R_OK):
                self.unreadable = self.unreadable or str(file)
            own = found.st_uid == os.geteuid() or os.access(file, os.R_OK | os.W_OK)
            if self._protected and file.is_file() and not own:
                self.foreign = self.foreign or str(file)
        self.largest_bytes = max(self.largest_bytes, total)


def _pin_method(path: Path) -> tuple[str | None, str | None]:
    """Try how a pin would hold files below `path`; say why it cannot."""
    folder = path / pin.FOLDER_NAME
    was_there = folder.exists()
    try:
        return pin.probe(path).value, None
    except errors.StorageFailed as error:
        return None, error.message.partition(": ")[2] or error.message
    finally:
        if not was_there:
            with contextlib.suppress(OSError):
                folder.rmdir()


def watched_folders(pattern: str) -> int:
    """Return how many folders the daemon would watch for one glob, at most."""
    found = _looked_at(scan.parse(pattern))
    return len(found.folders) + len(found.candidates)


def _looked_at(place: Place) -> Tree:
    """Return what is at a watched place, looked at once."""
    tree = Tree(place, watch=lambda folder: None)
    tree.refresh(now=0.0)
    return tree


def state(path: Path) -> State:
    """Return what is known of the state folder, or of the one it would be made in."""
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    on = mounts.file_system(there.resolve())
    try:
        free_bytes = node.free_bytes(path)
    except OSError:
        free_bytes = None
    return State(
        path=str(path),
        can_write=os.access(there, os.W_OK | os.X_OK),
        mode=path.stat().st_mode & 0o777 if path.exists() else None,
        file_system=on.kind,
        network=on.network,
        free_bytes=free_bytes,
        device=there.stat().st_dev,
    )


def hub(endpoint: str) -> tuple[TokenFound, Reached]:
    """Look for a token and ask the Hub about it."""
    from ckptd.hub import reach, tokens

    shown: str | None = None
    try:
        found = tokens.find()
        shown = None if found is None else found.text
        token = TokenFound(origin=None if found is None else found.origin)
    except errors.HubUnauthorized as error:
        token = TokenFound(error=error.message, hint=error.hint)
    try:
        answer = reach.look(endpoint, shown)
    except errors.HubUnauthorized as error:
        refused = TokenFound(error=f"the one from {token.origin}: {error.message}", hint=error.hint)
        return refused, Reached(endpoint=endpoint)
    except errors.HubError as error:
        return token, Reached(endpoint=endpoint, error=error.message, hint=error.hint)
    who = answer.identity
    return token, Reached(
        endpoint=endpoint,
        seconds=answer.seconds,
        skew_s=None if answer.hub_time is None else answer.hub_time - time.time(),
        account=None if who is None else who.name,
        role="" if who is None else who.role,
        namespaces=frozenset() if who is None else who.namespaces,
        writable=None if who is None else who.writable,
    )
