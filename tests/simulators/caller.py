"""A DICOM sender made of bare bytes: what it says is right only where a test wants it to be.

Written without the door's own codec, so that both cannot be wrong in the same way.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress

from tests.simulators.modality import EXPLICIT, encoded, phantom_study

CT = "1.2.840.10008.5.1.4.1.1.2"
VERIFICATION = "1.2.840.10008.1.1"
RQ, AC, RJ, DATA, RELEASE, RELEASED, ABORT = range(1, 8)
Context = tuple[int, str, Sequence[str]]
USUAL: tuple[Context, ...] = ((1, CT, (EXPLICIT,)), (3, VERIFICATION, (EXPLICIT,)))


def pdu(kind: int, body: bytes, length: int | None = None) -> bytes:
    """A PDU whose header may lie about its length."""
    return struct.pack(">BBI", kind, 0, len(body) if length is None else length) + body


def item(kind: int, body: bytes, length: int | None = None) -> bytes:
    """An item of an association request."""
    return struct.pack(">BBH", kind, 0, (len(body) if length is None else length) & 0xFFFF) + body


def context(number: int, abstract: str, syntaxes: Iterable[str]) -> bytes:
    """A proposed presentation context."""
    inside = item(0x30, abstract.encode()) + b"".join(item(0x40, one.encode()) for one in syntaxes)
    return item(0x20, bytes((number & 0xFF, 0, 0, 0)) + inside)


def request(
    contexts: Sequence[Context] = USUAL,
    *,
    called: bytes = b"RADFLEET",
    calling: bytes = b"MODALITY",
    max_pdu: int = 16384,
    user: bytes = b"",
    version: int = 1,
    application: bytes = b"1.2.840.10008.3.1.1.1",
    more: bytes = b"",
) -> bytes:
    """An A-ASSOCIATE-RQ."""
    fixed = struct.pack(">HH", version, 0) + called.ljust(16) + calling.ljust(16) + bytes(32)
    items = item(0x10, application) + b"".join(context(*one) for one in contexts) + more
    information = item(0x51, struct.pack(">I", max_pdu)) + item(0x52, b"1.2.3.4") + user
    return pdu(RQ, fixed + items + item(0x50, information))


def value(number: int, control: int, data: bytes, length: int | None = None) -> bytes:
    """A presentation data value; its header may lie."""
    return struct.pack(">IBB", len(data) + 2 if length is None else length, number, control) + data


def command(**elements: int | str) -> bytes:
    """A command set: `field`, `id`, `class_`, `instance`, `data` (0x0101: none), `priority`."""
    numbers = {"class_": 0x0002, "field": 0x0100, "id": 0x0110, "priority": 0x0700, "data": 0x0800, "instance": 0x1000}
    body = b""
    for name in sorted(elements, key=lambda one: numbers[one]):
        one = elements[name]
        data = struct.pack("<H", one) if isinstance(one, int) else one.encode() + b"\0" * (len(one) % 2)
        body += struct.pack("<HHI", 0, numbers[name], len(data)) + data
    return struct.pack("<HHII", 0, 0, 4, len(body)) + body


def echo(message: int = 1) -> bytes:
    """A C-ECHO-RQ command set."""
    return command(field=0x0030, id=message, class_=VERIFICATION, data=0x0101)


def store(instance: str, message: int = 1, sop_class: str = CT) -> bytes:
    """A C-STORE-RQ command set."""
    return command(field=0x0001, id=message, class_=sop_class, instance=instance, priority=2, data=1)


class Caller:
    """One connection. Every read ends within `patience_s`, or the test fails with TimeoutError."""

    def __init__(self, port: int, *, patience_s: float = 20.0) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=patience_s)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def say(self, data: bytes) -> None:
        """Sends bytes; a door that has hung up already is no fault."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self.sock.sendall(data)

    def associate(self, contexts: Sequence[Context] = USUAL, **more: int | bytes) -> bytes:
        """Negotiates and returns the body of the acceptance."""
        self.say(request(contexts, **more))  # type: ignore[arg-type]
        kind, body = self.hear()
        assert kind == AC, (kind, body)
        return body

    def hear(self) -> tuple[int, bytes]:
        """Returns type and body of the next PDU; (0, b"") when the door has hung up."""
        head = self._exactly(6)
        if len(head) < 6:
            return 0, b""
        return head[0], self._exactly(int.from_bytes(head[2:6], "big"))

    def answer(self) -> dict[int, bytes]:
        """Returns the elements of the next command set, from however many PDUs it comes in."""
        whole = b""
        while True:
            kind, body = self.hear()
            assert kind == DATA, (kind, body)
            length, _, control = struct.unpack(">IBB", body[:6])
            assert length == len(body) - 4
            assert control & 1
            whole += body[6:]
            if control & 2:
                break
        elements, at = {}, 0
        while at < len(whole):
            group, element, length = struct.unpack_from("<HHI", whole, at)
            assert group == 0
            elements[element] = whole[at + 8 : at + 8 + length]
            at += 8 + length
        return elements

    def status(self) -> int:
        """Returns the status of the next answer."""
        return int.from_bytes(self.answer()[0x0900], "little")

    def ended(self) -> tuple[int, ...]:
        """Reads to the end: (source, reason) of the abort that came, or () when the door just hung up."""
        found: tuple[int, ...] = ()
        while True:
            kind, body = self.hear()
            if not kind:
                return found
            assert kind == ABORT, (kind, body)
            found = (body[2], body[3])

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            try:
                got = self.sock.recv(count - len(data))
            except ConnectionResetError:
                got = b""
            if not got:
                return b""
            data += got
        return data


class Bystander:
    """Somebody who stores and echoes on one association while others misbehave."""

    def __init__(self, port: int) -> None:
        self._caller = Caller(port)
        self._caller.associate()
        self._item = phantom_study("chest-ct", 0, seed=9, slices=1)[0]
        self._stop = threading.Event()
        self._failures: list[str] = []
        self.rounds = 0
        self.longest_s = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends, and fails when anything went wrong meanwhile."""
        self._stop.set()
        self._thread.join(60)
        self._caller.sock.close()
        assert self._failures == [], self._failures

    def more(self, rounds: int = 2) -> None:
        """Waits until it got something done."""
        end, start = time.monotonic() + 30, self.rounds
        while self.rounds < start + rounds:
            assert time.monotonic() < end, "a bystander is held up"
            assert self._failures == [], self._failures
            time.sleep(0.01)

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            self._item.SOPInstanceUID = f"1.2.3.{id(self)}.{self.rounds + 1}"
            began = time.monotonic()
            try:
                stored = send(self._caller, str(self._item.SOPInstanceUID), encoded(self._item))
                self._caller.say(pdu(DATA, value(3, 3, echo())))
                echoed = self._caller.status()
            except Exception as exc:  # noqa: BLE001 told by `stop`
                self._failures.append(repr(exc))
                return
            if stored or echoed:
                self._failures.append(f"store {stored:#x}, echo {echoed:#x}")
                return
            self.longest_s = max(self.longest_s, time.monotonic() - began)
            self.rounds += 1


def send(one: Caller, instance: str, data: bytes, sop_class: str = CT) -> int:
    """Sends one object on context 1 and returns the status of its answer."""
    one.say(pdu(DATA, value(1, 3, store(instance, sop_class=sop_class))))
    for at in range(0, max(1, len(data)), 16000):
        one.say(pdu(DATA, value(1, 2 if at + 16000 >= len(data) else 0, data[at : at + 16000])))
    return one.status()
