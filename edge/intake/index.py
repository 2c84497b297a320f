"""intake.sqlite: what the spool holds, what the door refused, who called. Rebuildable from the spool's folder.

The index follows the folder and not the other way round: an object is durable when its file and the folder are, so
a commit here does not wait for the disk (`synchronous=NORMAL`). After a power cut the newest rows may be missing; the
next start finds the files, gives them rows again and names the index anew, so that followers start over (they know
what they have done by digest). What no file can tell again (a storage commitment) is written with `durable`.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msgspec import Struct

from edge.sqlite import insert, open_owned, transaction
from shared.errors import StateError

_SCHEMA_VERSION = 3
_SCHEMA = """
CREATE TABLE IF NOT EXISTS objects (
    id INTEGER PRIMARY KEY AUTOINCREMENT,   -- order of storing; other processes follow it as a cursor
    digest TEXT NOT NULL UNIQUE,
    file TEXT NOT NULL,                     -- name inside the spool folder
    offset INTEGER NOT NULL,                -- where the data set starts, bytes
    length INTEGER NOT NULL,                -- of the data set, bytes
    sop_instance TEXT NOT NULL,
    sop_class TEXT NOT NULL,
    study TEXT NOT NULL,
    series TEXT NOT NULL,
    modality TEXT NOT NULL,
    transfer_syntax TEXT NOT NULL,
    calling_ae TEXT NOT NULL,
    called_ae TEXT NOT NULL,
    address TEXT NOT NULL,
    association TEXT NOT NULL,
    received_at REAL NOT NULL,              -- first byte, seconds since 1970
    stored_at REAL NOT NULL,                -- durable, seconds since 1970
    conflict INTEGER NOT NULL,              -- 1: other bytes were stored under the same SOP Instance UID
    fault TEXT NOT NULL,                    -- why the data set could not be walked; empty when it could
    patient TEXT NOT NULL,                  -- SHA-256 of PatientID; empty when there is none
    state TEXT NOT NULL,                    -- kept; identity_conflict: kept beside, nobody reads it; evicted: file gone
    committed_at REAL                       -- reported to the sender by Storage Commitment
);
CREATE INDEX IF NOT EXISTS objects_instance ON objects (sop_instance);
CREATE INDEX IF NOT EXISTS objects_series ON objects (series);
CREATE INDEX IF NOT EXISTS objects_study ON objects (study);
CREATE INDEX IF NOT EXISTS objects_state ON objects (state, stored_at, id);
CREATE TABLE IF NOT EXISTS associations (id TEXT PRIMARY KEY, ended_at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS counts (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS quarantine (     -- what the door refused; the bytes lie in the quarantine folder
    digest TEXT PRIMARY KEY, file TEXT NOT NULL, outcome TEXT NOT NULL, reason TEXT NOT NULL,
    calling_ae TEXT NOT NULL, address TEXT NOT NULL, sop_class TEXT NOT NULL, sop_instance TEXT NOT NULL,
    transfer_syntax TEXT NOT NULL, length INTEGER NOT NULL, at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS callers (        -- who called and is not allowed
    ae_title TEXT NOT NULL, address TEXT NOT NULL, called_ae TEXT NOT NULL, proposed TEXT NOT NULL,
    first_at REAL NOT NULL, last_at REAL NOT NULL, times INTEGER NOT NULL, PRIMARY KEY (ae_title, address)
);
CREATE TABLE IF NOT EXISTS peers (          -- who called and is allowed
    ae_title TEXT NOT NULL, address TEXT NOT NULL, last_association_at REAL NOT NULL, last_echo_at REAL NOT NULL,
    objects INTEGER NOT NULL, bytes INTEGER NOT NULL, note TEXT NOT NULL, note_at REAL NOT NULL,
    PRIMARY KEY (ae_title, address)
);
CREATE TABLE IF NOT EXISTS commitments (    -- Storage Commitment requests until their report was taken
    transaction_uid TEXT NOT NULL, ae_title TEXT NOT NULL, address TEXT NOT NULL, asked TEXT NOT NULL,
    asked_at REAL NOT NULL, state TEXT NOT NULL, tries INTEGER NOT NULL, next_at REAL NOT NULL,
    last_error TEXT NOT NULL,
    PRIMARY KEY (transaction_uid, ae_title)
);
-- One row: how full the spool is. level: '', warning, full; held: JSON, what waits for what.
CREATE TABLE IF NOT EXISTS room (
    one INTEGER PRIMARY KEY CHECK (one = 1), used_bytes INTEGER NOT NULL, capacity_bytes INTEGER NOT NULL,
    level TEXT NOT NULL, held TEXT NOT NULL, at REAL NOT NULL
);
-- One row: names this index. A rebuilt index gives other ids to the same objects, so whoever follows ids starts again.
CREATE TABLE IF NOT EXISTS generation (one INTEGER PRIMARY KEY CHECK (one = 1), id TEXT NOT NULL);
"""
CALLERS_KEPT = 200
PEERS_KEPT = 1000

KEPT, IDENTITY_CONFLICT, EVICTED = "kept", "identity_conflict", "evicted"  # the states of an object


class Visit(Struct):
    """What one association of an allowed peer did."""

    ae_title: str
    address: str
    objects: int = 0
    bytes: int = 0
    echoed: bool = False
    note: str = ""  # why it was slow, with the cure


class Index:
    """See the module's docstring; one process owns the file, its threads share this object."""

    def __init__(self, path: Path) -> None:
        """Opens the index; one of an older version is thrown away, the spool rebuilds it.

        Raises:
            StateError: the file cannot be used or a newer version wrote it.
        """
        if 0 < _version(path) < _SCHEMA_VERSION:
            for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
                path.with_name(name).unlink(missing_ok=True)
        self._db = open_owned(path, _SCHEMA, _SCHEMA_VERSION)
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._lock = threading.Lock()
        with self._writing() as db:
            db.execute("INSERT OR IGNORE INTO generation VALUES (1, ?)", (secrets.token_hex(8),))

    def close(self) -> None:
        """Closes the file; the index is not used afterwards."""
        with self._lock:
            self._db.close()

    def rows(self, question: str, *values: object) -> list[sqlite3.Row]:
        """Returns the rows that a SELECT of ours gives; StateError when the file cannot be read."""
        try:
            with self._lock:
                return self._db.execute(question, values).fetchall()
        except sqlite3.Error as exc:
            raise StateError(f"Cannot read the index of the spool: {exc}.", cure="Check the disk.") from exc

    def digests(self, sop_instance: str) -> list[sqlite3.Row]:
        """Returns the rows stored under a SOP Instance UID, oldest first."""
        return self.rows("SELECT * FROM objects WHERE sop_instance = ? ORDER BY id", sop_instance)

    def beside(self, objects: Sequence[tuple[str, str]]) -> list[sqlite3.Row]:
        """Returns the rows that have the digest or the SOP Instance UID of one of the objects, oldest first."""
        marks = ", ".join("?" * len(objects))
        return self.rows(
            f"SELECT * FROM objects WHERE digest IN ({marks}) OR sop_instance IN ({marks}) ORDER BY id",  # noqa: S608 marks
            *(digest for digest, _ in objects),
            *(instance for _, instance in objects),
        )

    def add(self, objects: Sequence[Mapping[str, Any]], *, again: Sequence[str] = ()) -> None:
        """Adds rows, unless their digests are there, in one transaction; flags older rows of a conflict.

        The row of an evicted object that came again (its digest is in `again`) takes its place anew, under a new id.
        """
        with self._writing() as db:
            for digest in again:
                db.execute("DELETE FROM objects WHERE digest = ? AND state = ?", (digest, EVICTED))
            for row in objects:
                insert(db, "objects", row, on_conflict="OR IGNORE")
                if row["conflict"]:
                    db.execute("UPDATE objects SET conflict = 1 WHERE sop_instance = ?", (row["sop_instance"],))

    def evict(self, digests: Sequence[str], promised_before: float) -> list[str]:
        """Marks objects whose files are about to go, and returns their files; durable, so that no lost file is ever
        missed. What was promised at or after `promised_before` stays."""
        files = []
        with self.durable() as db:
            for one in digests:
                row = db.execute(
                    "UPDATE objects SET state = ? WHERE digest = ? AND state <> ?"
                    " AND (committed_at IS NULL OR committed_at < ?) RETURNING file",
                    (EVICTED, one, EVICTED, promised_before),
                ).fetchone()
                if row is not None:
                    files.append(row["file"])
        return files

    def promise(self, instances: Sequence[str], now: float) -> None:
        """Records, before it is said, that these SOP instances are promised to be kept; durable."""
        with self.durable() as db:
            db.executemany(
                "UPDATE objects SET committed_at = ? WHERE sop_instance = ? AND state <> ?",
                [(now, instance, EVICTED) for instance in instances],
            )

    def tidy(self, *, associations_before: float, evicted_before: float) -> None:
        """Forgets ended associations, and objects that left long ago."""
        with self._writing() as db:
            db.execute("DELETE FROM associations WHERE ended_at < ?", (associations_before,))
            db.execute("DELETE FROM objects WHERE state = ? AND stored_at < ?", (EVICTED, evicted_before))

    def tell_room(self, used: int, capacity: int, level: str, held: Mapping[str, int], now: float) -> None:
        """Writes down how full the spool is, for the page and `status`."""
        row = {
            "one": 1,
            "used_bytes": used,
            "capacity_bytes": capacity,
            "level": level,
            "held": json.dumps(held),
            "at": now,
        }
        with self._writing() as db:
            insert(db, "room", row, on_conflict="OR REPLACE")

    def rename(self) -> None:
        """Gives the index a new name: followers of its ids start over."""
        with self.durable() as db:
            db.execute("UPDATE generation SET id = ?", (secrets.token_hex(8),))

    def association_ended(self, association: str, now: float, visit: Visit | None) -> None:
        """Records that no more objects come by this association, and what it did."""
        with self._writing() as db:
            db.execute("INSERT OR IGNORE INTO associations VALUES (?, ?)", (association, now))
            if visit is None:
                return
            row = {
                "ae_title": visit.ae_title,
                "address": visit.address,
                "last_association_at": now,
                "last_echo_at": now if visit.echoed else 0.0,
                "objects": visit.objects,
                "bytes": visit.bytes,
                "note": visit.note,
                "note_at": now if visit.note else 0.0,
            }
            if not insert(db, "peers", row, on_conflict="OR IGNORE"):
                db.execute(
                    "UPDATE peers SET last_association_at = ?, last_echo_at = MAX(last_echo_at, ?),"
                    " objects = objects + ?, bytes = bytes + ?, note = CASE WHEN ? = '' THEN note ELSE ? END,"
                    " note_at = MAX(note_at, ?) WHERE ae_title = ? AND address = ?",
                    (
                        now,
                        row["last_echo_at"],
                        visit.objects,
                        visit.bytes,
                        visit.note,
                        visit.note,
                        row["note_at"],
                        visit.ae_title,
                        visit.address,
                    ),
                )
            else:
                _keep_newest(db, "peers", "last_association_at", PEERS_KEPT)

    def caller(self, ae_title: str, address: str, called_ae: str, proposed: str, now: float) -> None:
        """Records somebody who is not allowed; the oldest of more than CALLERS_KEPT are forgotten."""
        with self._writing() as db:
            db.execute(
                "INSERT INTO callers VALUES (?, ?, ?, ?, ?, ?, 1) ON CONFLICT (ae_title, address) DO UPDATE SET"
                " called_ae = excluded.called_ae, proposed = excluded.proposed, last_at = excluded.last_at,"
                " times = times + 1",
                (ae_title, address, called_ae, proposed, now, now),
            )
            _keep_newest(db, "callers", "last_at", CALLERS_KEPT)

    def count(self, name: str) -> None:
        """Adds one to a counter."""
        with self._writing() as db:
            db.execute("INSERT INTO counts VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET value = value + 1", (name,))

    def counts(self) -> dict[str, int]:
        """Returns the counters and how many objects are held."""
        counts = {row["name"]: int(row["value"]) for row in self.rows("SELECT * FROM counts")}
        stored, conflicts, identity = self.rows(
            "SELECT COUNT(*), COALESCE(SUM(conflict), 0), COALESCE(SUM(state = ?), 0) FROM objects", IDENTITY_CONFLICT
        )[0]
        return counts | {"stored": stored, "in_conflict": conflicts, "identity_conflicts": identity}

    def quarantine(self, row: Mapping[str, Any], limit_bytes: int) -> list[str]:
        """Records what was refused and returns the files that must go to keep the rest under `limit_bytes`."""
        with self._writing() as db:
            insert(db, "quarantine", row, on_conflict="OR REPLACE")
            total, gone = 0, []
            for one in db.execute("SELECT digest, file, length FROM quarantine ORDER BY rowid DESC").fetchall():
                total += one["length"]
                if total > limit_bytes:
                    gone.append((one["digest"], one["file"]))
            db.executemany("DELETE FROM quarantine WHERE digest = ?", [(digest,) for digest, _ in gone])
            return [file for _, file in gone]

    @contextmanager
    def durable(self) -> Iterator[sqlite3.Connection]:
        """One transaction that is on the disk when it ends."""
        with self._lock:
            self._db.execute("PRAGMA synchronous=FULL")
            try:
                with transaction(self._db) as db:
                    yield db
            finally:
                self._db.execute("PRAGMA synchronous=NORMAL")

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock, transaction(self._db) as db:
            yield db


def _keep_newest(db: sqlite3.Connection, table: str, column: str, kept: int) -> None:
    db.execute(
        f"DELETE FROM {table} WHERE rowid IN (SELECT rowid FROM {table} ORDER BY {column} DESC LIMIT -1 OFFSET ?)",  # noqa: S608 words of ours
        (kept,),
    )


def _version(path: Path) -> int:
    if not path.exists():
        return 0
    try:
        with sqlite3.connect(path) as db:
            version = int(db.execute("PRAGMA user_version").fetchone()[0])
        db.close()
    except sqlite3.Error:
        return 0  # open_owned says what is wrong with it
    return version
