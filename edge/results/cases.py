"""Confirmed cases, de-identified, at the model's input resolution: what local training and judging may read.

One case a projection image, one case a series: of a CT or MR series the case's image is the slice with
the largest evidence for the answer, its features are those of the pooled series. An image with text burned into its
original is no case, nor are its features: it is withheld, with the reason on record.
"""

from __future__ import annotations

import sqlite3
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from datetime import datetime
from pathlib import Path
from typing import Literal, Protocol

from edge.imaging.burned_in import burned_in
from edge.imaging.read import open_object
from edge.results.store import Store
from edge.results.tables import AnswerRecord
from edge.sqlite import insert, open_foreign, open_owned, transaction
from shared.errors import PeerError, StateError
from shared.log import get_logger
from shared.wire.records import FeatureBatch, FeatureRow

_SCHEMA_VERSION = 2
_SCHEMA = """
CREATE TABLE IF NOT EXISTS cases (
    "case" TEXT PRIMARY KEY,     -- pseudonym
    head TEXT NOT NULL,
    label INTEGER NOT NULL,      -- index into the head's classes
    held_out INTEGER NOT NULL,   -- 1: judges, never trains
    phantom INTEGER NOT NULL,    -- 1: drawn by Radfleet
    image BLOB NOT NULL,         -- uint8 (height, width)
    height INTEGER NOT NULL, width INTEGER NOT NULL,
    features BLOB NOT NULL,      -- float16 (D,), made by `package` and `variant`
    package TEXT NOT NULL, variant TEXT NOT NULL,
    confirmed_at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS withheld (
    "case" TEXT PRIMARY KEY, reason TEXT NOT NULL, at REAL NOT NULL -- at: of the label
);
"""
_LOOKED_AT_NOTHING = "the process that looked for burned-in text died over it"


class Look(Protocol):
    """edge.results.documents.Builder.look: `why_withheld` in another process."""

    def __call__(self, path: Path, frame: int) -> Future[str]: ...


class Enqueue(Protocol):
    """edge.uplink.outbox.drop with its folder bound: leaves a record for the uplink, once a name."""

    def __call__(self, stage: Literal["features"], record: FeatureBatch, *, name: str) -> None: ...


class CaseStore:
    """cases.sqlite; the pipeline writes it, learning reads it."""

    def __init__(self, path: Path) -> None:
        self._db = open_owned(path, _SCHEMA, _SCHEMA_VERSION)

    def put(self, record: AnswerRecord, label: int, confirmed_at: float) -> None:
        """Stores a confirmed case, or corrects its label; durable when it returns."""
        row = {
            '"case"': record.case,
            "head": record.head,
            "label": label,
            "held_out": int(record.held_out),
            "phantom": int(record.phantom),
            "image": record.image,
            "height": record.image_shape[0],
            "width": record.image_shape[1],
            "features": record.features,
            "package": record.package,
            "variant": record.variant,
            "confirmed_at": confirmed_at,
        }
        with transaction(self._db) as db:
            insert(db, "cases", row, on_conflict="OR REPLACE")
            db.execute('DELETE FROM withheld WHERE "case" = ?', (record.case,))

    def withhold(self, record: AnswerRecord, reason: str, at: float) -> None:
        """Records why a confirmed case is not kept, and lets go of what was kept of it before."""
        with transaction(self._db) as db:
            insert(db, "withheld", {'"case"': record.case, "reason": reason, "at": at}, on_conflict="OR REPLACE")
            db.execute('DELETE FROM cases WHERE "case" = ?', (record.case,))

    def count(self) -> int:
        """Returns how many cases there are."""
        return int(self._db.execute("SELECT COUNT(*) FROM cases").fetchone()[0])

    def close(self) -> None:
        """Closes the database."""
        self._db.close()


def label_index(record: AnswerRecord, label: str) -> int:
    """Returns the class a radiologist's label names; PeerError when the head has no such class."""
    for index, one in enumerate(record.classes):
        if one.name == label:
            return index
    raise PeerError(f"The head {record.head or '(none)'} has no class {label!r}.")


def feature_batch(record: AnswerRecord, label: int) -> FeatureBatch:
    """Returns the wire record of one confirmed case: no pixel, no identifier."""
    row = FeatureRow(record.case, record.head, label, record.held_out, record.features)
    return FeatureBatch(record.package, record.variant, [row])


def why_withheld(path: Path, frame: int) -> str:
    """Returns why nothing may be learned from a frame of a spooled object; empty when it may."""
    try:
        return burned_in(open_object(path), frame)
    except PeerError as exc:
        return exc.message
    except StateError:
        return "the original image is no longer here to be looked at"


class Confirmations:
    """Follows the radiologists' labels and turns each into a case, and into features for the uplink."""

    def __init__(
        self,
        store: Store,
        cases: CaseStore,
        labels: Path,
        enqueue: Enqueue | None,
        *,
        spool: Path,
        look: Look | None,
    ) -> None:
        """Takes the collaborators; without `look`, originals are looked at in this process."""
        self._store = store
        self._cases = cases
        self._path = labels
        self._enqueue = enqueue
        self._spool = spool
        self._look = look
        self._labels: sqlite3.Connection | None = None
        self._looking: tuple[sqlite3.Row, AnswerRecord, int, Future[str]] | None = None

    def step(self) -> bool:
        """Takes the next label one step on; False when there is none, or while its image is being looked at.

        The cursor moves last: after a crash the label is taken again, the case is the same row and the
        message has the same name.
        """
        if self._looking is None:
            row = self._next()
            if row is None:
                return False
            self._looking = self._begin(row)
            if self._looking is None:
                self._store.set_cursor("labels", int(row["serial"]))
                return True
        row, record, label, future = self._looking
        if not future.done():
            return False
        self._looking = None
        self._end(row, record, label, _result(future))
        self._store.set_cursor("labels", int(row["serial"]))
        return True

    def _next(self) -> sqlite3.Row | None:
        if self._labels is None:
            self._labels = open_foreign(self._path)
        if self._labels is None:
            return None
        row: sqlite3.Row | None = self._labels.execute(
            "SELECT * FROM labels WHERE serial > ? ORDER BY serial LIMIT 1", (self._store.cursor("labels"),)
        ).fetchone()
        return row

    def _begin(self, row: sqlite3.Row) -> tuple[sqlite3.Row, AnswerRecord, int, Future[str]] | None:
        record = self._store.latest(row["answer_id"])
        if record is None or not record.head:
            return None
        try:
            label = label_index(record, row["label"])
        except PeerError as exc:
            get_logger().warning("results.label_refused", answer=record.answer, reason=exc.message)
            return None
        path, frame = self._spool / record.shown.file, record.shown.frame
        if self._look is not None:
            return row, record, label, self._look(path, frame)
        looked: Future[str] = Future()
        looked.set_result(why_withheld(path, frame))
        return row, record, label, looked

    def _end(self, row: sqlite3.Row, record: AnswerRecord, label: int, withheld: str) -> None:
        at = datetime.fromisoformat(row["at"]).timestamp()
        if withheld:
            self._cases.withhold(record, withheld, at)
            get_logger().warning("results.case_withheld", answer=record.answer, reason=withheld)
            return
        self._cases.put(record, label, at)
        if self._enqueue is not None:
            name = f"features-{record.case}-{record.package[:16]}-{row['serial']}"
            self._enqueue("features", feature_batch(record, label), name=name)  # enqueue


def _result(future: Future[str]) -> str:
    try:
        return future.result()
    except BrokenProcessPool:
        return _LOOKED_AT_NOTHING
