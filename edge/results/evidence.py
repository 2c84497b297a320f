"""What results.sqlite and intake's index say about a series, for the decision whether it is complete."""

from __future__ import annotations

import sqlite3

from edge.results.series import WHOLE, Announced

GONE = "gone"  # outcome of an object that is wanted again after it has left the spool


def announce(db: sqlite3.Connection, series: str, part: str, count: int) -> None:
    """Keeps what an object says about the number of objects; the largest number wins."""
    db.execute(
        "INSERT INTO announced VALUES (?, ?, ?)"
        " ON CONFLICT (series, part) DO UPDATE SET count = MAX(count, excluded.count)",
        (series, part, count),
    )


def announced(db: sqlite3.Connection, series: str) -> Announced | None:
    """Returns how many objects a series is said to have: by its own number, else by the sum of its acquisitions."""
    parts = dict(db.execute("SELECT part, count FROM announced WHERE series = ?", (series,)).fetchall())
    if WHOLE in parts:
        return Announced(parts[WHOLE], firm=True)
    return Announced(sum(parts.values()), firm=False) if parts else None


def arrived(db: sqlite3.Connection, series: str) -> int:
    """Returns how many SOP instances of a series were read, by any head, or cannot be."""
    question = (
        "SELECT COUNT(*) FROM (SELECT substr(key, 1, instr(key, '#') - 1) AS instance FROM slices"
        " JOIN series USING (answer) WHERE series.series = :series"
        " UNION SELECT sop_instance FROM quarantine JOIN work USING (digest) WHERE work.series = :series)"
    )
    return int(db.execute(question, {"series": series}).fetchone()[0])


def ended(db: sqlite3.Connection, intake: sqlite3.Connection | None, answer: str, association: str) -> bool:
    """Tells whether all associations that brought the slices have ended, the latest one with more than one slice.

    A sender that opens an association an image says nothing about the series by closing it.
    """
    if not association or intake is None:
        return False
    brought = dict(
        db.execute(
            "SELECT association, COUNT(*) FROM slices WHERE answer = ? GROUP BY association", (answer,)
        ).fetchall()
    )
    if brought.get(association, 0) < 2:
        return False
    names = [one for one in brought if one]
    marks = ", ".join("?" * len(names))
    found = intake.execute(f"SELECT COUNT(*) FROM associations WHERE id IN ({marks})", names)  # noqa: S608 marks
    return int(found.fetchone()[0]) == len(names)


def gone(db: sqlite3.Connection, series: str) -> int:
    """Returns how many objects of a series had to be read again and had left."""
    question = "SELECT COUNT(*) FROM work WHERE series = ? AND outcome = ?"
    return int(db.execute(question, (series, GONE)).fetchone()[0])


def prune(db: sqlite3.Connection, before: float, *, undelivered: bool, limit: int = 50) -> bool:
    """Drops what old answers no longer need, a little at a time; False when there was nothing to drop.

    Answered series of before `before` (seconds since 1970) lose what their slices said, answers the picture for the
    page (it shows the model's input instead), and with `undelivered` documents that no PACS was there to take lose
    their bytes. The answers stay.
    """
    old = "SELECT answer FROM series WHERE pending_since IS NULL AND last_stored_at < ?"
    rows = db.execute(f"{old} AND answer IN (SELECT answer FROM slices) LIMIT ?", (before, limit)).fetchall()  # noqa: S608
    for (answer,) in map(tuple, rows):
        for table in ("slices", "peaks"):
            db.execute(f"DELETE FROM {table} WHERE answer = ?", (answer,))  # noqa: S608 two words of ours
    dropped = len(rows)
    dropped += db.execute(
        "UPDATE answers SET display = NULL WHERE rowid IN (SELECT rowid FROM answers WHERE display IS NOT NULL"
        " AND answered_at < ? LIMIT ?)",
        (before, limit),
    ).rowcount
    if undelivered:
        dropped += db.execute(
            "UPDATE deliveries SET state = 'expired', data = x'' WHERE sop_instance IN (SELECT sop_instance"
            " FROM deliveries WHERE state = 'waiting' AND next_at < ? LIMIT ?)",
            (before, limit),
        ).rowcount
    return dropped > 0
