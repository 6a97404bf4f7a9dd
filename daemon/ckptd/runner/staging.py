"""The staging folder of a job, and the ledger by which a killed job is resumed.

`<work>/out/` holds finished output files under their final names; `<work>/ledger.jsonl` says which
plan they belong to and what they were when they were finished. An attempt under another plan
starts over; under the same plan, files that are still what the ledger says are reused. Lines are
appended and synced after the file they speak of, so that a torn last line costs one file at most; its
sha256 is noted before it gets its name, so that a kill between the two costs nothing.

With `staging: none` no weights lie here, and the ledger alone says which file has which sha256 and
which were sent (`recall`, `note`).

A file that anybody touched since has another change time and is made again. After a restart of the
machine the disk may hold something else than what was synced, so that every file must also have the
sha256 of the ledger then; one without a sha256 is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptd.checkpoint import header, writer
from ckptd.errors import CkptdError
from ckptd.plan.plan import Plan, ShardPlan
from ckptd.plan.stream import FinishedShard
from ckptd.telemetry import node

_CHUNK_BYTES = 2 << 20
_LEDGER_NAME = "ledger.jsonl"
_NAMED = ("shard", "synced", "hashed", "sent")
"""The keys under which lines of the ledger name a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What the ledger says of a file that is sent without ever being written."""

    sha256: str
    is_sent: bool


def has_work(work_path: Path) -> bool:
    """Say whether a staging folder holds anything that another attempt need not do again."""
    ledger_path = work_path / _LEDGER_NAME
    with contextlib.suppress(OSError):
        if ledger_path.read_bytes().count(b"\n") > 1:
            return True
    return any((work_path / "out").glob("[!.]*"))


class Staging:
    """One job's folder. Blocking; owned by the job's process.

    `boot_id` names this start of the machine; where it is unknown (empty), every file is hashed. `check` is called while hashing and may raise to stop.
    """

    def __init__(
        self,
        work_path: Path,
        *,
        boot_id: str | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.work_path = work_path
        self._boot_id = node.boot_id() if boot_id is None else boot_id
        self._check = check
        self.out_path = work_path / "out"
        self._ledger_path = work_path / _LEDGER_NAME

    def resume(self, plan: Plan, *, hashed: bool) -> dict[str, FinishedShard]:
        """Make the folder ready for `plan`; return the files an earlier attempt finished.

        Files without a sha256 do not count where one is wanted (`hashed`).

        Raises:
            NoSpace, StorageFailed: the folder cannot be written.
        """
        finished = self._resumed(plan, hashed=hashed)
        for shard in plan.shards:
            writer.make_folder((self.out_path / shard.name).parent)
        return finished

    def _resumed(self, plan: Plan, *, hashed: bool) -> dict[str, FinishedShard]:
        writer.make_folder(self.out_path)
        lines = self._read_ledger()
        if not lines or lines[0].get("plan") != plan.digest:
            self._clear(keep=())
            writer.write_file(self._ledger_path, _line(self._head(plan)))
            return {}
        same_boot = lines[0].get("boot") == self._boot_id != ""
        by_name = {line.get("shard", line.get("synced")): line for line in lines[1:]}
        kept: list[Mapping[str, Any]] = [self._head(plan)]
        finished = {}
        for shard in plan.shards:
            line = self._reusable(shard, by_name.get(shard.name), same_boot, hashed)
            if line is not None:
                kept.append(line)
                finished[shard.name] = FinishedShard(
                    name=shard.name,
                    path=self.out_path / shard.name,
                    nbytes=shard.nbytes,
                    sha256=line["sha256"],
                )
        self._clear(keep=finished)
        # Written anew: a line appended behind a torn one would be lost with it.
        writer.write_file(self._ledger_path, b"".join(map(_line, kept)))
        return finished

    def recall(self, plan: Plan) -> dict[str, Sent]:
        """Make the folder ready for `plan`, whose files are not to lie here; return what is known.

        Raises:
            NoSpace, StorageFailed: the folder cannot be written.
        """
        writer.make_folder(self.out_path)
        lines = self._read_ledger()
        same = bool(lines) and lines[0].get("plan") == plan.digest
        known: dict[str, Sent] = {}
        for line in lines[1:] if same else ():
            name = next((str(line[key]) for key in _NAMED if key in line), "")
            sha256 = line.get("sha256")
            if name and isinstance(sha256, str):
                is_sent = "sent" in line or (name in known and known[name].is_sent)
                known[name] = Sent(sha256=sha256, is_sent=is_sent)
        self._clear(keep=())
        kept = [_sent_line(name, sent) for name, sent in known.items()]
        writer.write_file(self._ledger_path, b"".join(map(_line, (self._head(plan), *kept))))
        return known

    def note(self, name: str, sent: Sent) -> None:
        """Note the sha256 of a file that lies nowhere, and whether the Hub has it.

        Raises:
            NoSpace, StorageFailed: the ledger cannot be written.
        """
        self._append(_sent_line(name, sent))

    def announce(self, shard: FinishedShard) -> None:
        """Note what `shard` will be once it has its name: its bytes are durable.

        Raises:
            NoSpace, StorageFailed: the ledger cannot be written.
        """
        self._append({"synced": shard.name, "sha256": shard.sha256})

    def record(self, shard: FinishedShard) -> None:
        """Note that `shard` is durable under its name.

        Raises:
            NoSpace, StorageFailed: the ledger cannot be written.
        """
        self._append(_told(shard.name, shard.path.stat(), shard.sha256))

    def remove(self) -> None:
        """Remove the whole folder; nothing happens if it is gone."""
        shutil.rmtree(self.work_path, ignore_errors=True)

    def _append(self, line: Mapping[str, Any]) -> None:
        try:
            fd = os.open(self._ledger_path, os.O_WRONLY | os.O_APPEND)
            try:
                os.write(fd, _line(line))
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise writer.translated(error, self._ledger_path, 0) from error

    def _clear(self, *, keep: Container[str]) -> None:
        """Remove everything but `keep`: what an earlier attempt left may belong there no more."""
        try:
            for path in sorted(self.out_path.rglob("*"), reverse=True):  # files before folders
                if path.is_dir() and not path.is_symlink():
                    with contextlib.suppress(OSError):
                        path.rmdir()
                elif path.relative_to(self.out_path).as_posix() not in keep:
                    path.unlink()
        except OSError as error:
            raise writer.translated(error, self.out_path, 0) from error

    def _read_ledger(self) -> list[dict[str, Any]]:
        """Return the lines up to the first that is torn."""
        try:
            raw = self._ledger_path.read_bytes().splitlines()
        except OSError:
            return []
        lines = []
        for text in raw:
            try:
                line = json.loads(text)
            except ValueError:
                break
            if not isinstance(line, dict):
                break
            lines.append(line)
        return lines

    def _head(self, plan: Plan) -> dict[str, Any]:
        return {"plan": plan.digest, "boot": self._boot_id}

    def _reusable(
        self, shard: ShardPlan, line: Mapping[str, Any] | None, same_boot: bool, hashed: bool
    ) -> Mapping[str, Any] | None:
        """Return the ledger's line of `shard` where the file may be used as it is, else None."""
        path = self.out_path / shard.name
        try:
            if line is None or (hashed and not line["sha256"]):
                return None
            stat = path.stat()
            specs = {tensor.spec for tensor in header.read(path).tensors}
            if stat.st_size != shard.nbytes or specs != set(shard.tensors):
                return None
            if same_boot and "shard" in line:
                sound = line == _told(shard.name, stat, line["sha256"])
            else:
                sound = line["sha256"] is not None and self._sha256(path) == line["sha256"]
        except (OSError, CkptdError, KeyError):
            return None
        return _told(shard.name, stat, line["sha256"]) if sound else None

    def _sha256(self, path: Path) -> str:
        """Return the sha256 of a file in hexadecimal."""
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                self._check()
        return digest.hexdigest()


def _told(name: str, stat: os.stat_result, sha256: str | None) -> dict[str, Any]:
    """Return what the ledger says of a file; any write, also one that resets mtime, changes it."""
    return {
        "shard": name,
        "nbytes": stat.st_size,
        "sha256": sha256,
        "ino": stat.st_ino,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,
    }


def _sent_line(name: str, sent: Sent) -> dict[str, Any]:
    return {"sent" if sent.is_sent else "hashed": name, "sha256": sent.sha256}


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"
