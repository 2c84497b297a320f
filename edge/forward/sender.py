"""One destination's sender: a thread, an association a batch, and a pause of its own when the peer is away."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from edge.forward.peer import Peer, association
from edge.forward.queue import BEGUN, Queue, Waiting
from edge.forward.schedule import CRASH_AFTER, CUT_AFTER, Breaker, Verdict, delay, judge
from edge.forward.store import NotTakenError, contexts_for, send_file
from shared.clock import Clock
from shared.errors import LinkError, RadfleetError, StateError
from shared.log import get_logger

BATCH = 32
_IDLE_S = 1.0
_STOP_S = 15.0
_GONE_CURE = "The spool's file is gone; send the object again."


class Sender:
    """Sends one destination's queue; nothing expires, a peer that is away is asked ever more seldom.

    An object that was sent and not yet marked when the process died is sent again: same UID, same bytes, so the peer
    has one object. `random_unit` gives numbers 0..1.
    """

    def __init__(
        self,
        queue: Queue,
        peer: Peer,
        *,
        spool: Path,
        scratch: Path,
        ours: str,
        clock: Clock,
        random_unit: Callable[[], float],
    ) -> None:
        """Takes the queue, whom to send to, the folders of spool and transcoded copies, and our AE title."""
        self._queue = queue
        self._peer = peer
        self._spool = spool
        self._scratch = scratch
        self._ours = ours
        self._clock = clock
        self._random_unit = random_unit
        self._breaker = Breaker(random_unit)
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Sends in a thread until `stop`."""
        self._thread = threading.Thread(target=self._run, name=f"forward-{self._peer.name}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the object it is at; what is not sent stays queued."""
        self._stopping.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(_STOP_S)

    def wake(self, *, at_once: bool = False) -> None:
        """Something new waits; `at_once` ends a pause, because a person asked."""
        if at_once:
            self._breaker.try_now()
        self._wake.set()

    def step(self) -> int:
        """Sends one batch of what is due and returns how many objects have left the queue.

        Raises:
            StateError: our database failed.
        """
        if not self._breaker.closed(self._clock.monotonic()):
            return 0
        rows = self._queue.due(self._peer.name, self._now(), BATCH)
        if not rows:
            return 0
        verdicts: list[tuple[Waiting, Verdict, float]] = []
        try:
            self._send(rows, verdicts)
            self._breaker.worked()
            self._queue.link(self._peer.name, "", "", self._now())
        except LinkError as exc:
            wait = self._breaker.failed(self._clock.monotonic())
            self._queue.link(self._peer.name, exc.message, exc.cure, self._now())
            get_logger().warning(
                "forward.away", destination=self._peer.name, error=exc.message, cure=exc.cure, again_in_s=round(wait, 1)
            )
        finally:
            self._queue.settle(verdicts, self._now())
        return sum(verdict.state != "waiting" for _, verdict, _ in verdicts)

    def _send(self, rows: list[Waiting], verdicts: list[tuple[Waiting, Verdict, float]]) -> None:
        """Appends to `verdicts` what became of each row; LinkError ends the batch."""
        contexts = contexts_for((row.sop_class, row.transfer_syntax) for row in rows)
        with association(self._peer, contexts, ours=self._ours) as found:
            for message, row in enumerate(rows, 1):
                if self._stopping.is_set():
                    return
                try:
                    verdict = self._one(found, row, message)
                except LinkError as exc:
                    verdicts.append(self._timed(row, _cut(row, exc)))
                    raise
                except StateError:
                    raise
                except Exception as exc:  # a defect that one object found: it must not hold up the others for ever
                    error = LinkError(f"Sending failed with {type(exc).__name__}.", cure="Report it with the log.")
                    verdicts.append(self._timed(row, _cut(row, error)))
                    raise error from exc
                verdicts.append(self._timed(row, verdict))
                if verdict.busy:
                    raise LinkError(f"{self._peer}: {verdict.error}.", cure=verdict.cure)

    def _one(self, found: object, row: Waiting, message: int) -> Verdict:
        if row.last_error == BEGUN and row.tries >= CRASH_AFTER:
            return Verdict(
                "dead", f"transcoding ended the process {row.tries} times", "Allow its transfer syntax there."
            )
        path = self._spool / row.file
        if not path.exists():
            return Verdict("dead", "its bytes are not in the spool any more", _GONE_CURE)
        try:
            status = send_file(
                found,
                path,
                (row.sop_class, row.transfer_syntax),
                length=row.length,
                message=message,
                scratch=self._scratch,
                priority=row.priority,
                transcoding=lambda: self._queue.begin(row),
            )
        except NotTakenError as exc:
            return Verdict("dead", exc.message, exc.cure)
        except StateError as exc:
            return Verdict("dead", exc.message, exc.cure or _GONE_CURE)
        return judge(status, row.tries)

    def _timed(self, row: Waiting, verdict: Verdict) -> tuple[Waiting, Verdict, float]:
        if verdict.state == "dead":
            get_logger().error(
                "forward.dead",
                destination=self._peer.name,
                object=row.file[:12],
                error=verdict.error,
                cure=verdict.cure,
            )
        return row, verdict, self._now() + delay(row.tries + 1, self._random_unit)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                if self.step():
                    continue
            except Exception as exc:  # noqa: BLE001 a thread that ends would stop this destination in silence
                error = exc.message if isinstance(exc, RadfleetError) else type(exc).__name__
                get_logger().error("forward.sender_failed", destination=self._peer.name, error=error)
            self._wake.wait(_IDLE_S)

    def _now(self) -> float:
        return self._clock.now().timestamp()


def _cut(row: Waiting, exc: LinkError) -> Verdict:
    """The object at which an association ended waits, so that others go first; one that always ends it is given up."""
    if row.tries + 1 < CUT_AFTER:
        return Verdict("waiting", exc.message, exc.cure)
    return Verdict("dead", f"the association ended {CUT_AFTER} times while it was sent: {exc.message}", exc.cure)
