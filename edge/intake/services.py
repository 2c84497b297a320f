"""What the door does with the messages of one association: verification, storage, storage commitment."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable

from pydicom.uid import UID

from edge.intake import pdu
from edge.intake.association import Negotiated, Waits
from edge.intake.commitment import Commitments
from edge.intake.index import Visit
from edge.intake.meta import IMPLEMENTATION_NAME, IMPLEMENTATION_UID
from edge.intake.part import Arriving, Part, RefusedError
from edge.intake.pdu import Accepted, Command, Request
from edge.intake.peers import PEER_ASSOCIATIONS, AllowList, Peer
from edge.intake.spool import Spool
from edge.intake.status import KEPT, STATUS, Outcome
from edge.intake.syntaxes import STORAGE_COMMITMENT, VERIFICATION, negotiate
from shared.clock import Clock
from shared.errors import RadfleetError, RoomError
from shared.log import get_logger

FULL = 0.97  # of the spool's room: no new association, those that are open may finish

# PS3.8 table 9-21: result, source, reason
NOT_THIS_CALLED_AE = (1, 1, 7)
NOT_THIS_CALLING_AE = (1, 1, 3)
NOT_THIS_APPLICATION = (1, 1, 2)
NOT_THIS_PROTOCOL = (1, 2, 2)
TOO_MANY = (2, 3, 2)  # transient: local limit exceeded
CONGESTED = (2, 3, 1)  # transient: temporary congestion

# PS3.4 B.3.1: storage level 2 (everything is kept), signatures level 3 (bit preserving), nothing is coerced
EXTENDED_ANSWER = bytes((2, 0, 3, 0, 0, 0))
UNRECOGNIZED_OPERATION = 0x0211  # PS3.7 annex C.5.22
_PACE_LONGEST_S = 30.0  # below what senders wait for an answer
_SLOW_BYTES_PER_S = 100_000
_SLOW_AFTER_S = 20.0
_NAGLE_AFTER = 8  # messages
NAGLE = (
    "Its messages stand still for 40 ms and more in the middle: Nagle's algorithm at the sender. "
    "Cure: set TCP_NODELAY=1 in the environment of a DCMTK sender, or its equivalent."
)
SLOW = "It sends less than 100 kB a second. Cure: look at the network between it and this node."

Message = tuple[bytes, bytes]


class Room:
    """What all associations of the door share."""

    def __init__(
        self,
        *,
        spool: Spool,
        ae_title: str,
        allow: AllowList,
        storage: frozenset[str],
        syntaxes: tuple[str, ...],
        nudge: Callable[[], None],
        clock: Clock,
        limit: int,
    ) -> None:
        self.spool = spool
        self.ae_title = ae_title
        self.allow = allow
        self.storage = storage
        self.syntaxes = syntaxes
        self.nudge = nudge
        self.clock = clock
        self.commitments = Commitments(spool, clock)
        self._limit = limit
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}
        self._open: dict[tuple[str, ...], int] = {}
        self._ready_at: dict[tuple[str, ...], float] = {}

    def count(self, name: str) -> None:
        """Adds one to a counter of this process."""
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + 1

    def counts(self) -> dict[str, int]:
        """Returns the counters of this process."""
        with self._lock:
            return dict(self._counts)

    def enter(self, peer: Peer, address: str) -> bool:
        """Takes a slot for a negotiated association; False when this entry of the allow-list, this address or the door
        has none left. Other titles from one address do not help."""
        limits = {_entry(peer): peer.associations, (address,): PEER_ASSOCIATIONS, (): self._limit}
        with self._lock:
            if any(self._open.get(who, 0) >= limit for who, limit in limits.items()):
                return False
            for who in limits:
                self._open[who] = self._open.get(who, 0) + 1
            return True

    def leave(self, peer: Peer, address: str) -> None:
        """Gives the slot back."""
        with self._lock:
            for who in (_entry(peer), (address,), ()):
                self._open[who] -= 1
                if not self._open[who]:
                    del self._open[who]

    def pace(self, peer: Peer) -> float:
        """Returns how many seconds the next object of an entry of the allow-list must wait, and takes its turn."""
        if not peer.objects_per_second:
            return 0.0
        now = self.clock.monotonic()
        with self._lock:
            ready_at = max(now, self._ready_at.get(_entry(peer), 0.0))
            self._ready_at[_entry(peer)] = ready_at + 1.0 / peer.objects_per_second
        return ready_at - now


class Visitor:
    """The services of one association (edge.intake.association.Services)."""

    def __init__(self, room: Room, address: str, *, welcomed: Callable[[], None]) -> None:
        """`welcomed` is called when the association is accepted."""
        self._room = room
        self._address = address
        self._welcomed = welcomed
        self._peer: Peer | None = None
        self._calling_ae = ""
        self._called_ae = ""
        self._name = secrets.token_hex(8)
        self._visit: Visit | None = None

    def negotiate(self, request: Request) -> Negotiated | tuple[int, int, int]:
        """See `Services.negotiate`."""
        room, self._calling_ae, self._called_ae = self._room, request.calling_ae[:16], request.called_ae[:16]
        wrong = _wrong_address(request, room.ae_title)
        if wrong:
            if wrong[1] == NOT_THIS_CALLED_AE:
                self._note_caller(request)  # on installation day this is the mistake to look for
            return self._reject(*wrong)
        peer = room.allow.find(request.calling_ae, self._address)
        if peer is None:
            self._note_caller(request)
            return self._reject("rejected", NOT_THIS_CALLING_AE)
        if room.spool.fullness() >= FULL:
            return self._reject("congested", CONGESTED)
        if not room.enter(peer, self._address):
            return self._reject("too_many", TOO_MANY)
        self._peer = peer
        self._visit = Visit(self._calling_ae, self._address)
        self._welcomed()
        room.count("associations")
        accepted = negotiate(request.contexts, room.storage, room.syntaxes)
        taken = {one.abstract_syntax for one in accepted if one.result == 0}
        return Negotiated(
            contexts=accepted,
            roles=tuple((uid, scu, False) for uid, scu, _ in request.roles if uid in taken),
            extended={uid: EXTENDED_ANSWER for uid in request.extended if uid in taken and uid in room.storage},
            class_uid=IMPLEMENTATION_UID,
            version=IMPLEMENTATION_NAME,
        )

    def message(self, command: Command, context: Accepted) -> Arrival | Plain | Gathered:
        """See `Services.message`."""
        field = command.number(pdu.FIELD)
        if field == pdu.C_STORE_RQ and context.abstract_syntax in self._room.storage:
            self._pace()
            return Arrival(self, command, context)
        if field == pdu.C_ECHO_RQ and context.abstract_syntax == VERIFICATION:
            if self._visit:
                self._visit.echoed = True
            self._room.count("echoes")
            return Plain([_response(command, 0x0000)])
        if field == pdu.N_ACTION_RQ and context.abstract_syntax == STORAGE_COMMITMENT:
            return Gathered(lambda data: self._commit(command, context, data))
        if field == pdu.N_EVENT_REPORT_RQ | pdu.RESPONSE:
            return Plain([], lambda: self._room.commitments.taken(self._name, command))
        if field & pdu.RESPONSE or field == pdu.C_CANCEL_RQ:
            return Plain([])
        self._room.count("unrecognized")
        return Plain([_response(command, UNRECOGNIZED_OPERATION)])

    def left(self, how: str, waits: Waits) -> None:
        """The association is over: its slot is free, what it did is on record."""
        self._room.count(f"ended_{how}")
        if self._peer is None or self._visit is None:
            return
        self._room.leave(self._peer, self._address)
        self._visit.bytes = waits.bytes
        self._visit.note = _note(waits)
        if self._visit.note:
            get_logger().warning("intake.slow_peer", calling_ae=self._calling_ae, note=self._visit.note)
        try:
            self._room.commitments.association_over(self._name)
            self._room.spool.association_ended(self._name, self._visit)
        except RadfleetError as exc:  # only hints are lost: quiet time completes the series, a report waits its turn
            get_logger().warning("intake.hint_lost", error=exc.message)
        self._room.nudge()

    def begin(self, command: Command, context: Accepted) -> Part:
        """Returns the part for one C-STORE."""
        return self._room.spool.begin(
            Arriving(
                sop_class=command.uid(pdu.AFFECTED_CLASS),
                sop_instance=command.uid(pdu.AFFECTED_INSTANCE),
                transfer_syntax=context.transfer_syntax,
                calling_ae=self._calling_ae,
                called_ae=self._called_ae,
                address=self._address,
                association=self._name,
                limit_bytes=self._peer.object_limit_bytes if self._peer else 0,
                negotiated=context.abstract_syntax,
            )
        )

    def store(self, part: Part) -> Outcome:
        """Makes one object durable."""
        return self._room.spool.finish(part)

    def stored(self, outcome: Outcome) -> None:
        """Counts an outcome and wakes the next stage."""
        self._room.count(outcome.value)
        if outcome in KEPT:
            if self._visit:
                self._visit.objects += 1
            self._room.nudge()
        else:
            self._room.spool.count(outcome)

    def _commit(self, command: Command, context: Accepted, data: bytes) -> list[Message]:
        status, report = self._room.commitments.asked(
            command, data, context.transfer_syntax, self._calling_ae, self._address, self._name
        )
        return [_response(command, status), *report]

    def _reject(self, name: str, why: tuple[int, int, int]) -> tuple[int, int, int]:
        self._room.count(name)
        get_logger().warning("intake.rejected", calling_ae=self._calling_ae, address=self._address, why=name)
        return why

    def _note_caller(self, request: Request) -> None:
        names = ", ".join(dict.fromkeys(UID(one.abstract_syntax).name for one in request.contexts[:3]))
        proposed = f"{len(request.contexts)} contexts: {names}; {request.implementation}"[:300]
        try:
            self._room.spool.index.caller(
                self._calling_ae, self._address, self._called_ae, proposed, self._room.clock.now().timestamp()
            )
        except RadfleetError as exc:
            get_logger().warning("intake.caller_not_noted", error=exc.message)

    def _pace(self) -> None:
        """Slows a sender that is faster than its limit: it waits for its answers, nobody else does."""
        wait = self._room.pace(self._peer) if self._peer else 0.0
        if wait > 0:
            threading.Event().wait(min(_PACE_LONGEST_S, wait))


class Arrival:
    """The data set of one C-STORE, written to the spool fragment by fragment; its one answer whatever happens."""

    def __init__(self, visitor: Visitor, command: Command, context: Accepted) -> None:
        self._visitor = visitor
        self._command = command
        self._context = context
        self._part: Part | None = None
        self._refused: Outcome | None = None
        self._why = ""

    def write(self, data: memoryview) -> None:
        """See `Sink.write`; after the first fault the rest is dropped."""
        if self._refused is not None:
            return
        try:
            if self._part is None:
                self._part = self._visitor.begin(self._command, self._context)
            self._part.write(data)
        except Exception as exc:  # noqa: BLE001 an unanswered request would hang the sender
            self._refuse(exc)

    def finish(self) -> list[Message]:
        """See `Sink.finish`."""
        outcome = self._refused
        if outcome is None and self._part is None:
            outcome, self._why = Outcome.CUT, "There is no data set."
        if outcome is None and self._part is not None:
            try:
                outcome = self._visitor.store(self._part)
            except Exception as exc:  # noqa: BLE001 see above
                self._refuse(exc)
                outcome = self._refused
        outcome = outcome or Outcome.FAULT
        try:
            self._visitor.stored(outcome)
        except RadfleetError as exc:
            get_logger().warning("intake.count_failed", error=exc.message)
        return [_response(self._command, STATUS[outcome], "" if outcome in KEPT else self._why)]

    def give_up(self) -> None:
        """See `Sink.give_up`."""
        if self._part is not None:
            self._part.discard()

    def _refuse(self, exc: Exception) -> None:
        if isinstance(exc, RefusedError):
            self._refused, self._why = exc.outcome, exc.message
            get_logger().warning("intake.refused", outcome=exc.outcome.value, reason=exc.message)
        elif isinstance(exc, RadfleetError):
            self._refused = Outcome.NO_ROOM if isinstance(exc, RoomError) else Outcome.FAULT
            self._why = "No room left." if isinstance(exc, RoomError) else "The disk failed."
            get_logger().error("intake.not_stored", error=exc.message, cure=exc.cure)
        else:
            self._refused = Outcome.FAULT
            get_logger().error("intake.fault", error=type(exc).__name__)  # the message may quote the data set
        if self._part is not None:
            self._part.discard()


class Plain:
    """A message without a data set that matters: its answer is known."""

    def __init__(self, answer: list[Message], then: Callable[[], None] | None = None) -> None:
        self._answer = answer
        self._then = then

    def write(self, data: memoryview) -> None:
        """Drops it."""

    def finish(self) -> list[Message]:
        """See `Sink.finish`."""
        if self._then:
            self._then()
        return self._answer

    def give_up(self) -> None:
        """Nothing to give up."""


class Gathered:
    """A small data set, gathered in memory up to a limit and handed over whole."""

    LIMIT_BYTES = 8 * 1024 * 1024

    def __init__(self, answer: Callable[[bytes], list[Message]]) -> None:
        self._answer = answer
        self._data = bytearray()

    def write(self, data: memoryview) -> None:
        """Takes a fragment; what goes beyond the limit is dropped and makes the data set unreadable."""
        if len(self._data) <= self.LIMIT_BYTES:
            self._data += data

    def finish(self) -> list[Message]:
        """See `Sink.finish`."""
        return self._answer(bytes(self._data) if len(self._data) <= self.LIMIT_BYTES else b"")

    def give_up(self) -> None:
        """Nothing to give up."""


def _entry(peer: Peer) -> tuple[str, str]:
    return peer.ae_title, peer.address or "any"


def _wrong_address(request: Request, ae_title: str) -> tuple[str, tuple[int, int, int]] | None:
    """Returns the name and the numbers of the rejection of a request that is not for us, whoever calls."""
    if not request.protocol & 1:
        return "wrong_protocol", NOT_THIS_PROTOCOL
    if request.application != pdu.APPLICATION_CONTEXT:
        return "wrong_application", NOT_THIS_APPLICATION
    if request.called_ae != ae_title:
        return "wrong_called_ae", NOT_THIS_CALLED_AE
    return None


def _response(command: Command, status: int, why: str = "") -> Message:
    """The response to a request: its own identifiers, the status, and a comment for whoever reads the sender's log."""
    sop_class = command.uid(pdu.AFFECTED_CLASS) or command.uid(pdu.REQUESTED_CLASS)
    instance = command.uid(pdu.AFFECTED_INSTANCE) or command.uid(pdu.REQUESTED_INSTANCE)
    elements: dict[int, int | str] = {
        pdu.FIELD: (command.number(pdu.FIELD) | pdu.RESPONSE) & 0xFFFF,
        pdu.RESPONDED_ID: max(0, command.number(pdu.MESSAGE_ID)),
        pdu.DATA_SET_TYPE: pdu.NO_DATA_SET,
        pdu.STATUS: status,
    }
    if sop_class:
        elements[pdu.AFFECTED_CLASS] = sop_class[:64]
    if instance:
        elements[pdu.AFFECTED_INSTANCE] = instance[:64]
    if why:
        elements[pdu.ERROR_COMMENT] = why[:64]
    return pdu.command_set(elements), b""


def _note(waits: Waits) -> str:
    if waits.messages >= _NAGLE_AFTER and waits.stalled * 2 > waits.messages:
        return NAGLE
    if waits.reading_s > _SLOW_AFTER_S and waits.bytes < waits.reading_s * _SLOW_BYTES_PER_S:
        return SLOW
    return ""
