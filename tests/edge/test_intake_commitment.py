"""Storage Commitment: what is on the disk is safe, what is not is said so, and the sender hears it in the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.sop_class import StorageCommitmentPushModel  # type: ignore[attr-defined]

from edge.intake.commitment import (
    MAX_TRIES,
    WELL_KNOWN_INSTANCE,
    Asked,
    Commitments,
    judge,
    read_request,
)
from edge.intake.peers import AllowList, Peer
from edge.intake.reports import Reports, sender
from edge.intake.spool import Spool
from edge.intake.tls import Tls
from scripts.lab.certificates import Certificates
from scripts.lab.child import free_port, wait_until
from scripts.lab.parts import start_orthanc
from shared.errors import PeerError
from tests.simulators.modality import phantom_study, storescu, write_files
from tests.simulators.node import make_door, make_spool
from tests.simulators.release import HandClock

ITEM = phantom_study("chest-xray", 0, seed=1)[0]
PAIR = (str(ITEM.SOPClassUID), str(ITEM.SOPInstanceUID))


def request(*pairs: tuple[str, str], transaction: str = "2.25.77") -> Dataset:
    dataset = Dataset()
    dataset.TransactionUID = transaction
    dataset.ReferencedSOPSequence = [Dataset() for _ in pairs]
    for item, (sop_class, instance) in zip(dataset.ReferencedSOPSequence, pairs, strict=True):
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, instance
    return dataset


class Hears:
    """A modality that asks, and keeps the reports it hears."""

    def __init__(self, answer: int = 0x0000) -> None:
        self.reports: list[tuple[int, Dataset]] = []
        self.answer = answer
        self.heard = threading.Event()

    def on_report(self, event: Any) -> tuple[int, None]:
        self.reports.append((event.event_type, event.event_information))
        self.heard.set()
        return self.answer, None

    def ask(self, port: int, dataset: Dataset, instance: str = WELL_KNOWN_INSTANCE, *, wait: bool = True) -> int:
        ae = AE(ae_title="MODALITY")
        ae.add_requested_context(StorageCommitmentPushModel)
        association = ae.associate(
            "127.0.0.1", port, ae_title="RADFLEET", evt_handlers=[(evt.EVT_N_EVENT_REPORT, self.on_report)]
        )
        assert association.is_established
        status, _ = association.send_n_action(dataset, 1, StorageCommitmentPushModel, instance)
        if wait and status.Status == 0:
            assert self.heard.wait(10)
        association.release()
        return int(status.Status)


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    made = make_spool(tmp_path)
    yield made
    made.close()


@pytest.fixture
def port(spool: Spool, tmp_path: Path) -> Iterator[int]:
    door = make_door(spool)
    assert storescu(door.port, write_files(tmp_path / "send", [ITEM])).returncode == 0
    yield door.port
    door.stop()


def state(spool: Spool) -> list[str]:
    return [row["state"] for row in spool.index.rows("SELECT state FROM commitments ORDER BY asked_at")]


def test_what_is_stored_is_reported_safe_on_the_same_association(spool: Spool, port: int) -> None:
    modality = Hears()
    assert modality.ask(port, request(PAIR)) == 0x0000
    ((event, report),) = modality.reports
    assert event == 1
    assert report.TransactionUID == "2.25.77"
    assert report.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == PAIR[1]
    assert "FailedSOPSequence" not in report
    wait_until("the report to be taken", lambda: state(spool) == ["taken"])
    assert spool.index.digests(PAIR[1])[0]["committed_at"] > 0


def test_every_instance_that_is_not_safe_gets_its_reason(spool: Spool, port: int) -> None:
    modality = Hears()
    other = ("1.2.840.10008.5.1.4.1.1.7", PAIR[1])
    modality.ask(port, request(PAIR, ("1.2.840.10008.5.1.4.1.1.7", "1.2.3.4"), other))
    ((event, report),) = modality.reports
    assert event == 2
    assert [(one.ReferencedSOPInstanceUID, one.FailureReason) for one in report.FailedSOPSequence] == [
        ("1.2.3.4", 0x0112),
        (PAIR[1], 0x0119),
    ]
    assert len(report.ReferencedSOPSequence) == 1


def test_attack_a_file_that_lost_bytes_is_not_called_safe(spool: Spool, port: int) -> None:
    row = spool.index.digests(PAIR[1])[0]
    path = spool.folder / row["file"]
    path.write_bytes(path.read_bytes()[:-2])
    modality = Hears()
    modality.ask(port, request(PAIR))
    assert modality.reports[0][1].FailedSOPSequence[0].FailureReason == 0x0112


@pytest.mark.parametrize(
    ("dataset", "instance", "status"),
    [
        (request(), WELL_KNOWN_INSTANCE, 0x0115),
        (request(PAIR, transaction=""), WELL_KNOWN_INSTANCE, 0x0115),
        (Dataset(), WELL_KNOWN_INSTANCE, 0x0115),
        (request(PAIR), "1.2.3", 0x0112),
    ],
)
def test_a_request_that_asks_nothing_is_refused(
    spool: Spool, port: int, dataset: Dataset, instance: str, status: int
) -> None:
    if not dataset:
        dataset.PatientID = "x"
    assert Hears().ask(port, dataset, instance) == status
    assert state(spool) == []


def test_attack_a_request_for_more_than_the_limit_is_refused() -> None:
    from edge.intake import commitment
    from tests.simulators.modality import encoded

    many = request(*[PAIR] * 20)
    assert len(read_request(encoded(many), "1.2.840.10008.1.2.1").references) == 20
    commitment.REFERENCES_LIMIT, kept = 19, commitment.REFERENCES_LIMIT
    try:
        with pytest.raises(PeerError):
            read_request(encoded(many), "1.2.840.10008.1.2.1")
    finally:
        commitment.REFERENCES_LIMIT = kept


def test_attack_a_request_of_empty_items_is_refused_before_it_is_parsed() -> None:
    bomb = b"\x08\x00\x99\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\0\0\0\0" * 500_000
    began = time.process_time()
    with pytest.raises(PeerError, match="at most"):
        read_request(bomb, "1.2.840.10008.1.2.1")
    assert time.process_time() - began < 1.0


def test_judging_needs_class_and_instance() -> None:
    report = judge(Asked("1.2", (("A", "1"), ("B", "1"), ("A", "2"))), lambda uid: ["A"] if uid == "1" else [])
    assert report.safe == (("A", "1"),)
    assert report.failed == (("B", "1", 0x0119), ("A", "2", 0x0112))
    assert report.event == 2


class Listening:
    """A modality's own port for reports; the first `refusals` are answered with a failure."""

    def __init__(self, hears: Hears) -> None:
        ae = AE(ae_title="MODALITY")
        ae.add_supported_context(StorageCommitmentPushModel, scu_role=True, scp_role=True)
        self.port = free_port()
        self.server = ae.start_server(
            ("127.0.0.1", self.port), block=False, evt_handlers=[(evt.EVT_N_EVENT_REPORT, hears.on_report)]
        )


def unanswered(spool: Spool, port: int) -> None:
    """Asks, and takes no report on that association."""
    Hears(answer=0x0110).ask(port, request(PAIR))
    wait_until("the association to end", lambda: bool(spool.index.rows("SELECT 1 FROM peers WHERE bytes > 0")))
    assert state(spool) == ["waiting"]


def make_reports(spool: Spool, door_commitments: Any, peer_port: int, clock: HandClock) -> Reports:
    allow = AllowList((Peer("MODALITY", "127.0.0.1", port=peer_port),))
    return Reports(door_commitments, allow, send=sender("RADFLEET"), clock=clock)


def later() -> HandClock:
    clock = HandClock()
    clock.advance(3600)
    return clock


def test_a_report_that_was_not_taken_goes_out_on_a_new_association(spool: Spool, port: int) -> None:
    unanswered(spool, port)
    hears = Hears()
    listening = Listening(hears)
    try:
        assert make_reports(spool, Commitments(spool, later()), listening.port, later()).step() == 1
    finally:
        listening.server.shutdown()
    ((event, report),) = hears.reports
    assert (event, report.TransactionUID) == (1, "2.25.77")
    assert state(spool) == ["taken"]


def test_a_peer_that_is_away_is_tried_again_and_given_up_in_the_end(spool: Spool, port: int) -> None:
    unanswered(spool, port)
    clock = later()
    reports = make_reports(spool, Commitments(spool, clock), free_port(), clock)
    for _ in range(MAX_TRIES):
        assert state(spool) == ["waiting"]
        assert reports.step() == 0
        assert reports.step() == 0  # not before its time
        clock.advance(4000)
    assert state(spool) == ["given up"]
    (row,) = spool.index.rows("SELECT * FROM commitments")
    assert row["tries"] == MAX_TRIES
    assert "MODALITY" in row["last_error"]


def test_a_peer_without_a_port_is_named_with_the_cure(spool: Spool, port: int) -> None:
    unanswered(spool, port)
    make_reports(spool, Commitments(spool, later()), 0, later()).step()
    assert "dicom.allow" in spool.index.rows("SELECT last_error FROM commitments")[0]["last_error"]


def test_a_request_survives_the_end_of_the_process(spool: Spool, port: int, tmp_path: Path) -> None:
    unanswered(spool, port)
    again = make_spool(tmp_path)  # a second reader stands for the process that starts anew
    (due,) = Commitments(again, later()).due(later().now().timestamp())
    assert due.report.safe == (PAIR,)
    again.close()


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "TLS"])
def test_orthanc_as_a_modality_gets_its_commitment(tmp_path: Path, secure: bool) -> None:
    spool = make_spool(tmp_path / "node")
    door = make_door(spool, allow=(Peer("PACS", "127.0.0.1"),))
    pki = Certificates(tmp_path / "pki")
    orthanc = start_orthanc(
        tmp_path / "orthanc", peers=[("RADFLEET", door.port)], tls=(*pki.client, pki.ca) if secure else None
    )
    rest = f"http://127.0.0.1:{orthanc.http_port}"
    try:
        files = write_files(tmp_path / "send", [ITEM])
        stored = httpx.post(f"{rest}/instances", content=files[0].read_bytes()).json()
        httpx.post(f"{rest}/modalities/RADFLEET/store", json=[stored["ID"]], timeout=30).raise_for_status()
        asked = httpx.post(
            f"{rest}/modalities/RADFLEET/storage-commitment", json={"DicomInstances": [list(PAIR)]}, timeout=30
        ).json()
        listening = Peer("PACS", "127.0.0.1", port=orthanc.dicom_port)
        send = sender("RADFLEET", Tls(*pki.server, pki.ca) if secure else None)
        reports = Reports(door.commitments, AllowList((listening,)), send=send, clock=later())

        def reported() -> bool:
            reports.step()
            answer = httpx.get(f"{rest}{asked['Path']}", timeout=30).json()
            return bool(answer["Status"] == "Success")

        wait_until("Orthanc's report", reported)
        assert state(spool) == ["taken"]
    finally:
        orthanc.child.stop()
        door.stop()
        spool.close()


def test_attack_a_title_that_no_library_takes_does_not_stop_the_reports_of_others(spool: Spool, port: int) -> None:
    unanswered(spool, port)
    with spool.index.durable() as db:
        db.execute(
            "INSERT INTO commitments SELECT '2.25.78', 'BAD', address, asked, asked_at, state, tries, 0, ''"
            " FROM commitments"
        )
    clock = later()
    sent: list[str] = []

    def send(_report: object, ae_title: str, _host: str, _port: int) -> None:
        if ae_title == "BAD":
            raise ValueError("no AE title")
        sent.append(ae_title)

    allow = AllowList((Peer("*", port=104),))
    assert Reports(Commitments(spool, clock), allow, send=send, clock=clock).step() == 1
    assert sent == ["MODALITY"]
    rows = spool.index.rows("SELECT ae_title, state, tries, asked FROM commitments ORDER BY ae_title")
    assert [(row["ae_title"], row["state"], row["tries"]) for row in rows] == [
        ("BAD", "waiting", 1),
        ("MODALITY", "taken", 0),
    ]
    assert rows[1]["asked"] == ""  # what is over needs no room


def test_attack_requests_without_end_are_refused(spool: Spool, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge.intake.commitment.WAITING_LIMIT", 1)
    unanswered(spool, port)
    assert Hears().ask(port, request(PAIR, transaction="2.25.79")) == 0x0213
    assert state(spool) == ["waiting"]
