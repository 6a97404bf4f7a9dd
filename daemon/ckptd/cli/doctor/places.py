"""Checks of folders and disks: what is watched, and where state is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ckptd import units
from ckptd.cli.doctor.finding import Finding, failed, ok, skipped, warning


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """A watched root as it was found."""

    path: str
    is_there: bool
    can_list: bool
    file_system: str | None
    network: str | None
    """The kind of network file system, where it is one."""
    pin_method: str | None
    """`reflink`, `hard link` or `copy` by trying; None where nothing can be written."""
    why_not_written: str | None = None
    num_checkpoints: int = 0
    foreign_files: str | None = None
    """A checkpoint's file of another user that the kernel lets nobody else hard-link."""
    unreadable: str | None = None
    """A checkpoint or file of one that this user may not read."""
    other_mount: str | None = None
    """A checkpoint on another mount than its root: links do not reach it."""
    largest_bytes: int = 0
    """The largest checkpoint there."""
    device: int | None = None
    """Number of the file system, to tell two from one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The state folder as it was found, or where it would be made."""

    path: str
    can_write: bool
    mode: int | None
    """Permission bits; None while there is no such folder."""
    file_system: str | None
    network: str | None
    free_bytes: int | None
    device: int | None = None


def root(found: Root) -> list[Finding]:
    """Check one watched root: there, readable, and how pins are held."""
    name = f"root {found.path}"
    if not found.is_there:
        return [
            warning(
                name,
                "is not there (yet)",
                "make it before training starts, so that its files are seen by events; under "
                "systemd, see that ProtectHome and friends do not hide it",
            )
        ]
    if not found.can_list:
        return [failed(name, "this user may not list it", "run ckptd as the training user")]
    findings = [*_readable(found, name), _pins(found, name)]
    if found.network is not None:
        findings.append(
            warning(
                name,
                f"is on {found.network}: other hosts' writes make no events, it is polled",
                "network_scan_interval says how often; lower it where checkpoints live shortly",
            )
        )
    return findings


def _readable(found: Root, name: str) -> list[Finding]:
    if found.unreadable is not None:
        return [
            failed(
                name,
                f"{found.unreadable} may not be read by this user: it would be refused",
                "run ckptd as the training user (ckptd@USER), or open the files to a group of both",
            )
        ]
    return []


def _pins(found: Root, name: str) -> Finding:
    """Say how pins are held here and what that means."""
    if found.pin_method is None:
        return failed(
            name,
            f"nothing can be written there ({found.why_not_written}): each pin is a copy in the "
            "state folder, and a checkpoint that is rotated away quickly is lost",
            "give ckptd write access to the root (for .ckptd in it); under systemd "
            f"ReadWritePaths={found.path} in a drop-in",
        )
    if found.other_mount is not None:
        return warning(
            name,
            f"{found.other_mount} is another mount: its pins are copies",
            "watch each mount by a pattern whose fixed part lies on it",
        )
    if found.foreign_files is not None and found.pin_method != "reflink":
        return warning(
            name,
            f"{found.foreign_files} belongs to another user, and fs.protected_hardlinks lets only "
            "the owner link it: its pins are copies",
            "run ckptd as the training user (ckptd@USER)",
        )
    if found.pin_method == "copy":
        return warning(
            name,
            f"{found.file_system} has neither reflinks nor hard links: pins are copies, which need "
            "their bytes again",
            "keep checkpoints on a local disk (xfs or btrfs are best)",
        )
    note = {
        "reflink": "pins are reflinks: safe whatever the trainer does",
        "hard link": "pins are hard links; a trainer that rewrites weights in place voids the job",
    }[found.pin_method]
    return ok(name, f"{found.file_system}: {note}; {found.num_checkpoints} checkpoints")


def state(found: State) -> list[Finding]:
    """Check the state folder: written by this user alone, on a disk that locks."""
    name = f"state {found.path}"
    if not found.can_write:
        return [
            failed(
                name,
                "cannot be made or written by this user",
                "name another one with state_dir, or let systemd make it (StateDirectory)",
            )
        ]
    findings = []
    if found.network is not None:
        findings.append(
            failed(
                name,
                f"is on {found.network}: SQLite's log and the daemon's lock need a local disk",
                "put state_dir on a local disk",
            )
        )
    if found.mode is not None and found.mode & 0o077:
        findings.append(
            warning(name, f"is open to others (mode {found.mode:04o})", f"chmod 700 {found.path}")
        )
    return findings or [ok(name, f"{found.file_system}, written by this user")]


def cloning(roots: Sequence[Root], found: State) -> list[Finding]:
    """Say where reflinks could save the bytes of the output, and do not."""
    return [
        warning(
            "reflink",
            f"{root.path} has reflinks, {found.path} is on another file system: output is copied",
            "put state_dir on the file system of the runs: what no stage touches is cloned then",
        )
        for root in roots
        if root.pin_method == "reflink" and root.device != found.device
    ]


def disk(found: State, *, min_free_bytes: int, largest_bytes: int) -> Finding:
    """Compare what is free for staging with the mark and with the largest checkpoint seen."""
    name, size = "disk", units.format_bytes
    if found.free_bytes is None:
        return failed(name, f"{found.path} does not say what is free", "check the disk")
    if found.free_bytes < min_free_bytes:
        return failed(
            name,
            f"{size(found.free_bytes)} free, no job begins below {size(min_free_bytes)} (min_free)",
            "free some space, or put state_dir elsewhere",
        )
    if found.free_bytes < largest_bytes:
        return failed(
            name,
            f"{size(found.free_bytes)} free, the largest checkpoint has {size(largest_bytes)}: its "
            "output is staged whole before the commit",
            "free some space, or put state_dir on a larger disk",
        )
    return ok(name, f"{size(found.free_bytes)} free, the largest checkpoint has "
              f"{size(largest_bytes)}")  # fmt: skip


def definitions(folder: str, good: int, problems: dict[str, str]) -> list[Finding]:
    """Say which definition files can be used; `problems` by path."""
    name = "definitions"
    findings = [
        failed(name, f"{path}: {what}", "ckptd validate shows every problem with its place")
        for path, what in problems.items()
    ]
    if good:
        findings.append(ok(name, f"{good} in {folder}"))
    elif not problems:
        findings.append(
            skipped(name, f"none in {folder}: nothing is watched (`ckptd serve` waits for one)")
        )
    return findings
