"""Follows intake's index: every object that was stored is routed once, into the queues and the wishes to fetch."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct
from pydicom.dataset import Dataset

from edge.forward.facts import read_facts_head
from edge.forward.queue import Queue, Received, enqueue, want
from edge.forward.routes import Routes
from edge.forward.rules import Decision, Facts, matches
from edge.sqlite import insert, open_foreign
from shared.clock import Clock
from shared.errors import PeerError, StateError
from shared.log import get_logger

_BATCH = 64


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
        clock: Clock,
    ) -> None:
        """`quiet_s`: a series is asked after when no object came for so many seconds."""
        self._path = intake
        self._intake: sqlite3.Connection | None = None
        self._spool = spool
        self._queue = queue
        self._routes = routes
        self._fetches = fetches
        self._quiet_s = quiet_s
        self._clock = clock

    def step(self) -> int:
        """Routes a few objects and returns how many; 0 when there are no new ones.

        Raises:
            StateError: a database failed.
        """
        if self._intake is None:
            self._intake = open_foreign(self._path)
        if self._intake is None:
            return 0
        try:
            generation = self._intake.execute("SELECT id FROM generation").fetchone()["id"]
            cursor = f"intake {generation}"  # a rebuilt index gives other ids: digests keep us from repeating
            rows = self._intake.execute(
                "SELECT *, EXISTS (SELECT 1 FROM objects o WHERE o.sop_instance = objects.sop_instance"
                " AND o.id < objects.id) AS repeated FROM objects WHERE id > ? ORDER BY id LIMIT ?",
                (self._queue.cursor(cursor), _BATCH),
            ).fetchall()
        except sqlite3.Error as exc:
            raise StateError(f"Cannot follow {self._path}: {exc}.") from exc
        if not rows:
            return 0
        routed = [self._route(_received(row)) for row in rows if _shown(row)]
        now = self._clock.now().timestamp()
        with self._queue.writing() as db:
            for received, facts, decision in routed:
                enqueue(db, received, decision, now)
                if decision.read:
                    self._want(db, received, facts)
            insert(db, "cursors", {"name": cursor, "value": rows[-1]["id"]}, on_conflict="OR REPLACE")
        return len(rows)

    def _route(self, received: Received) -> tuple[Received, Facts, Decision]:
        try:
            head = read_facts_head(self._spool / received.file, received.offset, received.transfer_syntax)
        except (PeerError, StateError) as exc:  # what the index says is enough to send bytes as they are
            get_logger().warning("forward.head_unread", object=received.digest[:12], reason=exc.message)
            head = Dataset()
        facts = self._routes.facts(head, received)
        return received, facts, self._routes.decide(facts)

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
