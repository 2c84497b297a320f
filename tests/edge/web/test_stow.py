"""STOW-RS: what was said to be stored is stored, through the intake process's own door; hostile bodies are bounded."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import time
from collections.abc import AsyncIterator, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pydicom
import pytest
from pydicom.dataset import FileDataset

from edge.intake.handover import Answer
from edge.intake.part import Arriving
from edge.intake.status import STATUS, Outcome
from edge.web.dicomweb import stow
from edge.web.dicomweb.incoming import Incoming
from tests.simulators.dicomweb import DicomWebNode
from tests.simulators.modality import EXPLICIT, encoded, phantom_study

BOUNDARY = "the-boundary"
KIND = f'multipart/related; type="application/dicom"; boundary={BOUNDARY}'
GIGABYTES = 10 * 1024**3


@pytest.fixture
def node(tmp_path: Path) -> Iterator[DicomWebNode]:
    running = DicomWebNode(tmp_path).start()
    yield running
    running.stop()


@pytest.fixture
def client(node: DicomWebNode) -> Iterator[httpx.Client]:
    with node.client(node.token("ada", "radiologist")) as one:
        yield one


def item(seed: int = 1, **values: Any) -> FileDataset:
    one = phantom_study("chest-xray", 0, seed=seed)[0]
    for name, value in values.items():
        setattr(one, name, value)
    return one


def as_file(one: FileDataset) -> bytes:
    out = BytesIO()
    one.save_as(out, enforce_file_format=True)
    return out.getvalue()


def body(*parts: bytes, kind: str = "application/dicom", end: bool = True) -> bytes:
    pieces = [f"--{BOUNDARY}\r\nContent-Type: {kind}\r\n\r\n".encode() + part + b"\r\n" for part in parts]
    return b"".join(pieces) + (f"--{BOUNDARY}--\r\n".encode() if end else b"")


def post(client: httpx.Client, content: bytes, path: str = "/studies", kind: str = KIND) -> httpx.Response:
    return client.post(path, content=content, headers={"Content-Type": kind})


def reasons(answer: httpx.Response, name: str = "00081198") -> list[int]:
    return [one["00081197"]["Value"][0] for one in answer.json().get(name, {"Value": []})["Value"]]


def stored(node: DicomWebNode) -> list[str]:
    return sorted(row["sop_instance"] for row in node.spool.index.rows("SELECT sop_instance FROM objects"))


def quarantine(node: DicomWebNode) -> list[tuple[str, bytes]]:
    """What was refused, and the bytes that are kept of it."""
    rows = node.spool.index.rows("SELECT file, outcome, length FROM quarantine ORDER BY rowid")
    files = [(node.folder / "quarantine" / row["file"]).read_bytes() for row in rows]
    return [(row["outcome"], data[len(data) - row["length"] :]) for row, data in zip(rows, files, strict=True)]


def leftovers(node: DicomWebNode) -> list[Path]:
    return list((node.folder / "spool").glob(".*.part"))


def test_objects_are_stored_byte_for_byte_with_who_sent_them(node: DicomWebNode, client: httpx.Client) -> None:
    items = [item(seed) for seed in (1, 2, 3)]
    answer = post(client, body(*map(as_file, items)))
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/dicom+json"
    referenced = answer.json()["00081199"]["Value"]
    assert [one["00081155"]["Value"][0] for one in referenced] == [one.SOPInstanceUID for one in items]
    for one, entry in zip(items, referenced, strict=True):
        url = entry["00081190"]["Value"][0]
        back = client.get(url, headers={"Accept": "application/dicom; transfer-syntax=*"})
        assert back.content.endswith(encoded(one))
    rows = node.spool.index.rows("SELECT DISTINCT calling_ae, address, association FROM objects")
    assert [(row["calling_ae"], row["address"]) for row in rows] == [("STOW-RS", "127.0.0.1")]
    assert node.nudges >= 4  # an object each, and the end
    (ended,) = node.spool.index.rows("SELECT id FROM associations")
    assert ended["id"] == rows[0]["association"]
    (peer,) = node.spool.index.rows("SELECT ae_title, address, objects, bytes FROM peers")
    assert tuple(peer) == ("STOW-RS", "127.0.0.1", 3, sum(len(encoded(one)) for one in items))


def test_the_same_object_again_is_success_and_one_object(node: DicomWebNode, client: httpx.Client) -> None:
    for _ in range(2):
        assert post(client, body(as_file(item()))).status_code == 200
    assert stored(node) == [item().SOPInstanceUID]


def test_some_refused_is_202_and_all_refused_is_409(node: DicomWebNode, client: httpx.Client) -> None:
    good, cut = as_file(item(1)), as_file(item(2))[:-1000]
    mixed = post(client, body(good, cut))
    assert (mixed.status_code, reasons(mixed)) == (202, [STATUS[Outcome.CUT]])
    assert len(mixed.json()["00081199"]["Value"]) == 1
    none = post(client, body(cut))
    assert (none.status_code, reasons(none)) == (409, [STATUS[Outcome.CUT]])
    assert stored(node) == [item(1).SOPInstanceUID]
    (row,) = node.spool.index.rows("SELECT outcome, calling_ae FROM quarantine")
    assert (row["outcome"], row["calling_ae"]) == ("cut", "STOW-RS")
    assert leftovers(node) == []


def test_what_the_door_would_not_negotiate_is_refused(node: DicomWebNode, client: httpx.Client) -> None:
    strange, mpeg = item(1), item(2)
    strange.SOPClassUID = strange.file_meta.MediaStorageSOPClassUID = "1.2.3.4"
    mpeg.file_meta.TransferSyntaxUID = pydicom.uid.UID("1.2.3.5")
    raw = as_file(item(2)).replace(EXPLICIT.encode() + b"\0", b"1.2.840.99999.1.2.1\0", 1)
    answer = post(client, body(as_file(strange), raw))
    assert (answer.status_code, reasons(answer)) == (409, [0x0122, 0xC122])  # PS3.18 table I.2-2
    data = encoded(item(2))
    assert quarantine(node) == [("class_unknown", encoded(strange)), ("syntax_unknown", data)]


def test_an_object_whose_meta_contradicts_it_is_refused(client: httpx.Client) -> None:
    one = item(1)
    data = as_file(one).replace(one.SOPInstanceUID.encode(), b"9" + one.SOPInstanceUID.encode()[1:], 1)
    answer = post(client, body(data))
    assert (answer.status_code, reasons(answer)) == (409, [STATUS[Outcome.MISMATCH]])


def test_the_study_of_the_address_is_checked_before_anything_is_stored(
    node: DicomWebNode, client: httpx.Client
) -> None:
    mine, other = item(1), item(2)
    answer = post(client, body(as_file(mine), as_file(other)), path=f"/studies/{mine.StudyInstanceUID}")
    assert (answer.status_code, reasons(answer)) == (202, [stow.OTHER_STUDY])
    assert answer.json()["00081190"]["Value"][0].endswith(f"/studies/{mine.StudyInstanceUID}")
    assert stored(node) == [mine.SOPInstanceUID]
    assert quarantine(node) == [("mismatch", encoded(other))]


@pytest.mark.parametrize("pieces", [1, 7, 100, 4096])
def test_the_pieces_of_the_network_do_not_matter(node: DicomWebNode, client: httpx.Client, pieces: int) -> None:
    one = item(1, PixelData=item(1).PixelData[:64], Rows=4, Columns=8)
    whole = body(as_file(one))

    def trickle() -> Iterator[bytes]:
        for at in range(0, len(whole), pieces):
            yield whole[at : at + pieces]

    path = f"/studies/{one.StudyInstanceUID}"
    answer = client.post(path, content=trickle(), headers={"Content-Type": KIND})
    assert answer.status_code == 200, answer.text
    assert stored(node) == [one.SOPInstanceUID]


def test_a_file_meta_group_without_its_length_is_read(node: DicomWebNode, client: httpx.Client) -> None:
    whole = as_file(item(1))
    assert whole[132:140] == b"\x02\x00\x00\x00UL\x04\x00"
    answer = post(client, body(whole[:132] + whole[144:]))
    assert answer.status_code == 200, answer.text
    assert stored(node) == [item(1).SOPInstanceUID]


def test_a_broken_element_of_the_file_meta_does_not_swallow_the_data_set(
    node: DicomWebNode, client: httpx.Client
) -> None:
    whole = as_file(item(1))
    at = whole.index(b"\x02\0\x12\0UI")
    assert post(client, body(whole[: at + 4] + b"ob" + whole[at + 6 :])).status_code == 200
    (row,) = node.spool.index.rows("SELECT file, offset FROM objects")
    assert (node.folder / "spool" / row["file"]).read_bytes()[row["offset"] :] == encoded(item(1))
    endless = whole[:132] + whole[144 : at + 4] + b"ob" + whole[at + 6 :]  # and no group length to go by
    assert post(client, body(endless)).status_code == 409
    assert quarantine(node) == [("not_dicom", endless)]


def test_without_the_intake_process_the_caller_is_told_to_come_again(node: DicomWebNode, client: httpx.Client) -> None:
    node.handover.stop()
    answer = post(client, body(as_file(item(1))))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    node.handover.start()
    assert post(client, body(as_file(item(1)))).status_code == 200


def test_the_audit_names_who_stored(node: DicomWebNode, client: httpx.Client) -> None:
    post(client, body(as_file(item(1)), b"nonsense"))
    rows = node.labels._all("SELECT actor, action, subject FROM audit WHERE action = 'study.stored'")
    assert rows == [{"actor": "ada", "action": "study.stored", "subject": "1 stored, 1 refused"}]


@pytest.mark.parametrize("study", [False, True])
def test_wherever_the_network_cuts_the_same_bytes_arrive(study: bool) -> None:
    """Every place in preamble, meta group and the data set's first elements, once."""
    one = item(1, PixelData=bytes(64), Rows=4, Columns=8)
    whole, data = body(as_file(one)), encoded(one)

    async def received(cut: int) -> tuple[list[Arriving], bytes]:
        sink = Kept()
        request = stow.Stow(sink, Arriving, one.StudyInstanceUID if study else "")

        async def chunks() -> AsyncIterator[bytes]:
            yield whole[:cut]
            yield whole[cut:]

        await request.take(chunks(), Incoming(BOUNDARY))
        return sink.begun, bytes(sink.data)

    for cut in range(1, len(whole)):
        begun, got = asyncio.run(received(cut))
        assert begun == [Arriving(str(one.SOPClassUID), str(one.SOPInstanceUID), EXPLICIT)], cut
        assert got == data, cut


class Kept:
    """Keeps what would go to the intake process."""

    def __init__(self) -> None:
        self.begun: list[Arriving] = []
        self.data = bytearray()

    async def begin(self, arriving: Arriving) -> None:
        self.begun.append(arriving)

    async def write(self, data: bytes) -> None:
        self.data += data

    async def finish(self) -> Answer:
        return Answer(0, "stored")


class TestHostile:
    @pytest.mark.parametrize(
        ("kind", "status"),
        [
            ("application/dicom", 415),
            ("multipart/form-data; boundary=x", 415),
            ('multipart/related; type="application/dicom+json"; boundary=x', 415),
            ('multipart/related; type="application/dicom"', 400),
            ("multipart/related; type=application/dicom; boundary=", 400),
            (f"multipart/related; type=application/dicom; boundary={'x' * 71}", 400),
            ("multipart/related; type=application/dicom; boundary=other", 400),
        ],
    )
    def test_a_wrong_type_or_boundary(self, client: httpx.Client, kind: str, status: int) -> None:
        assert post(client, body(as_file(item(1))), kind=kind).status_code == status

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"no multipart at all",
            f"--{BOUNDARY}\r\n".encode(),
            f"--{BOUNDARY}\r\nX-Endless: ".encode() + b"x" * 3_000_000,
            f"--{BOUNDARY}\r\n".encode() + b"A: b\r\n" * 100_000,
            f"--{BOUNDARY}\r\n".encode() + b"x" * 3_000_000,
            body(b"DICM" * 100, end=False),
        ],
        ids=["empty", "none", "only-start", "endless-header", "many-headers", "endless-name", "truncated"],
    )
    def test_a_body_that_is_no_multipart_is_400(self, node: DicomWebNode, client: httpx.Client, content: bytes) -> None:
        assert post(client, content).status_code == 400
        assert stored(node) == []
        assert leftovers(node) == []

    @pytest.mark.parametrize(
        "part",
        [b"", b"x", bytes(200), bytes(128) + b"DICM", bytes(128) + b"DICM" + b"\xff" * 200_000, b"\0" * 3_000_000],
        ids=["empty", "one", "zeros", "dicm", "garbage", "much"],
    )
    def test_a_part_that_is_no_dicom_has_a_reason_of_its_own(
        self, node: DicomWebNode, client: httpx.Client, part: bytes
    ) -> None:
        answer = post(client, body(part, as_file(item(1))))
        assert (answer.status_code, reasons(answer, "0008119A")) == (202, [stow.CANNOT_UNDERSTAND])
        assert stored(node) == [item(1).SOPInstanceUID]
        assert quarantine(node) == [("not_dicom", part)]
        assert leftovers(node) == []

    def test_a_nested_multipart_is_no_dicom(self, node: DicomWebNode, client: httpx.Client) -> None:
        inner = body(as_file(item(1))).replace(BOUNDARY.encode(), b"inner")
        answer = post(client, body(inner, kind="multipart/related; boundary=inner"))
        assert (answer.status_code, reasons(answer, "0008119A")) == (409, [stow.CANNOT_UNDERSTAND])
        assert stored(node) == []

    def test_more_than_the_limit_is_413_before_it_is_read(self, node: DicomWebNode) -> None:
        with _raw(node, f"Content-Length: {GIGABYTES}") as connection:
            assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")

    def test_a_caller_that_leaves_in_the_middle_leaves_nothing(self, node: DicomWebNode) -> None:
        whole = body(as_file(item(1)), as_file(item(2)))
        with _raw(node, f"Content-Length: {len(whole)}") as connection:
            connection.sendall(whole[: -len(whole) // 4])
            _until(lambda: stored(node) == [item(1).SOPInstanceUID] and bool(leftovers(node)))
        _until(lambda: not leftovers(node))
        assert stored(node) == [item(1).SOPInstanceUID]  # what was whole is kept

    def test_a_caller_that_goes_silent_is_let_go(self, node: DicomWebNode, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stow, "SILENCE_S", 0.3)
        whole = body(as_file(item(1)))
        with _raw(node, f"Content-Length: {len(whole)}") as connection:
            connection.sendall(whole[: len(whole) // 2])
            assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
        _until(lambda: not leftovers(node))

    def test_a_body_that_breaks_off_tells_what_was_stored(self, node: DicomWebNode, client: httpx.Client) -> None:
        answer = post(client, body(as_file(item(1))).replace(f"--{BOUNDARY}--".encode(), f"--{BOUNDARY}x".encode()))
        assert answer.status_code == 400
        answer = post(client, body(as_file(item(1)), as_file(item(2)), end=False)[:-2])
        assert (answer.status_code, reasons(answer, "0008119A")) == (202, [stow.CANNOT_UNDERSTAND])
        assert len(answer.json()["00081199"]["Value"]) == 1

    def test_parts_are_counted(self, client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stow, "PARTS", 3)
        assert post(client, body(*[b"x"] * 4)).status_code == 413

    def test_a_large_object_costs_no_memory(self, node: DicomWebNode, client: httpx.Client) -> None:
        """300 MB through this very process: what it grows by is far less than half of the object."""
        one = item(1, PixelData=b"")
        start = as_file(one)
        head = start[: start.index(b"\xe0\x7f\x10\x00")]
        length = 300_000_000

        def pieces() -> Iterator[bytes]:
            yield f"--{BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode() + head
            yield b"\xe0\x7f\x10\x00OW\0\0" + length.to_bytes(4, "little")
            for _ in range(length // 100_000):
                yield bytes(100_000)
            yield f"\r\n--{BOUNDARY}--\r\n".encode()

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        answer = client.post("/studies", content=pieces(), headers={"Content-Type": KIND}, timeout=120)
        assert answer.status_code == 200, answer.text
        with client.stream("GET", answer.json()["00081199"]["Value"][0]["00081190"]["Value"][0]) as back:
            assert sum(len(piece) for piece in back.iter_bytes()) > length
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


class TestHandover:
    def test_the_socket_is_this_users_alone(self, node: DicomWebNode) -> None:
        assert node.socket.stat().st_mode & 0o777 == 0o600

    @pytest.mark.parametrize(
        "sent",
        [
            b"X\0\0\0\0",
            b"B\xff\xff\xff\xff",
            b"B\0\0\0\x01x",
            b"E\0\0\0\0",
            b"D\0\0\0\x01x",
            b"R\0\0\0\x01x",
        ],
    )
    def test_nonsense_ends_the_connection_and_nothing_else(
        self, node: DicomWebNode, client: httpx.Client, sent: bytes
    ) -> None:
        with socket.socket(socket.AF_UNIX) as end:
            end.settimeout(10)
            end.connect(str(node.socket))
            end.sendall(sent)
            with contextlib.suppress(ConnectionResetError):
                assert end.recv(1) == b""
        assert post(client, body(as_file(item(1)))).status_code == 200

    def test_a_connection_cut_inside_an_object_leaves_nothing(self, node: DicomWebNode) -> None:
        begin = msgspec.msgpack.encode(Arriving(str(item(1).SOPClassUID), "1.2.3", EXPLICIT))
        with socket.socket(socket.AF_UNIX) as end:
            end.connect(str(node.socket))
            end.sendall(b"B" + len(begin).to_bytes(4, "big") + begin + b"D\0\0\0\x05hello")
            _until(lambda: bool(leftovers(node)))
        _until(lambda: not leftovers(node))
        assert stored(node) == []


@contextlib.contextmanager
def _raw(node: DicomWebNode, *headers: str) -> Iterator[socket.socket]:
    token = node.token("raw", "radiologist")
    lines = [
        "POST /dicom-web/studies HTTP/1.1",
        "Host: localhost",
        f"Authorization: Bearer {token}",
        f"Content-Type: {KIND}",
        *headers,
    ]
    with socket.create_connection(("127.0.0.1", node.port), timeout=20) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        yield connection


def _until(true: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)
