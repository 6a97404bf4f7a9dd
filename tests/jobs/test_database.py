"""What the SQLite file promises beyond the store contract."""

from __future__ import annotations

import dataclasses
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from ckptd import errors
from ckptd.jobs.database import MIGRATIONS, Database
from ckptd.jobs.job import JobSpec, State

WRITER = """
import sys
from pathlib import Path
from ckptd.jobs.database import Database
from ckptd.jobs.job import JobSpec

with Database(Path(sys.argv[1])) as database:
    for number in range(100_000):
        text = str(number)
        database.enqueue(
            JobSpec(
                job_id=text, definition={}, pipeline="p", source_path="/s", pinned_path="/p",
                layout="hf", run="r", name="n", step=number, content_digest=text,
                pipeline_digest="d", target="", created_at=0.0,
            ),
            now=0.0,
        )
        print(number, flush=True)
"""


def spec() -> JobSpec:
    return JobSpec(
        job_id="abc",
        definition={},
        pipeline="p",
        source_path="/s",
        pinned_path="/p",
        layout="hf",
        run="r",
        name="n",
        step=None,
        content_digest="c",
        pipeline_digest="d",
        target="",
        created_at=0.0,
    )


def test_acknowledged_commits_survive_kill_9(tmp_path: Path) -> None:
    """A job whose enqueue returned is there after kill -9, and the database is whole."""
    path = tmp_path / "jobs.sqlite3"
    for _ in range(2):
        path.unlink(missing_ok=True)
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            acknowledged = [int(writer.stdout.readline()) for _ in range(25)]
            os.kill(writer.pid, signal.SIGKILL)
            acknowledged += [int(line) for line in writer.stdout.readlines()]
        with Database(path) as database:
            found = {job.job_id for job in database.list()}
        assert {str(number) for number in acknowledged} <= found
        with sqlite3.connect(path) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        connection.close()


def test_two_processes_can_share_it(tmp_path: Path) -> None:
    """The command line sees and changes jobs while the daemon has the database open."""
    path = tmp_path / "jobs.sqlite3"
    with Database(path) as daemon, Database(path) as command:
        daemon.enqueue(spec(), now=0.0)
        command.cancel("abc", now=1.0)
        assert daemon.get("abc").state is State.CANCELLED


def test_read_only_reads_and_never_writes(tmp_path: Path) -> None:
    """`ckptd jobs ls` can look at a database that it could not change."""
    path = tmp_path / "jobs.sqlite3"
    with Database(path) as database:
        database.enqueue(spec(), now=0.0)
    with Database(path, read_only=True) as database:
        assert len(database.list()) == 1
        with pytest.raises(errors.StorageFailed, match="readonly"):
            database.cancel("abc", now=1.0)


def test_absent_database_is_not_made_by_a_reader(tmp_path: Path) -> None:
    """Looking leaves no file behind."""
    with pytest.raises(errors.StorageFailed):
        Database(tmp_path / "jobs.sqlite3", read_only=True)
    assert list(tmp_path.iterdir()) == []


def test_newer_database_is_refused(tmp_path: Path) -> None:
    """A database of a newer ckptd is left alone, with the advice what to do."""
    path = tmp_path / "jobs.sqlite3"
    Database(path).close()
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version={len(MIGRATIONS) + 1}")
    connection.close()
    with pytest.raises(errors.StorageFailed, match="version 2"):
        Database(path)


def test_damaged_database_is_a_storage_failure(tmp_path: Path) -> None:
    """What is no database is refused by name instead of being replaced."""
    path = tmp_path / "jobs.sqlite3"
    path.write_bytes(b"this is not a database, whatever its name says" * 100)
    with pytest.raises(errors.StorageFailed, match=r"jobs\.sqlite3"):
        Database(path)
    assert path.read_bytes().startswith(b"this is not")


def test_failed_transaction_leaves_nothing(tmp_path: Path) -> None:
    """A row that breaks a rule of the schema changes nothing, and the next call works."""
    with Database(tmp_path / "jobs.sqlite3") as database:
        database.enqueue(spec(), now=0.0)
        with pytest.raises(errors.StorageFailed):
            database.enqueue(JobSpec(**{**_fields(), "content_digest": "other"}), now=0.0)
        assert len(database.list()) == 1


def _fields() -> dict[str, object]:
    given = spec()
    return {name: getattr(given, name) for name in given.__dataclass_fields__}


def test_the_next_job_is_found_in_steps_that_grow_with_the_queue_alone(tmp_path: Path) -> None:
    """A long queue for one branch behind a long past costs no step for each pair of them."""
    num_jobs, num_queued = 600, 300
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 100
        return 0

    with Database(tmp_path / "jobs.sqlite3") as database:
        for number in range(num_jobs):
            text = str(number)
            one = dataclasses.replace(
                spec(), job_id=text, content_digest=text, target="acme/a@main"
            )
            database.enqueue(one, now=0.0)
        past = num_jobs - num_queued
        database._connection.execute("UPDATE jobs SET state='published' WHERE seq<=?", (past,))
        database._connection.set_progress_handler(count, 100)
        job = database.acquire(worker="w", lease_s=60.0, now=1.0)
    assert job is not None
    assert job.job_id == str(past)
    assert steps < 100 * num_jobs
