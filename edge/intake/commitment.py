"""Storage Commitment Push Model as provider (PS3.4 annex J): what is safe here is said per instance, and said again
until the sender has heard it.

The report goes out on the association that asked, at once. When that association ends without an answer to the
report, it goes out on a new one, to the port that the configuration names for the peer.
"""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Sequence
from io import BytesIO

import pydicom
from msgspec import Struct
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from edge.intake import index as states
from edge.intake import pdu
from edge.intake.head import valid_uid
from edge.intake.pdu import Command
from edge.intake.spool import Spool
from edge.intake.syntaxes import STORAGE_COMMITMENT
from shared.clock import Clock
from shared.errors import LinkError, PeerError, RadfleetError
from shared.log import get_logger

WELL_KNOWN_INSTANCE = "1.2.840.10008.1.20.1.1"  # Storage Commitment Push Model SOP Instance (PS3.4 J.3.5)
REFERENCES_LIMIT = 20_000  # of one request
WAITING_LIMIT = 100  # requests of one peer whose report was not taken yet
KEPT_S = 7 * 86400.0  # how long an ended request stays on record
RETRY_BASE_S = 30.0
RETRY_CAP_S = 3600.0
MAX_TRIES = 20

# PS3.4 table J.3-1 and PS3.3 C.14.1.1: failure reasons
NO_SUCH_INSTANCE = 0x0112
CLASS_CONFLICT = 0x0119
RESOURCE_LIMITATION = 0x0213  # PS3.7 annex C.5.19
SUCCESS, NO_SUCH_ACTION, INVALID_ARGUMENT, PROCESSING_FAILURE, NO_SUCH_OBJECT = 0x0000, 0x0123, 0x0115, 0x0110, 0x0112
ALL_SAFE, SOME_FAILED = 1, 2  # event types

Message = tuple[bytes, bytes]


class Asked(Struct, frozen=True):
    """One request: its transaction and the (SOP class, SOP instance) pairs it names."""

    transaction: str
    references: tuple[tuple[str, str], ...]


class Report(Struct, frozen=True):
    """What is said of a request: pairs that are safe, and pairs that are not with the reason."""

    transaction: str
    safe: tuple[tuple[str, str], ...]
    failed: tuple[tuple[str, str, int], ...]

    @property
    def event(self) -> int:
        """The event type of the N-EVENT-REPORT (PS3.4 table J.3-2)."""
        return SOME_FAILED if self.failed else ALL_SAFE


class Due(Struct, frozen=True):
    """A report that waits for an association of our own."""

    report: Report
    ae_title: str
    address: str
    tries: int


def read_request(data: bytes, transfer_syntax: str) -> Asked:
    """Returns what an N-ACTION data set asks.

    Raises:
        PeerError: it cannot be read, names nothing, or more than REFERENCES_LIMIT instances.
    """
    item = b"\xff\xfe\xe0\x00" if transfer_syntax == "1.2.840.10008.1.2.2" else b"\xfe\xff\x00\xe0"
    if data.count(item) > REFERENCES_LIMIT:  # before a parser makes an object of each
        raise PeerError(f"A request names at most {REFERENCES_LIMIT} instances.")
    try:
        dataset = pydicom.filereader.read_dataset(
            BytesIO(data), transfer_syntax == "1.2.840.10008.1.2", transfer_syntax != "1.2.840.10008.1.2.2"
        )
        transaction = str(dataset.TransactionUID)
        items = dataset.ReferencedSOPSequence
        references = tuple((str(one.ReferencedSOPClassUID), str(one.ReferencedSOPInstanceUID)) for one in items)
    except Exception as exc:
        raise PeerError("The request for storage commitment cannot be read.") from exc
    if not valid_uid(transaction) or not 0 < len(references) <= REFERENCES_LIMIT:
        raise PeerError(f"A request names 1 to {REFERENCES_LIMIT} instances under a transaction UID.")
    return Asked(transaction, references)


def judge(asked: Asked, held: Callable[[str], Sequence[str]]) -> Report:
    """Returns the report; `held` gives the SOP classes under which an instance is on the disk, whole."""
    safe, failed = [], []
    for sop_class, instance in asked.references:
        classes = held(instance)
        if sop_class in classes:
            safe.append((sop_class, instance))
        else:
            failed.append((sop_class, instance, CLASS_CONFLICT if classes else NO_SUCH_INSTANCE))
    return Report(asked.transaction, tuple(safe), tuple(failed))


def encode_report(report: Report, transfer_syntax: str) -> bytes:
    """Returns the data set of the N-EVENT-REPORT."""
    dataset = _dataset(report)
    out = DicomBytesIO()
    out.is_implicit_VR = transfer_syntax == "1.2.840.10008.1.2"
    out.is_little_endian = transfer_syntax != "1.2.840.10008.1.2.2"
    write_dataset(out, dataset)
    return out.getvalue()


class Commitments:
    """The requests of all associations and their reports, kept in the index until they are taken."""

    def __init__(self, spool: Spool, clock: Clock) -> None:
        self._spool = spool
        self._clock = clock
        self._lock = threading.Lock()
        self._sent: dict[str, list[tuple[str, str]]] = {}  # association to (transaction, AE title), not yet answered

    def asked(
        self, command: Command, data: bytes, transfer_syntax: str, calling_ae: str, address: str, association: str
    ) -> tuple[int, list[Message]]:
        """Returns the status of an N-ACTION and the report to send after it; a success is durable."""
        if command.uid(pdu.REQUESTED_INSTANCE) != WELL_KNOWN_INSTANCE:
            return NO_SUCH_OBJECT, []
        if command.number(pdu.ACTION_TYPE) != 1:
            return NO_SUCH_ACTION, []
        try:
            asked = read_request(data, transfer_syntax)
            if self._waiting(calling_ae) >= WAITING_LIMIT:
                return RESOURCE_LIMITATION, []
            report = self._record(asked, calling_ae, address)
        except PeerError as exc:
            get_logger().warning("intake.commitment_refused", reason=exc.message)
            return INVALID_ARGUMENT, []
        except RadfleetError as exc:
            get_logger().error("intake.commitment_failed", error=exc.message)
            return PROCESSING_FAILURE, []
        with self._lock:
            self._sent.setdefault(association, []).append((asked.transaction, calling_ae))
        event = pdu.command_set(
            {
                pdu.AFFECTED_CLASS: STORAGE_COMMITMENT,
                pdu.FIELD: pdu.N_EVENT_REPORT_RQ,
                pdu.MESSAGE_ID: (command.number(pdu.MESSAGE_ID) + 1) & 0x7FFF,
                pdu.DATA_SET_TYPE: 0x0001,
                pdu.AFFECTED_INSTANCE: WELL_KNOWN_INSTANCE,
                pdu.EVENT_TYPE: report.event,
            }
        )
        return SUCCESS, [(event, encode_report(report, transfer_syntax))]

    def taken(self, association: str, command: Command) -> None:
        """The peer answered the oldest report of this association."""
        with self._lock:
            waiting = self._sent.get(association, [])
            oldest = waiting.pop(0) if waiting else None
        if oldest and command.number(pdu.STATUS) == SUCCESS:
            self.mark(*oldest, "taken")

    def association_over(self, association: str) -> None:
        """What was not answered on this association goes out on a new one, now; StateError when the index failed."""
        with self._lock:
            unanswered = self._sent.pop(association, [])
        if unanswered:
            with self._spool.index.durable() as db:
                db.executemany(
                    "UPDATE commitments SET next_at = ? WHERE transaction_uid = ? AND ae_title = ?",
                    [(self._clock.now().timestamp(), *one) for one in unanswered],
                )

    def due(self, now: float) -> list[Due]:
        """Returns what waits for a new association, judged anew."""
        with self._lock:
            busy = {one for unanswered in self._sent.values() for one in unanswered}
        rows = self._spool.index.rows(
            "SELECT * FROM commitments WHERE state = 'waiting' AND next_at <= ? ORDER BY next_at LIMIT 16", now
        )
        due = []
        for row in rows:
            if (row["transaction_uid"], row["ae_title"]) not in busy:
                asked = Asked(row["transaction_uid"], tuple((one[0], one[1]) for one in json.loads(row["asked"])))
                due.append(Due(self._promise(asked), row["ae_title"], row["address"], row["tries"]))
        return due

    def mark(self, transaction: str, ae_title: str, state: str) -> None:
        """Ends a request: its report was taken, or given up."""
        with self._spool.index.durable() as db:
            db.execute(
                "UPDATE commitments SET state = ?, asked = '' WHERE transaction_uid = ? AND ae_title = ?",
                (state, transaction, ae_title),
            )

    def failed(self, due: Due, error: str) -> None:
        """Schedules the next try of a report, or gives it up after MAX_TRIES."""
        wait = min(RETRY_CAP_S, RETRY_BASE_S * 2.0 ** min(due.tries, 10))
        state = "waiting" if due.tries + 1 < MAX_TRIES else "given up"
        with self._spool.index.durable() as db:
            db.execute(
                "UPDATE commitments SET tries = ?, next_at = ?, last_error = ?, state = ?,"
                " asked = CASE WHEN ? = 'waiting' THEN asked ELSE '' END WHERE transaction_uid = ? AND ae_title = ?",
                (
                    due.tries + 1,
                    self._clock.now().timestamp() + wait,
                    error[:300],
                    state,
                    state,
                    due.report.transaction,
                    due.ae_title,
                ),
            )

    def _waiting(self, calling_ae: str) -> int:
        question = "SELECT COUNT(*) FROM commitments WHERE ae_title = ? AND state = 'waiting'"
        return int(self._spool.index.rows(question, calling_ae)[0][0])

    def _record(self, asked: Asked, calling_ae: str, address: str) -> Report:
        now = self._clock.now().timestamp()
        report = self._promise(asked)
        with self._spool.index.durable() as db:
            db.execute(
                "INSERT OR REPLACE INTO commitments VALUES (?, ?, ?, ?, ?, 'waiting', 0, ?, '')",
                (asked.transaction, calling_ae, address, json.dumps(asked.references), now, now + RETRY_BASE_S),
            )
            db.execute("DELETE FROM commitments WHERE state <> 'waiting' AND asked_at < ?", (now - KEPT_S,))
        return report

    def _promise(self, asked: Asked) -> Report:
        """Marks first and judges then: what is said to be safe cannot leave the spool in between."""
        self._spool.index.promise([instance for _, instance in asked.references], self._clock.now().timestamp())
        return judge(asked, self._held)

    def _held(self, instance: str) -> list[str]:
        return [
            row["sop_class"]
            for row in self._spool.index.digests(instance)
            if row["state"] != states.EVICTED and _whole(self._spool, row["file"], row["offset"] + row["length"])
        ]


def send_report(
    report: Report,
    *,
    our_ae: str,
    ae_title: str,
    host: str,
    port: int,
    tls: ssl.SSLContext | None = None,
    timeout_s: float = 30.0,
) -> None:
    """Sends a report on an association of our own, in the provider's role (PS3.4 J.3.3).

    Raises:
        LinkError: the peer cannot be reached, does not take the role, or answers with a failure.
    """
    from pynetdicom import AE, build_role

    ae = AE(ae_title=our_ae)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = ae.connection_timeout = timeout_s
    ae.add_requested_context(STORAGE_COMMITMENT)
    association = ae.associate(
        host,
        port,
        ae_title=ae_title,
        ext_neg=[build_role(STORAGE_COMMITMENT, scu_role=False, scp_role=True)],
        tls_args=(tls, host) if tls else None,
    )
    if not association.is_established:
        raise LinkError(f"{ae_title} at {host}:{port} takes no storage commitment report.")
    try:
        status, _ = association.send_n_event_report(
            _dataset(report), report.event, STORAGE_COMMITMENT, WELL_KNOWN_INSTANCE
        )
    except (ValueError, RuntimeError) as exc:
        raise LinkError(f"{ae_title} does not take the report: {str(exc)[:200]}") from exc
    finally:
        association.release()
    if "Status" not in status or int(status.Status) != SUCCESS:
        raise LinkError(f"{ae_title} answered the report with a failure.")


def _dataset(report: Report) -> Dataset:
    dataset = Dataset()
    dataset.TransactionUID = report.transaction
    if report.failed:
        dataset.FailedSOPSequence = [_reference(*one) for one in report.failed]
    if report.safe:
        dataset.ReferencedSOPSequence = [_reference(*one) for one in report.safe]
    return dataset


def _reference(sop_class: str, instance: str, reason: int = 0) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, instance
    if reason:
        item.FailureReason = reason
    return item


def _whole(spool: Spool, file: str, size: int) -> bool:
    try:
        return (spool.folder / file).stat().st_size == size
    except OSError:
        return False
