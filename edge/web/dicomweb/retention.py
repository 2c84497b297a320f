"""What DICOMweb may show: the kept objects of intake's index, read-only. Files are the spool's."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from msgspec import Struct

from edge.sqlite import open_foreign
from shared.errors import PeerError, StateError

_COLUMNS = (
    "id, digest, file, offset, length, sop_instance, sop_class, study, series, modality, transfer_syntax, stored_at"
)
_TOGETHER = 500  # rows in memory at once


class NotKeptError(PeerError):
    """No kept object has these UIDs: never received, or already evicted."""


class Kept(Struct, frozen=True):
    """One kept object; `offset` is where its data set starts in the file and `length` how long it is, bytes."""

    id: int
    digest: str
    file: str
    offset: int
    length: int
    sop_instance: str
    sop_class: str
    study: str
    series: str
    modality: str
    transfer_syntax: str
    stored_at: float


class SeriesCount(Struct, frozen=True):
    """A series in the index: how many instances, and the newest object, which stands for it in answers."""

    study: str
    series: str
    modality: str
    instances: int
    newest: int


class Uids(Struct, frozen=True):
    """Which objects a request is about; an empty tuple stands for all."""

    study: tuple[str, ...] = ()
    series: tuple[str, ...] = ()
    instance: tuple[str, ...] = ()


class Retention:
    """Reads `intake.sqlite` and names files of the spool; every call sees the newest state."""

    def __init__(self, index: Path, spool: Path) -> None:
        self._index = index
        self._spool = spool

    def path(self, kept: Kept) -> Path:
        """Returns where the object's file is; its name is a digest, never a word from outside."""
        return self._spool / kept.file

    def series(self, uids: Uids) -> list[SeriesCount]:
        """Returns the series that have kept objects, the last to arrive first."""
        question = (
            "SELECT study, series, MAX(modality) AS modality, COUNT(DISTINCT sop_instance) AS instances,"
            " MAX(id) AS newest FROM objects WHERE {where} GROUP BY study, series ORDER BY newest DESC"
        )
        return [SeriesCount(**row) for row in self._rows(question, uids)]

    def instances(self, uids: Uids) -> list[Kept]:
        """Returns what `each` gives: for a study or a series, of which a list can be had."""
        return list(self.each(uids))

    def each(self, uids: Uids, *, skip: int = 0) -> Iterator[Kept]:
        """Gives the kept objects in order of arrival without the first `skip`; a few are in memory at a time.

        Where other bytes came under the same UIDs, the last to arrive is the one shown.
        """
        question = (
            # The plus signs keep the order of ids: no other index can give it, and sorting takes all rows.
            f"SELECT {_COLUMNS} FROM objects WHERE {{where}} AND id > ? AND NOT EXISTS (SELECT 1 FROM objects AS newer"  # noqa: S608 constants
            " WHERE newer.sop_instance = objects.sop_instance AND +newer.series = objects.series"
            " AND +newer.study = objects.study AND newer.id > objects.id AND {newer}) ORDER BY id LIMIT ? OFFSET ?"
        )
        after = -1
        while True:
            found = [Kept(**row) for row in self._rows(question, uids, [after, _TOGETHER, skip])]
            yield from found
            if len(found) < _TOGETHER:
                return
            after, skip = found[-1].id, 0

    def by_id(self, ids: list[int]) -> dict[int, Kept]:
        """Returns objects by their id in the index; one that was evicted meanwhile is missing."""
        found: dict[int, Kept] = {}
        for start in range(0, len(ids), 500):
            some = ids[start : start + 500]
            question = f"SELECT {_COLUMNS} FROM objects WHERE {{where}} AND id IN ({', '.join('?' * len(some))})"  # noqa: S608
            found |= {row["id"]: Kept(**row) for row in self._rows(question, Uids(), some)}
        return found

    def one(self, study: str, series: str, instance: str) -> Kept:
        """Returns one object; NotKeptError when there is none."""
        found = self.instances(Uids((study,), (series,), (instance,)))
        if not found:
            raise NotKeptError("No such instance is kept on this node.")
        return found[0]

    def _rows(self, question: str, uids: Uids, more: list[int] | None = None) -> Iterator[dict[str, Any]]:
        index = open_foreign(self._index)
        if index is None:
            return
        try:
            with closing(index):
                where, newer, values = _where(index, uids)
                asked = question.format(where=where, newer=newer)
                yield from map(dict, index.execute(asked, (*values, *(more or ()))))
        except sqlite3.Error as exc:
            raise StateError(f"Cannot read the intake's index: {exc}.") from exc


def _where(index: sqlite3.Connection, uids: Uids) -> tuple[str, str, list[str]]:
    """The condition of every question: whole identifiers, kept, and the UIDs asked for; and that on a newer object."""
    conditions = ["study <> '' AND series <> '' AND sop_instance <> ''"]
    newer = "1"
    values: list[str] = []
    if any(row["name"] == "state" for row in index.execute("PRAGMA table_info(objects)")):  # older indexes have none
        conditions.append("+state = 'kept'")
        newer = "+newer.state = 'kept'"
    for column, wanted in (("study", uids.study), ("series", uids.series), ("sop_instance", uids.instance)):
        if wanted:
            conditions.append(f"{column} IN ({', '.join('?' * len(wanted))})")
            values += wanted
    return " AND ".join(conditions), newer, values
