"""What other processes may ask of forward.sqlite, and how they ask for dead objects to be tried again."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from edge.forward.rules import OUTCOME
from edge.nudge import Nudge
from edge.sqlite import reading
from shared.errors import RadfleetError
from shared.files import atomic_write, read_limited
from shared.log import get_logger

_REQUEST_LIMIT_BYTES = 1_000_000
DEAD_SHOWN = 500


class DestinationState(Struct, frozen=True):
    """One destination's queue; `configured` is false for rows that a removed [[destination]] left behind."""

    name: str
    where: str
    configured: bool
    waiting: int
    sent: int
    dead: int
    dropped: int  # a person gave them up
    oldest_at: float | None  # of what waits, seconds since 1970
    last_error: str  # empty when the peer answered last time
    cure: str


class DeadLetter(Struct, frozen=True):
    """One object that a destination did not take."""

    id: int
    destination: str
    sop_instance: str
    modality: str
    calling_ae: str
    why: str
    tries: int
    error: str
    cure: str
    at: float


class FetchState(Struct, frozen=True):
    """What was or will be fetched by rule, counted."""

    source: str
    kind: str
    state: str
    count: int
    moved: int
    last_error: str
    cure: str


class Request(Struct, frozen=True):
    """What a person asks for: `retry` dead objects, or `drop` what will never be taken; some, or a destination's."""

    by: str
    action: Literal["retry", "drop"]
    ids: list[int] = []
    destination: str = ""


class Requests:
    """Where the page and the command line leave requests that the forward process takes, each once."""

    def __init__(self, folder: Path, ear: Path) -> None:
        """`folder` is made when needed; `ear` is the forward process's socket."""
        self._folder = folder
        self._nudge = Nudge(ear)

    def leave(self, request: Request) -> None:
        """Leaves a request and wakes the process; durable when it returns."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        atomic_write(self._folder / f"{secrets.token_hex(8)}.json", msgspec.json.encode(request))
        self._nudge()

    def take(self) -> Iterator[Request]:
        """Yields what was left; a request is removed after its turn, so after a crash it is taken again."""
        for path in sorted(self._folder.glob("*.json")):
            try:
                yield msgspec.json.decode(read_limited(path, _REQUEST_LIMIT_BYTES), type=Request)
            except (RadfleetError, msgspec.MsgspecError) as exc:
                get_logger().warning("forward.request_unread", reason=type(exc).__name__)
            path.unlink(missing_ok=True)


def destinations(path: Path, configured: dict[str, str]) -> list[DestinationState]:
    """Returns every destination, the configured ones first; `configured` gives where they are by name."""
    with reading(path) as db:
        queued = {} if db is None else _by_name(db, _QUEUED)
        links = {} if db is None else _by_name(db, "SELECT * FROM links")
    found = []
    for name in [*configured, *sorted(set(queued) - set(configured))]:
        row, link = queued.get(name), links.get(name)
        found.append(
            DestinationState(
                name=name,
                where=configured.get(name, ""),
                configured=name in configured,
                waiting=int(row["waiting"]) if row else 0,
                sent=int(row["sent"]) if row else 0,
                dead=int(row["dead"]) if row else 0,
                dropped=int(row["dropped"]) if row else 0,
                oldest_at=row["oldest_at"] if row else None,
                last_error=link["last_error"] if link else "",
                cure=link["cure"] if link else "",
            )
        )
    return found


def dead_letters(path: Path, *, limit: int = DEAD_SHOWN) -> list[DeadLetter]:
    """Returns what destinations did not take, newest first."""
    with reading(path) as db:
        if db is None:
            return []
        rows = db.execute(
            "SELECT id, destination, sop_instance, modality, calling_ae, why, tries, last_error AS error, cure,"
            " COALESCE(ended_at, queued_at) AS at FROM queue WHERE state = 'dead' ORDER BY at DESC, id DESC LIMIT ?",
            (limit,),
        ).fetchall()
    return [DeadLetter(**dict(row)) for row in rows]


def fetches(path: Path) -> list[FetchState]:
    """Returns the fetches by source, kind and state."""
    with reading(path) as db:
        if db is None:
            return []
        rows = db.execute(
            "SELECT source, kind, state, COUNT(*) AS count, SUM(moved) AS moved, MAX(last_error) AS last_error,"
            " MAX(cure) AS cure FROM fetches GROUP BY source, kind, state ORDER BY source, kind, state"
        ).fetchall()
    return [FetchState(**dict(row)) for row in rows]


def not_read(results: Path) -> dict[str, int]:
    """Returns how many objects rules kept from the models, by action."""
    with reading(results) as db:
        if db is None:
            return {}
        rows = db.execute(
            "SELECT outcome, COUNT(*) AS n FROM work WHERE outcome >= ? AND outcome < ? GROUP BY outcome",
            (OUTCOME, OUTCOME.replace(":", ";")),  # the next character: a range the index can use
        ).fetchall()
    return {str(row["outcome"]).removeprefix(OUTCOME): int(row["n"]) for row in rows}


_QUEUED = (
    "SELECT destination, SUM(state = 'waiting') AS waiting, SUM(state = 'sent') AS sent, SUM(state = 'dead') AS dead,"
    " SUM(state = 'dropped') AS dropped,"
    " MIN(CASE WHEN state = 'waiting' THEN queued_at END) AS oldest_at FROM queue GROUP BY destination"
)


def _by_name(db: sqlite3.Connection, question: str) -> dict[str, sqlite3.Row]:
    rows: Sequence[sqlite3.Row] = db.execute(question).fetchall()
    return {str(row["destination"]): row for row in rows}
