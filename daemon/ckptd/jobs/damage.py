"""A job database that is damaged: told from other failures, kept aside, and saved from what can be.

A database is damaged where SQLite says so: pages that contradict each other, a file that is none.
It is never written to again, so that a person can look at it. What can still be read of it goes
into the new one: jobs that were published, cancelled or failed stay so. What cannot be read is found
again by the watcher in the folders, and by the push id on the Hub: a second commit is not made.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from ckptd.errors import StorageFailed
from ckptd.jobs import rows

_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_WAITING = frozenset({
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN,
})  # fmt: skip
_COMPANIONS = ("", "-wal", "-shm")
_MOST_ASIDE = 1000


class DatabaseDamaged(StorageFailed):
    """The job database contradicts itself, or is no database."""


class DatabaseBusy(StorageFailed):
    """The job database cannot be used now: locked by another process, a full or read-only disk."""


def translated(error: sqlite3.Error | OSError, path: Path) -> StorageFailed:
    """Return the failure of the database at `path` as one of ours."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    text = f"the job database failed: {error}"
    if code in _DAMAGED:
        hint = "the daemon keeps it aside when it starts, and goes on with what can be read of it"
        return DatabaseDamaged(text, path=path, hint=hint)
    hint = "is the state folder writable, and is there space on its disk?"
    if code in _WAITING:
        return DatabaseBusy(text, path=path, hint=hint)
    return StorageFailed(text, path=path, hint=hint)


def check(connection: sqlite3.Connection, path: Path) -> None:
    """Read the whole database once.

    Raises:
        DatabaseDamaged: something in it contradicts itself.
    """
    [found] = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise DatabaseDamaged(f"the job database is damaged: {found}", path=path)


def set_aside(path: Path) -> Path:
    """Rename the database at `path`, with its journal; return where it is now.

    Raises:
        StorageFailed: it cannot be renamed.
    """
    for number in range(1, _MOST_ASIDE):
        aside = path.with_name(f"{path.name}.damaged-{number}")
        if not aside.exists():
            break
    try:
        for companion in reversed(
            _COMPANIONS
        ):  # the database last: killed before, it is done again
            with contextlib.suppress(FileNotFoundError):
                path.with_name(path.name + companion).rename(
                    aside.with_name(aside.name + companion)
                )
    except OSError as error:
        raise StorageFailed(f"cannot be kept aside: {error.strerror}", path=path) from error
    return aside


def rescue(damaged: Path, path: Path) -> int:
    """Copy what can be read of the database `damaged` into the empty one at `path`; count jobs.

    Raises:
        StorageFailed: the new database cannot be written.
    """
    try:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as target:
            target.execute("BEGIN IMMEDIATE")
            num_jobs = _copy(damaged, target, "jobs")
            _copy(damaged, target, "history")
            _copy(damaged, target, "sightings")
            target.execute("COMMIT")
    except sqlite3.Error as error:
        raise translated(error, path) from error
    return num_jobs


def _copy(damaged: Path, target: sqlite3.Connection, table: str) -> int:
    """Copy the readable, sound rows of a table, from both ends towards what is damaged."""
    known = {row[1] for row in target.execute(f"PRAGMA table_info({table})")}
    done = 0
    for order in ("ASC", "DESC"):
        for row in _readable(damaged, table, order):
            if table == "jobs" and not _is_sound(row):
                continue
            columns = [column for column in row.keys() if column in known]  # noqa: SIM118 - a Row iterates over its values
            marks = ", ".join("?" * len(columns))
            names = ", ".join(columns)
            query = f"INSERT OR IGNORE INTO {table} ({names}) VALUES ({marks})"  # noqa: S608 - our own table and column names; values are bound
            with contextlib.suppress(sqlite3.IntegrityError):
                done += target.execute(query, [row[c] for c in columns]).rowcount
    return done


def _readable(damaged: Path, table: str, order: str) -> Iterator[sqlite3.Row]:
    key = "source_path" if table == "sightings" else "seq"
    try:
        with contextlib.closing(
            sqlite3.connect(f"{damaged.absolute().as_uri()}?mode=ro", uri=True)
        ) as source:
            source.row_factory = sqlite3.Row
            yield from source.execute(f"SELECT * FROM {table} ORDER BY {key} {order}")  # noqa: S608 - our own names
    except sqlite3.Error:
        return


def _is_sound(row: sqlite3.Row) -> bool:
    try:
        rows.job(row)
    except (ValueError, IndexError, TypeError):
        return False
    return True
