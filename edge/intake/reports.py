"""Storage Commitment reports that no association is left for: sent on one of our own, retried, given up visibly."""

from __future__ import annotations

import threading
from collections.abc import Callable

from edge.intake.commitment import Commitments, Due, Report, send_report
from edge.intake.peers import AllowList
from edge.intake.tls import Tls
from shared.clock import Clock
from shared.errors import LinkError, RadfleetError
from shared.log import get_logger

_LOOK_S = 5.0

Send = Callable[[Report, str, str, int], None]  # report, AE title, host, port; raises LinkError


class Reports:
    """Sends what is due, in a thread of its own: a peer that hangs holds up nobody."""

    def __init__(self, commitments: Commitments, allow: AllowList, *, send: Send, clock: Clock) -> None:
        self._commitments = commitments
        self._allow = allow
        self._send = send
        self._clock = clock
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="commitment-reports", daemon=True)

    def start(self) -> None:
        """Begins to look for due reports."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; what is due stays due."""
        self._stop.set()
        self._thread.join(5.0)

    def step(self) -> int:
        """Sends what is due now and returns how many reports were taken.

        Raises:
            StateError: the index failed.
        """
        taken = 0
        for due in self._commitments.due(self._clock.now().timestamp()):
            try:
                self._send_one(due)
            except LinkError as exc:
                self._failed(due, str(exc))
                continue
            except Exception as exc:  # noqa: BLE001 one odd request must not stop the reports of all others
                self._failed(due, f"The report could not be sent: {type(exc).__name__}.")
                continue
            self._commitments.mark(due.report.transaction, due.ae_title, "taken")
            taken += 1
        return taken

    def _send_one(self, due: Due) -> None:
        peer = self._allow.find(due.ae_title, due.address)
        if peer is None or not peer.port:
            raise LinkError(f"Nobody knows where {due.ae_title} listens.", cure="Set port at its entry of dicom.allow.")
        self._send(due.report, due.ae_title, due.address, peer.port)

    def _failed(self, due: Due, error: str) -> None:
        get_logger().warning("intake.report_failed", calling_ae=due.ae_title, tries=due.tries, error=error)
        self._commitments.failed(due, error)

    def _run(self) -> None:
        while not self._stop.wait(_LOOK_S):
            try:
                self.step()
            except RadfleetError as exc:
                get_logger().error("intake.reports_failed", error=exc.message)


def sender(our_ae: str, tls: Tls | None = None) -> Send:
    """Returns the function that sends a report under our AE title, over TLS where there is one."""
    return lambda report, ae_title, host, port: send_report(
        report, our_ae=our_ae, ae_title=ae_title, host=host, port=port, tls=tls.calling() if tls else None
    )
