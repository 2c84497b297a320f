"""Sending on to archives that are not ours: Orthanc and DCMTK's storescp, up, down, full, and choosy."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pydicom
import pytest
from pynetdicom import AE, evt
from pynetdicom.sop_class import DigitalXRayImageStorageForPresentation

from edge.forward import peer as peers
from edge.forward import reading
from edge.forward.peer import Peer
from edge.forward.rules import Rule
from edge.forward.schedule import BACKOFF_CAP_S, CUT_AFTER, DEAD_AFTER, Breaker, delay, judge
from edge.forward.store import contexts_for
from edge.forward.transcode import to_little_endian
from scripts.lab.child import Child, free_port, listens
from scripts.lab.parts import Orthanc, start_orthanc
from shared.errors import PeerError
from tests.edge.test_bad_input import jpeg_ls_bomb
from tests.simulators.forwarding import ForwardingNode, peer_of, radiographs, receive
from tests.simulators.modality import phantom_study, to_bytes
from tests.simulators.real_data import DATA, needs_data

ALL = Rule(name="all", action="both", destinations=("one",))


@pytest.fixture
def orthancs(tmp_path: Path) -> Iterator[tuple[Orthanc, Orthanc]]:
    both = start_orthanc(tmp_path / "o1", aet="ONE"), start_orthanc(tmp_path / "o2", aet="TWO")
    yield both
    for one in both:
        one.child.stop()


def states(node: ForwardingNode) -> dict[str, tuple[int, int, int]]:
    return {
        one.name: (one.waiting, one.sent, one.dead)
        for one in reading.destinations(node.state / "forward.sqlite", dict.fromkeys(node.senders, ""))
    }


@pytest.mark.e2e
def test_one_archive_that_is_down_never_delays_another(tmp_path: Path, orthancs: tuple[Orthanc, Orthanc]) -> None:
    one, two = orthancs
    rule = Rule(name="all", action="both", destinations=("one", "two"))
    node = ForwardingNode(tmp_path / "n", [rule], [peer_of(one, "one"), peer_of(two, "two")])
    receive(node.state, radiographs(6))
    assert node.follow() == 6
    two.child.stop()
    assert node.send("two") == 0
    assert node.send("one") == 6
    assert one.count() == 6
    (_, away) = reading.destinations(node.state / "forward.sqlite", {"one": "", "two": ""})
    assert "Nobody listens" in away.last_error
    assert away.cure
    assert states(node) == {"one": (0, 6, 0), "two": (6, 0, 0)}

    two.child.restart()
    two.child.wait_ready("orthanc", lambda: listens(two.http_port) and listens(two.dicom_port), seconds=60)
    assert node.send("two") == 0  # the pause has not passed
    node.clock.advance(10)
    assert node.send("two") == 6
    assert two.count() == 6
    assert states(node) == {"one": (0, 6, 0), "two": (0, 6, 0)}
    received = {i.tags["SOPInstanceUID"]: two.file(i) for i in two.instances()}
    for path in (node.state / "spool").glob("*.dcm"):
        sent = pydicom.dcmread(path)
        assert pydicom.dcmread(pydicom.filebase.DicomBytesIO(received[sent.SOPInstanceUID])).PixelData == sent.PixelData


@pytest.mark.e2e
def test_what_was_sent_and_not_yet_marked_is_one_object_at_the_archive(
    tmp_path: Path, orthancs: tuple[Orthanc, Orthanc]
) -> None:
    one, _ = orthancs
    node = ForwardingNode(tmp_path / "n", [ALL], [peer_of(one, "one")])
    receive(node.state, radiographs(3))
    node.follow()
    assert node.send("one") == 3
    with node.queue.writing() as db:
        db.execute("UPDATE queue SET state = 'waiting', next_at = 0")
    assert node.send("one") == 3
    assert one.count() == 3


def test_the_most_urgent_goes_first_and_an_index_that_was_rebuilt_repeats_nothing(tmp_path: Path) -> None:
    rules = [
        Rule(name="late", action="both", destinations=("one",), priority="low", calling_ae=("SLOW",)),
        Rule(name="now", action="forward", destinations=("one",), priority="high", calling_ae=("FAST",)),
    ]
    node = ForwardingNode(tmp_path, rules, [Peer("one", "ONE", "127.0.0.1", 1)])
    receive(tmp_path, radiographs(2), calling="SLOW")
    receive(tmp_path, radiographs(2, first=2), calling="FAST")
    receive(tmp_path, radiographs(1, first=4), calling="ONE")  # came from there: does not go back
    assert node.follow() == 5
    due = node.queue.due("one", node.now(), 10)
    assert [row.priority for row in due] == [0, 0, 2, 2]
    for name in ("intake.sqlite", "intake.sqlite-wal", "intake.sqlite-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    receive(tmp_path, [])
    again = ForwardingNode(tmp_path, rules, [Peer("one", "ONE", "127.0.0.1", 1)])
    assert again.follow() == 5
    assert len(again.queue.due("one", node.now(), 10)) in (4, 5)  # a rebuilt index has forgotten who called
    assert {row.id for row in due} <= {row.id for row in again.queue.due("one", node.now(), 10)}


def test_other_bytes_under_a_uid_that_was_seen_wait_for_a_person(tmp_path: Path) -> None:
    node = ForwardingNode(tmp_path, [ALL], [Peer("one", "ONE", "127.0.0.1", 1)])
    (first,) = radiographs(1)
    receive(tmp_path, [first])
    first.ImageComments = "changed"
    receive(tmp_path, [first])
    node.follow()
    assert states(node) == {"one": (1, 0, 1)}
    (letter,) = reading.dead_letters(tmp_path / "forward.sqlite")
    assert "same SOP Instance UID" in letter.error
    assert node.queue.retry([letter.id]) == 1
    assert states(node) == {"one": (2, 0, 0)}


@contextmanager
def archive(status: int | None, *, syntaxes: list[str] | None = None) -> Iterator[tuple[Peer, list[pydicom.Dataset]]]:
    """An SCP that answers every C-STORE with one status; None: it hangs up."""
    got: list[pydicom.Dataset] = []

    def store(event: evt.Event) -> int:
        if status is None:
            event.assoc.abort()
            return 0xC000
        got.append(event.dataset)
        return status

    ae = AE(ae_title="ONE")
    ae.add_supported_context(DigitalXRayImageStorageForPresentation, syntaxes or ["1.2.840.10008.1.2.1"])
    port = free_port()
    server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, store)])
    try:
        yield Peer("one", "ONE", "127.0.0.1", port), got
    finally:
        server.shutdown()


@pytest.mark.parametrize("status", [0x0000, 0x0111, 0xB000, 0xB007])
def test_success_duplicate_and_warnings_count_as_sent(tmp_path: Path, status: int) -> None:
    with archive(status) as (peer, got):
        node = ForwardingNode(tmp_path, [ALL], [peer])
        receive(tmp_path, radiographs(1))
        node.follow()
        assert node.send("one") == 1
    assert states(node) == {"one": (0, 1, 0)}
    assert len(got) == 1


def test_a_full_archive_is_asked_again_for_ever_and_ever_more_seldom(tmp_path: Path) -> None:
    with archive(0xA700) as (peer, got):
        node = ForwardingNode(tmp_path, [ALL], [peer])
        receive(tmp_path, radiographs(3))
        node.follow()
        for tries in range(1, 2 * DEAD_AFTER):
            assert node.send("one") == 0
            assert len(got) == tries  # the first refusal ends the batch
            assert node.send("one") == 0
            assert len(got) == tries
            node.clock.advance(BACKOFF_CAP_S + 1)
    assert states(node) == {"one": (3, 0, 0)}


def test_a_refused_object_is_given_up_with_reason_and_cure_and_the_others_go_on(tmp_path: Path) -> None:
    with archive(0xC123) as (peer, got):
        node = ForwardingNode(tmp_path, [ALL], [peer])
        receive(tmp_path, radiographs(2))
        node.follow()
        for _ in range(DEAD_AFTER):
            node.send("one")
            node.clock.advance(BACKOFF_CAP_S + 1)
        assert states(node) == {"one": (0, 0, 2)}
        assert len(got) == 2 * DEAD_AFTER
    letters = reading.dead_letters(tmp_path / "forward.sqlite")
    assert "0xC123: it cannot understand the data set" in letters[0].error
    assert letters[0].cure
    assert letters[0].why == "all: it has no condition"
    assert node.queue.retry([], "one") == 2
    with archive(0x0000) as (peer, _):
        node.senders["one"] = node.sender(peer)
        assert node.send("one") == 2


def test_an_object_that_always_ends_the_association_does_not_hold_up_the_queue_for_ever(tmp_path: Path) -> None:
    with archive(None) as (peer, _):
        node = ForwardingNode(tmp_path, [ALL], [peer])
        receive(tmp_path, radiographs(1))
        node.follow()
        for tries in range(CUT_AFTER):
            assert states(node) == {"one": (1, 0, 0)}, tries
            node.send("one")
            node.clock.advance(BACKOFF_CAP_S + 1)
    assert states(node) == {"one": (0, 0, 1)}
    (letter,) = reading.dead_letters(tmp_path / "forward.sqlite")
    assert "association ended" in letter.error


def test_a_wrong_name_is_told_with_its_cure(tmp_path: Path) -> None:
    with archive(0x0000) as (peer, _):
        node = ForwardingNode(tmp_path, [ALL], [Peer("one", "ONE", "no-such-host.invalid", peer.port)])
        receive(tmp_path, radiographs(1))
        node.follow()
        node.send("one")
    (one,) = reading.destinations(tmp_path / "forward.sqlite", {"one": ""})
    assert one.last_error == "The host no-such-host.invalid has no address."
    assert one.cure


@pytest.fixture
def storescp(tmp_path: Path) -> Iterator[tuple[Peer, Path]]:
    """DCMTK's storescp, which takes uncompressed objects only."""
    folder, port = tmp_path / "storescp", free_port()
    folder.mkdir()
    child = Child("storescp", ["storescp", "-aet", "ONE", "-od", folder, str(port)], log=tmp_path / "storescp.log")
    child.wait_ready("storescp", lambda: listens(port))
    yield Peer("one", "ONE", "127.0.0.1", port), folder
    child.stop()


def real_object(syntax: str) -> Path:
    """Returns a real object in a transfer syntax."""
    for path in sorted((DATA / "dicom").rglob("*")):
        if path.is_file() and path.suffix not in (".md", ".csv"):
            try:
                item = pydicom.dcmread(path, stop_before_pixels=True)
            except pydicom.errors.InvalidDicomError:
                continue
            if item.file_meta.get("TransferSyntaxUID") == syntax and "SOPInstanceUID" in item and item.get("Rows"):
                return path
    raise LookupError(syntax)


def spool_file(state: Path, path: Path) -> pydicom.FileDataset:
    item = pydicom.dcmread(path)
    receive(state, [item])
    return item


@needs_data
@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.70"])
def test_a_peer_that_takes_no_compression_gets_the_same_pixels_uncompressed(
    tmp_path: Path, storescp: tuple[Peer, Path], syntax: str
) -> None:
    peer, folder = storescp
    node = ForwardingNode(tmp_path / "n", [ALL], [peer])
    sent = spool_file(node.state, real_object(syntax))
    node.follow()
    assert node.send("one") == 1
    assert states(node) == {"one": (0, 1, 0)}
    (path,) = folder.iterdir()
    got = pydicom.dcmread(path)
    assert not got.file_meta.TransferSyntaxUID.is_compressed
    assert got.SOPInstanceUID == sent.SOPInstanceUID
    assert (got.pixel_array == sent.pixel_array).all()
    assert list(node.scratch.iterdir()) == []


@needs_data
def test_what_cannot_be_decoded_is_a_dead_letter_that_tells_what_to_allow(
    tmp_path: Path, storescp: tuple[Peer, Path]
) -> None:
    peer, folder = storescp
    node = ForwardingNode(tmp_path / "n", [ALL], [peer])
    item = radiographs(1)[0]
    item.file_meta.TransferSyntaxUID = pydicom.uid.MPEG4HP41
    item.PixelData = pydicom.encaps.encapsulate([b"no film at all " * 4])
    item["PixelData"].VR, item["PixelData"].is_undefined_length = "OB", True
    receive(node.state, [item, *radiographs(1, first=5)])
    node.follow()
    assert node.send("one") == 2
    assert states(node) == {"one": (0, 1, 1)}
    (letter,) = reading.dead_letters(node.state / "forward.sqlite")
    assert "MPEG-4" in letter.error
    assert letter.cure.startswith("Allow MPEG-4")
    assert len(list(folder.iterdir())) == 1


def test_attack_a_frame_that_is_larger_than_its_header_says_is_not_transcoded(tmp_path: Path) -> None:
    item = phantom_study("chest-xray", 1, seed=1)[0]
    jpeg_ls_bomb(item)
    path = tmp_path / "bomb.dcm"
    path.write_bytes(to_bytes(item))
    with pytest.raises(PeerError, match="65535 x 65535 pixels, the header says otherwise"):
        to_little_endian(path, tmp_path / "copy.dcm", implicit=False)
    assert not (tmp_path / "copy.dcm").exists()


def test_a_transcoding_that_ends_the_process_is_begun_three_times_only(tmp_path: Path) -> None:
    with archive(0x0000, syntaxes=["1.2.840.10008.1.2"]) as (peer, got):
        node = ForwardingNode(tmp_path, [ALL], [peer])
        receive(tmp_path, radiographs(1))
        node.follow()
        for _ in range(3):
            (row,) = node.queue.due("one", node.now(), 1)
            node.queue.begin(row)  # and then the process is gone
        assert node.send("one") == 1
        assert states(node) == {"one": (0, 0, 1)}
        assert got == []
        node.queue.retry([], "one")
        assert node.send("one") == 1
        assert states(node) == {"one": (0, 1, 0)}


def test_back_off_grows_to_ten_minutes_with_full_jitter() -> None:
    assert [delay(n, lambda: 1.0) for n in (1, 2, 3, 30)] == [2.0, 4.0, 8.0, BACKOFF_CAP_S]
    assert delay(5, lambda: 0.0) == 0.0
    breaker = Breaker(lambda: 0.5)
    assert breaker.failed(100.0) == 1.0
    assert not breaker.closed(100.9)
    assert breaker.closed(101.0)
    breaker.failed(101.0)
    breaker.worked()
    assert breaker.closed(101.0)


@pytest.mark.parametrize(
    ("status", "tries", "state", "busy"),
    [
        (0x0000, 0, "sent", False),
        (0x0111, 9, "sent", False),
        (0xB006, 0, "sent", False),
        (0xA700, 99, "waiting", True),
        (0xA900, 0, "waiting", False),
        (0xA900, DEAD_AFTER - 1, "dead", False),
        (0xC000, DEAD_AFTER - 1, "dead", False),
        (0x0122, DEAD_AFTER - 1, "dead", False),
        (0x9999, 0, "waiting", False),
    ],
)
def test_what_a_status_means(status: int, tries: int, state: str, busy: bool) -> None:
    verdict = judge(status, tries)
    assert (verdict.state, verdict.busy) == (state, busy)
    assert bool(verdict.error) == bool(verdict.cure) == (state != "sent")


def test_a_peer_that_stops_reading_is_given_up_and_memory_does_not_fill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The association is accepted, then nothing is read any more: 30 MB find no taker."""
    monkeypatch.setattr(peers, "_STALL_S", 1)
    stalled = threading.Event()

    def stall(event: evt.Event) -> None:
        if event.data[0] == 0x04:  # P-DATA-TF: the library's reading thread stands still from here on
            stalled.wait(60)

    ae = AE(ae_title="ONE")
    ae.add_supported_context(DigitalXRayImageStorageForPresentation, "1.2.840.10008.1.2.1")
    port = free_port()
    server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_DATA_RECV, stall)])
    node = ForwardingNode(tmp_path, [ALL], [Peer("one", "ONE", "127.0.0.1", port)])
    (item,) = radiographs(1)
    item.NumberOfFrames = 60
    item.PixelData = bytes(item.Rows * item.Columns * 2 * 60)
    receive(tmp_path, [item])
    node.follow()
    try:
        began = time.monotonic()
        assert node.send("one") == 0
        assert time.monotonic() - began < 30
    finally:
        stalled.set()
        server.shutdown()
    assert states(node) == {"one": (1, 0, 0)}
    (one,) = reading.destinations(tmp_path / "forward.sqlite", {"one": ""})
    assert one.last_error


def test_what_a_retired_destination_never_takes_can_be_given_up(tmp_path: Path) -> None:
    node = ForwardingNode(tmp_path, [ALL], [Peer("one", "ONE", "127.0.0.1", 1)])
    (first, second) = radiographs(2)
    receive(tmp_path, [first, second])
    first.ImageComments = "changed"
    receive(tmp_path, [first])
    node.follow()
    (letter,) = reading.dead_letters(tmp_path / "forward.sqlite")
    assert node.queue.drop([letter.id, letter.id - 1]) == 1  # what waits is dropped only with its destination
    assert states(node) == {"one": (2, 0, 0)}
    assert node.queue.drop([], "one") == 2
    (one,) = reading.destinations(tmp_path / "forward.sqlite", {})
    assert (one.configured, one.waiting, one.dropped) == (False, 0, 3)
    assert node.follow() == 0


def test_requests_are_taken_once_and_a_damaged_one_is_left_out(tmp_path: Path) -> None:
    requests = reading.Requests(tmp_path / "requests", tmp_path / "ear")
    assert list(requests.take()) == []
    requests.leave(reading.Request("ann", "retry", [1, 2]))
    (tmp_path / "requests" / "0.json").write_text("{")
    assert list(requests.take()) == [reading.Request("ann", "retry", [1, 2])]
    assert list(requests.take()) == []


def test_what_is_no_uid_is_not_proposed_and_holds_up_no_association() -> None:
    proposed = contexts_for(
        [("1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.1.2.1"), ("../x", "1.2.840.10008.1.2.1"), ("1.2.3", "not a uid")]
    )
    assert {str(one.abstract_syntax) for one in proposed} == {"1.2.840.10008.5.1.4.1.1.7"}
