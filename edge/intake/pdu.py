"""The upper layer's messages as the door needs them (PS3.8 section 9.3), and DIMSE command sets (PS3.7 section 6.3).

Pure functions from bytes to values and back; every length is checked against what is there. pynetdicom is the other
side of every test of this file. Why it is not used here: docs/adr/0006-own-acceptor.md.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence

from msgspec import Struct

ASSOCIATE_RQ, ASSOCIATE_AC, ASSOCIATE_RJ, P_DATA, RELEASE_RQ, RELEASE_RP, ABORT = range(1, 8)
HEADER_BYTES = 6
MAX_REQUEST_BYTES = 256 * 1024  # 128 contexts with every transfer syntax there is take 190 KB
MAX_CONTEXTS = 128  # odd identifiers of one byte
MAX_SYNTAXES = 64  # proposed in one context
APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"

_APPLICATION, _CONTEXT_RQ, _CONTEXT_AC, _USER = 0x10, 0x20, 0x21, 0x50
_ABSTRACT, _TRANSFER = 0x30, 0x40
_MAX_LENGTH, _CLASS_UID, _ASYNC, _ROLE, _VERSION_NAME, _EXTENDED = 0x51, 0x52, 0x53, 0x54, 0x55, 0x56


class PduError(Exception):
    """The bytes are no PDU of the standard; `reason` is the A-ABORT reason of PS3.8 table 9-26."""

    def __init__(self, message: str, reason: int = 6) -> None:
        super().__init__(message)
        self.reason = reason


class Proposed(Struct, frozen=True):
    """One presentation context as the requestor proposes it."""

    context_id: int
    abstract_syntax: str
    transfer_syntaxes: tuple[str, ...]


class Request(Struct, frozen=True):
    """An A-ASSOCIATE-RQ. AE titles without padding, bytes that are no ASCII replaced."""

    called_ae: str
    calling_ae: str
    protocol: int  # a bit for each version, bit 0 for version 1
    application: str  # application context name
    contexts: tuple[Proposed, ...]
    max_pdu_bytes: int  # of what the requestor wants to receive; 0 is no limit
    implementation: str
    operations: tuple[int, int] | None  # asynchronous operations window proposed: invoked, performed
    roles: tuple[tuple[str, bool, bool], ...]  # SOP class, requestor as SCU, requestor as SCP
    extended: tuple[str, ...]  # SOP classes with extended negotiation


class Accepted(Struct, frozen=True):
    """The acceptor's answer to one proposed context; `result` 0 accepts (PS3.8 table 9-18)."""

    context_id: int
    abstract_syntax: str
    transfer_syntax: str
    result: int


def parse_request(body: memoryview) -> Request:
    """Returns an A-ASSOCIATE-RQ from what follows its header.

    Raises:
        PduError: no such PDU, or more contexts than the standard has identifiers for.
    """
    if len(body) < 68:
        raise PduError("The association request ends inside its fixed fields.")
    contexts: list[Proposed] = []
    user: dict[int, list[bytes]] = {}
    application = ""
    for kind, data in _items(body[68:]):
        if kind == _CONTEXT_RQ:
            if len(contexts) == MAX_CONTEXTS:
                raise PduError(f"More than {MAX_CONTEXTS} presentation contexts are proposed.")
            contexts.append(_proposed(data))
            if any(one.context_id == contexts[-1].context_id for one in contexts[:-1]):
                raise PduError("Two presentation contexts have one identifier.")
        elif kind == _APPLICATION:
            application = _text(data)
        elif kind == _USER:
            for sub, value in _items(data):
                user.setdefault(sub, []).append(bytes(value))
                if len(user[sub]) > MAX_CONTEXTS * 2:
                    raise PduError("More user information than there are presentation contexts.")
    longest = user.get(_MAX_LENGTH, [b""])[0]
    window = user.get(_ASYNC, [b""])[0]
    return Request(
        called_ae=_title(body[4:20]),
        calling_ae=_title(body[20:36]),
        protocol=int.from_bytes(body[:2], "big"),
        application=application,
        contexts=tuple(contexts),
        max_pdu_bytes=int.from_bytes(longest[:4], "big") if len(longest) >= 4 else 0,
        implementation=_text(user.get(_VERSION_NAME, user.get(_CLASS_UID, [b""]))[0])[:64],
        operations=struct.unpack(">HH", window[:4]) if len(window) >= 4 else None,
        roles=tuple(_role(value) for value in user.get(_ROLE, [])),
        extended=tuple(_text(_sized(value)) for value in user.get(_EXTENDED, [])),
    )


def associate_accept(
    request_body: memoryview,
    contexts: Sequence[Accepted],
    *,
    max_pdu_bytes: int,
    class_uid: str,
    version: str,
    operations: bool,
    roles: Sequence[tuple[str, bool, bool]],
    extended: Mapping[str, bytes],
) -> bytes:
    """Returns the A-ASSOCIATE-AC to a request whose body is given (its reserved fields are sent back, table 9-17)."""
    items = [_item(_APPLICATION, APPLICATION_CONTEXT.encode())]
    for one in contexts:
        syntax = _item(_TRANSFER, one.transfer_syntax.encode())
        items.append(_item(_CONTEXT_AC, bytes((one.context_id, 0, one.result, 0)) + syntax))
    user = [_item(_MAX_LENGTH, max_pdu_bytes.to_bytes(4, "big")), _item(_CLASS_UID, class_uid.encode())]
    if operations:
        user.append(_item(_ASYNC, b"\0\1\0\1"))  # one at a time, whatever was proposed (PS3.7 D.3.3.3)
    for uid, scu, scp in roles:
        user.append(_item(_ROLE, _prefixed(uid) + bytes((scu, scp))))
    user.append(_item(_VERSION_NAME, version.encode()))
    for uid, information in extended.items():
        user.append(_item(_EXTENDED, _prefixed(uid) + information))
    items.append(_item(_USER, b"".join(user)))
    return _pdu(ASSOCIATE_AC, b"\0\1\0\0" + bytes(request_body[4:68]) + b"".join(items))


def associate_reject(result: int, source: int, reason: int) -> bytes:
    """Returns an A-ASSOCIATE-RJ (PS3.8 table 9-21)."""
    return _pdu(ASSOCIATE_RJ, bytes((0, result, source, reason)))


def release_response() -> bytes:
    """Returns an A-RELEASE-RP."""
    return _pdu(RELEASE_RP, bytes(4))


def abort(reason: int) -> bytes:
    """Returns an A-ABORT by the service provider (PS3.8 table 9-26); reason 0 is none given."""
    return _pdu(ABORT, bytes((0, 0, 2, reason)))


def values(body: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """Yields context identifier, message control header and fragment of each PDV of a P-DATA-TF.

    Raises:
        PduError: a PDV is shorter than its header or reaches beyond the PDU.
    """
    at, end = 0, len(body)
    while at < end:
        if end - at < 6:
            raise PduError("A presentation data value ends inside its header.")
        length = int.from_bytes(body[at : at + 4], "big")
        if length < 2 or length > end - at - 4:
            raise PduError("A presentation data value is longer than its PDU.")
        yield body[at + 4], body[at + 5], body[at + 6 : at + 4 + length]
        at += 4 + length


def data_pdus(context_id: int, data: bytes, *, command: bool, max_pdu_bytes: int) -> bytes:
    """Returns `data` as P-DATA-TF PDUs of at most `max_pdu_bytes` (0: no limit), one PDV each."""
    step = (max_pdu_bytes or 1 << 20) - 6
    if step <= 0:
        raise PduError("The requestor's maximum length leaves no room for data.")
    pieces = []
    for at in range(0, max(len(data), 1), step):
        piece = data[at : at + step]
        control = command | (2 if at + step >= len(data) else 0)
        value = struct.pack(">IBB", len(piece) + 2, context_id, control) + piece
        pieces.append(_pdu(P_DATA, value))
    return b"".join(pieces)


class Command(Struct, frozen=True):
    """A command set: element number inside group 0000 to value bytes."""

    elements: dict[int, bytes]

    def number(self, element: int) -> int:
        """Returns a US value; -1 when it is absent or no US."""
        value = self.elements.get(element, b"")
        return int.from_bytes(value, "little") if len(value) == 2 else -1

    def uid(self, element: int) -> str:
        """Returns a UI value without its padding; bytes that are no ASCII are replaced."""
        return _text(self.elements.get(element, b""))


AFFECTED_CLASS, REQUESTED_CLASS, FIELD, MESSAGE_ID, RESPONDED_ID = 0x0002, 0x0003, 0x0100, 0x0110, 0x0120
DATA_SET_TYPE, STATUS, AFFECTED_INSTANCE, REQUESTED_INSTANCE = 0x0800, 0x0900, 0x1000, 0x1001
EVENT_TYPE, ACTION_TYPE, ERROR_COMMENT = 0x1002, 0x1008, 0x0902
NO_DATA_SET = 0x0101
C_STORE_RQ, C_ECHO_RQ, N_EVENT_REPORT_RQ, N_ACTION_RQ, C_CANCEL_RQ, RESPONSE = (
    0x0001,
    0x0030,
    0x0100,
    0x0130,
    0x0FFF,
    0x8000,
)


def parse_command(data: bytes) -> Command:
    """Returns a command set: implicit VR little endian, group 0000 only.

    Raises:
        PduError: an element reaches beyond the end or is of another group.
    """
    elements: dict[int, bytes] = {}
    at = 0
    while at < len(data):
        if len(data) - at < 8:
            raise PduError("The command set ends inside an element.")
        group, element, length = struct.unpack_from("<HHI", data, at)
        if group != 0 or length > len(data) - at - 8:
            raise PduError("The command set has an element that is none of its own.")
        elements[element] = data[at + 8 : at + 8 + length]
        at += 8 + length
    return Command(elements)


def command_set(elements: Mapping[int, int | str]) -> bytes:
    """Returns an encoded command set with its group length; integers are US, text is UI or LO."""
    body = b""
    for element in sorted(elements):
        value = elements[element]
        if isinstance(value, int):
            encoded = value.to_bytes(2, "little")
        else:
            encoded = value.encode("ascii", "replace")
            if len(encoded) % 2:
                encoded += b" " if element == ERROR_COMMENT else b"\0"
        body += struct.pack("<HHI", 0, element, len(encoded)) + encoded
    return struct.pack("<HHII", 0, 0, 4, len(body)) + body


def _proposed(data: memoryview) -> Proposed:
    if len(data) < 4:
        raise PduError("A presentation context ends inside its header.")
    if data[0] % 2 == 0:
        raise PduError("A presentation context has an even identifier.")
    abstract, syntaxes = "", []
    for kind, value in _items(data[4:]):
        if kind == _ABSTRACT:
            abstract = _text(value)
        elif kind == _TRANSFER:
            syntaxes.append(_text(value))
            if len(syntaxes) > MAX_SYNTAXES:
                raise PduError(f"More than {MAX_SYNTAXES} transfer syntaxes are proposed in one context.")
    if not syntaxes:
        raise PduError("A presentation context proposes no transfer syntax.")
    return Proposed(data[0], abstract, tuple(syntaxes))


def _items(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    at, end = 0, len(data)
    while at < end:
        if end - at < 4:
            raise PduError("An item of the association request ends inside its header.")
        length = data[at + 2] << 8 | data[at + 3]
        if length > end - at - 4:
            raise PduError("An item of the association request is longer than the request.")
        yield data[at], data[at + 4 : at + 4 + length]
        at += 4 + length


def _role(value: bytes) -> tuple[str, bool, bool]:
    uid = _sized(value)
    roles = value[2 + len(uid) :]
    if len(roles) < 2:
        raise PduError("A role selection ends inside its fields.")
    return _text(uid), bool(roles[0]), bool(roles[1])


def _sized(value: bytes) -> bytes:
    return value[2 : 2 + int.from_bytes(value[:2], "big")]


def _prefixed(uid: str) -> bytes:
    return len(uid).to_bytes(2, "big") + uid.encode()


def _item(kind: int, data: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, len(data)) + data


def _pdu(kind: int, body: bytes) -> bytes:
    return struct.pack(">BBI", kind, 0, len(body)) + body


def _title(raw: memoryview) -> str:
    return _text(raw)


def _text(raw: bytes | memoryview) -> str:
    return bytes(raw).decode("ascii", "replace").strip(" \0")
