"""What this hospital owes the cloud: a row a sealed message, ended only by a verdict or a visible expiry.

Other processes leave plaintext records in the drop folder (`drop`); `uplink`, which alone reads the device
key, seals them into `outbox.sqlite`. A record is in the folder or in the table, whatever is killed when.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from edge.sqlite import open_owned, transaction
from shared.clock import Clock
from shared.errors import PeerError
from shared.files import atomic_write
from shared.wire.chunks import Whole
from shared.wire.records import UpStage
from shared.wire.stages import STAGES, encode

End: TypeAlias = Literal["accepted", "duplicate", "refused", "expired"]

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,150}")
_ENDED_KEPT = 2000  # rows; the counts are kept for ever


@dataclass(frozen=True, slots=True)
class Class:
    """How one stage is treated: smaller `priority` goes first; None means never."""

    priority: int
    lifetime: timedelta | None = None
    quota_bytes: int | None = None


CLASSES: dict[str, Class] = {
    "report": Class(0),
    "judgement": Class(1),
    "update": Class(2),
    "features": Class(3, lifetime=timedelta(days=30), quota_bytes=256 * 1024 * 1024),
}

_SCHEMA = """
CREATE TABLE IF NOT EXISTS messages (
  sequence INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL UNIQUE,
  stage TEXT NOT NULL,
  name TEXT NOT NULL,
  plain TEXT NOT NULL,
  priority INTEGER NOT NULL,
  digest BLOB NOT NULL,
  length INTEGER NOT NULL,
  created TEXT NOT NULL,
  expires TEXT,
  attempts INTEGER NOT NULL DEFAULT 0,
  state TEXT NOT NULL DEFAULT 'waiting',
  reason TEXT NOT NULL DEFAULT '',
  ended TEXT
);
CREATE INDEX IF NOT EXISTS messages_state ON messages (state, priority, sequence);
CREATE INDEX IF NOT EXISTS messages_name ON messages (stage, name, sequence);
CREATE TABLE IF NOT EXISTS bodies (sequence INTEGER PRIMARY KEY, sealed BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS counts (stage TEXT, what TEXT, n INTEGER NOT NULL, PRIMARY KEY (stage, what));
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


def drop(folder: Path, stage: UpStage, record: msgspec.Struct, *, name: str) -> None:
    """Leaves a record for `uplink` to seal and send; durable when this returns.

    The same `name` with the same content is one message, however often it is dropped; the same name with
    other content is a new one. `name` is 1 to 151 characters of a-z, A-Z, 0-9, `_`, `-` and inner dots.

    Raises:
        PeerError: the name is malformed or the record is longer than its stage allows.
        RoomError: the disk is full; nothing was written.
        StateError: the folder cannot be written.
    """
    if _NAME.fullmatch(name) is None:
        raise PeerError(f"{name[:60]!r} cannot name a message.")
    data = encode(record)
    if len(data) > STAGES[stage].plain_limit:
        raise PeerError(f"A {stage} of {len(data)} bytes; the limit is {STAGES[stage].plain_limit}.")
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / f"{name}.{stage}.msg", data)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A message that has no verdict yet."""

    sequence: int
    stage: UpStage
    whole: Whole
    attempts: int


class Outbox:
    """The table; owned by the `uplink` process and used by one thread of it."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self._db: sqlite3.Connection = open_owned(path, _SCHEMA, 1)
        self._clock = clock

    def put(self, stage: UpStage, name: str, record: bytes, seal: Callable[[int], tuple[str, bytes]]) -> bool:
        """Seals a record under the next sequence number and keeps it; False when it is there already.

        `seal(sequence)` returns the message id and the sealed bytes; it runs inside the transaction, so no
        sequence number is ever given twice.

        Raises:
            RoomError: the disk is full; nothing was kept.
            StateError: any other failure of the database; nothing was kept.
        """
        plain = hashlib.sha256(record).hexdigest()
        now = self._clock.now()
        kind = CLASSES[stage]
        with transaction(self._db) as db:
            last = db.execute(
                "SELECT plain FROM messages WHERE stage = ? AND name = ? ORDER BY sequence DESC LIMIT 1",
                (stage, name),
            ).fetchone()
            if last is not None and last["plain"] == plain:
                return False
            row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'messages'").fetchone()
            sequence = (row["seq"] if row else 0) + 1
            message_id, sealed = seal(sequence)
            if kind.quota_bytes is not None:
                self._make_room(db, stage, kind.quota_bytes - len(sealed))
            db.execute(
                "INSERT INTO messages (sequence, id, stage, name, plain, priority, digest, length, created,"
                " expires) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    sequence,
                    message_id,
                    stage,
                    name,
                    plain,
                    kind.priority,
                    hashlib.sha256(sealed).digest(),
                    len(sealed),
                    now.isoformat(),
                    (now + kind.lifetime).isoformat() if kind.lifetime else None,
                ),
            )
            db.execute("INSERT INTO bodies VALUES (?, ?)", (sequence, sealed))
            self._count(db, stage, "sealed")
        return True

    def waiting(self, limit: int = 256) -> list[Waiting]:
        """Returns messages without a verdict, the most urgent first."""
        rows = self._db.execute(
            "SELECT sequence, id, stage, digest, length, attempts FROM messages WHERE state = 'waiting'"
            " ORDER BY priority, sequence LIMIT ?",
            (limit,),
        )
        return [
            Waiting(
                row["sequence"],
                row["stage"],
                Whole(row["id"], row["digest"], row["length"]),
                row["attempts"],
            )
            for row in rows
        ]

    def body(self, sequence: int, offset: int, length: int) -> bytes:
        """Returns a part of a sealed message without reading the rest of it."""
        with self._db.blobopen("bodies", "sealed", sequence, readonly=True) as blob:
            blob.seek(offset)
            return blob.read(length)

    def attempted(self, message_id: str) -> None:
        """Counts one sending of a message."""
        with transaction(self._db) as db:
            db.execute("UPDATE messages SET attempts = attempts + 1 WHERE id = ?", (message_id,))

    def trouble(self, message_id: str, reason: str) -> None:
        """Notes why a waiting message does not get through; it keeps waiting."""
        with transaction(self._db) as db:
            db.execute("UPDATE messages SET reason = ? WHERE id = ? AND state = 'waiting'", (reason, message_id))

    def end(self, message_id: str, state: End, reason: str = "") -> bool:
        """Ends a message; False when it has ended before or is unknown, and nothing changes."""
        with transaction(self._db) as db:
            return self._end(db, message_id, state, reason)

    def expire(self) -> int:
        """Ends messages whose lifetime is over and returns how many; only stages with a lifetime expire."""
        now = self._clock.now().isoformat()
        late = "SELECT id FROM messages WHERE state = 'waiting' AND expires <= ?"
        if self._db.execute(f"{late} LIMIT 1", (now,)).fetchone() is None:
            return 0
        with transaction(self._db) as db:
            ids = [row["id"] for row in db.execute(late, (now,)).fetchall()]
            for message_id in ids:
                self._end(db, message_id, "expired", "not delivered within its lifetime")
        return len(ids)

    def count(self, stage: str, what: str) -> None:
        """Counts something that happened to a record of `stage` before it became a message."""
        with transaction(self._db) as db:
            self._count(db, stage, what)

    def counts(self) -> dict[tuple[str, str], int]:
        """Returns (stage, "sealed", "accepted" ...) -> how often since the node was set up."""
        return {(row["stage"], row["what"]): row["n"] for row in self._db.execute("SELECT * FROM counts")}

    def depth(self, stage: str | None = None) -> int:
        """Returns how many messages (of one stage) have no verdict yet."""
        query = "SELECT count(*) FROM messages WHERE state = 'waiting' AND stage = coalesce(?, stage)"
        return int(self._db.execute(query, (stage,)).fetchone()[0])

    def note(self, name: str, value: str) -> None:
        """Keeps a fact for others to read, for example `link`: connected or why not."""
        with transaction(self._db) as db:
            db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    def close(self) -> None:
        self._db.close()

    def _make_room(self, db: sqlite3.Connection, stage: str, allowed: int) -> None:
        """Ends the oldest messages of a class over its quota: visibly, and counted."""
        query = "SELECT coalesce(sum(length), 0) FROM messages WHERE state = 'waiting' AND stage = ?"
        used = db.execute(query, (stage,)).fetchone()[0]
        oldest = db.execute(
            "SELECT id, length FROM messages WHERE state = 'waiting' AND stage = ? ORDER BY sequence",
            (stage,),
        )
        victims: Iterator[sqlite3.Row] = iter(oldest.fetchall() if used > allowed else ())
        for row in victims:
            if used <= allowed:
                return
            self._end(db, row["id"], "expired", f"the quota of {stage} is full")
            used -= row["length"]

    def _end(self, db: sqlite3.Connection, message_id: str, state: End, reason: str) -> bool:
        row = db.execute(
            "SELECT sequence, stage FROM messages WHERE id = ? AND state = 'waiting'", (message_id,)
        ).fetchone()
        if row is None:
            return False
        db.execute(
            "UPDATE messages SET state = ?, reason = ?, ended = ? WHERE sequence = ?",
            (state, reason, self._clock.now().isoformat(), row["sequence"]),
        )
        db.execute("DELETE FROM bodies WHERE sequence = ?", (row["sequence"],))
        self._count(db, row["stage"], state)
        db.execute(
            "DELETE FROM messages WHERE state IN ('accepted', 'duplicate') AND sequence <= ?",
            (row["sequence"] - _ENDED_KEPT,),
        )
        return True

    def _count(self, db: sqlite3.Connection, stage: str, what: str) -> None:
        db.execute(
            "INSERT INTO counts VALUES (?, ?, 1) ON CONFLICT (stage, what) DO UPDATE SET n = n + 1",
            (stage, what),
        )
