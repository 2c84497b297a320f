"""Documents, delivery and reading: what leaves the pipeline towards the PACS and the page."""

from __future__ import annotations

import io
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pydicom
import pytest
from msgspec.structs import replace
from PIL import Image

from edge.intake.part import Arriving
from edge.results import reading
from edge.results.documents import build_documents
from edge.results.report import RESEARCH_ONLY, build_report, device_uid
from edge.results.sender import BACKOFF_CAP_S
from edge.results.tables import AnswerRecord
from scripts.lab.child import free_port
from scripts.lab.parts import Orthanc, start_orthanc
from tests.simulators.modality import encoded, phantom_study
from tests.simulators.node import make_pipeline, make_sender, make_spool, run_until_idle


class Clock:
    """A clock that a test moves by hand."""

    def __init__(self) -> None:
        self.seconds = 1_800_000_000.0

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.seconds, UTC)

    def monotonic(self) -> float:
        return self.seconds


def put(state: Path, item: pydicom.Dataset, clock: Clock | None = None) -> None:
    spool = make_spool(state, clock)
    spool.store(
        Arriving(str(item.SOPClassUID), str(item.SOPInstanceUID), str(item.file_meta.TransferSyntaxUID), "MODALITY"),
        [encoded(item)],
    )
    spool.close()


def answered(state: Path, item: pydicom.Dataset) -> AnswerRecord:
    put(state, item)
    run_until_idle(make_pipeline(state))
    (row,) = reading.worklist(state / "results.sqlite", state / "labels.sqlite")
    record = reading.answer_detail(state / "results.sqlite", row.answer)
    assert record is not None
    return record


@pytest.fixture
def xray(tmp_path: Path) -> AnswerRecord:
    return answered(tmp_path, phantom_study("chest-xray", 1, seed=11)[0])


def documents(record: AnswerRecord, state: Path) -> dict[str, bytes]:
    built = build_documents(record, state / "spool", 0.0)
    assert built.state == "built"
    return {row["kind"]: row["data"] for row in built.rows}


def test_a_document_built_again_is_the_same_to_the_byte(xray: AnswerRecord, tmp_path: Path) -> None:
    assert documents(xray, tmp_path) == documents(xray, tmp_path)


def test_a_changed_answer_is_a_new_object(xray: AnswerRecord, tmp_path: Path) -> None:
    def uid(record: AnswerRecord) -> str:
        return str(pydicom.dcmread(io.BytesIO(documents(record, tmp_path)["report"])).SOPInstanceUID)

    others = [
        replace(xray, version=2),
        replace(xray, package="f" * 64),
        replace(xray, inputs=(replace(xray.inputs[0], digest="e" * 64),)),
    ]
    assert len({uid(record) for record in [xray, *others]}) == 4
    assert device_uid(replace(xray, package="f" * 64)) != device_uid(xray)


def test_the_report_says_what_found_what_and_that_nobody_verified_it(xray: AnswerRecord, tmp_path: Path) -> None:
    report = pydicom.dcmread(io.BytesIO(documents(xray, tmp_path)["report"]))
    source = pydicom.dcmread(next((tmp_path / "spool").glob("*.dcm")))
    assert report.SOPClassUID == "1.2.840.10008.5.1.4.1.1.88.34"
    assert report.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    assert (report.VerificationFlag, report.CompletionFlag) == ("UNVERIFIED", "COMPLETE")
    for name in ("PatientID", "PatientName", "StudyInstanceUID", "AccessionNumber"):
        assert report[name].value == source[name].value
    evidence = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
    assert evidence.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
    text = report.to_json()
    assert RESEARCH_ONLY in text
    assert xray.package in text
    assert f"release {xray.release}" in text
    chosen = xray.classes[xray.chosen].code
    assert f'"{chosen.value}"' in text
    assert '"122157"' in text
    assert str(round(xray.probabilities[xray.chosen], 4)) in text
    assert report.ContributingEquipmentSequence[0].DeviceUID == device_uid(xray)


def test_not_assessed_is_said_with_its_reason_and_without_a_probability(xray: AnswerRecord, tmp_path: Path) -> None:
    source = pydicom.dcmread(next((tmp_path / "spool").glob("*.dcm")))
    report = build_report(replace(xray, reason="unlike the training images"), source)
    text = pydicom.dcmread(io.BytesIO(report.data)).to_json()
    assert "Not assessed: unlike the training images." in text
    assert '"122157"' not in text
    assert f'"{xray.classes[xray.chosen].code.value}"' not in text


def test_the_picture_carries_its_warning_in_the_pixels(xray: AnswerRecord, tmp_path: Path) -> None:
    picture = pydicom.dcmread(io.BytesIO(documents(xray, tmp_path)["picture"]))
    assert picture.SOPClassUID == "1.2.840.10008.5.1.4.1.1.7"
    assert picture.BurnedInAnnotation == "YES"
    assert picture.SourceImageSequence[0].ReferencedSOPInstanceUID == xray.shown.sop_instance
    pixels = picture.pixel_array
    assert pixels.ndim == 3
    assert pixels[-50:].max() == 255  # the text band
    body = pixels[:-56].astype(int)
    assert (np.abs(body[..., 0] - body[..., 2]) > 30).mean() > 0.05  # coloured evidence over a grey image


def test_odd_patient_and_study_values_cost_no_document(tmp_path: Path) -> None:
    item = phantom_study("chest-xray", 1, seed=11)[0]
    item.PatientName = "A" * 300
    item.PatientID = "B" * 300
    item["StudyDate"]._value, item["StudyTime"]._value, item["PatientSex"]._value = "00000000", "11:42:21", "\u00c4"
    record = answered(tmp_path, item)
    report = pydicom.dcmread(io.BytesIO(documents(record, tmp_path)["report"]))
    assert (report.StudyDate, report.StudyTime, report.PatientSex) == ("", "114221", "")
    assert report.PatientName == "A" * 64


def test_no_patient_is_named_in_warnings_while_documents_are_built(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    item = phantom_study("chest-xray", 1, seed=11)[0]
    item.PatientName = "SINGLECOMPONENT"  # highdicom warns of such names, quoting them
    answered(tmp_path, item)
    assert not [w for w in recwarn if "SINGLECOMPONENT" in str(w.message)]
    assert "SINGLECOMPONENT" not in caplog.text


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[Orthanc]:
    orthanc = start_orthanc(tmp_path / "pacs")
    yield orthanc
    orthanc.child.stop()


@pytest.mark.e2e
def test_the_pacs_gets_report_and_picture_into_the_same_study(
    xray: AnswerRecord, tmp_path: Path, pacs: Orthanc
) -> None:
    sender = make_sender(tmp_path, pacs.dicom_port)
    assert sender.step() == 2
    assert sender.step() == 0
    found = pacs.instances(StudyInstanceUID=xray.study)
    kept = {str(item.SOPClassUID): item for item in (pydicom.dcmread(io.BytesIO(pacs.file(one))) for one in found)}
    made = documents(xray, tmp_path)
    assert kept.keys() == {"1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.88.34"}
    assert kept["1.2.840.10008.5.1.4.1.1.7"] == pydicom.dcmread(io.BytesIO(made["picture"]))
    assert kept["1.2.840.10008.5.1.4.1.1.88.34"] == pydicom.dcmread(io.BytesIO(made["report"]))
    (row,) = reading.worklist(tmp_path / "results.sqlite", tmp_path / "labels.sqlite")
    assert (row.delivered, row.documents) == (2, 2)


@pytest.mark.e2e
def test_a_result_sent_but_not_marked_is_sent_again_and_doubles_nothing(
    xray: AnswerRecord, tmp_path: Path, pacs: Orthanc
) -> None:
    copy = sqlite3.connect(tmp_path / "results.sqlite").execute("SELECT sop_instance, data FROM deliveries").fetchall()
    assert make_sender(tmp_path, pacs.dicom_port).step() == 2
    with sqlite3.connect(tmp_path / "results.sqlite") as database:  # as if the process had died before its commit
        for uid, data in copy:
            database.execute("UPDATE deliveries SET state = 'waiting', data = ? WHERE sop_instance = ?", (data, uid))
    assert make_sender(tmp_path, pacs.dicom_port).step() == 2
    assert pacs.count() == 2


def test_a_pacs_that_is_away_is_tried_later_and_survives_a_restart(xray: AnswerRecord, tmp_path: Path) -> None:
    clock = Clock()
    sender = make_sender(tmp_path, free_port(), clock=clock)
    waits = []
    for _ in range(14):
        assert sender.step() == 0
        waits.append(sender._pause_until - clock.seconds)
        clock.seconds = sender._pause_until + 0.001
    assert max(waits) <= BACKOFF_CAP_S
    assert max(waits[:3]) <= 8
    counts = reading.counts(tmp_path / "results.sqlite")
    assert counts.waiting_for_pacs == 2
    assert "cannot be reached" in counts.oldest_error


def test_the_page_reads_images_and_labels(xray: AnswerRecord, tmp_path: Path) -> None:
    results, labels = tmp_path / "results.sqlite", tmp_path / "labels.sqlite"
    image = Image.open(io.BytesIO(reading.image_png(results, xray.answer)))
    overlay = Image.open(io.BytesIO(reading.evidence_png(results, xray.answer)))
    assert image.mode == "L"
    assert min(image.size) >= 400
    assert overlay.mode == "RGBA"
    assert np.asarray(overlay)[..., 3].min() == 0
    assert np.asarray(overlay)[..., 3].max() == 255
    (row,) = reading.worklist(results, labels)
    assert row.title == "Chest X-ray"
    assert row.patient_name == "DOE^JANE"
    assert 0 < row.probability <= 1
    assert reading.versions(results, xray.answer) == [1]
    assert reading.worklist(tmp_path / "absent.sqlite", labels) == []
    assert reading.counts(tmp_path / "absent.sqlite").answers == 0
