"""PDUs that nobody should send, to a real door in a process of its own, while somebody else works there unharmed.

Every attack ends in bounded time (each read of `Caller` has a limit) and in bounded memory (the last test of the
file looks at the most that the process ever held).
"""

from __future__ import annotations

import random
import socket
import sqlite3
import ssl
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from scripts.lab.child import wait_until
from scripts.lab.door import DoorProcess, door_process
from tests.simulators import caller
from tests.simulators.caller import ABORT, AC, CT, DATA, RELEASE, RELEASED, RJ, RQ, VERIFICATION, Bystander, Caller
from tests.simulators.modality import EXPLICIT, encoded, phantom_study
from tests.simulators.pki import TestAuthority

ARTIM_S = 1.0
IDLE_S = 5.0
BY_PROVIDER = 2
UNRECOGNIZED, UNEXPECTED, INVALID = 1, 2, 6  # PS3.8 table 9-26
ITEM = phantom_study("chest-ct", 0, seed=1, slices=1)[0]
INSTANCE, BYTES = str(ITEM.SOPInstanceUID), encoded(ITEM)


@dataclass
class Hell:
    door: DoorProcess
    bystander: Bystander
    began_mb: float

    @property
    def spool(self) -> Path:
        return self.door.state / "spool"

    def stored(self, instance: str) -> bytes:
        """Returns the data set that is kept under an instance."""
        database = sqlite3.connect(self.door.state / "intake.sqlite")
        ((file, offset),) = database.execute(
            "SELECT file, offset FROM objects WHERE sop_instance = ?", (instance,)
        ).fetchall()
        database.close()
        return (self.spool / file).read_bytes()[offset:]


@pytest.fixture(scope="module")
def hell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hell]:
    folder = tmp_path_factory.mktemp("hell")
    authority = TestAuthority(folder)
    leaf = authority.issue("localhost", file="door")
    (folder / "door.pem").exists() or leaf.certificate.rename(folder / "door.pem")
    (folder / "door.key").exists() or leaf.key_file.rename(folder / "door.key")
    with door_process(
        folder / "state", "--artim-s", str(ARTIM_S), "--idle-s", str(IDLE_S), "--tls", str(folder)
    ) as door:
        bystander = Bystander(door.port)
        try:
            bystander.more()
            yield Hell(door, bystander, door.memory_mb())
        finally:
            bystander.stop()


@pytest.fixture(autouse=True)
def unharmed(hell: Hell) -> Iterator[None]:
    """Somebody works while the test runs, and still does after it."""
    yield
    hell.bystander.more(1)


@contextmanager
def negotiated(hell: Hell, **more: int | bytes) -> Iterator[Caller]:
    with Caller(hell.door.port) as one:
        one.associate(**more)
        yield one


MANY = b"".join(caller.context(1, CT, [EXPLICIT]) for _ in range(100_000))
BEFORE = {
    "data": (caller.pdu(DATA, caller.value(1, 3, caller.echo())), UNEXPECTED),
    "release": (caller.pdu(RELEASE, bytes(4)), UNEXPECTED),
    "acceptance": (caller.pdu(AC, bytes(70)), UNEXPECTED),
    "unknown type": (caller.pdu(0x99, b"x"), UNRECOGNIZED),
    "type 0": (caller.pdu(0, b"x"), UNRECOGNIZED),
    "web": (b"GET / HTTP/1.1\r\nHost: radfleet\r\n\r\n", UNRECOGNIZED),
    "4 GB": (caller.pdu(RQ, b"x" * 1000, 0xFFFFFFFF), INVALID),
    "4 GB of data": (caller.pdu(DATA, b"x" * 1000, 0xFFFFFFFF), INVALID),
    "empty": (caller.pdu(RQ, b""), INVALID),
    "ends in its fixed fields": (caller.pdu(RQ, bytes(67)), INVALID),
    "100,000 contexts": (caller.request(more=MANY), INVALID),
    "129 contexts": (caller.request([(2 * n + 1, CT, [EXPLICIT]) for n in range(129)]), INVALID),
    "even identifier": (caller.request([(2, CT, [EXPLICIT])]), INVALID),
    "identifier 0": (caller.request([(0, CT, [EXPLICIT])]), INVALID),
    "one identifier twice": (caller.request([(1, CT, [EXPLICIT]), (1, VERIFICATION, [EXPLICIT])]), INVALID),
    "no transfer syntax": (caller.request([(1, CT, [])]), INVALID),
    "1,000 transfer syntaxes": (caller.request([(1, CT, [EXPLICIT] * 1000)]), INVALID),
    "item beyond the end": (caller.request(more=caller.item(0x20, b"\1\0\0\0", 60_000)), INVALID),
    "half an item header": (caller.request(user=b"\x53\0"), INVALID),
    "role of no length": (caller.request(user=caller.item(0x54, b"\0\5")), INVALID),
    "60,000 roles": (caller.request(user=caller.item(0x54, b"\0\x011\1\1") * 6000), INVALID),
}


@pytest.mark.parametrize("what", BEFORE)
def test_attack_what_is_no_request_is_aborted_with_the_standards_reason(hell: Hell, what: str) -> None:
    data, reason = BEFORE[what]
    with Caller(hell.door.port) as one:
        one.say(data)
        assert one.ended() == (BY_PROVIDER, reason)


REJECTED = {
    "calling": ({"calling": b"STRANGER"}, (1, 1, 3)),
    "called": ({"called": b"SOMEBODY"}, (1, 1, 7)),
    "called in another case": ({"called": b"radfleet"}, (1, 1, 7)),
    "calling of no ASCII": ({"calling": "MODALITÄT".encode()}, (1, 1, 3)),
    "called of no ASCII": ({"called": bytes(range(240, 256))}, (1, 1, 7)),
    "calling of nothing": ({"calling": bytes(16)}, (1, 1, 3)),
    "calling with a wildcard": ({"calling": b"*"}, (1, 1, 3)),
    "protocol version": ({"version": 2}, (1, 2, 2)),
    "application context": ({"application": b"1.2.3"}, (1, 1, 2)),
}


@pytest.mark.parametrize("what", REJECTED)
def test_rejections_carry_the_standards_numbers(hell: Hell, what: str) -> None:
    said, numbers = REJECTED[what]
    with Caller(hell.door.port) as one:
        one.say(caller.request(**said))  # type: ignore[arg-type]
        kind, body = one.hear()
        assert (kind, tuple(body[1:])) == (RJ, numbers)


def test_a_peer_beyond_its_limit_is_rejected_for_the_moment(tmp_path: Path) -> None:
    with door_process(tmp_path, "--associations", "2") as door, ExitStack() as stack:
        first, *_ = (stack.enter_context(Caller(door.port)) for _ in range(2))
        first.associate()
        second = stack.enter_context(Caller(door.port))
        second.associate()
        third = stack.enter_context(Caller(door.port))
        third.say(caller.request())
        kind, body = third.hear()
        assert (kind, tuple(body[1:])) == (RJ, (2, 3, 2))
        first.say(caller.pdu(RELEASE, bytes(4)))
        assert first.hear()[0] == RELEASED
        first.sock.close()

        def let_in() -> bool:
            with Caller(door.port) as again:
                again.say(caller.request())
                return again.hear()[0] == AC

        wait_until("the slot to be free", let_in)


def test_a_full_spool_rejects_for_the_moment(tmp_path: Path) -> None:
    with door_process(tmp_path, "--limit-bytes", str(len(BYTES) + 500)) as door, Caller(door.port) as one:
        one.associate()
        one.say(caller.pdu(DATA, caller.value(1, 3, caller.store(INSTANCE))) + _data(BYTES))
        assert one.status() == 0
        with Caller(door.port) as late:
            late.say(caller.request())
            kind, body = late.hear()
            assert (kind, tuple(body[1:])) == (RJ, (2, 3, 1))
        one.say(_said(1, 3, caller.store("1.2.3.4")) + _data(BYTES))
        assert one.status() == 0xA700
        one.say(_said(3, 3, caller.echo()))
        assert one.status() == 0


def _said(number: int, control: int, data: bytes) -> bytes:
    return caller.pdu(DATA, caller.value(number, control, data))


def _data(data: bytes, step: int = 16000) -> bytes:
    return b"".join(
        _said(1, 2 if at + step >= len(data) else 0, data[at : at + step]) for at in range(0, len(data), step)
    )


STORE = _said(1, 3, caller.store("1.2.3.4"))
WITHIN = {
    "a second request": (caller.request(), UNEXPECTED),
    "an acceptance": (caller.pdu(AC, bytes(70)), UNEXPECTED),
    "a rejection": (caller.pdu(RJ, bytes(4)), UNEXPECTED),
    "a release response": (caller.pdu(RELEASED, bytes(4)), UNEXPECTED),
    "unknown type": (caller.pdu(0x08, bytes(4)), UNRECOGNIZED),
    "4 GB": (caller.pdu(DATA, b"x" * 100, 0xFFFFFFFF), INVALID),
    "more than was agreed": (caller.pdu(DATA, b"x" * 100, 128 * 1024 + 1), INVALID),
    "a context that was not accepted": (_said(99, 3, caller.echo()), INVALID),
    "a context that was refused": (_said(5, 3, caller.echo()), INVALID),
    "an even context": (_said(2, 3, caller.echo()), INVALID),
    "a data set without command": (_said(1, 2, BYTES[:100]), INVALID),
    "a value longer than its PDU": (caller.pdu(DATA, caller.value(1, 3, b"abc", 4000)), INVALID),
    "a value of 4 GB": (caller.pdu(DATA, caller.value(1, 3, b"abc", 0xFFFFFFFF)), INVALID),
    "a value of length 1": (caller.pdu(DATA, caller.value(1, 3, b"abc", 1)), INVALID),
    "half a value header": (caller.pdu(DATA, b"\0\0\0"), INVALID),
    "an endless command": (_said(1, 1, b"x" * 16000) * 6, INVALID),
    "a command of garbage": (_said(1, 3, b"\xff" * 40), INVALID),
    "a command of another group": (_said(1, 3, struct.pack("<HHI", 8, 0x18, 2) + b"1\0"), INVALID),
    "a command inside a data set": (STORE + _said(1, 3, caller.echo()), INVALID),
    "another context inside a message": (STORE + _said(3, 0, b"abc"), INVALID),
    "another context inside a command": (_said(1, 1, b"abc") + _said(3, 3, caller.echo()), INVALID),
}


@pytest.mark.parametrize("what", WITHIN)
def test_attack_what_has_no_place_in_an_association_is_aborted(hell: Hell, what: str) -> None:
    data, reason = WITHIN[what]
    with Caller(hell.door.port) as one:
        one.associate((*caller.USUAL, (5, "1.2.840.10008.5.1.4.1.2.2.1", [EXPLICIT])))
        one.say(data)
        assert one.ended() == (BY_PROVIDER, reason)


@pytest.mark.parametrize("how", ["abort", "hang up", "hang up in a PDU", "release"])
def test_attack_whoever_leaves_in_the_middle_of_an_object_leaves_nothing(hell: Hell, how: str) -> None:
    with negotiated(hell) as one:
        one.say(_said(1, 3, caller.store(INSTANCE)) + _said(1, 0, BYTES[:9000]))
        part = {"abort": caller.pdu(ABORT, bytes(4)), "release": caller.pdu(RELEASE, bytes(4))}
        one.say(part.get(how, caller.pdu(DATA, b"x" * 100, 5000)[: 0 if how == "hang up" else 50]))
        if how == "release":
            assert one.hear()[0] == RELEASED
    wait_until("half an object to go", lambda: not _halves(hell))


def _halves(hell: Hell) -> list[Path]:
    """Files that are arriving and are not the bystander's, who is done in a moment."""
    found = []
    for one in hell.spool.glob(".*.part"):
        with suppress(FileNotFoundError):
            if time.time() - one.stat().st_mtime > 0.2:
                found.append(one)
    return found


FRAGMENTS = {
    "one byte a value": lambda data, control: b"".join(
        _said(1, control | (2 if n == len(data) - 1 else 0), data[n : n + 1]) for n in range(len(data))
    ),
    "many values a PDU": lambda data, control: caller.pdu(
        DATA,
        b"".join(
            caller.value(1, control | (2 if n + 7 >= len(data) else 0), data[n : n + 7]) for n in range(0, len(data), 7)
        ),
    ),
    "empty values between": lambda data, control: b"".join(
        _said(1, control, b"") * 3 + _said(1, control | (2 if n + 500 >= len(data) else 0), data[n : n + 500])
        for n in range(0, len(data), 500)
    ),
    "an empty last value": lambda data, control: _said(1, control, data) + _said(1, control | 2, b""),
}


@pytest.mark.parametrize("how", FRAGMENTS)
def test_fragments_of_every_size_are_one_object(hell: Hell, how: str) -> None:
    data, instance = BYTES[:-4], f"1.2.9.{len(how)}"
    small = phantom_study("chest-ct", 0, seed=1, slices=1)[0]
    small.Rows = small.Columns = 16
    small.PixelData, small.SOPInstanceUID = bytes(512), instance
    data = encoded(small)
    with negotiated(hell) as one:
        one.say(FRAGMENTS[how](caller.store(instance), 1) + FRAGMENTS[how](data, 0))
        assert one.status() == 0
        one.say(_said(3, 3, caller.echo()))
        assert one.status() == 0
    assert hell.stored(instance) == data


def test_bytes_one_by_one_are_a_whole_conversation(hell: Hell) -> None:
    with Caller(hell.door.port) as one:
        for byte in caller.request():
            one.say(bytes([byte]))
        assert one.hear()[0] == AC
        for byte in _said(3, 3, caller.echo(77)) + caller.pdu(RELEASE, bytes(4)):
            one.say(bytes([byte]))
        answer = one.answer()
        assert answer[0x0120] == struct.pack("<H", 77)
        assert one.hear() == (RELEASED, bytes(4))


def test_requests_sent_without_waiting_are_each_answered_once_and_in_order(hell: Hell) -> None:
    with negotiated(hell, user=caller.item(0x53, b"\0\x10\0\x10")) as one:
        one.say(b"".join(_said(3, 3, caller.echo(number)) for number in range(1, 301)))
        assert [int.from_bytes(one.answer()[0x0120], "little") for _ in range(300)] == list(range(1, 301))
        one.say(caller.pdu(RELEASE, bytes(4)))
        assert one.hear()[0] == RELEASED
        assert one.ended() == ()


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (_said(1, 3, caller.command(field=0x0001, id=1, class_=CT, instance="1.2.3", data=0x0101)), 0xC000),
        (STORE + _said(1, 2, b""), 0xC000),
        (_said(1, 3, caller.store("../../../etc/passwd")) + _data(BYTES), 0x0117),
        (_said(1, 3, caller.store("1." + "2" * 300)) + _data(BYTES), 0x0117),
        (_said(1, 3, caller.store("")) + _data(BYTES), 0x0117),
        (_said(1, 3, caller.command(field=0x0020, id=1, class_=CT, data=1)) + _data(BYTES), 0x0211),
        (_said(1, 3, caller.command(field=0x7777, id=1, class_=CT, data=0x0101)), 0x0211),
        (_said(3, 3, caller.store(INSTANCE)) + _said(3, 2, BYTES[:1000]), 0x0211),
        (_said(1, 3, caller.echo()), 0x0211),
    ],
)
def test_attack_odd_requests_get_one_answer_and_the_association_goes_on(hell: Hell, said: bytes, status: int) -> None:
    with negotiated(hell) as one:
        one.say(said)
        assert one.status() == status
        one.say(_said(3, 3, caller.echo(5)))
        answer = one.answer()
        assert answer[0x0120] == b"\5\0"


def test_the_negotiation_is_answered_truthfully(hell: Hell) -> None:
    role = caller.item(0x54, struct.pack(">H", len(CT)) + CT.encode() + b"\1\1")
    extended = caller.item(0x56, struct.pack(">H", len(CT)) + CT.encode() + b"\1\0\1\0\1\0")
    window = caller.item(0x53, b"\0\0\0\0")  # unlimited
    name = caller.item(0x55, "Gerät 7".encode())
    with Caller(hell.door.port) as one:
        body = one.associate(user=role + extended + window + name)
        assert caller.item(0x53, b"\0\1\0\1") in body
        assert caller.item(0x54, struct.pack(">H", len(CT)) + CT.encode() + b"\1\0") in body
        assert caller.item(0x56, struct.pack(">H", len(CT)) + CT.encode() + b"\2\0\3\0\0\0") in body
    with Caller(hell.door.port) as one:  # what was not asked is not answered
        body = one.associate()
        assert not any(bytes([kind, 0]) in body[-80:-20] for kind in (0x53, 0x54, 0x56))


@pytest.mark.parametrize("longest", [0, 7, 13, 0xFFFFFFFF])
def test_the_requestors_maximum_length_is_kept(hell: Hell, longest: int) -> None:
    with negotiated(hell, max_pdu=longest) as one:
        one.say(_said(3, 3, caller.echo()))
        first, body = one.hear()
        assert first == DATA
        assert len(body) <= (longest or 1 << 20)


@pytest.mark.parametrize("longest", [1, 6])
def test_attack_a_maximum_length_without_room_for_an_answer_ends_the_association(hell: Hell, longest: int) -> None:
    with negotiated(hell, max_pdu=longest) as one:
        one.say(_said(3, 3, caller.echo()))
        assert one.ended() == (BY_PROVIDER, INVALID)


def test_attack_a_slow_loris_is_cut_off_when_artim_expires(hell: Hell) -> None:
    began = time.monotonic()
    with Caller(hell.door.port) as one, pytest.raises((BrokenPipeError, ConnectionResetError)):
        _drip(one.sock, caller.request() * 20)
    assert ARTIM_S * 0.5 < time.monotonic() - began < ARTIM_S + 3


def _drip(sock: socket.socket, data: bytes) -> None:
    for byte in data:
        sock.sendall(bytes([byte]))
        time.sleep(0.02)


def test_attack_silence_inside_an_association_ends_it(hell: Hell) -> None:
    with negotiated(hell) as one:
        began = time.monotonic()
        one.say(_said(1, 3, caller.store(INSTANCE)) + caller.pdu(DATA, b"x" * 100, 5000))
        one.ended()
        assert time.monotonic() - began < IDLE_S + 3
    wait_until("half an object to go", lambda: not _halves(hell))


@pytest.mark.parametrize("first", [b"", b"\1"])
def test_attack_600_connections_that_say_little_stop_nobody(hell: Hell, first: bytes) -> None:
    threads = len(hell.door.threads())
    with ExitStack() as stack:
        most = 0
        for _ in range(600):
            one = stack.enter_context(Caller(hell.door.port))
            one.say(first)
            most = max(most, len(hell.door.threads()))
        hell.bystander.more(3)
        with Caller(hell.door.port) as other:
            other.associate()
        assert most < threads + 200  # 128, and those that are ending
        wait_until("the threads to end", lambda: len(hell.door.threads()) <= threads + 2, seconds=ARTIM_S + 5)


def test_attack_somebody_who_never_reads_holds_only_himself(hell: Hell) -> None:
    with negotiated(hell) as one:
        one.sock.settimeout(0.5)
        with pytest.raises((TimeoutError, ConnectionError)):
            one.sock.sendall(_said(3, 3, caller.echo()) * 500_000)
        hell.bystander.more(2)


def test_attack_plain_words_on_the_tls_port_and_the_reverse(hell: Hell) -> None:
    with Caller(hell.door.tls_port) as one:
        one.say(caller.request())
        with suppress(ConnectionResetError):
            assert one.sock.recv(100)[:1] in (b"", b"\x15")  # at most a TLS alert, never an acceptance
    with Caller(hell.door.port) as one, pytest.raises((ssl.SSLError, OSError)):
        _anybody().wrap_socket(one.sock)


def test_attack_tls_without_a_client_certificate_is_no_association(hell: Hell) -> None:
    with (
        Caller(hell.door.tls_port) as one,
        _anybody().wrap_socket(one.sock) as secured,
        suppress(ssl.SSLError, OSError),
    ):
        secured.sendall(caller.request())
        assert secured.recv(1) == b""


def _anybody() -> ssl.SSLContext:
    """A client that has no certificate and believes every server."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


@pytest.mark.parametrize("said", [b"", b"\x16", b"\x16\3\1\2\0\1\0\1\xfc\3\3"])
def test_attack_a_tls_handshake_that_stands_still_is_cut_off(hell: Hell, said: bytes) -> None:
    with Caller(hell.door.tls_port) as one:
        began = time.monotonic()
        one.say(said)
        assert one.sock.recv(1) == b""
        assert time.monotonic() - began < ARTIM_S + 3


@pytest.mark.parametrize("seed", range(40))
def test_attack_a_conversation_with_changed_bytes_ends(hell: Hell, seed: int) -> None:
    luck = random.Random(seed)
    small = phantom_study("chest-ct", 0, seed=1, slices=1)[0]
    small.Rows = small.Columns = 8
    small.PixelData, small.SOPInstanceUID = bytes(128), f"1.2.8.{seed}"
    stream = bytearray(caller.request() + _said(1, 3, caller.store(f"1.2.8.{seed}")) + _data(encoded(small), 300))
    stream += _said(3, 3, caller.echo()) + caller.pdu(RELEASE, bytes(4))
    for _ in range(luck.randint(1, 6)):
        at = luck.randrange(len(stream))
        change = luck.randrange(3)
        if change == 0:
            stream[at] = luck.randrange(256)
        elif change == 1:
            del stream[at : at + luck.randrange(1, 40)]
        else:
            stream[at:at] = stream[luck.randrange(len(stream)) :][: luck.randrange(1, 400)]
    with Caller(hell.door.port) as one:
        one.say(bytes(stream))
        with suppress(OSError):
            one.sock.shutdown(socket.SHUT_WR)
        kinds = []
        while (heard := one.hear())[0]:
            kinds.append(heard[0])
    assert set(kinds) <= {AC, RJ, DATA, RELEASED, ABORT}
    assert kinds.count(AC) <= 1
    wait_until("half an object to go", lambda: not _halves(hell))


def test_memory_stayed_bounded_through_all_of_this(hell: Hell) -> None:
    """The last test of the file: 700 connections, 4 GB announced, five megabytes of contexts."""
    assert hell.door.memory_mb() < hell.began_mb + 60
    assert hell.bystander.longest_s < 5
