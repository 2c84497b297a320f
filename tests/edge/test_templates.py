"""Reports out of a template have the bytes of reports that highdicom builds from nothing."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pydicom
import pytest
from highdicom.sr import Comprehensive3DSR
from msgspec.structs import replace
from pydicom.dataset import Dataset
from pydicom.uid import UID

from edge.results import report as module
from edge.results.report import Document, build_report
from edge.results.tables import AnswerRecord
from edge.results.template import Templates
from tests.edge.test_pipeline import Node
from tests.simulators.modality import phantom_study


def plainly(record: AnswerRecord, source: Dataset) -> Document:
    """The report without a template."""
    evidence = []
    for one in record.inputs:
        item = Dataset()
        item.StudyInstanceUID, item.SeriesInstanceUID = record.study, record.series
        item.SOPInstanceUID, item.SOPClassUID = UID(one.sop_instance), UID(one.sop_class)
        evidence.append(item)
    evidence[0].update(module.patient_and_study(source))
    evidence[0].StudyInstanceUID = record.study
    evidence[0].PatientName = ""
    uid = module.document_uid("report", record)
    answered = datetime.fromtimestamp(record.answered_at, UTC)
    made = Comprehensive3DSR(
        evidence=evidence,
        content=module._content(record),
        series_instance_uid=module.hashed_uid("report-series", record.study),
        series_number=module.SERIES_NUMBER["report"],
        sop_instance_uid=uid,
        instance_number=module.instance_number(uid),
        manufacturer=module.MANUFACTURER,
        is_complete=True,
        is_final=False,
        is_verified=False,
        series_description=module.series_description(record, "report"),
        manufacturer_model_name=record.package_name[:64] or "Radfleet",
        software_versions=module.software_versions(record),
        content_date=answered.date(),
        content_time=answered.time(),
        specific_character_set="ISO_IR 192",
    )
    made.PatientName = module.patient_and_study(source).PatientName
    return module.encode(made, record, "report")


def varied(record: AnswerRecord, rng: np.random.Generator) -> Iterator[AnswerRecord]:
    """The record with other values wherever two answers may differ."""
    for reason in ("", "the image is blank", "unlike the training images (distance 3.1, limit 2.0)"):
        for complete in ("", "association ended"):
            for degraded in ("", "CUDAExecutionProvider is not usable"):
                for chosen in (0, 2):
                    probability = float(rng.random())
                    yield replace(
                        record,
                        answer=f"{rng.integers(1 << 60):x}",
                        study=f"2.25.{rng.integers(1 << 60)}",
                        series=f"2.25.{rng.integers(1 << 60)}",
                        version=int(rng.integers(1, 9)),
                        reason=reason,
                        complete=complete,
                        degraded=degraded,
                        chosen=chosen,
                        probabilities=(probability, 0.0, probability),
                        answered_at=1.7e9 + float(rng.random()) * 1e7,
                    )


@pytest.mark.parametrize("head", ["chest-xray", "chest-ct"])
def test_a_report_out_of_a_template_is_the_one_built_from_nothing_to_the_byte(
    tmp_path: Path, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TEMPLATES", Templates())
    node = Node(tmp_path)
    items = phantom_study(head, 1, seed=3, slices=5)
    node.put(items)
    node.run(after_s=1)
    record = node.record(node.worklist()[0].answer)
    record = replace(record, inputs=(*record.inputs, record.inputs[0]))  # two frames of one object
    strange = pydicom.Dataset()  # a source that says nothing but who it is
    strange.PatientID, strange.PatientName = "X-9", "ÅNGSTRÖM^Ω"
    rng = np.random.default_rng(0)
    for _ in range(2):  # the second time around, every template is warm
        for one in varied(record, rng):
            for source in (items[0], strange):
                assert build_report(one, source).data == plainly(one, source).data
        frame = replace(record.shown, frame=3)
        of_frame = replace(record, shown=frame, inputs=(frame,))
        assert build_report(of_frame, items[0]).data == plainly(of_frame, items[0]).data
