"""forward.sqlite, the forward process's own: what goes where, what was fetched, and how far intake was followed.

Others read it (`edge/forward/reading.py`) or leave a request in its folder. Times are seconds since 1970.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct

from edge.forward.rules import Decision
from edge.forward.schedule import BACKOFF_CAP_S, Verdict
from edge.sqlite import insert, open_owned, transaction

SCHEMA_VERSION = 2
SCHEMA = """
CREATE TABLE IF NOT EXISTS cursors (name TEXT PRIMARY KEY, value INTEGER NOT NULL);

-- One row an object and destination: the same object again is not sent twice. What ended is forgotten after the
-- retention, when the object has left the spool.
CREATE TABLE IF NOT EXISTS queue (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    destination TEXT NOT NULL,          -- name in the configuration
    digest TEXT NOT NULL, file TEXT NOT NULL, offset INTEGER NOT NULL, length INTEGER NOT NULL,  -- as in intake's index
    sop_instance TEXT NOT NULL, sop_class TEXT NOT NULL, transfer_syntax TEXT NOT NULL,
    modality TEXT NOT NULL, calling_ae TEXT NOT NULL,
    why TEXT NOT NULL,                  -- the rule's name and what matched
    priority INTEGER NOT NULL,          -- 0 high, 1 normal, 2 low
    state TEXT NOT NULL,                -- waiting, sent, dead (a person must look), dropped (gave it up)
    tries INTEGER NOT NULL,             -- refusals, lost associations and transcodings begun
    next_at REAL NOT NULL,
    last_error TEXT NOT NULL, cure TEXT NOT NULL,
    queued_at REAL NOT NULL, ended_at REAL,
    UNIQUE (destination, digest)
);
CREATE INDEX IF NOT EXISTS queue_due ON queue (destination, state, priority, id);
CREATE INDEX IF NOT EXISTS queue_instance ON queue (destination, sop_instance);

-- What was routed, until it has left the spool: an index that is named anew is not routed again by today's rules.
CREATE TABLE IF NOT EXISTS routed (digest TEXT PRIMARY KEY, at REAL NOT NULL);

-- What the disk did not give when it was to be routed; tried again, and then a person must look.
CREATE TABLE IF NOT EXISTS unrouted (digest TEXT PRIMARY KEY, tries INTEGER NOT NULL, next_at REAL NOT NULL);

-- The last word about each peer.
CREATE TABLE IF NOT EXISTS links (
    destination TEXT PRIMARY KEY, last_error TEXT NOT NULL, cure TEXT NOT NULL, at REAL NOT NULL
);

-- One row a thing to fetch: nothing is fetched twice by rule. What ended is forgotten after the retention.
CREATE TABLE IF NOT EXISTS fetches (
    kind TEXT NOT NULL,                 -- priors, series
    source TEXT NOT NULL,               -- name of a destination
    uid TEXT NOT NULL,                  -- priors: study and modality; series: the series
    study TEXT NOT NULL, series TEXT NOT NULL, modality TEXT NOT NULL,
    file TEXT NOT NULL, offset INTEGER NOT NULL, transfer_syntax TEXT NOT NULL,  -- an object that tells the patient
    rule INTEGER NOT NULL,              -- which [[fetch]] of the configuration, 0 the first
    state TEXT NOT NULL,                -- waiting, done, dead
    tries INTEGER NOT NULL, next_at REAL NOT NULL,  -- or when it ended
    last_error TEXT NOT NULL, cure TEXT NOT NULL,
    moved INTEGER NOT NULL,             -- objects that the peer says it sent
    PRIMARY KEY (kind, source, uid)
);
CREATE INDEX IF NOT EXISTS fetches_due ON fetches (source, state, next_at);

-- Studies that this node asked for as priors: kept, never read, never a reason to fetch more.
CREATE TABLE IF NOT EXISTS priors (study TEXT PRIMARY KEY, of TEXT NOT NULL, at REAL NOT NULL);
"""
PRIORITIES = {"high": 0, "normal": 1, "low": 2}
BEGUN = "transcoding began"
PRIOR_S = 7 * 86400.0  # an archive may have to fetch from tape; later the study counts as any other
_CONFLICT = "other bytes came before under the same SOP Instance UID"
_CONFLICT_CURE = "Compare the two; retry sends this one as well."
_UNKNOWN_CURE = "Look at the object; retry sends it."


class Received(Struct, frozen=True):
    """One object of the spool, as intake's index tells."""

    digest: str
    file: str
    offset: int
    length: int
    sop_instance: str
    sop_class: str
    transfer_syntax: str
    study: str
    series: str
    modality: str
    calling_ae: str
    called_ae: str
    stored_at: float
    repeated: bool  # an earlier object has the same SOP Instance UID and other bytes


class Waiting(Struct, frozen=True):
    """One queued object on its way to a destination."""

    id: int
    file: str
    length: int
    sop_instance: str
    sop_class: str
    transfer_syntax: str
    priority: int
    tries: int
    last_error: str


class Fetch(Struct, frozen=True):
    """One thing to fetch."""

    kind: str
    source: str
    uid: str
    study: str
    series: str
    modality: str
    file: str
    offset: int
    transfer_syntax: str
    rule: int
    tries: int


class Queue:
    """See the module's docstring; the threads of one process use it."""

    def __init__(self, path: Path) -> None:
        self._db = open_owned(path, SCHEMA, SCHEMA_VERSION)
        self._lock = threading.Lock()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One durable transaction; the other threads wait."""
        with self._lock, transaction(self._db) as db:
            yield db

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._db.close()

    def cursor(self, name: str) -> int:
        """Returns how far an index was followed; 0 at first."""
        rows = self._all("SELECT value FROM cursors WHERE name = ?", name)
        return int(rows[0]["value"]) if rows else 0

    def due(self, destination: str, now: float, limit: int) -> list[Waiting]:
        """Returns what may be sent now, most urgent and oldest first."""
        columns = ", ".join(Waiting.__struct_fields__)
        rows = self._all(
            # A time further away than the longest pause comes from a clock that jumped.
            f"SELECT {columns} FROM queue WHERE destination = ? AND state = 'waiting'"  # noqa: S608 words of ours
            " AND (next_at <= ? OR next_at > ?) ORDER BY priority, id LIMIT ?",
            destination,
            now,
            now + BACKOFF_CAP_S,
            limit,
        )
        return [Waiting(**dict(row)) for row in rows]

    def settle(self, verdicts: Sequence[tuple[Waiting, Verdict, float]], now: float) -> None:
        """Records what became of objects; each with the time of its next try."""
        with self.writing() as db:
            for one, verdict, next_at in verdicts:
                db.execute(
                    "UPDATE queue SET state = ?, tries = ?, next_at = ?, last_error = ?, cure = ?, ended_at = ?"
                    " WHERE id = ?",
                    (
                        verdict.state,
                        one.tries + 1,
                        next_at,
                        verdict.error,
                        verdict.cure,
                        None if verdict.state == "waiting" else now,
                        one.id,
                    ),
                )

    def begin(self, one: Waiting) -> None:
        """Counts a transcoding before it begins: what ends this process is not begun for ever."""
        with self.writing() as db:
            db.execute("UPDATE queue SET tries = tries + 1, last_error = ? WHERE id = ?", (BEGUN, one.id))

    def link(self, destination: str, error: str, cure: str, now: float) -> None:
        """Records the last word about a peer; an empty error when it answers."""
        rows = self._all("SELECT last_error FROM links WHERE destination = ?", destination)
        if rows and not error and not rows[0]["last_error"]:
            return  # it answered before: nothing to write
        row = {"destination": destination, "last_error": error, "cure": cure, "at": now}
        with self.writing() as db:
            insert(db, "links", row, on_conflict="OR REPLACE")

    def retry(self, ids: Sequence[int], destination: str = "") -> int:
        """Puts dead objects back into the queue, by id or all of a destination; returns how many."""
        fresh = "UPDATE queue SET state = 'waiting', tries = 0, next_at = 0, ended_at = NULL WHERE state = 'dead' AND "
        with self.writing() as db:
            if destination:
                return db.execute(f"{fresh} destination = ?", (destination,)).rowcount
            return sum(db.execute(f"{fresh} id = ?", (one,)).rowcount for one in ids)

    def drop(self, ids: Sequence[int], destination: str = "") -> int:
        """Gives up dead objects by id, or all that a destination did not get; returns how many."""
        given_up = "UPDATE queue SET state = 'dropped' WHERE "
        with self.writing() as db:
            if destination:
                return db.execute(
                    f"{given_up} destination = ? AND state IN ('waiting', 'dead')", (destination,)
                ).rowcount
            return sum(db.execute(f"{given_up} id = ? AND state = 'dead'", (one,)).rowcount for one in ids)

    def is_prior(self, study: str, now: float) -> bool:
        """Tells whether this node fetched the study as a prior lately."""
        return is_prior(self._all("SELECT at FROM priors WHERE study = ?", study), now)

    def routed(self, digests: Sequence[str]) -> set[str]:
        """Returns which of some objects were routed, or wait to be routed."""
        marks = ", ".join("?" * len(digests))
        question = (
            f"SELECT digest FROM routed WHERE digest IN ({marks})"  # noqa: S608 marks
            f" UNION SELECT digest FROM unrouted WHERE digest IN ({marks})"
        )
        return {str(row["digest"]) for row in self._all(question, *digests, *digests)}

    def unrouted(self, now: float, limit: int) -> dict[str, int]:
        """Returns how often some objects were tried that are to be routed again now, by digest."""
        due = "SELECT digest, tries FROM unrouted WHERE next_at <= ? OR next_at > ? ORDER BY next_at LIMIT ?"
        return {str(row["digest"]): int(row["tries"]) for row in self._all(due, now, now + BACKOFF_CAP_S, limit)}

    def remembered(self, after: str, limit: int) -> list[str]:
        """Returns digests of objects that were routed, in order, from the one after `after` on."""
        rows = self._all("SELECT digest FROM routed WHERE digest > ? ORDER BY digest LIMIT ?", after, limit)
        return [str(row["digest"]) for row in rows]

    def forget(self, evicted: Sequence[str], missing: Sequence[str], before: float) -> None:
        """Forgets that some objects were routed: those that were evicted, and those long ago that nobody knows."""
        with self.writing() as db:
            db.executemany("DELETE FROM routed WHERE digest = ?", [(one,) for one in evicted])
            # An index that is being rebuilt does not know them yet.
            db.executemany("DELETE FROM routed WHERE digest = ? AND at < ?", [(one, before) for one in missing])

    def tidy(self, before: float, now: float) -> None:
        """Forgets what ended before a time: what was sent and has left the spool, fetches, and old priors."""
        with self.writing() as db:
            db.execute(
                "DELETE FROM queue WHERE state IN ('sent', 'dropped') AND COALESCE(ended_at, queued_at) < ?"
                " AND digest NOT IN (SELECT digest FROM routed)",
                (before,),
            )
            db.execute("DELETE FROM fetches WHERE state <> 'waiting' AND next_at < ?", (before,))
            db.execute("DELETE FROM priors WHERE at < ?", (now - PRIOR_S,))

    def next_fetch(self, source: str, now: float) -> Fetch | None:
        """Returns what to fetch from a peer now, the oldest first."""
        columns = ", ".join(Fetch.__struct_fields__)
        rows = self._all(
            f"SELECT {columns} FROM fetches WHERE source = ? AND state = 'waiting' AND next_at <= ?"  # noqa: S608
            " ORDER BY next_at LIMIT 1",
            source,
            now,
        )
        return Fetch(**dict(rows[0])) if rows else None

    def note_priors(self, studies: Sequence[str], of: str, now: float) -> None:
        """Records, before they are asked for, studies that come as priors of another."""
        with self.writing() as db:
            for study in studies:
                insert(db, "priors", {"study": study, "of": of, "at": now}, on_conflict="OR REPLACE")

    def end_fetch(
        self, fetch: Fetch, state: str, *, moved: int = 0, error: str = "", cure: str = "", next_at: float = 0.0
    ) -> None:
        """Records how a fetch went."""
        with self.writing() as db:
            db.execute(
                "UPDATE fetches SET state = ?, tries = tries + 1, moved = moved + ?, last_error = ?, cure = ?,"
                " next_at = ? WHERE kind = ? AND source = ? AND uid = ?",
                (state, moved, error, cure, next_at, fetch.kind, fetch.source, fetch.uid),
            )

    def _all(self, question: str, *values: object) -> list[sqlite3.Row]:
        with self._lock:
            return self._db.execute(question, values).fetchall()


def is_prior(rows: Sequence[sqlite3.Row], now: float) -> bool:
    """Tells whether a study's row in `priors` still counts."""
    return any(abs(now - row["at"]) < PRIOR_S for row in rows)


def enqueue(db: sqlite3.Connection, received: Received, decision: Decision, now: float, unknown: str = "") -> None:
    """Queues an object for the destinations of a decision; inside `Queue.writing`.

    `unknown` says why it is not known whether the object should go there: then a person decides.
    """
    error, cure = (
        (unknown, _UNKNOWN_CURE) if unknown else (_CONFLICT, _CONFLICT_CURE) if received.repeated else ("", "")
    )
    for name in decision.destinations:
        row = {
            "destination": name,
            "digest": received.digest,
            "file": received.file,
            "offset": received.offset,
            "length": received.length,
            "sop_instance": received.sop_instance,
            "sop_class": received.sop_class,
            "transfer_syntax": received.transfer_syntax,
            "modality": received.modality,
            "calling_ae": received.calling_ae,
            "why": decision.why,
            "priority": PRIORITIES[decision.priority],
            # Of two under one UID a PACS would keep one and lose the other without a word: a person decides.
            "state": "dead" if error else "waiting",
            "tries": 0,
            "next_at": 0.0,
            "last_error": error,
            "cure": cure,
            "queued_at": now,
        }
        insert(db, "queue", row, on_conflict="OR IGNORE")


def note_routed(db: sqlite3.Connection, digest: str, now: float) -> None:
    """Records that an object was routed; inside `Queue.writing`."""
    insert(db, "routed", {"digest": digest, "at": now}, on_conflict="OR IGNORE")
    db.execute("DELETE FROM unrouted WHERE digest = ?", (digest,))


def note_unrouted(db: sqlite3.Connection, digest: str, tries: int, next_at: float) -> None:
    """Records that an object is to be routed again; inside `Queue.writing`."""
    insert(db, "unrouted", {"digest": digest, "tries": tries, "next_at": next_at}, on_conflict="OR REPLACE")


def want(db: sqlite3.Connection, kind: str, source: str, rule: int, received: Received, due_at: float) -> None:
    """Asks for priors of a study, or for the rest of a series once it is quiet; inside `Queue.writing`."""
    uid = received.series if kind == "series" else f"{received.study} {received.modality}"
    row = {
        "kind": kind,
        "source": source,
        "uid": uid,
        "study": received.study,
        "series": received.series,
        "modality": received.modality,
        "file": received.file,
        "offset": received.offset,
        "transfer_syntax": received.transfer_syntax,
        "rule": rule,
        "state": "waiting",
        "tries": 0,
        "next_at": due_at,
        "last_error": "",
        "cure": "",
        "moved": 0,
    }
    if not insert(db, "fetches", row, on_conflict="OR IGNORE") and kind == "series":
        db.execute(  # the series still grows
            "UPDATE fetches SET next_at = MAX(next_at, ?) WHERE kind = ? AND source = ? AND uid = ?"
            " AND state = 'waiting' AND tries = 0",
            (due_at, kind, source, uid),
        )
