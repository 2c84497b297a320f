"""What other processes may ask of results.sqlite: worklist, one answer, its images, counts. Read-only."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
from msgspec import Struct

from edge.results.documents import png
from edge.results.picture import evidence_alpha
from edge.results.tables import AnswerRecord
from edge.sqlite import reading
from shared.errors import PeerError

_ANSWER = msgspec.msgpack.Decoder(AnswerRecord)
_OVERLAY_SIDE = 512  # pixels; the page stretches the overlay over the image


class WorklistRow(Struct, frozen=True):
    """One answer as the worklist shows it; `finding` is empty when it is not assessed, `reason` says why."""

    answer: str
    version: int
    study: str
    patient_name: str
    patient_id: str
    accession: str
    study_date: str
    description: str
    modality: str
    head: str
    title: str
    finding: str  # meaning of the chosen class
    finding_name: str  # its short name, as labels use it
    abnormal: bool  # the chosen class is not the head's normal one
    probability: float
    reason: str
    label: str  # what a radiologist said, short name; empty when nobody did
    labelled_by: str
    images: int
    conflict: bool
    degraded: str
    package: str
    release: int
    stored_at: float  # seconds since 1970, last image
    answered_at: float
    delivered: int  # documents that the PACS took
    documents: int  # documents that were made


class QuarantineRow(Struct, frozen=True):
    """One object that could not be read."""

    digest: str
    sop_instance: str
    study: str
    modality: str
    calling_ae: str
    reason: str
    at: float


class Counts(Struct, frozen=True):
    """What the node did since it was set up."""

    answers: int
    not_assessed: int
    quarantined: int
    waiting_for_pacs: int
    oldest_error: str  # the PACS's, of what waits longest


def worklist(results: Path, labels: Path, *, limit: int = 500) -> list[WorklistRow]:
    """Returns the latest version of every answer, newest first; empty while nothing was answered."""
    with reading(results) as db:
        if db is None:
            return []
        rows = db.execute(
            "SELECT a.record, s.*,"
            " (SELECT COUNT(*) FROM deliveries d WHERE d.answer = a.answer AND d.version = a.version) AS documents,"
            " (SELECT COUNT(*) FROM deliveries d WHERE d.answer = a.answer AND d.version = a.version"
            "  AND d.state = 'sent') AS delivered"
            " FROM answers a JOIN studies s USING (study) WHERE a.latest = 1"
            " ORDER BY a.answered_at DESC LIMIT ?",
            (limit,),
        ).fetchall()
    said = _labels(labels)
    return [_worklist_row(_ANSWER.decode(row["record"]), row, said) for row in rows]


def answer_detail(results: Path, answer: str, version: int | None = None) -> AnswerRecord | None:
    """Returns one version of an answer, the latest by default; None when there is none."""
    with reading(results) as db:
        row = _answer_row(db, answer, version, "record")
    return _ANSWER.decode(row["record"]) if row else None


def image_png(results: Path, answer: str, version: int | None = None) -> bytes:
    """Returns the shown image as PNG (8-bit grey): as prepared for the page, or the model's input until that is done.

    Raises:
        PeerError: there is no such answer, or no head read it.
    """
    with reading(results) as db:
        row = _answer_row(db, answer, version, "record, display")
    if row is None:
        raise PeerError("There is no such answer.")
    if row["display"] is not None:
        return bytes(row["display"])
    return png(_model_input(_ANSWER.decode(row["record"])))


def evidence_png(results: Path, answer: str, version: int | None = None) -> bytes:
    """Returns the evidence for the chosen class as RGBA PNG to lay over the image, stretched to its corners.

    The alpha channel is the evidence between its own smallest and largest value; the page's slider scales it.

    Raises:
        PeerError: there is no such answer, or no head read it.
    """
    record = answer_detail(results, answer, version)
    if record is None:
        raise PeerError("There is no such answer.")
    height, width = _model_input(record).shape
    scale = _OVERLAY_SIDE / max(height, width)
    alpha = evidence_alpha(record, round(height * scale), round(width * scale))  # (H, W) 0..1
    gray = np.rint(alpha * 255).astype(np.uint8)
    colour = cv2.applyColorMap(gray, cv2.COLORMAP_INFERNO)[..., ::-1]  # RGB
    return png(np.dstack([colour, gray]))


def versions(results: Path, answer: str) -> list[int]:
    """Returns the versions of an answer, oldest first."""
    with reading(results) as db:
        if db is None:
            return []
        rows = db.execute("SELECT version FROM answers WHERE answer = ? ORDER BY version", (answer,))
        return [int(row["version"]) for row in rows]


def quarantine(results: Path, *, limit: int = 500) -> list[QuarantineRow]:
    """Returns what could not be read and why, newest first."""
    with reading(results) as db:
        if db is None:
            return []
        rows = db.execute("SELECT * FROM quarantine ORDER BY at DESC LIMIT ?", (limit,)).fetchall()
    return [QuarantineRow(**{name: row[name] for name in QuarantineRow.__struct_fields__}) for row in rows]


def withheld(cases: Path, case: str) -> str:
    """Returns why a confirmed case in cases.sqlite is kept out of learning; empty when it is not."""
    with reading(cases) as db:
        row = db.execute('SELECT reason FROM withheld WHERE "case" = ?', (case,)).fetchone() if db else None
    return str(row["reason"]) if row else ""


def counts(results: Path) -> Counts:
    """Returns the node's counters."""
    with reading(results) as db:
        if db is None:
            return Counts(0, 0, 0, 0, "")

        def count(rows: str) -> int:
            return int(db.execute(f"SELECT COUNT(*) FROM {rows}").fetchone()[0])  # noqa: S608 constants below

        answers = count("answers WHERE latest = 1")
        unassessed = count("answers WHERE latest = 1 AND assessed = 0")
        quarantined = count("quarantine")
        waiting = count("deliveries WHERE state = 'waiting'")
        oldest = db.execute(
            "SELECT last_error FROM deliveries WHERE state = 'waiting' ORDER BY next_at LIMIT 1"
        ).fetchone()
    return Counts(answers, unassessed, quarantined, waiting, oldest["last_error"] if oldest else "")


def _worklist_row(record: AnswerRecord, row: sqlite3.Row, said: dict[str, tuple[str, str]]) -> WorklistRow:
    chosen = record.classes[record.chosen] if record.assessed and record.chosen >= 0 else None
    label, by = said.get(record.answer, ("", ""))
    return WorklistRow(
        answer=record.answer,
        version=record.version,
        study=record.study,
        patient_name=row["patient_name"],
        patient_id=row["patient_id"],
        accession=row["accession"],
        study_date=row["study_date"],
        description=row["description"],
        modality=record.modality,
        head=record.head,
        title=record.title,
        finding=chosen.code.meaning if chosen else "",
        finding_name=chosen.name if chosen else "",
        abnormal=bool(chosen) and record.chosen != record.normal,
        probability=record.probabilities[record.chosen] if chosen else 0.0,
        reason=record.reason,
        label=label,
        labelled_by=by,
        images=len(record.inputs),
        conflict=record.conflict,
        degraded=record.degraded,
        package=record.package,
        release=record.release,
        stored_at=record.stored_at,
        answered_at=record.answered_at,
        delivered=int(row["delivered"]),
        documents=int(row["documents"]),
    )


def _model_input(record: AnswerRecord) -> np.ndarray[Any, np.dtype[np.uint8]]:
    if not record.image:
        raise PeerError("No head read this image; there is nothing to show.")
    return np.frombuffer(record.image, np.uint8).reshape(record.image_shape)


def _labels(path: Path) -> dict[str, tuple[str, str]]:
    with reading(path) as db:
        if db is None:
            return {}
        rows = db.execute("SELECT answer_id, label, by FROM labels ORDER BY serial").fetchall()
    return {row["answer_id"]: (row["label"], row["by"]) for row in rows}  # the newest one stays


def _answer_row(db: sqlite3.Connection | None, answer: str, version: int | None, columns: str) -> sqlite3.Row | None:
    if db is None:
        return None
    which = "latest = 1" if version is None else "version = ?"
    values = (answer,) if version is None else (answer, version)
    row: sqlite3.Row | None = db.execute(
        f"SELECT {columns} FROM answers WHERE answer = ? AND {which}",  # noqa: S608 words of ours
        values,
    ).fetchone()
    return row
