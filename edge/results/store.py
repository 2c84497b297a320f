"""results.sqlite, the pipeline's own: claims, slices, answers, quarantine and what is served."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
from msgspec import Struct

from edge.results import evidence
from edge.results.evidence import GONE
from edge.results.series import Evidence
from edge.results.tables import SCHEMA, SCHEMA_VERSION, AnswerRecord, InputRef, SliceRecord, Subject
from edge.sqlite import insert, open_foreign, open_owned, transaction

MAX_TRIES = 3  # an object that took the process down so often is quarantined
_CLAIM_BATCH = 8
_KNOWN_BATCH = 1000  # rows of intake's index that one question passes
_SERVED = ("pid", "package", "release", "variant", "provider", "degraded", "weights_loaded", "golden")
_ENCODER = msgspec.msgpack.Encoder()
_ANSWER = msgspec.msgpack.Decoder(AnswerRecord)
_SUBJECT = msgspec.msgpack.Decoder(Subject)
_SLICE = msgspec.msgpack.Decoder(SliceRecord)


class Claimed(Struct, frozen=True):
    """One object of the spool, leased to this process."""

    digest: str
    file: str
    offset: int
    transfer_syntax: str
    sop_instance: str
    sop_class: str
    study: str
    series: str
    modality: str
    calling_ae: str
    called_ae: str
    association: str
    received_at: float
    stored_at: float
    conflict: bool
    fault: str
    tries: int
    claimed_at: float


class OpenSeries(Struct, frozen=True):
    """A series whose latest slices no answer counts yet."""

    answer: str
    study: str
    series: str
    head: str
    package: str
    reason: str
    subject: Subject
    association: str
    pending_since: float
    first_received_at: float
    last_stored_at: float


class Served(Protocol):
    """What a process serves (edge.slots.swap.ServingRecord)."""

    @property
    def pid(self) -> int: ...
    @property
    def package(self) -> str: ...
    @property
    def release(self) -> int: ...
    @property
    def variant(self) -> str: ...
    @property
    def provider(self) -> str: ...
    @property
    def degraded(self) -> str: ...
    @property
    def weights_loaded(self) -> str: ...
    @property
    def golden(self) -> str: ...


class Store:
    """See the module's docstring; one thread uses it."""

    def __init__(self, path: Path, intake: Path) -> None:
        """Opens `path` as its owner and follows intake's index at `intake` read-only."""
        self.path = path
        self._db = open_owned(path, SCHEMA, SCHEMA_VERSION)
        self._intake_path = intake
        self._intake: sqlite3.Connection | None = None
        self._intake_name = ""
        self._leased: list[Claimed] = []
        self._looked = "", 0  # name of intake's index, and the id up to which not_looked_at went
        with transaction(self._db) as db:  # leases of the process that died
            db.execute("UPDATE work SET claimed_at = 0 WHERE outcome = ''")

    def claim(self, now: float) -> Claimed | None:
        """Returns the next object to work on, leased to this process, or None.

        Leases of a process that died come first, one at a time; new objects are leased a few at once,
        because each lease costs a write to the disk.
        """
        if not self._leased:
            self._leased = self._lapsed(now) or self._arrived(now)
        return self._leased.pop(0) if self._leased else None

    def claim_this(self, object_id: int, one: Claimed, now: float) -> Claimed | None:
        """Leases one object out of its turn; None when it is claimed already."""
        with self.writing():
            if not self._lease(object_id, one.digest, one.series, now):
                return None
        return msgspec.structs.replace(one, claimed_at=now)

    def not_looked_at(self, skip: int, limit: int) -> list[tuple[int, Claimed]]:
        """Returns objects behind the next `skip` unclaimed ones, each once in the life of this process, with their ids.

        At most `limit`, in the order of arrival; empty when there are no more than `skip`.
        """
        intake = self._follow_intake()
        if intake is None:
            return []
        cursor = self._intake_cursor(intake)
        nth = "SELECT id FROM objects WHERE id > ? AND state = 'kept' ORDER BY id LIMIT 1 OFFSET ?"
        first = intake.execute(nth, (cursor, skip)).fetchone()
        if first is None:
            return []
        index, looked = self._looked
        after = max(looked if index == self._intake_name else 0, first["id"] - 1)
        following = "SELECT * FROM objects WHERE id > ? AND state = 'kept' ORDER BY id LIMIT ?"
        rows = intake.execute(following, (after, limit)).fetchall()
        if rows:
            self._looked = self._intake_name, rows[-1]["id"]
        return [(row["id"], _claimed(row, 1, 0.0)) for row in rows if not self._known(row["digest"])]

    @property
    def leased(self) -> int:
        """How many objects are leased and were not handed out by `claim` yet."""
        return len(self._leased)

    def finish(self, claimed: Claimed, outcome: str) -> None:
        """Marks the object as done; to be called inside `writing`, with what came of it."""
        self._db.execute("UPDATE work SET outcome = ? WHERE digest = ?", (outcome, claimed.digest))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One durable transaction around what belongs together."""
        with transaction(self._db):
            yield

    def quarantine(self, claimed: Claimed, reason: str, now: float) -> None:
        """Records why the object cannot be read; its bytes stay in the spool."""
        row = {
            "digest": claimed.digest,
            "file": claimed.file,
            "sop_instance": claimed.sop_instance,
            "study": claimed.study,
            "modality": claimed.modality,
            "calling_ae": claimed.calling_ae,
            "reason": reason[:500],
            "at": now,
        }
        with self.writing():
            insert(self._db, "quarantine", row, on_conflict="OR REPLACE")
            self.finish(claimed, "quarantined")

    def note_study(self, row: Mapping[str, Any]) -> None:
        """Keeps what the worklist shows of a study, from its first image; inside `writing`."""
        insert(self._db, "studies", row, on_conflict="OR IGNORE")

    def add_answer(self, record: AnswerRecord) -> AnswerRecord | None:
        """Stores the next version of an answer and returns it as stored; None when nothing new went into it.

        Inside `writing`. `record.version` is set here.
        """
        latest = self.latest(record.answer)
        inputs = inputs_digest(record.package, record.inputs)
        if latest is not None and inputs_digest(latest.package, latest.inputs) == inputs:
            return None
        record = msgspec.structs.replace(record, version=latest.version + 1 if latest else 1)
        self._db.execute("UPDATE answers SET latest = 0 WHERE answer = ?", (record.answer,))
        row = {
            "answer": record.answer,
            "version": record.version,
            "latest": 1,
            "study": record.study,
            "series": record.series,
            "head": record.head,
            "inputs": inputs,
            "assessed": int(record.assessed),
            "answered_at": record.answered_at,
            "documents": "",
            "record": _ENCODER.encode(record),
        }
        insert(self._db, "answers", row)
        return record

    def latest(self, answer: str) -> AnswerRecord | None:
        """Returns the latest version of an answer."""
        row = self._db.execute("SELECT record FROM answers WHERE answer = ? AND latest = 1", (answer,)).fetchone()
        return _ANSWER.decode(row["record"]) if row else None

    def undocumented(self) -> AnswerRecord | None:
        """Returns the oldest answer whose report and picture are not built yet."""
        row = self._db.execute(
            "SELECT record FROM answers WHERE documents = '' ORDER BY answered_at LIMIT 1"
        ).fetchone()
        return _ANSWER.decode(row["record"]) if row else None

    def add_documents(
        self, record: AnswerRecord, state: str, display: bytes | None, deliveries: Sequence[Mapping[str, Any]]
    ) -> None:
        """Stores an answer's documents for delivery and its picture for the page, in one transaction."""
        with self.writing():
            for row in deliveries:
                insert(self._db, "deliveries", row, on_conflict="OR IGNORE")
            self._db.execute(
                "UPDATE answers SET documents = ?, display = ? WHERE answer = ? AND version = ?",
                (state, display, record.answer, record.version),
            )

    def add_slice(self, series: OpenSeries, key: str, record: SliceRecord, association: str, image: bytes) -> bool:
        """Adds one slice and its model input to its series, inside `writing`; True for the first slice.

        A slice of another package than the series was begun with throws the old slices out: their objects
        are leased again, because a series is read by one package. So are those of a series that was pruned.
        """
        self._restart_if_needed(series)
        row = {name: getattr(series, name) for name in OpenSeries.__struct_fields__}
        row["subject"] = _ENCODER.encode(series.subject)
        first = insert(self._db, "series", row, on_conflict="OR IGNORE")
        if not first:
            self._db.execute(
                "UPDATE series SET association = ?, pending_since = COALESCE(pending_since, ?),"
                " last_stored_at = MAX(last_stored_at, ?) WHERE answer = ?",
                (association, series.pending_since, series.last_stored_at, series.answer),
            )
        slice_row = {
            "answer": series.answer,
            "key": key,
            "record": _ENCODER.encode(record),
            "association": association,
        }
        # Other bytes under the same SOP Instance UID do not push out the first ones.
        new = insert(self._db, "slices", slice_row, on_conflict="OR IGNORE")
        if new:
            self._keep_peaks(series.answer, key, record, image)
        return first

    def open_series(self) -> list[OpenSeries]:
        """Returns the series with slices that no answer counts yet, oldest first."""
        rows = self._db.execute("SELECT * FROM series WHERE pending_since IS NOT NULL ORDER BY pending_since")
        return [OpenSeries(**{**dict(row), "subject": _SUBJECT.decode(row["subject"])}) for row in rows]

    def slices(self, answer: str) -> dict[str, SliceRecord]:
        """Returns a series' slices by key, in the order of the keys."""
        rows = self._db.execute("SELECT key, record FROM slices WHERE answer = ? ORDER BY key", (answer,))
        return {row["key"]: _SLICE.decode(row["record"]) for row in rows}

    def peak(self, answer: str, chosen: int) -> tuple[str, bytes]:
        """Returns key and model input of the slice with the largest logit for a class."""
        row = self._db.execute(
            "SELECT key, image FROM peaks WHERE answer = ? AND class = ?", (answer, chosen)
        ).fetchone()
        return row["key"], row["image"]

    def reread(self, answer: str, series: str, package: str) -> None:
        """Leases all objects of a series again, to be read by `package`; inside `writing`."""
        self._db.execute(
            "UPDATE work SET outcome = '', claimed_at = 0, tries = 0 WHERE series = ? AND outcome = 'slice'",
            (series,),
        )
        for table in ("slices", "peaks"):
            self._db.execute(f"DELETE FROM {table} WHERE answer = ?", (answer,))  # noqa: S608 two words of ours
        self._db.execute("UPDATE series SET package = ? WHERE answer = ?", (package, answer))

    def close_series(self, answer: str) -> None:
        """Nothing of the series is pending any more; inside `writing`, with its answer."""
        self._db.execute("UPDATE series SET pending_since = NULL WHERE answer = ?", (answer,))

    def unread(self, series: str) -> bool:
        """Tells whether stored objects of the series wait to be read."""
        if self._db.execute("SELECT 1 FROM work WHERE series = ? AND outcome = ''", (series,)).fetchone():
            return True
        intake = self._follow_intake()
        if intake is None:
            return False
        ahead = "SELECT digest FROM objects WHERE series = ? AND id > ? AND state = 'kept'"
        with closing(intake.execute(ahead, (series, self._intake_cursor(intake)))) as rows:
            return any(not self._known(row["digest"]) for row in rows)

    def evidence(self, series: OpenSeries) -> Evidence:
        """Returns what is known of an open series."""
        announced = evidence.announced(self._db, series.series)
        return Evidence(
            pending_since=series.pending_since,
            last_stored_at=series.last_stored_at,
            unread=self.unread(series.series),
            ended=evidence.ended(self._db, self._follow_intake(), series.answer, series.association),
            arrived=evidence.arrived(self._db, series.series) if announced else 0,
            announced=announced,
        )

    def announce(self, series: str, part: str, count: int) -> None:
        """Keeps what an object says about the number of objects in its series; inside `writing`."""
        evidence.announce(self._db, series, part, count)

    def gone(self, series: str) -> int:
        """Returns how many objects of a series had to be read again and had left the spool."""
        return evidence.gone(self._db, series)

    def unreadable(self, series: str) -> int:
        """Returns how many objects of a series are in quarantine."""
        asked = "SELECT COUNT(*) FROM work WHERE series = ? AND outcome = 'quarantined'"
        return int(self._db.execute(asked, (series,)).fetchone()[0])

    def prune(self, before: float, *, undelivered: bool) -> bool:
        """See `edge.results.evidence.prune`."""
        with self.writing():
            return evidence.prune(self._db, before, undelivered=undelivered)

    def record_serving(self, served: Served, now: float) -> None:
        """Writes down what this process serves, after its golden proof."""
        row = {name: getattr(served, name) for name in _SERVED}
        with self.writing():
            insert(self._db, "serving", {"one": 1, **row, "since": now}, on_conflict="OR REPLACE")

    def cursor(self, name: str) -> int:
        """Returns how far another process's table was followed; 0 at first."""
        row = self._db.execute("SELECT value FROM cursors WHERE name = ?", (name,)).fetchone()
        return int(row["value"]) if row else 0

    def set_cursor(self, name: str, value: int) -> None:
        """Moves a cursor; durable when the surrounding transaction is, or at once without one."""
        insert(self._db, "cursors", {"name": name, "value": value}, on_conflict="OR REPLACE")

    def close(self) -> None:
        """Closes both databases."""
        self._db.close()
        if self._intake is not None:
            self._intake.close()

    def _lapsed(self, now: float) -> list[Claimed]:
        intake = self._follow_intake()
        while intake is not None:
            row = self._db.execute(
                "SELECT digest FROM work WHERE outcome = '' AND claimed_at = 0 ORDER BY object LIMIT 1"
            ).fetchone()
            if row is None:
                break
            found = intake.execute(
                "SELECT * FROM objects WHERE digest = ? AND state = 'kept'", (row["digest"],)
            ).fetchone()
            with self.writing():
                if found is None:  # it has left the spool; if it comes again it is read
                    self._db.execute("UPDATE work SET outcome = ? WHERE digest = ?", (GONE, row["digest"]))
                    continue
                leased = "UPDATE work SET claimed_at = ?, tries = tries + 1 WHERE digest = ? RETURNING tries"
                tries = self._db.execute(leased, (now, row["digest"])).fetchone()["tries"]
            return [_claimed(found, int(tries), now)]
        return []

    def _arrived(self, now: float) -> list[Claimed]:
        intake = self._follow_intake()
        if intake is None:
            return []
        followed = passed = self._intake_cursor(intake)
        rows: list[sqlite3.Row] = []
        while not rows:  # an index that was named anew is full of what is known: nothing waits for that
            rows, reached = self._unknown(intake, passed)
            if reached == passed:
                break
            passed = reached
        if passed == followed:
            return []
        claimed = []
        with self.writing():
            for row in rows:
                if self._lease(row["id"], row["digest"], row["series"], now):
                    claimed.append(_claimed(row, 1, now))
            self.set_cursor(self._intake_name, passed)
        return claimed

    def _unknown(self, intake: sqlite3.Connection, after: int) -> tuple[list[sqlite3.Row], int]:
        """Returns a few objects that were not claimed yet, and the id up to which that was looked at."""
        found: list[sqlite3.Row] = []
        with closing(
            intake.execute(
                "SELECT * FROM objects WHERE id > ? AND state = 'kept' ORDER BY id LIMIT ?", (after, _KNOWN_BATCH)
            )
        ) as rows:
            for row in rows:
                after = int(row["id"])
                if not self._known(row["digest"]):
                    found.append(row)
                    if len(found) == _CLAIM_BATCH:
                        break
        return found, after

    def _known(self, digest: str) -> bool:
        row = self._db.execute("SELECT outcome FROM work WHERE digest = ?", (digest,)).fetchone()
        return row is not None and row["outcome"] != GONE

    def _lease(self, object_id: int, digest: str, series: str, now: float) -> bool:
        """Leases an object that is new, or that was wanted while it was gone."""
        lease = {"digest": digest, "object": object_id, "series": series, "claimed_at": now, "tries": 1, "outcome": ""}
        if insert(self._db, "work", lease, on_conflict="OR IGNORE"):
            return True
        again = "UPDATE work SET outcome = '', object = ?, claimed_at = ?, tries = 1 WHERE digest = ? AND outcome = ?"
        return self._db.execute(again, (object_id, now, digest, GONE)).rowcount > 0

    def _restart_if_needed(self, series: OpenSeries) -> None:
        row = self._db.execute(
            "SELECT package, pending_since IS NULL AND NOT EXISTS (SELECT 1 FROM slices WHERE slices.answer ="
            " series.answer) AS pruned FROM series WHERE answer = ?",
            (series.answer,),
        ).fetchone()
        if row is not None and (row["package"] != series.package or row["pruned"]):
            self.reread(series.answer, series.series, series.package)

    def _keep_peaks(self, answer: str, key: str, record: SliceRecord, image: bytes) -> None:
        for index, logit in enumerate(np.frombuffer(record.logits, dtype="<f4")):
            # Equal logits go to the smaller key, so that the order of arrival changes nothing.
            self._db.execute(
                "INSERT INTO peaks VALUES (?, ?, ?, ?, ?) ON CONFLICT (answer, class) DO UPDATE SET"
                " logit = excluded.logit, key = excluded.key, image = excluded.image"
                " WHERE (excluded.logit, peaks.key) > (peaks.logit, excluded.key)",
                (answer, index, float(logit), key, image),
            )

    def _intake_cursor(self, intake: sqlite3.Connection) -> int:
        """How far intake's index was followed: 0 for an index that was rebuilt, digests keep us from repeating."""
        generation = intake.execute("SELECT id FROM generation").fetchone()["id"]
        self._intake_name = f"intake {generation}"
        return self.cursor(self._intake_name)

    def _follow_intake(self) -> sqlite3.Connection | None:
        if self._intake is None:
            self._intake = open_foreign(self._intake_path)
        return self._intake


def inputs_digest(package: str, inputs: Sequence[InputRef]) -> str:
    """Returns one digest over package and inputs, independent of their order."""
    text = "\n".join([package, *sorted(f"{one.sop_instance}#{one.frame} {one.digest}" for one in inputs)])
    return hashlib.sha256(text.encode()).hexdigest()


def _claimed(row: sqlite3.Row, tries: int, now: float) -> Claimed:
    return Claimed(
        **{name: row[name] for name in Claimed.__struct_fields__ if name not in ("tries", "claimed_at", "conflict")},
        conflict=bool(row["conflict"]),
        tries=tries,
        claimed_at=now,
    )
