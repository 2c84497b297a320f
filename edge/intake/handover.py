"""STOW-RS objects on their way from the web process into the spool: one Unix socket, served by the intake process.

The web process never writes the spool. It opens one connection for each request, hands its objects over one by
one, and gets for each the answer that a C-STORE would have got. On the socket every message is one letter, the
length of its body (four bytes, big endian) and the body:

    B  begin, a msgpack `Arriving`
    D  data, a piece of the data set as received
    E  end of the object
    R  end of an object that the web process refuses, a msgpack (outcome, reason): its bytes go to the quarantine
    A  the answer to E or R, a msgpack `Answer`

A connection that ends inside an object leaves nothing behind; its end is what the end of an association is.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Container
from pathlib import Path

import msgspec
from msgspec import Struct

from edge.intake.index import Visit
from edge.intake.part import Arriving, Part, RefusedError
from edge.intake.spool import Spool
from edge.intake.status import STATUS, Outcome
from edge.nudge import short_name
from shared.errors import LinkError, PeerError, RadfleetError, RoomError
from shared.log import get_logger

PIECE_BYTES = 256 * 1024
MAX_CONNECTIONS = 8
IDLE_S = 120.0  # a connection that says nothing for so long is closed
ANSWER_S = 120.0  # how long the web process waits for the answer to one object

_HEAD = struct.Struct(">cI")
_SHORT_BYTES = 8192  # of a message that is no data; the names in it are short


class Answer(Struct, frozen=True):
    """What became of one object: the standard's status, and for people the outcome and the reason."""

    status: int
    outcome: str
    reason: str = ""

    @property
    def stored(self) -> bool:
        return self.status == 0


class Handover:
    """The intake process's end; `storage` and `syntaxes` are what the DICOM door takes.

    `nudge` is called after an object is durable and after a connection has ended.
    """

    def __init__(
        self,
        path: Path,
        spool: Spool,
        *,
        storage: Container[str],
        syntaxes: Container[str],
        nudge: Callable[[], None],
    ) -> None:
        self._path = path
        self._spool = spool
        self._storage = storage
        self._syntaxes = syntaxes
        self._nudge = nudge
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._listening: socket.socket | None = None
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Starts to listen and returns; the socket can be opened by this user alone."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with short_name(self._path) as name:
            self._listening.bind(name)
        self._path.chmod(0o600)  # before `listen`: nobody was let in yet
        self._listening.listen(MAX_CONNECTIONS)
        threading.Thread(target=self._accept, args=(self._listening,), name="handover", daemon=True).start()

    def stop(self) -> None:
        """Ends listening and every connection; what was answered is on the disk already."""
        with self._lock:
            ending = [*self._open, *([self._listening] if self._listening else [])]
        for one in ending:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        if self._listening is not None:
            self._listening.close()
            self._listening = None

    def _accept(self, listening: socket.socket) -> None:
        while True:
            self._places.acquire()
            try:
                connection, _ = listening.accept()
            except OSError:  # `stop` closed it
                self._places.release()
                return
            try:
                threading.Thread(target=self._converse, args=(connection,), name="handover", daemon=True).start()
            except RuntimeError as exc:  # no thread left: this request goes, the socket stays
                get_logger().error("intake.no_thread", error=str(exc))
                connection.close()
                self._places.release()

    def _converse(self, connection: socket.socket) -> None:
        visits: dict[str, Visit] = {}
        connection.settimeout(IDLE_S)
        with self._lock:
            self._open.add(connection)
        try:
            while (arriving := _read_begin(connection)) is not None:
                visit = visits.setdefault(arriving.association, Visit(arriving.calling_ae, arriving.address))
                answer = self._take(connection, arriving, visit)
                if answer.stored:
                    visit.objects += 1
                    self._nudge()
                _send(connection, b"A", msgspec.msgpack.encode(answer))
        except (OSError, PeerError) as exc:
            get_logger().warning("intake.handover_ended", error=type(exc).__name__)
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()
            self._places.release()
            self._ended(visits)

    def _take(self, connection: socket.socket, arriving: Arriving, visit: Visit) -> Answer:
        """Reads one object to its end and returns its one answer."""
        answer: Answer | None = None  # where there is no room: the rest is read and dropped
        part: Part | None = None
        try:
            while (step := _read_step(connection))[0] == b"D":
                visit.bytes += len(step[1])
                if answer is not None:
                    continue
                try:
                    part = part or self._spool.begin(arriving)
                    part.write(step[1])
                except RadfleetError as exc:
                    answer = self._refused(exc)
            refused = _refusal(step[1]) if step[0] == b"R" else self._not_negotiable(arriving)
        except BaseException:
            if part is not None:
                part.discard()
            raise
        return answer or self._finish(arriving, part, refused)

    def _not_negotiable(self, arriving: Arriving) -> RefusedError | None:
        """Refuses what the DICOM door would refuse in the negotiation of presentation contexts."""
        if arriving.sop_class not in self._storage:
            return RefusedError(Outcome.CLASS_UNKNOWN, "The SOP class is no storage class that is known here.")
        if arriving.transfer_syntax not in self._syntaxes:
            return RefusedError(Outcome.SYNTAX_UNKNOWN, "The transfer syntax is not known here.")
        return None

    def _finish(self, arriving: Arriving, part: Part | None, refused: RefusedError | None) -> Answer:
        try:
            part = part or self._spool.begin(arriving)  # an empty one
            if refused is not None:
                self._spool.refuse(part, refused)
                part.discard()
                return self._refused(refused)
            outcome = self._spool.finish(part)
        except RadfleetError as exc:
            return self._refused(exc)
        except Exception as exc:  # noqa: BLE001 an object without an answer would be sent again and again
            get_logger().error("intake.fault", error=type(exc).__name__)  # the message may quote the data set
            outcome = Outcome.FAULT
        return Answer(STATUS[outcome], outcome.value)

    def _refused(self, exc: RadfleetError) -> Answer:
        get_logger().warning("intake.refused", reason=exc.message, by="handover")
        outcome = Outcome.NO_ROOM if isinstance(exc, RoomError) else Outcome.FAULT
        if isinstance(exc, RefusedError):
            outcome = exc.outcome
        self._spool.count(outcome)
        return Answer(STATUS[outcome], outcome.value, exc.message)

    def _ended(self, visits: dict[str, Visit]) -> None:
        for association, visit in visits.items():
            try:
                self._spool.association_ended(association, visit)
            except RadfleetError as exc:  # only a hint is lost: quiet time completes the series
                get_logger().warning("intake.hint_lost", error=exc.message)
        self._nudge()


class Handing:
    """The web process's end of one connection; used by one task, object after object.

    Every method raises LinkError when the intake process is away or ends in between: what was not answered is
    not stored.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, path: Path) -> Handing:
        """Returns an open connection to the intake process that listens at `path`."""
        end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        end.setblocking(False)
        try:
            with short_name(path) as name:
                end.connect(name)  # on a Unix socket this never waits
            return cls(*await asyncio.open_unix_connection(sock=end))
        except OSError as exc:
            end.close()
            raise LinkError("The intake process does not listen.", cure="Try again in a moment.") from exc

    async def begin(self, arriving: Arriving) -> None:
        """Announces an object."""
        await self._send(b"B", msgspec.msgpack.encode(arriving))

    async def write(self, data: bytes) -> None:
        """Hands over a piece of its data set; waits while the other end is busy."""
        for start in range(0, len(data), PIECE_BYTES):
            await self._send(b"D", data[start : start + PIECE_BYTES])

    async def finish(self) -> Answer:
        """Ends the object and returns what became of it: when it says stored, it is durable."""
        await self._send(b"E", b"")
        return await self._answer()

    async def refuse(self, outcome: Outcome, reason: str) -> Answer:
        """Ends an object that is refused; its bytes are in the quarantine when this returns."""
        await self._send(b"R", msgspec.msgpack.encode((outcome.value, reason)))
        return await self._answer()

    def close(self) -> None:
        """Ends the connection; an object that was not finished is dropped at the other end."""
        self._writer.close()

    async def _answer(self) -> Answer:
        try:
            async with asyncio.timeout(ANSWER_S):
                letter, length = _HEAD.unpack(await self._reader.readexactly(_HEAD.size))
                if letter != b"A" or length > _SHORT_BYTES:
                    raise LinkError("The intake process answered something else.")
                return msgspec.msgpack.decode(await self._reader.readexactly(length), type=Answer)
        except (OSError, EOFError, TimeoutError, msgspec.MsgspecError) as exc:
            raise LinkError("The intake process gave no answer.", cure="Send the object again.") from exc

    async def _send(self, letter: bytes, body: bytes) -> None:
        try:
            self._writer.write(_HEAD.pack(letter, len(body)) + body)
            await self._writer.drain()
        except OSError as exc:
            raise LinkError("The intake process has ended.", cure="Send the object again.") from exc


def _send(connection: socket.socket, letter: bytes, body: bytes) -> None:
    connection.sendall(_HEAD.pack(letter, len(body)) + body)


def _read_begin(connection: socket.socket) -> Arriving | None:
    head = _exactly(connection, _HEAD.size, may_end=True)
    if not head:
        return None
    letter, length = _HEAD.unpack(head)
    if letter != b"B" or length > _SHORT_BYTES:
        raise PeerError("A handover begins with something else.")
    try:
        return msgspec.msgpack.decode(_exactly(connection, length), type=Arriving)
    except msgspec.MsgspecError as exc:
        raise PeerError("A handover begins with something else.") from exc


def _read_step(connection: socket.socket) -> tuple[bytes, bytes]:
    """Returns the letter, D, E or R, and the body of the next message."""
    letter, length = _HEAD.unpack(_exactly(connection, _HEAD.size))
    if length > {b"D": PIECE_BYTES, b"E": 0, b"R": _SHORT_BYTES}.get(letter, -1):
        raise PeerError("A piece of a handover is something else.")
    return letter, _exactly(connection, length)


def _refusal(body: bytes) -> RefusedError:
    try:
        return RefusedError(*msgspec.msgpack.decode(body, type=tuple[Outcome, str]))
    except msgspec.MsgspecError as exc:
        raise PeerError("A refusal is something else.") from exc


def _exactly(connection: socket.socket, length: int, *, may_end: bool = False) -> bytes:
    """Returns `length` bytes; with `may_end`, empty when the other end has closed instead."""
    buffer = bytearray(length)
    view, have = memoryview(buffer), 0
    while have < length:
        count = connection.recv_into(view[have:])
        if not count:
            if may_end and not have:
                return b""
            raise PeerError("A handover ended inside an object.")
        have += count
    return bytes(buffer)
