"""The staging folder of a job, and the ledger by which a killed job is resumed.

`<work>/out/` holds finished output files under their final names; `<work>/ledger.jsonl` says which
plan they belong to and what they were when they were finished. An attempt under another plan
starts over; under the same plan, files that are still what the ledger says are reused. Lines are
appended and synced after the file they speak of, so that a torn last line costs one file at most.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from ckptd.checkpoint import header, writer
from ckptd.checkpoint.header import FileStamp
from ckptd.errors import CkptdError
from ckptd.plan.plan import Plan, ShardPlan
from ckptd.plan.stream import FinishedShard


class Staging:
    """One job's folder. Blocking; owned by the job's process."""

    def __init__(self, work_path: Path) -> None:
        self.work_path = work_path
        self.out_path = work_path / "out"
        self._ledger_path = work_path / "ledger.jsonl"

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
            writer.write_file(self._ledger_path, _line({"plan": plan.digest}))
            return {}
        by_name = {line["shard"]: line for line in lines if "shard" in line}
        kept, finished = [lines[0]], {}
        for shard in plan.shards:
            line = by_name.get(shard.name)
            if line is not None and self._holds(shard, line) and (line["sha256"] or not hashed):
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

    def record(self, shard: FinishedShard) -> None:
        """Note that `shard` is durable.

        Raises:
            NoSpace, StorageFailed: the ledger cannot be written.
        """
        stat = shard.path.stat()
        line = {
            "shard": shard.name,
            "nbytes": shard.nbytes,
            "sha256": shard.sha256,
            "ino": stat.st_ino,
            "mtime_ns": stat.st_mtime_ns,
        }
        try:
            fd = os.open(self._ledger_path, os.O_WRONLY | os.O_APPEND)
            try:
                os.write(fd, _line(line))
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise writer.translated(error, self._ledger_path, 0) from error

    def remove(self) -> None:
        """Remove the whole folder; nothing happens if it is gone."""
        shutil.rmtree(self.work_path, ignore_errors=True)

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

    def _holds(self, shard: ShardPlan, line: Mapping[str, Any]) -> bool:
        path = self.out_path / shard.name
        try:
            stat = path.stat()
            same = FileStamp(
                ino=line["ino"], nbytes=shard.nbytes, mtime_ns=line["mtime_ns"]
            ) == FileStamp.of(stat)
            if not same or "sha256" not in line:
                return False
            found = header.read(path)
        except (OSError, CkptdError, KeyError):
            return False
        return {tensor.spec for tensor in found.tensors} == set(shard.tensors)


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"
