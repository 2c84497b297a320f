"""A wire that remembers: stands between a sender and a door, passes every byte on, and tells afterwards what was said.

What a sender puts on the wire is not always what its file holds: toolkits encode anew. Here is what really came.
Read without the door's own codec, so that both cannot be wrong in the same way.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

_RQ, _AC, _RJ, _DATA = 1, 2, 3, 4


@dataclass(frozen=True)
class Transfer:
    """One C-STORE as it was on the wire; `status` is -1 when no answer came."""

    sop_class: str
    instance: str
    transfer_syntax: str
    data: bytes
    status: int


@dataclass
class Conversation:
    """One connection: what either side said, whether it is over, and how long the door's slowest word took."""

    said: bytearray = field(default_factory=bytearray)
    answered: bytearray = field(default_factory=bytearray)
    over: threading.Event = field(default_factory=threading.Event)
    waited_s: float = 0.0
    _said_at: float = field(default_factory=time.monotonic)

    def caller_spoke(self) -> None:
        """Starts the clock anew: the door has not heard all before."""
        self._said_at = time.monotonic()

    def door_spoke(self) -> None:
        """Reads the clock."""
        self.waited_s = max(self.waited_s, time.monotonic() - self._said_at)

    def rejected(self) -> bool:
        """Tells whether the association was rejected."""
        return any(kind == _RJ for kind, _ in _pdus(self.answered))

    def accepted(self) -> dict[int, str]:
        """Returns the transfer syntax of each accepted context."""
        return {
            data[0]: next((value.decode("ascii", "replace").strip("\0 ") for kind, value in _items(data[4:])), "")
            for kind, body in _pdus(self.answered)
            if kind == _AC
            for tag, data in _items(body[68:])
            if tag == 0x21 and data[2] == 0
        }

    def transfers(self) -> list[Transfer]:
        """Returns the C-STOREs whose data set arrived whole."""
        syntaxes = self.accepted()
        statuses = [
            int.from_bytes(command[0x0900], "little")
            for _, command, _ in _messages(self.answered)
            if command.get(0x0100) == b"\x01\x80"
        ]
        found = []
        for number, command, data in _messages(self.said):
            if command.get(0x0100) != b"\x01\x00":
                continue
            status = statuses[len(found)] if len(found) < len(statuses) else -1
            names = [command.get(tag, b"").decode("ascii", "replace").strip("\0 ") for tag in (0x0002, 0x1000)]
            found.append(Transfer(names[0], names[1], syntaxes.get(number, ""), data, status))
        return found


class Tap:
    """Listens on a port of its own and passes everything on to `port` on loopback."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = int(self._listener.getsockname()[1])
        self._conversations: list[Conversation] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def heard(self) -> list[Conversation]:
        """Returns the conversations since the last call, each of them over."""
        found, self._conversations = self._conversations, []
        for one in found:
            if not one.over.wait(60):
                raise TimeoutError("A conversation does not end.")
        return found

    def close(self) -> None:
        """Stops listening."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            conversation = Conversation()
            self._conversations.append(conversation)
            threading.Thread(target=self._converse, args=(caller, conversation), daemon=True).start()

    def _converse(self, caller: socket.socket, conversation: Conversation) -> None:
        with caller, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._target), 30) as door:
            door.settimeout(None)
            answers = (door, caller, conversation.answered, conversation.door_spoke)
            back = threading.Thread(target=_pump, args=answers, daemon=True)
            back.start()
            _pump(caller, door, conversation.said, conversation.caller_spoke)
            back.join()
        conversation.over.set()


def _pump(source: socket.socket, sink: socket.socket, record: bytearray, spoke: Callable[[], None]) -> None:
    with contextlib.suppress(OSError):
        for one in (source, sink):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := source.recv(1 << 16):
            record += data
            spoke()
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def _pdus(stream: bytes | bytearray) -> list[tuple[int, memoryview]]:
    view, found, at = memoryview(bytes(stream)), [], 0
    while at + 6 <= len(view):
        length = int.from_bytes(view[at + 2 : at + 6], "big")
        if at + 6 + length <= len(view):
            found.append((view[at], view[at + 6 : at + 6 + length]))
        at += 6 + length
    return found


def _items(data: memoryview) -> list[tuple[int, bytes]]:
    found, at = [], 0
    while at + 4 <= len(data):
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        found.append((data[at], bytes(data[at + 4 : at + 4 + length])))
        at += 4 + length
    return found


def _messages(stream: bytes | bytearray) -> list[tuple[int, dict[int, bytes], bytes]]:
    """Returns (context, command elements, data set) of each message that is whole."""
    found: list[tuple[int, dict[int, bytes], bytes]] = []
    command, data, elements = b"", bytearray(), {}
    for kind, body in _pdus(stream):
        at = 0
        while kind == _DATA and at + 6 <= len(body):
            length, number, control = struct.unpack_from(">IBB", body, at)
            piece = body[at + 6 : at + 4 + length]
            at += 4 + length
            if control & 1:
                command += piece
            else:
                data += piece
            if control == 3:
                elements, command, data = _elements(command), b"", bytearray()
            if control == 2 or (control == 3 and elements.get(0x0800) == b"\x01\x01"):
                found.append((number, elements, bytes(data)))
    return found


def _elements(command: bytes) -> dict[int, bytes]:
    found, at = {}, 0
    while at + 8 <= len(command):
        _, element, length = struct.unpack_from("<HHI", command, at)
        found[element] = command[at + 8 : at + 8 + length]
        at += 8 + length
    return found
