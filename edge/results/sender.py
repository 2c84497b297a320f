"""Delivery to the PACS: C-STORE as SCU, one association a batch, with a schedule that survives a restart."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
from msgspec import Struct
from pynetdicom import AE

from edge.results.tables import SCHEMA, SCHEMA_VERSION
from edge.sqlite import open_owned, transaction
from shared.clock import Clock
from shared.errors import LinkError, RadfleetError
from shared.log import get_logger

BATCH = 32
BACKOFF_BASE_S = 1.0
BACKOFF_CAP_S = 600.0
_CONNECT_S = 10.0
_ANSWER_S = 30.0
_IDLE_S = 1.0
_DUPLICATE = 0x0111  # "Duplicate SOP Instance": the PACS has it already, which is what we want


class Pacs(Struct, frozen=True):
    """Where results go."""

    ae_title: str
    host: str
    port: int


class Sender:
    """Sends waiting deliveries of results.sqlite; nothing expires, every failure waits longer, up to ten minutes.

    A delivery that was sent but not yet marked when the process died is sent again: same UID, same bytes,
    so the PACS has one object. `random_unit` gives numbers 0..1 for the full jitter.
    """

    def __init__(
        self, results: Path, pacs: Pacs, *, ae_title: str, clock: Clock, random_unit: Callable[[], float]
    ) -> None:
        self._db = open_owned(results, SCHEMA, SCHEMA_VERSION)
        self._pacs = pacs
        self._ae_title = ae_title
        self._clock = clock
        self._random_unit = random_unit
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._pause_until = 0.0
        self._failures = 0

    def start(self) -> None:
        """Delivers in a thread of its own until `stop`: a PACS that hangs holds up no answer."""
        self._thread = threading.Thread(target=self._run, name="results-sender", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; what is not delivered stays scheduled."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(_CONNECT_S)

    def wake(self) -> None:
        """Something new waits."""
        self._wake.set()

    def step(self) -> int:
        """Sends one batch of what is due and returns how many objects the PACS took.

        Raises:
            StateError: the database failed.
        """
        now = self._clock.now().timestamp()
        if now < self._pause_until:
            return 0
        rows = self._db.execute(
            "SELECT * FROM deliveries WHERE state = 'waiting' AND next_at <= ? ORDER BY next_at LIMIT ?",
            (now, BATCH),
        ).fetchall()
        if not rows:
            return 0
        try:
            sent = self._send(rows)
            self._failures = 0
        except LinkError as exc:
            self._failures += 1
            self._pause_until = now + self._delay(self._failures)
            with transaction(self._db) as db:
                db.executemany(
                    "UPDATE deliveries SET last_error = ? WHERE sop_instance = ?",
                    [(exc.message, row["sop_instance"]) for row in rows],
                )
            get_logger().warning("results.pacs_away", error=exc.message, tries=self._failures)
            sent = 0
        return sent

    def _send(self, rows: Sequence[sqlite3.Row]) -> int:
        """Raises LinkError when the PACS cannot be reached or hangs up; what it took until then is marked."""
        ae = AE(ae_title=self._ae_title)
        ae.connection_timeout = ae.acse_timeout = _CONNECT_S
        ae.dimse_timeout = ae.network_timeout = _ANSWER_S
        for context in sorted({(row["sop_class"], row["transfer_syntax"]) for row in rows}):
            ae.add_requested_context(*context)
        association = ae.associate(self._pacs.host, self._pacs.port, ae_title=self._pacs.ae_title)
        if not association.is_established:
            what = "rejects us" if association.is_rejected else "cannot be reached"
            raise LinkError(f"The PACS {self._pacs.ae_title} at {self._pacs.host}:{self._pacs.port} {what}.")
        sent = 0
        try:
            for row in rows:
                error = _store(association, row)
                self._mark(row, error)
                sent += not error
        finally:
            association.release()
        return sent

    def _mark(self, row: sqlite3.Row, error: str) -> None:
        now = self._clock.now().timestamp()
        tries = row["tries"] + 1
        with transaction(self._db) as db:
            if not error:
                # The bytes can be built again from the answer; a copy of every picture is not kept for
                # ever.
                db.execute(
                    "UPDATE deliveries SET state = 'sent', tries = ?, sent_at = ?, last_error = '', data = x''"
                    " WHERE sop_instance = ?",
                    (tries, now, row["sop_instance"]),
                )
                return
            db.execute(
                "UPDATE deliveries SET tries = ?, next_at = ?, last_error = ? WHERE sop_instance = ?",
                (tries, now + self._delay(tries), error, row["sop_instance"]),
            )
        get_logger().warning("results.not_delivered", kind=row["kind"], tries=tries, error=error)

    def _delay(self, tries: int) -> float:
        return float(min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2.0 ** min(tries, 20)) * self._random_unit())

    def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            try:
                if self.step():
                    continue
            except RadfleetError as exc:
                get_logger().error("results.sender_failed", error=exc.message)
            self._wake.wait(_IDLE_S)
        self._db.close()


def _store(association: Any, row: sqlite3.Row) -> str:
    """Returns why the PACS did not take the object; empty when it did. Raises LinkError when it hung up."""
    try:
        status = association.send_c_store(pydicom.dcmread(BytesIO(row["data"])))
    except (ValueError, RuntimeError, AttributeError) as exc:  # pynetdicom: no accepted context, or hung up
        if not association.is_established:
            raise LinkError("The PACS ended the association.") from exc
        return f"the PACS does not accept {row['kind']}s: {str(exc)[:200]}"
    if "Status" not in status:
        raise LinkError("The PACS did not answer a C-STORE.")
    code = int(status.Status)
    if code in (0x0000, _DUPLICATE) or code & 0xF000 == 0xB000:
        return ""
    return f"the PACS answered 0x{code:04X}"
