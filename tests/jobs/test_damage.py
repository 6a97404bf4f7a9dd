"""A job database that is damaged, locked or full: told apart, kept aside, waited for."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import anyio
import pytest
import structlog

from ckptd.errors import StorageFailed
from ckptd.jobs import database as job_database
from ckptd.jobs import sqlite as job_sqlite
from ckptd.jobs.damage import DatabaseBusy, DatabaseDamaged
from ckptd.jobs.database import Database
from ckptd.jobs.job import State
from ckptd.jobs.sqlite import SqliteStore
from tests.jobs.test_store import spec

NUM_JOBS = 60
PAGE_BYTES = 4096


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A database of many pages: most jobs queued, the first ones cancelled."""
    path = tmp_path / "state" / "jobs.sqlite3"
    with Database(path) as database:
        for number in range(NUM_JOBS):
            given = spec(f"c{number}", definition={"pipeline": "p", "note": "x" * 2000})
            database.enqueue(given, now=1.0)
        for job in database.list()[:5]:
            database.cancel(job.job_id, now=2.0)
    return path


def _leaf_pages(path: Path) -> list[int]:
    """Return the numbers of the pages that hold rows (a table's leaf begins with 13)."""
    content = path.read_bytes()
    pages = range(1, len(content) // PAGE_BYTES)
    return [page for page in pages if content[page * PAGE_BYTES] == 13]


def _overwrite(path: Path, page: int) -> None:
    with path.open("r+b") as file:
        file.seek(page * PAGE_BYTES)
        file.write(os.urandom(PAGE_BYTES))


async def test_what_can_be_read_of_a_damaged_database_is_kept(path: Path) -> None:
    """One page is gone: the new database has the jobs of both sides of it, in their states."""
    leaves = _leaf_pages(path)
    _overwrite(path, leaves[len(leaves) // 2])
    with pytest.raises(DatabaseDamaged):
        Database(path)
    with structlog.testing.capture_logs() as logs:
        store = await SqliteStore.open(path)
    found = await store.list()
    await store.aclose()
    assert NUM_JOBS // 2 < len(found) < NUM_JOBS
    assert [job.state for job in found[:5]] == [State.CANCELLED] * 5
    assert found[-1].spec.content_digest == f"c{NUM_JOBS - 1}"
    assert [log["log_level"] for log in logs] == ["error", "warning"]
    assert path.with_name("jobs.sqlite3.damaged-1").stat().st_size > 0


async def test_a_second_damage_is_kept_beside_the_first(path: Path) -> None:
    """Nothing that was kept aside is overwritten."""
    for _ in range(2):
        path.write_bytes(os.urandom(10_000))
        await (await SqliteStore.open(path)).aclose()
    assert {p.name for p in path.parent.glob("*damaged*")} == {
        "jobs.sqlite3.damaged-1",
        "jobs.sqlite3.damaged-2",
    }


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_torn_journal_costs_the_last_transactions_at_most(path: Path, share: float) -> None:
    """A power loss leaves a part of the WAL, or zeros in it: the database opens, and is sound."""
    database = Database(path)
    database.enqueue(spec("late"), now=3.0)
    wal = path.with_name(path.name + "-wal")
    torn = path.parent / "torn"
    torn.mkdir()
    (torn / path.name).write_bytes(path.read_bytes())
    content = wal.read_bytes()
    kept = int(len(content) * share)
    (torn / wal.name).write_bytes(content[:kept] + bytes(len(content) - kept))
    database.close()
    with Database(torn / path.name) as found:
        assert len(found.list()) in {NUM_JOBS, NUM_JOBS + 1}


async def test_a_lock_of_another_process_is_waited_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it is held: the call comes back when it is let go, and says so meanwhile."""
    monkeypatch.setattr(job_database, "BUSY_TIMEOUT_S", 0.01)
    monkeypatch.setattr(job_sqlite, "PAUSES_S", (0.01,))
    store = await SqliteStore.open(path)
    lock = sqlite3.connect(path, isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    told = anyio.Event()

    def tell(logger: object, name: str, event: dict[str, object]) -> dict[str, object]:
        if event["event"] == "job store failed, trying again":
            told.set()
        raise structlog.DropEvent

    structlog.configure(processors=[tell])
    try:
        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                group.start_soon(lambda: store.enqueue(spec("late"), now=3.0))
                await told.wait()
                lock.execute("ROLLBACK")
    finally:
        structlog.reset_defaults()
        lock.close()
    assert len(await store.list()) == NUM_JOBS + 1
    await store.aclose()


def test_a_full_disk_is_no_damage(path: Path) -> None:
    """SQLite has no page left: waited for, and the transaction is not half there."""
    with Database(path) as database:
        connection = database._connection
        [pages] = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count={pages}")
        with pytest.raises(DatabaseBusy, match="full"):
            database.enqueue(spec("large", definition={"note": "x" * 1_000_000}), now=4.0)
        connection.execute("PRAGMA max_page_count=100000")
        before = len(database.list())
        database.enqueue(spec("after"), now=5.0)
        assert len(database.list()) == before + 1


def test_a_newer_database_is_neither_damaged_nor_replaced(path: Path) -> None:
    """It belongs to a newer ckptd: the start fails, the file stays."""
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(StorageFailed, match="version 99") as caught:
        Database(path)
    assert not isinstance(caught.value, DatabaseDamaged | DatabaseBusy)
