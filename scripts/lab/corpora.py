"""Every file of the two folders of real and hostile objects, sent by foreign senders, and what became of it.

What was stored is fetched back by WADO-RS and compared, byte for byte, with what the sender put on the wire; what was
refused is compared with what the quarantine holds.
"""

from __future__ import annotations

import csv
import hashlib
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from edge.intake.status import STATUS, Outcome
from scripts.lab.senders import NO_ANSWER, NotSentError, Sender, Sent, Web

BOUND_S = 10.0  # an answer that takes longer is a stall
# What may become of a file that was stored; whatever it is, the spool holds the very bytes.
FETCHED = "fetched back"
NO_UID = "no study or series UID"  # DICOMweb has no address for it; imaging quarantines it for this reason
BESIDE = "another one shown"  # kept beside another object of the same UIDs, which is the one that WADO-RS gives
CONFLICT = Outcome.IDENTITY_CONFLICT.value  # kept beside and not shown: the page lists it
KEPT = (FETCHED, NO_UID, BESIDE, CONFLICT)
# Faults of the node.
LOST, SILENT, STALLED, WRONG_STATUS = "NOT IDENTICAL", "NO ANSWER", "STALLED", "ANOTHER STATUS"
FAULTS = (LOST, SILENT, STALLED, WRONG_STATUS)


@dataclass(frozen=True)
class Item:
    """One file of a corpus; `expected` is the manifest's own word."""

    path: Path
    category: str
    expected: str = ""


@dataclass(frozen=True)
class Fate:
    """What became of one file by one sender: a word of KEPT or FAULTS, one of the sender's, or the door's outcome."""

    item: Item
    outcome: str
    reason: str = ""  # of the door's quarantine
    digest: str = ""  # of the object in spool or quarantine
    answer_s: float = 0.0  # the longest wait for a word of the node
    fetch_s: float = 0.0


def corpus(data: Path) -> list[Item]:
    """Returns every file that the two manifests name."""
    items = []
    for folder in ("dicom", "dicom_hostile"):
        with (data / folder / "manifest.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                category = f"{folder}: {row.get('category') or row.get('kind') or ''}".rstrip(": ")
                items.append(Item(data / folder / row["file"], category, row.get("expected", "")))
    return items


def send_all(items: Sequence[Item], send: Sender, state: Path, web: Web) -> list[Fate]:
    """Sends files one by one to the node at `state`, and looks at each before the next."""
    fates = []
    for item in items:
        try:
            sent = send(item.path)
        except NotSentError as exc:
            fates.append(Fate(item, str(exc)))
        else:
            fates.append(look(item, sent, state, web))
    return fates


def look(item: Item, sent: Sent, state: Path, web: Web) -> Fate:
    """Returns what became of a file that was just sent."""
    if sent.status == NO_ANSWER:
        return Fate(item, SILENT, answer_s=sent.seconds)
    fate = _kept(item, sent, state, web) if sent.status == 0 else _refused(item, sent, state)
    return fate if max(fate.answer_s, fate.fetch_s) <= BOUND_S else Fate(item, STALLED, answer_s=fate.answer_s)


def _kept(item: Item, sent: Sent, state: Path, web: Web) -> Fate:
    syntax, data = sent.forms[0]
    digest = _digest(syntax, data)
    row = _row(state, "SELECT * FROM objects WHERE digest = ?", digest)
    if row is None or (state / "spool" / row["file"]).read_bytes()[row["offset"] :] != data:
        return Fate(item, LOST, digest=digest, answer_s=sent.seconds)
    if row["state"] == CONFLICT or not row["study"] or not row["series"]:
        return Fate(item, CONFLICT if row["state"] == CONFLICT else NO_UID, digest=digest, answer_s=sent.seconds)
    uids = (row["study"], row["series"], row["sop_instance"])
    back_syntax, back, seconds = web.fetch(*uids)
    outcome = FETCHED if (back_syntax, back) == (syntax, data) else LOST
    question = "SELECT digest FROM objects WHERE study = ? AND series = ? AND sop_instance = ? AND state = 'kept'"
    if outcome == LOST and (shown := _row(state, f"{question} AND id > ? ORDER BY id DESC", *uids, row["id"])):
        outcome = BESIDE if shown["digest"] == _digest(back_syntax, back) else LOST
    return Fate(item, outcome, digest=digest, answer_s=sent.seconds, fetch_s=seconds)


def _refused(item: Item, sent: Sent, state: Path) -> Fate:
    row = _row(state, "SELECT * FROM quarantine ORDER BY rowid DESC")
    if row is None:
        return Fate(item, LOST, f"status {sent.status:#06x}", answer_s=sent.seconds)
    file = (state / "quarantine" / row["file"]).read_bytes()
    whole = file[len(file) - row["length"] :] in [data for _, data in sent.forms] and row["reason"]
    outcome = row["outcome"] if STATUS[Outcome(row["outcome"])] == sent.status else WRONG_STATUS
    return Fate(item, outcome if whole else LOST, row["reason"], row["digest"], sent.seconds)


def _digest(syntax: str, data: bytes) -> str:
    return hashlib.sha256(syntax.encode() + b"\0" + data).hexdigest()


def _row(state: Path, question: str, *values: object) -> sqlite3.Row | None:
    with closing(sqlite3.connect(f"file:{state / 'intake.sqlite'}?mode=ro", uri=True, timeout=30)) as database:
        database.row_factory = sqlite3.Row
        row: sqlite3.Row | None = database.execute(question, values).fetchone()
        return row
