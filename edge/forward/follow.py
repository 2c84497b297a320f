"""Follows intake's index: every object that was stored is routed once, into the queues and the wishes to fetch.

What the disk does not give at that moment is tried again while others go on. Where an object cannot be read as far as
the rules need, the destinations that it may belong to get it as a dead letter: a person decides.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from edge.forward.queue import Queue, Received, enqueue, note_routed, note_unrouted, want
from edge.forward.routes import Routes, Told
from edge.forward.rules import SENT, Facts, matches
from edge.sqlite import insert, open_foreign
from shared.clock import Clock
from shared.errors import StateError
from shared.log import get_logger

_BATCH = 64
_TRIES = 10  # of an object that the disk does not give, about a quarter of an hour altogether
_LONGEST_S = 300.0  # between two of them
_TIDY_S = 3600.0
_TOGETHER = 500
_ROWS = (
    "SELECT *, EXISTS (SELECT 1 FROM objects o WHERE o.sop_instance = objects.sop_instance"
    " AND o.id < objects.id) AS repeated FROM objects"
)


class FetchRule(Struct, frozen=True):
    """When to ask a peer for more: `priors` of the same patient and modality, or the rest of a `series`."""

    source: str
    what: str  # priors, series
    modality: tuple[str, ...] = ()
    body_part: tuple[str, ...] = ()
    count: int = 1
    within_days: int = 3650


class Follower:
    """Routes what intake stored, in the order of storing; the cursor moves with the rows it made."""

    def __init__(
        self,
        intake: Path,
        spool: Path,
        queue: Queue,
        routes: Routes,
        fetches: Sequence[FetchRule],
        *,
        quiet_s: float,
        keep_s: float,
        clock: Clock,
    ) -> None:
        """`quiet_s`: a series is asked after when no object came for so many seconds. `keep_s`: the retention."""
        self._path = intake
        self._intake: sqlite3.Connection | None = None
        self._spool = spool
        self._queue = queue
        self._routes = routes
        self._fetches = fetches
        self._quiet_s = quiet_s
        self._keep_s = keep_s
        self._clock = clock
        self._tidied: float | None = None

    def step(self) -> int:
        """Routes a few objects and returns how many were looked at; 0 when there is nothing to do now.

        Raises:
            StateError: a database failed.
        """
        if self._intake is None:
            self._intake = open_foreign(self._path)
        if self._intake is None:
            return 0
        try:
            again, gone = self._again(self._intake)
            cursor, rows = self._arrived(self._intake)
            self._tidy(self._intake)
        except sqlite3.Error as exc:
            raise StateError(f"Cannot follow {self._path}: {exc}.") from exc
        known = self._queue.routed([row["digest"] for row in rows])
        new = [_received(row) for row in rows if _shown(row) and row["digest"] not in known]
        if not rows and not again and not gone:
            return 0
        tried = [self._told(one, tries) for one, tries in [*again, *((one, 0) for one in new)]]
        now = self._clock.now().timestamp()
        with self._queue.writing() as db:
            for received, told, tries in tried:
                if told is None:
                    note_unrouted(db, received.digest, tries, now + min(2.0**tries, _LONGEST_S))
                    continue
                self._enqueue(db, received, told, now)
                note_routed(db, received.digest, now)
                if told.decision.read:
                    self._want(db, received, told.facts)
            for digest in gone:
                db.execute("DELETE FROM unrouted WHERE digest = ?", (digest,))
            if rows:
                insert(db, "cursors", {"name": cursor, "value": rows[-1]["id"]}, on_conflict="OR REPLACE")
        return len(rows) + len(again) + len(gone)

    def _arrived(self, intake: sqlite3.Connection) -> tuple[str, list[sqlite3.Row]]:
        followed, cursor = self._followed(intake)
        return cursor, intake.execute(f"{_ROWS} WHERE id > ? ORDER BY id LIMIT ?", (followed, _BATCH)).fetchall()

    def _followed(self, intake: sqlite3.Connection) -> tuple[int, str]:
        """The last id that was taken up, and the cursor's name: a rebuilt index has another, and other ids."""
        generation = intake.execute("SELECT id FROM generation").fetchone()["id"]
        cursor = f"intake {generation}"
        return self._queue.cursor(cursor), cursor

    def _again(self, intake: sqlite3.Connection) -> tuple[list[tuple[Received, int]], list[str]]:
        """What is to be tried again now, with how often it was; and what has left the spool meanwhile."""
        found, gone = [], []
        for digest, tries in self._queue.unrouted(self._clock.now().timestamp(), _BATCH).items():
            row = intake.execute(f"{_ROWS} WHERE digest = ?", (digest,)).fetchone()
            if row is not None and _shown(row):
                found.append((_received(row), tries))
            else:
                gone.append(digest)
        return found, gone

    def _told(self, received: Received, tries: int) -> tuple[Received, Told | None, int]:
        """What happens to an object and how often it was tried; None where it is to be tried again."""
        try:
            told = self._routes.told(self._spool / received.file, received)
        except StateError as exc:
            get_logger().warning("forward.head_unread", object=received.digest[:12], reason=exc.message)
            if tries + 1 < _TRIES:
                return received, None, tries + 1
            told = self._routes.untold(received, exc.message)
        return received, told, tries + 1

    def _enqueue(self, db: sqlite3.Connection, received: Received, told: Told, now: float) -> None:
        if not told.uncertain:
            enqueue(db, received, told.decision, now)
            return
        unknown = f"it is not known whether the rule holds: {told.fault}"
        for rule in told.possible:
            if rule.action in SENT:
                enqueue(db, received, self._routes.of_rule(rule, received.calling_ae), now, unknown)
                get_logger().error(
                    "forward.not_decided", object=received.digest[:12], rule=rule.name, reason=told.fault
                )

    def _tidy(self, intake: sqlite3.Connection) -> None:
        """Forgets what is over, now and then."""
        if self._tidied is not None and self._clock.monotonic() - self._tidied < _TIDY_S:
            return
        self._tidied = self._clock.monotonic()
        now = self._clock.now().timestamp()
        last = ""
        if not self._queue.remembered(last, 1):  # a queue of an older version did not remember
            followed, _ = self._followed(intake)
            routed = intake.execute("SELECT digest FROM objects WHERE id <= ? AND state = 'kept'", (followed,))
            with self._queue.writing() as db:
                for row in routed:
                    insert(db, "routed", {"digest": row["digest"], "at": now}, on_conflict="OR IGNORE")
                db.execute("DELETE FROM routed WHERE digest IN (SELECT digest FROM unrouted)")
        while digests := self._queue.remembered(last, _TOGETHER):
            marks = ", ".join("?" * len(digests))
            question = f"SELECT digest, state FROM objects WHERE digest IN ({marks})"  # noqa: S608 marks
            states = {str(row["digest"]): str(row["state"]) for row in intake.execute(question, digests)}
            evicted = [one for one in digests if states.get(one) == "evicted"]
            missing = [one for one in digests if one not in states]
            if evicted or missing:
                self._queue.forget(evicted, missing, now - self._keep_s)
            last = digests[-1]
        self._queue.tidy(now - self._keep_s, now)

    def _want(self, db: sqlite3.Connection, received: Received, facts: Facts) -> None:
        if not received.study or not received.series:
            return
        for number, rule in enumerate(self._fetches):
            if matches(rule.modality, facts.modality) and matches(rule.body_part, facts.body_part):
                due = received.stored_at + self._quiet_s if rule.what == "series" else received.stored_at
                want(db, rule.what, rule.source, number, received, due)


def _shown(row: sqlite3.Row) -> bool:
    """Whether the pipeline sees the object too: an identity conflict goes nowhere until a person has looked."""
    return str(row["state"]) == "kept"


def _received(row: sqlite3.Row) -> Received:
    values = {name: row[name] for name in Received.__struct_fields__ if name != "repeated"}
    return Received(**values, repeated=bool(row["repeated"]))
