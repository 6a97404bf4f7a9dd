"""Checks of the machine and of this process's place in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ckptd import units
from ckptd.cli.doctor.finding import Finding, failed, ok, skipped, warning
from ckptd.watch.events import MAX_FOLDERS, WATCHES_SHARE

FEW_FILES = 1024
"""Open files a daemon with some runners, their uploads and a database may come to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inotify:
    """The kernel's limits for this user, and what is used of them."""

    max_watches: int
    max_instances: int
    used_instances: int
    """By processes of this user that can be seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What systemd gave this process; None for what it did not."""

    notify_socket: str | None
    watchdog_usec: str | None
    state_directory: str | None
    memory_max_bytes: int | None


def inotify(found: Inotify | None, folders: Mapping[str, int]) -> list[Finding]:
    """Compare the limits with the watched places; `folders` counts those of each pattern."""
    name, total = "inotify", sum(folders.values())
    if not folders:
        return [skipped(name, "nothing is watched by events")]
    if found is None:
        return [warning(name, "this kernel has none: everything is polled", "use another kernel")]
    findings = []
    free = found.max_instances - found.used_instances
    if free < len(folders):
        findings.append(
            failed(
                name,
                f"{len(folders)} places need an instance each, {max(free, 0)} of "
                f"{found.max_instances} are free: the others are polled",
                f"sysctl fs.inotify.max_user_instances={max(1024, 2 * found.max_instances)}",
            )
        )
    ours = found.max_watches // WATCHES_SHARE
    if ours < total:
        findings.append(
            failed(
                name,
                f"{total} folders are watched, {ours} may be: a quarter of {found.max_watches}",
                f"sysctl fs.inotify.max_user_watches={max(524_288, 4 * total)}",
            )
        )
    findings += [
        warning(
            name,
            f"{pattern}: {count} folders, events are asked for {MAX_FOLDERS}: the others are "
            "found by the scan alone",
            "move old runs away, or watch them by several patterns",
        )
        for pattern, count in folders.items()
        if count > MAX_FOLDERS
    ]
    return findings or [
        ok(name, f"{total} folders of {found.max_watches} watches, {free} instances free")
    ]


def open_files(soft_limit: int) -> Finding:
    """Check how many files a process may have open."""
    if soft_limit < FEW_FILES:
        return failed(
            "open files",
            f"{soft_limit} files may be open, a daemon may need {FEW_FILES}",
            "ulimit -n 65536, or LimitNOFILE=65536 in the unit",
        )
    return ok("open files", f"{soft_limit} may be open")


def memory(node_bytes: int, *, slots: int, runner_bytes: int, needed_bytes: int) -> Finding:
    """Compare the bound of the runners with the node; `needed_bytes` is what one takes at least."""
    size = units.format_bytes
    if slots * needed_bytes > node_bytes:
        return failed(
            "memory",
            f"{slots} runners need {size(slots * needed_bytes)}, there are {size(node_bytes)}",
            "lower slots or byte_budget in the settings",
        )
    if slots * runner_bytes > node_bytes:
        return warning(
            "memory",
            f"{slots} runners may take {size(slots * runner_bytes)} (runner_memory), "
            f"there are {size(node_bytes)}",
            "lower runner_memory, or slots: the trainer's memory is on the same node",
        )
    return ok("memory", f"{slots} x {size(runner_bytes)} of {size(node_bytes)}")


def bytecode(environ: Mapping[str, str], cached: Mapping[str, bool]) -> Finding:
    """Check that Python's bytecode is cached; `cached` says so for each package."""
    missing = [package for package, is_cached in cached.items() if not is_cached]
    if missing:
        return warning(
            "bytecode",
            f"{', '.join(missing)}: no cached bytecode, so that each runner compiles it anew",
            "run `python -m compileall` on the environment once, as a user who may write there",
        )
    if environ.get("PYTHONDONTWRITEBYTECODE"):
        return warning(
            "bytecode",
            "PYTHONDONTWRITEBYTECODE is set: what is not cached yet never will be",
            "unset it for the daemon",
        )
    return ok("bytecode", "cached")


def user(uid: int) -> Finding:
    """Check that this is not root."""
    if uid == 0:
        return warning(
            "user",
            "this is root: what is found here need not hold for the daemon's user",
            "run it as that user (`sudo -u`), or the daemon as the training user (ckptd@USER)",
        )
    return ok("user", f"user {uid}")


def unit(found: Unit, *, runner_bytes: int, slots: int) -> list[Finding]:
    """Check what systemd gave; nothing to see outside of a unit."""
    name = "systemd"
    if found.notify_socket is None:
        return [skipped(name, "not under systemd; `systemd-analyze verify` checks the unit")]
    findings = []
    if found.watchdog_usec is None:
        findings.append(
            warning(name, "no watchdog: a daemon that hangs stays", "WatchdogSec=120 in the unit")
        )
    if found.state_directory is None:
        findings.append(
            warning(
                name,
                "no StateDirectory: state lies in a user's folder",
                "use the unit that ships, or StateDirectory=ckptd",
            )
        )
    if found.memory_max_bytes is not None and found.memory_max_bytes < runner_bytes * slots:
        size = units.format_bytes
        findings.append(
            warning(
                name,
                f"MemoryMax is {size(found.memory_max_bytes)}, runners may take "
                f"{size(runner_bytes * slots)}: the kernel would kill one where it could have failed "
                "in words",
                "lower runner_memory below MemoryMax",
            )
        )
    return findings or [ok(name, "notify socket, watchdog and state folder are there")]
