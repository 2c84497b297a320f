"""What happens at the DICOM door, as the intake process wrote it: callers, peers, refusals, identity conflicts.

Everything here reads; the one thing that is written, an admission, goes into labels.sqlite.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from msgspec import Struct

from edge.sqlite import open_foreign
from edge.web.dicomweb.elements import text_of
from edge.web.dicomweb.retention import Kept
from edge.web.dicomweb.search import Headers
from shared.errors import StateError

SHOWN = 200  # rows of a table on the page
CONFLICTS_SHOWN = 50  # each reads two headers

Row = TypeVar("Row", bound=Struct)


class Caller(Struct, frozen=True):
    """Somebody who called and is not allowed."""

    ae_title: str
    address: str
    called_ae: str
    proposed: str
    last_at: float
    times: int


class Guest(Struct, frozen=True):
    """A peer that is allowed and has called; `note` says why it was slow, with the cure."""

    ae_title: str
    address: str
    last_association_at: float
    last_echo_at: float  # 0: never
    objects: int
    bytes: int
    note: str


class Refused(Struct, frozen=True):
    """An object that the door refused; its bytes are in the quarantine folder."""

    digest: str
    outcome: str
    reason: str
    calling_ae: str
    address: str
    sop_instance: str
    length: int
    at: float


class Side(Struct, frozen=True):
    """One of two objects under the same SOP Instance UID; empty where the file says nothing."""

    kept: bool  # the one that is shown and analysed
    patient_name: str
    patient_id: str
    birth_date: str
    study_date: str
    description: str
    modality: str
    calling_ae: str
    address: str
    stored_at: float
    digest: str


class Conflict(Struct, frozen=True):
    """Objects of different patients, or with different pixels, under one SOP Instance UID."""

    sop_instance: str
    sides: list[Side]


class Destination(Struct, frozen=True):
    """A peer of the configuration that can be echoed by its name."""

    name: str
    ae_title: str
    host: str
    port: int
    tls: bool


@dataclass(frozen=True)
class Door:
    """The page's view of the door.

    `ours` is how modalities call this node; `echo` asks a peer (name of a destination, or host, port and AE title)
    and raises LinkError with cause and cure.
    """

    index: Path
    headers: Headers
    ae_title: str
    host: str
    port: int
    tls_port: int  # 0: none
    allowed: Sequence[tuple[str, str]]  # AE title and address of the configuration's allow-list
    destinations: Sequence[Destination]
    echo: Callable[[Destination], None]

    def callers(self) -> list[Caller]:
        """Returns who called without being allowed, the latest first."""
        columns = "ae_title, address, called_ae, proposed, last_at, times"
        return self._table(Caller, f"SELECT {columns} FROM callers ORDER BY last_at DESC LIMIT {SHOWN}")  # noqa: S608

    def guests(self) -> list[Guest]:
        """Returns the peers that called, the latest first."""
        columns = "ae_title, address, last_association_at, last_echo_at, objects, bytes, note"
        question = f"SELECT {columns} FROM peers ORDER BY last_association_at DESC LIMIT {SHOWN}"  # noqa: S608
        return self._table(Guest, question)

    def refused(self) -> list[Refused]:
        """Returns what the door refused, the latest first."""
        columns = "digest, outcome, reason, calling_ae, address, sop_instance, length, at"
        return self._table(Refused, f"SELECT {columns} FROM quarantine ORDER BY at DESC LIMIT {SHOWN}")  # noqa: S608

    def conflicts(self) -> list[Conflict]:
        """Returns the identity conflicts, the latest first, each with what is kept and what stands beside it."""
        latest = (
            "SELECT sop_instance FROM objects WHERE state = 'identity_conflict'"  # noqa: S608 constants
            f" GROUP BY sop_instance ORDER BY MAX(id) DESC LIMIT {CONFLICTS_SHOWN}"
        )
        question = f"SELECT * FROM objects WHERE state <> 'evicted' AND sop_instance IN ({latest}) ORDER BY id"  # noqa: S608
        found: dict[str, list[Side]] = {}
        for row in self._rows(question):
            found.setdefault(row["sop_instance"], []).append(self._side(row))
        return [Conflict(instance, sides) for instance, sides in reversed(found.items())]

    def counts(self) -> dict[str, int]:
        """Returns what the page's tiles show."""
        asked = {
            "kept": "SELECT COUNT(*) FROM objects WHERE state = 'kept'",
            "identity_conflicts": "SELECT COUNT(*) FROM objects WHERE state = 'identity_conflict'",
            "refused": "SELECT COUNT(*) FROM quarantine",
            "callers": "SELECT COUNT(*) FROM callers",
        }
        return {name: next((int(row[0]) for row in self._rows(question)), 0) for name, question in asked.items()}

    def _side(self, row: sqlite3.Row) -> Side:
        head = self.headers.of(Kept(**{name: row[name] for name in Kept.__struct_fields__}))
        return Side(
            kept=row["state"] == "kept",
            patient_name=text_of(head, "00100010"),
            patient_id=text_of(head, "00100020"),
            birth_date=text_of(head, "00100030"),
            study_date=text_of(head, "00080020"),
            description=text_of(head, "00081030") or text_of(head, "0008103E"),
            modality=row["modality"],
            calling_ae=row["calling_ae"],
            address=row["address"],
            stored_at=row["stored_at"],
            digest=row["digest"],
        )

    def _table(self, kind: type[Row], question: str) -> list[Row]:
        return [kind(**dict(row)) for row in self._rows(question)]

    def _rows(self, question: str) -> list[sqlite3.Row]:
        """Returns rows; none where the index has no such table, because an older version wrote it."""
        index = open_foreign(self.index)
        if index is None:
            return []
        with closing(index):
            try:
                return index.execute(question).fetchall()
            except sqlite3.OperationalError as exc:
                if "no such" in str(exc):
                    return []
                raise StateError(f"Cannot read the intake's index: {exc}.") from exc
