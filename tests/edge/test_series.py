"""When a series is thought complete: the evidence, the reason on record, and what late objects do."""

from __future__ import annotations

import sqlite3
import struct
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset

from edge.intake.part import Arriving
from edge.results import reading
from edge.results.reading import WorklistRow
from edge.results.report import build_report
from edge.results.series import Announced, Evidence, Rules, announcement, completeness, reopened
from edge.results.store import Store
from edge.results.tables import AnswerRecord
from tests.simulators.modality import encoded, phantom_study
from tests.simulators.node import OneModel, baseline, make_pipeline, make_spool, run_until_idle
from tests.simulators.reading import ReadingNode

FIRM, LOOSE = Announced(24, firm=True), Announced(24, firm=False)


@pytest.mark.parametrize(
    ("now", "known", "why"),
    [
        (100.5, {}, ""),
        (103.1, {}, "quiet time"),
        (103.1, {"unread": True}, ""),
        (100.5, {"ended": True}, "association ended"),
        (100.5, {"ended": True, "unread": True}, ""),
        (160.0, {"last_stored_at": 159.9, "unread": True}, "hard limit"),
        (100.5, {"arrived": 24, "announced": FIRM}, "expected count 24 of 24"),
        (100.5, {"arrived": 24, "announced": LOOSE}, "expected count 24 of 24"),
        (100.5, {"arrived": 24, "announced": FIRM, "unread": True}, ""),
        (103.1, {"arrived": 20, "announced": FIRM, "ended": True}, ""),
        (159.0, {"arrived": 20, "announced": FIRM}, "hard limit with 20 of 24"),
        (100.5, {"arrived": 20, "announced": LOOSE, "ended": True}, ""),
        (103.1, {"arrived": 20, "announced": LOOSE}, "quiet time with 20 of 24"),
        (100.5, {"arrived": 25, "announced": FIRM}, ""),
        (100.5, {"arrived": 25, "announced": FIRM, "ended": True}, "association ended"),
        (103.1, {"arrived": 25, "announced": FIRM}, "quiet time"),
        (98.0, {}, ""),  # the clock went back a little
        (10.0, {}, "hard limit"),  # or to another day: nobody waits for it to return
    ],
)
def test_when_a_series_is_complete(now: float, known: dict[str, object], why: str) -> None:
    plain = {"pending_since": 99.0, "last_stored_at": 100.0}
    assert completeness(Rules(3.0, 60.0), now, Evidence(**{**plain, **known})) == why  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, None),
        ({"NumberOfSeriesRelatedInstances": 24, "ImagesInAcquisition": 12}, ("", 24)),
        ({"ImagesInAcquisition": 12, "AcquisitionNumber": 3}, ("acquisition 3", 12)),
        ({"ImagesInAcquisition": 12}, ("acquisition 0", 12)),
        ({"ImagesInAcquisition": 1}, None),
        ({"ImagesInAcquisition": 12, "NumberOfFrames": 12}, None),
        ({"ImagesInAcquisition": -5}, None),
        ({"ImagesInAcquisition": 10**9}, None),
        ({"Modality": "PT", "NumberOfSlices": 47, "SeriesType": ["STATIC", "IMAGE"]}, ("", 47)),
        ({"Modality": "PT", "NumberOfSlices": 47, "SeriesType": ["DYNAMIC", "IMAGE"]}, None),
        (
            {"Modality": "PT", "NumberOfSlices": 47, "SeriesType": ["DYNAMIC", "IMAGE"], "NumberOfTimeSlices": 4},
            ("", 188),
        ),
        (
            {
                "Modality": "PT",
                "NumberOfSlices": 10,
                "SeriesType": ["GATED", "IMAGE"],
                "NumberOfRRIntervals": 2,
                "NumberOfTimeSlots": 8,
            },
            ("", 160),
        ),
        ({"Modality": "NM", "NumberOfSlices": 47, "NumberOfFrames": 47}, None),
    ],
)
def test_what_an_object_announces(values: dict[str, object], says: tuple[str, int] | None) -> None:
    dataset = Dataset()
    for name, value in values.items():
        setattr(dataset, name, value)
    assert announcement(dataset) == says


def test_attack_an_announcement_that_is_no_number_is_none() -> None:
    for value in (b"ABC ", b"\xff\xff", b"1e9 ", b"12\\13 ", b""):
        raw = struct.pack("<HHL", 0x0020, 0x1209, len(value)) + value
        dataset = pydicom.filereader.read_dataset(BytesIO(raw), is_implicit_VR=True, is_little_endian=True)
        assert announcement(dataset) == (("", 12) if value.startswith(b"12") else None)


def test_the_reason_says_how_many_came_late() -> None:
    assert reopened("quiet time", 0) == "quiet time"
    assert reopened("quiet time", 1) == "quiet time, opened again by 1 late image"
    assert reopened("hard limit with 20 of 24", 2) == "hard limit with 20 of 24, opened again by 2 late images"


class Clock:
    """Time by hand."""

    def __init__(self) -> None:
        self.seconds = 1_800_000_000.0

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.seconds, UTC)

    def monotonic(self) -> float:
        return self.seconds


class Node:
    """A spool and a pipeline on one state folder and one clock."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.clock = Clock()
        self.spool = make_spool(state, self.clock)
        self.models = OneModel()
        self.start()

    def start(self) -> None:
        """A new process on the same state."""
        self.pipeline = make_pipeline(self.state, clock=self.clock, models=self.models)

    def put(self, items: list[pydicom.Dataset], association: str = "") -> None:
        for item in items:
            self.clock.seconds += 0.01
            uids = str(item.SOPClassUID), str(item.SOPInstanceUID), str(item.file_meta.TransferSyntaxUID)
            self.spool.store(Arriving(*uids, "MODALITY", association=association), [encoded(item)])

    def run(self, *, after_s: float = 0.0) -> None:
        self.clock.seconds += after_s
        run_until_idle(self.pipeline)

    def rows(self) -> list[WorklistRow]:
        return reading.worklist(self.state / "results.sqlite", self.state / "labels.sqlite")

    def record(self, version: int | None = None) -> AnswerRecord:
        (row,) = self.rows()
        record = reading.answer_detail(self.state / "results.sqlite", row.answer, version)
        assert record is not None
        return record

    def ask(self, question: str) -> list[tuple[object, ...]]:
        database = sqlite3.connect(self.state / "results.sqlite")
        found = database.execute(question).fetchall()
        database.close()
        return found


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def ct(slices: int, **values: object) -> list[pydicom.Dataset]:
    study = phantom_study("chest-ct", 2, seed=5, slices=slices)
    for item in study:
        for name, value in values.items():
            setattr(item, name, value)
    return list(study)


def test_the_last_of_the_announced_images_completes_a_series_at_once(node: Node) -> None:
    study = ct(6, NumberOfSeriesRelatedInstances=6)
    node.put(study[:5], association="open")
    node.run(after_s=10)
    assert node.rows() == []  # quiet, but one is missing
    node.put(study[5:], association="open")
    node.run()
    assert node.record().complete == "expected count 6 of 6"


def test_what_never_comes_is_waited_for_until_the_hard_limit(node: Node) -> None:
    study = ct(6, NumberOfSeriesRelatedInstances=6)
    node.put(study[:4], association="a")
    node.spool.association_ended("a")
    node.run(after_s=50)
    assert node.rows() == []
    node.run(after_s=11)
    assert node.record().complete == "hard limit with 4 of 6"


def test_an_image_that_cannot_be_read_has_arrived(node: Node) -> None:
    study = ct(4, NumberOfSeriesRelatedInstances=4)
    study[3].PixelData = study[3].PixelData[:1000]
    node.put(study)
    node.run()
    assert node.record().complete == "expected count 4 of 4, 1 image could not be read"
    assert len(node.record().inputs) == 3


def test_more_images_than_announced_give_a_new_version_that_says_so(node: Node) -> None:
    study = ct(6, ImagesInAcquisition=4)
    node.put(study[:4])
    node.run()
    assert node.record().complete == "expected count 4 of 4"
    node.put(study[4:])
    node.run()
    assert node.record().version == 1
    node.run(after_s=1)
    assert node.record().version == 2
    assert node.record().complete == "quiet time, opened again by 2 late images"
    assert node.record(1).complete == "expected count 4 of 4"


def test_two_acquisitions_are_counted_together(node: Node) -> None:
    study = ct(6, ImagesInAcquisition=3)
    for number, item in enumerate(study):
        item.AcquisitionNumber = 1 + number % 2
    node.put(study[:4])
    node.run()
    assert node.rows() == []
    node.put(study[4:])
    node.run()
    assert node.record().complete == "expected count 6 of 6"


def test_two_associations_that_carry_one_series_must_both_end(node: Node) -> None:
    study = ct(6)
    node.put(study[:2], association="a")
    node.put(study[2:4], association="b")
    node.run()
    node.spool.association_ended("b")
    node.run()
    assert node.rows() == []
    node.put(study[4:], association="a")
    node.spool.association_ended("a")
    node.run()
    assert (node.record().complete, node.record().version) == ("association ended", 1)
    assert len(node.record().inputs) == 6


def test_the_decision_is_the_same_when_the_process_dies_in_between(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    study = ct(6, NumberOfSeriesRelatedInstances=6)
    node.put(study[:3])
    node.run()
    node.start()  # what was announced and what arrived is on the disk
    node.put(study[3:])

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "close_series", die)
    with pytest.raises(KeyboardInterrupt):
        node.run()
    monkeypatch.undo()
    node.start()
    assert node.rows() == []
    node.run()
    assert (node.record().complete, node.record().version) == ("expected count 6 of 6", 1)


def test_the_report_says_why_the_series_was_thought_complete(node: Node) -> None:
    study = ct(4, NumberOfSeriesRelatedInstances=4)
    node.put(study)
    node.run()
    report = pydicom.dcmread(pydicom.filebase.DicomBytesIO(build_report(node.record(), study[0]).data))
    assert "Images read: 4. Series thought complete by: expected count 4 of 4." in report.to_json()


def test_the_page_and_the_api_say_it_too(tmp_path: Path) -> None:
    reader = ReadingNode(tmp_path).start()
    client = reader.client(reader.person("Ada", "radiologist"))
    try:
        node = Node(tmp_path)
        study = ct(4, ImagesInAcquisition=3)
        node.put(study[:3])
        node.run()
        node.put(study[3:])
        node.run(after_s=1)
        (answer,) = (row.answer for row in node.rows() if row.modality == "CT")
        why = "quiet time, opened again by 1 late image"
        assert client.get(f"/api/answers/{answer}").json()["complete"] == why
        assert why in client.get(f"/studies/{answer}").text
    finally:
        client.close()
        reader.stop()


# -- what has left the spool ----------------------------------------------------------------------------------------


def evict(node: Node) -> None:
    digests = [row["digest"] for row in node.spool.index.rows("SELECT digest FROM objects")]
    node.spool.evict(digests, promised_before=float("inf"))


def test_a_late_image_of_a_series_that_has_left_joins_what_its_images_said(node: Node) -> None:
    study = ct(6)
    node.put(study[:5])
    node.run(after_s=1)
    evict(node)
    node.put(study[5:])
    node.run(after_s=1)
    record = node.record()
    assert (record.version, len(record.inputs), record.assessed) == (2, 6, True)
    assert node.ask("SELECT COUNT(*) FROM answers WHERE documents <> 'built'") == [(0,)]


@pytest.mark.parametrize("how", ["another package", "pruned"])
def test_a_late_image_is_not_answered_alone_when_the_others_must_be_read_again(node: Node, how: str) -> None:
    study = ct(6)
    node.put(study[:5])
    node.run(after_s=1)
    evict(node)
    if how == "pruned":
        node.run(after_s=15 * 86400)
        assert node.ask("SELECT COUNT(*) FROM slices") == [(0,)]
    else:
        engine, manifest, _ = baseline()
        node.models.served = (engine, manifest, "b" * 64)
    node.put(study[5:])
    node.run(after_s=1)
    record = node.record()
    assert (record.version, record.assessed) == (2, False)
    assert record.reason == "5 earlier images of the series have left this node"
    assert node.record(1).assessed
    node.put(study[:5])  # sent again, the series is read whole
    node.run(after_s=1)
    record = node.record()
    assert (record.version, record.assessed, len(record.inputs)) == (3, True, 6)


def test_a_series_that_left_and_comes_again_keeps_its_answer(node: Node) -> None:
    study = ct(4)
    node.put(study)
    node.run(after_s=1)
    before = node.record()
    evict(node)
    node.run(after_s=15 * 86400)
    node.put(study[:2])
    node.run(after_s=100)
    assert node.record() == before
    node.put(study[2:])
    node.run(after_s=100)
    assert node.record() == before


def test_old_answers_stand_without_what_only_their_making_needed(node: Node) -> None:
    node.put(ct(4))
    node.run(after_s=1)
    (row,) = node.rows()
    picture = reading.image_png(node.state / "results.sqlite", row.answer)
    assert node.ask("SELECT COUNT(*) FROM deliveries WHERE state = 'waiting' AND length(data) > 0") == [(2,)]
    node.run(after_s=13 * 86400)
    assert node.ask("SELECT COUNT(*) FROM slices") == [(4,)]
    node.run(after_s=2 * 86400)
    assert node.ask("SELECT COUNT(*) FROM slices") == [(0,)]
    assert node.ask("SELECT COUNT(*) FROM peaks") == [(0,)]
    assert node.ask("SELECT DISTINCT state, length(data) FROM deliveries") == [("expired", 0)]
    assert node.record().assessed
    small = reading.image_png(node.state / "results.sqlite", row.answer)
    assert len(small) < len(picture)
