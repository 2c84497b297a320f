"""One SQLite file a process: opened by its owner for writing, by everybody else read-only."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared.errors import RoomError, StateError


def open_owned(path: Path, schema: str, version: int) -> sqlite3.Connection:
    """Returns the owner's connection: WAL, `synchronous=FULL`, schema in place, explicit transactions only.

    Use it with `transaction`. It may be used by several threads when a lock of the caller keeps them apart.

    Raises:
        StateError: the file cannot be opened or was written by a newer version.
        RoomError: the disk is full.
    """
    with _translated(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, isolation_level=None, timeout=30, check_same_thread=False)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        found = int(connection.execute("PRAGMA user_version").fetchone()[0])
        if found > version:
            raise StateError(
                f"{path} has schema {found}, this version knows {version}.",
                cure="Install the version that wrote it.",
            )
        if found < version:
            # executescript commits by itself: the version is set last, so a cut in between starts again.
            connection.executescript(schema)
            connection.execute(f"PRAGMA user_version={version}")
    return connection


def open_foreign(path: Path) -> sqlite3.Connection | None:
    """Returns a read-only connection to another process's file, or None while that file does not exist."""
    if not path.exists():
        return None
    try:
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro",
            uri=True,
            isolation_level=None,
            timeout=30,
            check_same_thread=False,
        )
        connection.row_factory = sqlite3.Row
        if int(connection.execute("PRAGMA user_version").fetchone()[0]) == 0:
            connection.close()  # its owner is still creating it
            return None
    except sqlite3.Error as exc:
        raise StateError(f"Cannot read {path}: {exc}.") from exc
    return connection


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection | None]:
    """`open_foreign` for as long as the block runs."""
    connection = open_foreign(path)
    try:
        yield connection
    finally:
        if connection is not None:
            connection.close()


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """One write transaction: committed and durable at the end, rolled back when anything raises.

    Raises:
        RoomError: the disk is full; nothing was changed.
        StateError: any other failure of the database; nothing was changed.
    """
    with _translated("the database"):
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")


def insert(connection: sqlite3.Connection, table: str, row: Mapping[str, Any], *, on_conflict: str = "") -> bool:
    """Inserts one row, named columns only, and tells whether it was new.

    `table`, the keys and `on_conflict` ("OR IGNORE", "OR REPLACE") are words of ours, never input.
    """
    columns = ", ".join(row)
    marks = ", ".join("?" * len(row))
    statement = f"INSERT {on_conflict} INTO {table} ({columns}) VALUES ({marks})"  # noqa: S608 see above
    return connection.execute(statement, tuple(row.values())).rowcount > 0


@contextmanager
def _translated(what: object) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as exc:
        if exc.sqlite_errorcode == sqlite3.SQLITE_FULL:
            raise RoomError(f"No room left for {what}: {exc}.", cure="Free disk space.") from exc
        raise StateError(f"Cannot use {what}: {exc}.", cure="Check the disk and its file system.") from exc
