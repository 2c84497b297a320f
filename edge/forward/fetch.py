"""Fetching: what a peer holds (C-FIND), and having it sent to our door (C-MOVE).

By rule once a study or series: priors of the same patient and modality, or the images that a series lacks. What comes
as a prior is kept and neither read nor a reason to fetch more.
"""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pynetdicom import build_context
from pynetdicom.sop_class import (
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelMove,
)

from edge.forward.facts import read_facts_head
from edge.forward.follow import FetchRule
from edge.forward.peer import Peer, association
from edge.forward.queue import Fetch, Queue
from edge.forward.schedule import Breaker, delay
from edge.imaging.read import lenient_text
from edge.sqlite import open_foreign
from shared.clock import Clock
from shared.errors import LinkError, PeerError, RadfleetError, StateError
from shared.log import get_logger

Level = Literal["STUDY", "SERIES", "IMAGE"]
MATCH_LIMIT = 10_000  # answers to one query; a peer that sends more is cut off
MOVE_ANSWER_S = 600.0  # an archive may fetch from tape between two images
_UIDS_A_MOVE = 100
_TRIES = 5
_EVERY_S = 2.0  # at most one fetch in so many seconds from one peer
_WILDCARDS = frozenset("*?\\")
_UID = re.compile("[0-9.]{1,64}")  # one, and no wildcard: a C-MOVE would send whatever an answer names
_COUNT = re.compile("[0-9]{1,12}")  # an IS has at most 12 characters (PS3.5 6.2)

# C-MOVE and C-FIND failures (PS3.4 tables C.4-1 and C.4-2): cause and cure.
_FAILED: dict[int, tuple[str, str]] = {
    0xA701: ("it has no resources to count the matches", "Try again later."),
    0xA702: ("it has no resources to send", "Try again later."),
    0xA801: ("it does not know the AE title {to} to send to", "Add {to} with host and port of its door at the peer."),
    0xA900: ("the query does not fit the level", "Name the keys of the level above too."),
    0x0122: ("it does not answer such queries", "Allow Query/Retrieve, Study Root, for our AE title at the peer."),
    0x0124: ("we are not authorised", "Allow Query/Retrieve for our AE title at the peer."),
}


class Moved(Struct, frozen=True):
    """How far a C-MOVE is: objects still to be sent, sent, sent with a warning, and failed."""

    remaining: int
    completed: int
    warned: int
    failed: int


def find(peer: Peer, level: Level, keys: Mapping[str, str], *, ours: str) -> list[Dataset]:
    """Returns what matches at a peer, Study Root; `keys` by DICOM keyword, empty for what is only asked for.

    Raises:
        LinkError: the peer is away, hangs up or refuses, with cause and cure.
        PeerError: an unknown keyword, or more than MATCH_LIMIT answers.
    """
    query = _identifier(level, keys)
    found: list[Dataset] = []
    model = StudyRootQueryRetrieveInformationModelFind
    with association(peer, [build_context(model)], ours=ours) as link:
        for status, match in link.send_c_find(query, model):
            _check(peer, status, "find", ours)
            if match is not None:
                found.append(match)
            if len(found) > MATCH_LIMIT:
                link.abort()
                raise PeerError(f"{peer} has more than {MATCH_LIMIT} matches.", cure="Ask for less.")
    return found


def move(peer: Peer, level: Level, keys: Mapping[str, str], *, to: str, ours: str) -> Iterator[Moved]:
    """Has a peer send what matches to the AE title `to`, and yields how far it is; the last one is the end.

    Raises:
        LinkError: the peer is away, hangs up or refuses, with cause and cure.
        PeerError: an unknown keyword.
    """
    query = _identifier(level, keys)
    model = StudyRootQueryRetrieveInformationModelMove
    with association(peer, [build_context(model)], ours=ours) as link:
        link.dimse_timeout = MOVE_ANSWER_S
        for status, _ in link.send_c_move(query, to, model):
            _check(peer, status, "move", to)
            yield Moved(
                *(
                    int(status.get(f"NumberOf{name}Suboperations") or 0)
                    for name in ("Remaining", "Completed", "Warning", "Failed")
                )
            )


def choose_priors(
    matches: Sequence[Mapping[str, str]],
    *,
    patient: str,
    issuer: str,
    study: str,
    before: str,
    modality: str,
    count: int,
    within_days: int,
) -> list[str]:
    """Returns the Study Instance UIDs of the most recent priors, the newest first.

    A peer may match more than it was asked for: an identifier with `*` in it is a wildcard to it. So patient, date and
    modality are compared again, exactly; a study of the same day is no prior.

    Args:
        matches: a peer's answers by DICOM keyword; ModalitiesInStudy joined by a backslash.
        patient, issuer: PatientID and IssuerOfPatientID of the study; an issuer counts where both name one.
        study, before, modality: its Study Instance UID, Study Date (YYYYMMDD) and modality.
        count, within_days: at most so many, not older than that.
    """
    day = _day(before)
    if not patient or day is None:
        return []
    found = []
    for match in matches:
        then = _day(match.get("StudyDate", ""))
        if (
            match.get("PatientID", "").strip() == patient
            and (not issuer or match.get("IssuerOfPatientID", "") in ("", issuer))
            and _UID.fullmatch(match.get("StudyInstanceUID", ""))
            and match["StudyInstanceUID"] != study
            and modality in match.get("ModalitiesInStudy", "").split("\\")
            and then is not None
            and _earlier(day, within_days) <= then < day
        ):
            found.append((then, match["StudyInstanceUID"]))
    return [uid for _, uid in sorted(found, reverse=True)[:count]]


class Fetcher:
    """Fetches from one peer what rules ask for, in a thread of its own; see the module's docstring."""

    def __init__(
        self,
        queue: Queue,
        peer: Peer,
        rules: Sequence[FetchRule],
        *,
        intake: Path,
        spool: Path,
        ours: str,
        clock: Clock,
        random_unit: Callable[[], float],
    ) -> None:
        self._queue = queue
        self._peer = peer
        self._rules = rules
        self._intake = intake
        self._spool = spool
        self._ours = ours
        self._clock = clock
        self._random_unit = random_unit
        self._breaker = Breaker(random_unit)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Fetches in a thread until `stop`."""
        self._thread = threading.Thread(target=self._run, name=f"fetch-{self._peer.name}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; a fetch that is not done stays wanted."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(1.0)  # a C-MOVE may take long: it is done again

    def step(self) -> bool:
        """Does one fetch; False when there is none to do now.

        Raises:
            StateError: our database failed.
        """
        now = self._now()
        if not self._breaker.closed(self._clock.monotonic()):
            return False
        fetch = self._queue.next_fetch(self._peer.name, now)
        if fetch is None:
            return False
        try:
            moved = self._series(fetch) if fetch.kind == "series" else self._priors(fetch)
            self._queue.end_fetch(fetch, "done", moved=moved, next_at=now)
            self._breaker.worked()
            get_logger().info("forward.fetched", kind=fetch.kind, source=fetch.source, objects=moved)
        except LinkError as exc:
            self._breaker.failed(self._clock.monotonic())
            self._failed(fetch, now, exc.message, exc.cure)
        except (PeerError, StateError) as exc:  # too many answers, or the object that named the patient is gone
            self._queue.end_fetch(fetch, "dead", error=exc.message, cure=exc.cure, next_at=now)
        except Exception as exc:  # noqa: BLE001 what one fetch finds odd must not hold up the others for ever
            self._failed(fetch, now, f"The fetch ended with {type(exc).__name__}.", "Report it with the log.")
        return True

    def _failed(self, fetch: Fetch, now: float, error: str, cure: str) -> None:
        state = "waiting" if fetch.tries + 1 < _TRIES else "dead"
        again = now + delay(fetch.tries + 1, self._random_unit)
        self._queue.end_fetch(fetch, state, error=error, cure=cure, next_at=again)
        get_logger().warning("forward.not_fetched", kind=fetch.kind, source=fetch.source, error=error)

    def _priors(self, fetch: Fetch) -> int:
        rule = self._rules[fetch.rule] if fetch.rule < len(self._rules) else None
        head = read_facts_head(self._spool / fetch.file, fetch.offset, fetch.transfer_syntax).dataset
        patient, before = lenient_text(head, "PatientID", 64), lenient_text(head, "StudyDate", 8)
        day = _day(before)
        if rule is None or not patient or day is None:
            return 0  # without a patient the query would match everybody
        keys = {
            "PatientID": "".join("?" if letter in _WILDCARDS else letter for letter in patient),
            "IssuerOfPatientID": "",
            "StudyInstanceUID": "",
            "StudyDate": f"{_earlier(day, rule.within_days):%Y%m%d}-{before}",
            "ModalitiesInStudy": fetch.modality,
            "NumberOfStudyRelatedInstances": "",
        }
        matches = [as_texts(match) for match in find(self._peer, "STUDY", keys, ours=self._ours)]
        chosen = choose_priors(
            matches,
            patient=patient,
            issuer=lenient_text(head, "IssuerOfPatientID", 64),
            study=fetch.study,
            before=before,
            modality=fetch.modality,
            count=rule.count,
            within_days=rule.within_days,
        )
        there = {match.get("StudyInstanceUID", ""): match.get("NumberOfStudyRelatedInstances", "") for match in matches}
        lacking = [
            uid
            for uid in chosen
            if self._holds("study", uid) < (int(there[uid]) if _COUNT.fullmatch(there[uid]) else 1)
        ]
        lacking = [uid for uid in lacking if not self._live(uid)]
        self._queue.note_priors(lacking, fetch.study, self._now())
        return sum(self._move("STUDY", {"StudyInstanceUID": uid}) for uid in lacking)

    def _series(self, fetch: Fetch) -> int:
        above = {"StudyInstanceUID": fetch.study, "SeriesInstanceUID": fetch.series}
        series = find(self._peer, "SERIES", {**above, "NumberOfSeriesRelatedInstances": ""}, ours=self._ours)
        count = next((as_texts(one).get("NumberOfSeriesRelatedInstances", "") for one in series), "")
        held = self._instances(fetch.series)
        if not series or (_COUNT.fullmatch(count) and int(count) <= len(held)):
            return 0
        there = find(self._peer, "IMAGE", {**above, "SOPInstanceUID": ""}, ours=self._ours)
        told = {as_texts(one).get("SOPInstanceUID", "") for one in there} - held
        lacking = sorted(uid for uid in told if _UID.fullmatch(uid))
        moved = 0
        for at in range(0, len(lacking), _UIDS_A_MOVE):
            moved += self._move("IMAGE", {**above, "SOPInstanceUID": "\\".join(lacking[at : at + _UIDS_A_MOVE])})
        return moved

    def _move(self, level: Level, keys: Mapping[str, str]) -> int:
        last = Moved(0, 0, 0, 0)
        for so_far in move(self._peer, level, keys, to=self._ours, ours=self._ours):
            last = so_far
            if self._stopping.is_set():
                raise LinkError("The node stops; the fetch is done again.")
        if last.failed:
            raise LinkError(
                f"{self._peer} could not send {last.failed} of {last.failed + last.completed + last.warned} objects.",
                cure=f"Look at the peer's log: it must reach {self._ours}, and [dicom] allow must name its AE title.",
            )
        return last.completed + last.warned

    def _holds(self, column: Literal["study", "series"], uid: str) -> int:
        return len(self._ask(f"SELECT DISTINCT sop_instance FROM objects WHERE {column} = ?", uid))  # noqa: S608

    def _instances(self, series: str) -> set[str]:
        return {
            str(row["sop_instance"]) for row in self._ask("SELECT sop_instance FROM objects WHERE series = ?", series)
        }

    def _live(self, study: str) -> bool:
        """Whether the study comes here by itself: what it still lacks must be read, so it is not fetched as a prior."""
        return self._holds("study", study) > 0 and not self._queue.is_prior(study, self._now())

    def _ask(self, question: str, value: str) -> list[sqlite3.Row]:
        database = open_foreign(self._intake)
        if database is None:
            return []
        try:
            return database.execute(question, (value,)).fetchall()
        except sqlite3.Error as exc:
            raise StateError(f"Cannot read {self._intake}: {exc}.") from exc
        finally:
            database.close()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.step()
            except Exception as exc:  # noqa: BLE001 a thread that ends would stop fetching in silence
                error = exc.message if isinstance(exc, RadfleetError) else type(exc).__name__
                get_logger().error("forward.fetch_failed", source=self._peer.name, error=error)
            self._stopping.wait(_EVERY_S)

    def _now(self) -> float:
        return self._clock.now().timestamp()


def as_texts(match: Dataset) -> dict[str, str]:
    """Returns an answer's values by keyword, several joined by a backslash; what cannot be read is empty."""
    texts: dict[str, str] = {}
    for tag in match.keys():  # noqa: SIM118 a data set iterates over its elements, and one may be unreadable
        try:
            element = match[tag]
            value = element.value
            many = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
            texts[element.keyword] = "\\".join(map(str, value)) if many else str(value or "").strip()
        except Exception:  # noqa: BLE001, S112 pydicom names no family for values it cannot read
            continue
    return texts


def _identifier(level: Level, keys: Mapping[str, str]) -> Dataset:
    query = Dataset()
    query.QueryRetrieveLevel = level
    query.SpecificCharacterSet = "ISO_IR 192"
    for keyword, value in keys.items():
        if tag_for_keyword(keyword) is None:
            raise PeerError(f"{keyword} is no DICOM keyword.", cure="As in PatientID or StudyInstanceUID.")
        setattr(query, keyword, value.split("\\") if "\\" in value else value)
    return query


def _check(peer: Peer, status: Any, verb: str, to: str) -> None:
    if "Status" not in status:
        raise LinkError(f"{peer} ended the association or did not answer a {verb}.", cure="Look at the peer's log.")
    code = int(status.Status)
    if code in (0x0000, 0xFF00, 0xFF01) or code & 0xF000 == 0xB000:
        return
    what, cure = _FAILED.get(code, ("it cannot", "Look at the peer's log."))
    raise LinkError(f"{peer} refuses the {verb} with 0x{code:04X}: {what.format(to=to)}.", cure=cure.format(to=to))


def _day(text: str) -> date | None:
    try:
        return date(int(text[:4]), int(text[4:6]), int(text[6:8]))
    except ValueError:
        return None


def _earlier(day: date, days: int) -> date:
    return date.fromordinal(max(day.toordinal() - days, 1))  # the calendar has a first day
