"""What the reading page may ask of this node, and the one thing it may say: a label."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge.report import RoomState, room_state
from edge.results import reading
from edge.results.reading import Counts, QuarantineRow, WorklistRow
from edge.results.tables import AnswerRecord
from edge.web.labels import Labels, Person
from shared.errors import PeerError
from shared.wire.records import NodeReport


class NoSuchAnswerError(PeerError):
    """The worklist has no such answer."""


@dataclass(frozen=True)
class Studies:
    """The page's view of the node.

    `labelled` wakes the pipeline, `report` is what the cloud hears too, `link` and `degraded` are as in
    `edge.report`, `site` names the node, empty before it was enrolled, `pacs` where reports go, empty for nowhere.
    """

    results: Path
    labels: Labels
    labelled: Callable[[], None]
    report: Callable[[], NodeReport]
    link: Callable[[], str]
    degraded: Callable[[], str]
    site: Callable[[], str]
    pacs: str

    def worklist(self) -> list[WorklistRow]:
        """Returns the newest answers, newest first."""
        return reading.worklist(self.results, self.results.with_name("labels.sqlite"))

    def row(self, answer: str) -> WorklistRow | None:
        """Returns the worklist's row of one answer; None when it has left the worklist."""
        return next((row for row in self.worklist() if row.answer == answer), None)

    def answer(self, answer: str) -> AnswerRecord:
        """Returns one answer in its latest version; NoSuchAnswerError when there is none."""
        record = reading.answer_detail(self.results, answer)
        if record is None:
            raise NoSuchAnswerError("There is no such answer.", cure="Go back to the worklist.")
        return record

    def withheld(self, record: AnswerRecord) -> str:
        """Returns why nothing is learned from a confirmed answer; empty when something is, or nobody confirmed it."""
        return reading.withheld(self.results.parent / "cases" / "cases.sqlite", record.case)

    def room(self) -> RoomState | None:
        """Returns how full the spool is; None before the intake process said anything."""
        return room_state(self.results.parent)

    def image(self, answer: str) -> bytes:
        """Returns the image of an answer as PNG."""
        self.answer(answer)
        return reading.image_png(self.results, answer)

    def evidence(self, answer: str) -> bytes:
        """Returns the evidence of an answer as RGBA PNG."""
        self.answer(answer)
        return reading.evidence_png(self.results, answer)

    def label(self, answer: str, label: str, by: Person) -> int:
        """Records what a person says about an answer and returns the label's serial.

        Raises:
            NoSuchAnswerError: there is no such answer.
            PeerError: no head reads it, or the label is not one of the head's classes.
            TrustError: the role may not label.
        """
        record = self.answer(answer)
        names = [one.name for one in record.classes]
        if label not in names:
            raise PeerError(f"{label[:40]!r} is not a class of this answer.", cure=f"One of {', '.join(names)}.")
        serial = self.labels.add(answer, record.head, label, by)
        self.labelled()
        return serial

    def quarantine(self) -> list[QuarantineRow]:
        """Returns what could not be read, newest first."""
        return reading.quarantine(self.results)

    def counts(self) -> Counts:
        """Returns the node's counters."""
        return reading.counts(self.results)
