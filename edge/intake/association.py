"""One DICOM association from its first byte to its last, as acceptor: PS3.8's state machine in one thread.

The thread reads a PDU into one buffer that it keeps, hands each fragment on from there, and answers before it reads
on: no queues, no polling, and no more memory than the buffer, however large the object. What is done with a message
is the service's business (`Services`); how the bytes travel is this file's.
"""

from __future__ import annotations

import contextlib
import math
import socket
from collections.abc import Mapping
from typing import Protocol

from msgspec import Struct

from edge.intake import pdu
from edge.intake.pdu import Accepted, Command, PduError, Request
from shared.clock import Clock

MAX_PDU_BYTES = 128 * 1024
_COMMAND_LIMIT_BYTES = 64 * 1024
_COARSE_S = 5.0  # longer waits are rounded up to whole seconds
_PARTING_S = 2.0  # how long the peer may take to hang up after the last word
_STALL_S = (0.03, 0.25)  # a wait of this length inside a message is Nagle's algorithm meeting a delayed acknowledgement


class Sink(Protocol):
    """Takes the data set of one message."""

    def write(self, data: memoryview) -> None:
        """Takes a fragment, valid during the call only; never raises."""

    def finish(self) -> list[tuple[bytes, bytes]]:
        """Returns what to send when the data set is whole: (command set, data set or nothing); never raises."""

    def give_up(self) -> None:
        """Is told instead that the association ended in the middle."""


class Services(Protocol):
    """What an acceptor does with messages (edge.intake.door)."""

    def negotiate(self, request: Request) -> Negotiated | tuple[int, int, int]:
        """Returns what is accepted, or result, source and reason of the rejection (PS3.8 table 9-21)."""

    def message(self, command: Command, context: Accepted) -> Sink:
        """Returns the sink for a message; for one without a data set `finish` is called at once."""


class Negotiated(Struct, frozen=True):
    """The acceptor's part of the negotiation."""

    contexts: tuple[Accepted, ...]
    roles: tuple[tuple[str, bool, bool], ...]
    extended: Mapping[str, bytes]
    class_uid: str
    version: str


class Waits(Struct):
    """Where the time of an association went, as far as the peer is to blame."""

    messages: int = 0
    stalled: int = 0  # messages with a wait that looks like Nagle's algorithm
    reading_s: float = 0.0  # waiting for bytes in the middle of messages
    bytes: int = 0


class PeerGoneError(Exception):
    """The connection ended or stood still; `how` says it in a word for the log."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.how = how


class Association:
    """See the module's docstring. `serve` runs in the connection's own thread; `close` may come from any."""

    def __init__(self, sock: socket.socket, services: Services, *, clock: Clock, artim_s: float, idle_s: float) -> None:
        self.waits = Waits()
        self._sock = sock
        self._patience_s = -1.0  # the socket's timeout
        self._services = services
        self._now = clock.monotonic
        self._artim_s = artim_s
        self._idle_s = idle_s
        self._buffer = bytearray(pdu.HEADER_BYTES + 4096)  # grows once it is known who calls
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._max_send = 0
        self._contexts: dict[int, Accepted] = {}
        self._context_id = 0  # of the message that is arriving, as are the three that follow
        self._command = bytearray()
        self._sink: Sink | None = None
        self._waited = 0.0

    def serve(self) -> str:
        """Runs the association and returns how it ended: rejected, released, aborted, lost, silent or protocol."""
        try:
            return self._negotiate() or self._converse()
        except PeerGoneError as exc:
            return exc.how
        except PduError as exc:
            self._say(pdu.abort(exc.reason))
            return "protocol"
        finally:
            if self._sink is not None:
                self._sink.give_up()

    def close(self) -> None:
        """Ends the connection: an abort if the peer is there to hear it."""
        self._say(pdu.abort(0))
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _negotiate(self) -> str:
        """Answers the request; returns "rejected" when that was the end."""
        kind, body = self._read_pdu(pdu.MAX_REQUEST_BYTES, self._now() + self._artim_s)
        if kind != pdu.ASSOCIATE_RQ:
            raise PduError("The connection does not begin with an association request.", 2)
        answer = self._services.negotiate(request := pdu.parse_request(body))
        if isinstance(answer, tuple):
            self._say(pdu.associate_reject(*answer))
            self._part()
            return "rejected"
        accept = pdu.associate_accept(
            body,
            answer.contexts,
            max_pdu_bytes=MAX_PDU_BYTES,
            class_uid=answer.class_uid,
            version=answer.version,
            operations=request.operations is not None,
            roles=answer.roles,
            extended=answer.extended,
        )
        self._contexts = {one.context_id: one for one in answer.contexts if one.result == 0}
        self._max_send = request.max_pdu_bytes
        self._send(accept)
        return ""

    def _converse(self) -> str:
        """Takes messages until the association ends, and returns how."""
        self._grow(pdu.HEADER_BYTES + MAX_PDU_BYTES)
        while True:
            before = self._now()
            kind, body = self._read_pdu(MAX_PDU_BYTES, before + self._idle_s)
            if kind == pdu.P_DATA:
                if self._in_message:
                    self._waited = max(self._waited, self._now() - before)
                    self.waits.reading_s += self._now() - before
                self.waits.bytes += len(body)
                for value in pdu.values(body):
                    self._take(*value)
            elif kind == pdu.RELEASE_RQ:
                self._send(pdu.release_response())
                self._part()
                return "released"
            elif kind == pdu.ABORT:
                return "aborted"
            else:
                raise PduError("A PDU comes that has no place in an association.", 2)

    @property
    def _in_message(self) -> bool:
        return bool(self._command) or self._sink is not None

    def _take(self, context_id: int, control: int, fragment: memoryview) -> None:
        """Takes one presentation data value; bit 0 of `control` says command, bit 1 says last (PS3.8 annex E.2)."""
        if not self._in_message:
            self._context_id = context_id
        if context_id != self._context_id or context_id not in self._contexts:
            raise PduError("A message uses a presentation context that was not accepted for it.")
        if control & 1:
            if self._sink is not None or len(self._command) + len(fragment) > _COMMAND_LIMIT_BYTES:
                raise PduError("A command set comes where none is expected, or is too long.")
            self._command += fragment
            if control & 2:
                command = pdu.parse_command(bytes(self._command))
                self._command.clear()
                self._sink = self._services.message(command, self._contexts[context_id])
                if command.number(pdu.DATA_SET_TYPE) == pdu.NO_DATA_SET:
                    self._answer()
        elif self._sink is None:
            raise PduError("A data set comes without its command.")
        else:
            self._sink.write(fragment)
            if control & 2:
                self._answer()

    def _answer(self) -> None:
        """Sends the one answer of a message."""
        sink, self._sink = self._sink, None
        out = b""
        for command, data in sink.finish() if sink else ():
            out += pdu.data_pdus(self._context_id, command, command=True, max_pdu_bytes=self._max_send)
            if data:
                out += pdu.data_pdus(self._context_id, data, command=False, max_pdu_bytes=self._max_send)
        if out:
            self._send(out)
        self.waits.messages += 1
        self.waits.stalled += _STALL_S[0] <= self._waited <= _STALL_S[1]
        self._waited = 0.0

    def _read_pdu(self, limit: int, deadline: float) -> tuple[int, memoryview]:
        """Returns type and body of the next PDU, valid until the next call.

        Raises:
            PduError: longer than `limit`, or of no known type.
            PeerGoneError: the peer hung up, or the PDU is not there at `deadline` (monotonic seconds).
        """
        self._need(pdu.HEADER_BYTES, deadline)
        kind = self._buffer[self._start]
        length = int.from_bytes(self._view[self._start + 2 : self._start + 6], "big")
        if not pdu.ASSOCIATE_RQ <= kind <= pdu.ABORT:
            raise PduError("The PDU is of no known type.", 1)
        if length > limit:
            raise PduError(f"A PDU has {length} bytes, {limit} are allowed.")
        self._grow(pdu.HEADER_BYTES + length)
        self._need(pdu.HEADER_BYTES + length, deadline)
        at = self._start + pdu.HEADER_BYTES
        self._start = at + length
        return kind, self._view[at : self._start]

    def _need(self, count: int, deadline: float) -> None:
        """Reads until `count` bytes stand in the buffer from `_start` on."""
        if self._end - self._start >= count:
            return
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start + count > len(self._buffer):
            rest = self._end - self._start
            self._view[:rest] = bytes(self._view[self._start : self._end])
            self._start, self._end = 0, rest
        while self._end - self._start < count:
            self._receive(deadline)

    def _receive(self, deadline: float) -> None:
        """Takes whatever has arrived behind what is there already, or waits for it."""
        left = deadline - self._now()
        if left <= 0:
            raise PeerGoneError("silent")
        try:
            # Whole seconds where it does not matter, so that the timeout is set once and not for every message.
            self._be_patient(math.ceil(left) if left > _COARSE_S else left)
            got = self._sock.recv_into(self._view[self._end :])
            # The kernel forgets it after a while; without it a sender with Nagle's algorithm on waits 40 ms.
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        except TimeoutError as exc:
            raise PeerGoneError("silent") from exc
        except (OSError, ValueError) as exc:  # ValueError: closed by another thread
            raise PeerGoneError("lost") from exc
        if not got:
            raise PeerGoneError("lost")
        self._end += got

    def _grow(self, size: int) -> None:
        if len(self._buffer) < size:
            larger = bytearray(size)
            rest = self._end - self._start
            larger[:rest] = self._view[self._start : self._end]
            self._buffer, self._view = larger, memoryview(larger)
            self._start, self._end = 0, rest

    def _send(self, data: bytes) -> None:
        try:
            self._be_patient(math.ceil(self._idle_s) if self._idle_s > _COARSE_S else self._idle_s)
            self._sock.sendall(data)
        except (OSError, ValueError) as exc:
            raise PeerGoneError("lost") from exc

    def _be_patient(self, seconds: float) -> None:
        if seconds != self._patience_s:
            self._sock.settimeout(seconds)
            self._patience_s = seconds

    def _say(self, data: bytes) -> None:
        """Sends what nobody needs to hear."""
        with contextlib.suppress(OSError, ValueError):
            self._sock.settimeout(_PARTING_S)
            self._sock.sendall(data)

    def _part(self) -> None:
        """Leaves it to the peer to close, for a moment (PS3.8 state 13)."""
        with contextlib.suppress(OSError, ValueError):
            self._sock.settimeout(_PARTING_S)
            self._sock.recv(64)
