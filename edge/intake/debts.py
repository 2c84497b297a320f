"""What is still owed for an object of the spool: read from the books of the other processes, never guessed.

Nothing is owed for an object that the pipeline has worked off, whose series is answered with its documents built and,
where there is a PACS, delivered, that no label waits on, and that was sent on wherever a rule says so. A book that is
missing or cannot be read leaves everything owed.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from msgspec import Struct

from edge.sqlite import open_foreign
from shared.errors import StateError

UNREAD = "not read yet"
QUARANTINED = "in quarantine: cannot be read"
UNANSWERED = "not answered yet"
UNDELIVERED = "waiting for the PACS"
LABELLED = "a label waits to be kept"
UNSENT = "waiting to be forwarded"

_ANSWERED = ("answered", "slice", "unassessed")  # outcomes of results.sqlite that stand in an answer
_TO_READ = ("", "gone")  # leased, or wanted again when it had left
Owed = Callable[[Sequence[sqlite3.Row]], Mapping[str, str]]


class Open(Struct, frozen=True):
    """What is unfinished now, by the names that the other processes use."""

    reading: frozenset[str]  # series with objects that wait to be leased or to be read
    pending: frozenset[str]  # series with slices that no answer counts
    undelivered: frozenset[tuple[str, int]]  # answers, with version, that a PACS must still take
    labelled: frozenset[str]  # answers with a label that was not worked off


class Worked(Struct, frozen=True):
    """What the pipeline says of some objects and their series."""

    outcomes: Mapping[str, str]  # by digest
    answers: Mapping[
        str, Sequence[tuple[str, int, bool]]
    ]  # by series: answer, version, whether its documents are built


class Books:
    """The files of the other processes in the state folder, opened read-only for one look at a time.

    `pacs`: results must be delivered. `forwarding`: rules may send objects on, so each must have been routed.
    """

    def __init__(self, state: Path, *, pacs: bool, forwarding: bool) -> None:
        self.state = state
        self._pacs = pacs
        self._forwarding = forwarding

    @contextmanager
    def opened(self) -> Iterator[Owed]:
        """Gives a function from rows of intake's index to what is owed, by digest; no entry: nothing is.

        Raises:
            StateError: a book cannot be read.
        """
        with ExitStack() as stack:
            try:
                yield self._open(stack)
            except sqlite3.Error as exc:
                raise StateError(f"Cannot read what is owed: {exc}.") from exc

    def _open(self, stack: ExitStack) -> Owed:
        def book(name: str) -> sqlite3.Connection | None:
            found = open_foreign(self.state / name)
            return stack.enter_context(closing(found)) if found else None

        results, labels, intake = book("results.sqlite"), book("labels.sqlite"), book("intake.sqlite")
        if results is None or intake is None:
            return lambda rows: {row["digest"]: UNREAD for row in rows}
        forward = book("forward.sqlite")
        unfinished = _open_now(results, labels, intake, pacs=self._pacs)

        def owed(rows: Sequence[sqlite3.Row]) -> Mapping[str, str]:
            worked, unsent = _worked(results, rows), self._unsent(intake, forward, rows)
            found = {row["digest"]: judge(row["digest"], row["series"], worked, unfinished) for row in rows}
            return {digest: reason or UNSENT for digest, reason in found.items() if reason or digest in unsent}

        return owed

    def _unsent(
        self, intake: sqlite3.Connection, forward: sqlite3.Connection | None, rows: Sequence[sqlite3.Row]
    ) -> set[str]:
        """Returns the digests that were not routed yet, or that a destination did not take yet (dead letters too: a
        person decides about them)."""
        if forward is None:
            return {row["digest"] for row in rows} if self._forwarding else set()
        waiting = _where_in(
            forward, "SELECT digest FROM queue WHERE state IN ('waiting', 'dead') AND digest IN ({})", rows, "digest"
        )
        unsent = {row["digest"] for row in waiting}
        if self._forwarding:
            followed = _followed(forward, intake)
            unsent |= {row["digest"] for row in rows if row["id"] > followed}
            again = _where_in(forward, "SELECT digest FROM unrouted WHERE digest IN ({})", rows, "digest")
            unsent |= {row["digest"] for row in again}  # the disk did not give it when it was to be routed
        return unsent


def judge(digest: str, series: str, worked: Worked, unfinished: Open) -> str:
    """Returns why an object must stay; empty when the pipeline and the reader are done with it."""
    outcome = worked.outcomes.get(digest, "")
    answers = worked.answers.get(series, ())
    undelivered = any((answer, version) in unfinished.undelivered for answer, version, _ in answers)
    reasons = (
        (outcome in _TO_READ or series in unfinished.reading, UNREAD),
        (outcome == "quarantined", QUARANTINED),
        (series in unfinished.pending, UNANSWERED),
        (outcome in _ANSWERED and not answers, UNANSWERED),
        (not all(built for _, _, built in answers), UNANSWERED),
        (undelivered, UNDELIVERED),
        (any(answer in unfinished.labelled for answer, _, _ in answers), LABELLED),
    )
    return next((reason for holds, reason in reasons if holds), "")


def _open_now(
    results: sqlite3.Connection, labels: sqlite3.Connection | None, intake: sqlite3.Connection, *, pacs: bool
) -> Open:
    def column(question: str) -> frozenset[str]:
        return frozenset(row[0] for row in results.execute(question))

    arrived = "SELECT DISTINCT series FROM objects WHERE state = 'kept' AND id > ?"  # and not leased yet
    unleased = frozenset(row[0] for row in intake.execute(arrived, (_followed(results, intake),)))

    undelivered = "SELECT DISTINCT answer, version FROM deliveries WHERE state IN ('waiting', 'refused')"
    labelled: frozenset[str] = frozenset()
    if labels is not None:
        cursor = results.execute("SELECT value FROM cursors WHERE name = 'labels'").fetchone()
        serial = cursor["value"] if cursor else 0
        labelled = frozenset(
            row[0] for row in labels.execute("SELECT answer_id FROM labels WHERE serial > ?", (serial,))
        )
    return Open(
        reading=unleased | column("SELECT DISTINCT series FROM work WHERE outcome = ''"),
        pending=column("SELECT DISTINCT series FROM series WHERE pending_since IS NOT NULL"),
        undelivered=frozenset((row[0], row[1]) for row in results.execute(undelivered)) if pacs else frozenset(),
        labelled=labelled,
    )


def _followed(follower: sqlite3.Connection, intake: sqlite3.Connection) -> int:
    """Returns the last id of intake's index that another process has taken up."""
    generation = intake.execute("SELECT id FROM generation").fetchone()["id"]
    cursor = follower.execute("SELECT value FROM cursors WHERE name = ?", (f"intake {generation}",)).fetchone()
    return int(cursor["value"]) if cursor else 0


def _worked(results: sqlite3.Connection, rows: Sequence[sqlite3.Row]) -> Worked:
    work = _where_in(results, "SELECT digest, outcome FROM work WHERE digest IN ({})", rows, "digest")
    answers: dict[str, list[tuple[str, int, bool]]] = {}
    question = "SELECT answer, version, series, documents FROM answers WHERE study IN ({})"
    for row in _where_in(results, question, rows, "study"):
        answers.setdefault(row["series"], []).append((row["answer"], row["version"], bool(row["documents"])))
    return Worked({row["digest"]: row["outcome"] for row in work}, answers)


def _where_in(db: sqlite3.Connection, question: str, rows: Sequence[sqlite3.Row], column: str) -> Iterator[sqlite3.Row]:
    values = list(dict.fromkeys(row[column] for row in rows))
    return db.execute(question.format(", ".join("?" * len(values))), values)
