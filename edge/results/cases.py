"""Confirmed cases, de-identified, at the model's input resolution: what local training and judging may read.

One case a projection image, one case a series: of a CT or MR series the case's image is the slice with
the largest evidence for the answer, its features are those of the pooled series.
"""

from __future__ import annotations

import sqlite3
from datetime import datetime
from pathlib import Path
from typing import Literal, Protocol

from edge.results.store import Store
from edge.results.tables import AnswerRecord
from edge.sqlite import insert, open_foreign, open_owned, transaction
from shared.errors import PeerError
from shared.log import get_logger
from shared.wire.records import FeatureBatch, FeatureRow

_SCHEMA_VERSION = 1
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
"""


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


class Confirmations:
    """Follows the radiologists' labels and turns each into a case, and into features for the uplink."""

    def __init__(self, store: Store, cases: CaseStore, labels: Path, enqueue: Enqueue | None) -> None:
        self._store = store
        self._cases = cases
        self._path = labels
        self._enqueue = enqueue
        self._labels: sqlite3.Connection | None = None

    def step(self) -> bool:
        """Takes the next label; False when there is none.

        The cursor moves last: after a crash the label is taken again, the case is the same row and the
        message has the same name.
        """
        if self._labels is None:
            self._labels = open_foreign(self._path)
        if self._labels is None:
            return False
        row = self._labels.execute(
            "SELECT * FROM labels WHERE serial > ? ORDER BY serial LIMIT 1", (self._store.cursor("labels"),)
        ).fetchone()
        if row is None:
            return False
        record = self._store.latest(row["answer_id"])
        if record is not None and record.head:
            try:
                self._confirm(record, row)
            except PeerError as exc:
                get_logger().warning("results.label_refused", answer=record.answer, reason=exc.message)
        self._store.set_cursor("labels", int(row["serial"]))
        return True

    def _confirm(self, record: AnswerRecord, row: sqlite3.Row) -> None:
        label = label_index(record, row["label"])
        self._cases.put(record, label, datetime.fromisoformat(row["at"]).timestamp())
        if self._enqueue is not None:
            name = f"features-{record.case}-{record.package[:16]}-{row['serial']}"
            self._enqueue("features", feature_batch(record, label), name=name)  # enqueue
