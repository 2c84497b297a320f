"""The report: a DICOM SR (TID 1500, Comprehensive 3D SR): what was found, by what, and that nobody verified it.

Every UID and date comes from the answer's record: building the document again gives the same bytes, so a
repeat after a crash overwrites nothing and a changed answer is a new object.
"""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime
from io import BytesIO

import highdicom
from highdicom.sr import (
    AlgorithmIdentification,
    CodedConcept,
    Comprehensive3DSR,
    DeviceObserverIdentifyingAttributes,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    QualitativeEvaluation,
    RelationshipTypeValues,
    SourceImageForMeasurementGroup,
    TextContentItem,
    TrackingIdentifier,
)
from msgspec import Struct, structs
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import UID

from edge.imaging.read import MANUFACTURER, lenient_text
from edge.results.store import inputs_digest
from edge.results.tables import AnswerRecord
from edge.results.template import Templates

RESEARCH_ONLY = "Research use only, not for diagnosis"
SERIES_NUMBER = {"report": 9101, "picture": 9102}  # high, so that they do not collide with the modality's

_PROBABILITY = Code("122157", "DCM", "Probability")
_FINDING = Code("121071", "DCM", "Finding")
_COMMENT = Code("121106", "DCM", "Comment")
_NO_UNIT = Code("{0:1}", "UCUM", "range: 0:1")
_NOT_ASSESSED = Code("not-assessed", "99RADFLEET", "Not assessed")
_PROCEDURES = {
    "CT": Code("77477000", "SCT", "Computed tomography"),
    "MR": Code("113091000", "SCT", "Magnetic resonance imaging"),
    "CR": Code("168537006", "SCT", "Plain radiography"),
    "DX": Code("168537006", "SCT", "Plain radiography"),
}
_ANY_PROCEDURE = Code("363679005", "SCT", "Imaging")
_COPIED = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "AccessionNumber"),
    *("StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName", "StudyDescription", "IssuerOfPatientID"),
)

_IN_REPORTS = tuple(
    name for name in _COPIED if name not in ("StudyInstanceUID", "StudyDescription", "IssuerOfPatientID")
)
_TEMPLATES = Templates()

_TIME = re.compile(r"([01][0-9]|2[0-3])([0-5][0-9]([0-5][0-9](\.[0-9]{1,6})?)?)?")


class Document(Struct, frozen=True):
    """One DICOM file for the PACS."""

    sop_instance: str
    sop_class: str
    transfer_syntax: str
    kind: str  # report, picture
    data: bytes


def document_uid(kind: str, record: AnswerRecord) -> str:
    """Returns the UID of one document: a hash of study, inputs, package and document version."""
    return hashed_uid(kind, record.answer, record.study, *_version_of(record))


def hashed_uid(*parts: str) -> str:
    """Returns `2.25.<128 bits of SHA-256 over the parts>` (PS3.5 B.2)."""
    digest = hashlib.sha256("\0".join(parts).encode()).digest()
    return f"2.25.{int.from_bytes(digest[:16], 'big')}"


def device_uid(record: AnswerRecord) -> str:
    """Returns the UID of package and variant: it changes with every change of the model, as IHE AIR asks."""
    return hashed_uid("device", record.package, record.variant)


def build_report(record: AnswerRecord, source: Dataset) -> Document:
    """Returns the SR of one answer.

    Args:
        record: the answer; one that is not assessed gives a report that says so, with the reason.
        source: data set of one of the inputs, for patient and study; its pixels are not needed.

    Raises:
        ValueError, TypeError, AttributeError: the source's own attributes cannot be written as DICOM.
    """
    marked = _marked(record)
    report = _TEMPLATES.report(
        _kind(record), _texts(record), lambda: (_tree(marked, patient_and_study(source)), _texts(marked))
    )
    answered = datetime.fromtimestamp(record.answered_at, UTC)
    report.ContentDate, report.ContentTime = answered.strftime("%Y%m%d"), answered.strftime("%H%M%S.%f")
    report.InstanceNumber = instance_number(document_uid("report", record))
    (current,) = report.CurrentRequestedProcedureEvidenceSequence
    current.ReferencedSeriesSequence[0].ReferencedSOPSequence = _references(record)
    for measurement in _measurements(record):
        _put_probability(report, measurement[0])
    copied = patient_and_study(source)
    for name in _IN_REPORTS:
        setattr(report, name, copied[name].value)
    return encode(report, record, "report")


def _tree(record: AnswerRecord, patient: Dataset) -> Dataset:
    """The SR as highdicom builds it, with one input."""
    evidence = Dataset()
    evidence.update(patient)  # gives patient and study to the document
    evidence.StudyInstanceUID = record.study
    evidence.SeriesInstanceUID = record.series
    evidence.SOPInstanceUID = UID(record.shown.sop_instance)
    evidence.SOPClassUID = UID(record.shown.sop_class)
    evidence.PatientName = ""  # highdicom warns about names, and would put one into the log
    uid = document_uid("report", record)
    answered = datetime.fromtimestamp(record.answered_at, UTC)
    tree: Dataset = Comprehensive3DSR(
        evidence=[evidence],
        content=_content(record),
        series_instance_uid=hashed_uid("report-series", record.study),
        series_number=SERIES_NUMBER["report"],
        sop_instance_uid=uid,
        instance_number=instance_number(uid),
        manufacturer=MANUFACTURER,
        is_complete=True,
        is_final=False,
        is_verified=False,
        series_description=series_description(record, "report"),
        manufacturer_model_name=record.package_name[:64] or "Radfleet",
        software_versions=software_versions(record),
        content_date=answered.date(),
        content_time=answered.time(),
        specific_character_set="ISO_IR 192",
    )
    return tree


def _kind(record: AnswerRecord) -> tuple[object, ...]:
    """Everything that decides on the tree, but for what `_texts` names."""
    return (
        *(record.head, record.title, record.chosen, record.package, record.package_name, record.release),
        *(record.variant, record.modality, record.shown.sop_class, record.shown.frame, record.assessed),
        *(bool(record.complete), bool(record.degraded), finding_code(record).value),
    )


def _marked(record: AnswerRecord) -> AnswerRecord:
    """The record with a text of its own wherever two reports of a kind differ."""
    shown = structs.replace(record.shown, sop_instance="2.25.9001")
    return structs.replace(
        record,
        answer="marked",
        study="2.25.9002",
        series="2.25.9003",
        shown=shown,
        inputs=(shown,),
        reason=record.reason and "marked reason",
        complete=record.complete and "marked completeness",
        degraded=record.degraded and "marked degradation",
    )


def _texts(record: AnswerRecord) -> dict[str, str]:
    return {
        "study": record.study,
        "series": record.series,
        "shown": record.shown.sop_instance,
        "uid": document_uid("report", record),
        "report series": hashed_uid("report-series", record.study),
        "tracking": hashed_uid("tracking", record.answer),
        **{f"comment {number}": text for number, text in enumerate(_comments(record))},
    }


def _references(record: AnswerRecord) -> list[Dataset]:
    found: dict[str, Dataset] = {}  # frames of one object refer to it once
    for one in record.inputs:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = UID(one.sop_class), UID(one.sop_instance)
        found.setdefault(one.sop_instance, item)
    return list(found.values())


def _put_probability(dataset: Dataset, measured: Dataset) -> None:
    """Puts a measured value where the template has another: a report has one."""
    for item in dataset.get("ContentSequence", ()):
        if item.ValueType == "NUM":
            item.MeasuredValueSequence = measured.MeasuredValueSequence
        _put_probability(item, measured)


def encode(dataset: Dataset, record: AnswerRecord, kind: str) -> Document:
    """Returns the finished document: dates from the record, the algorithm as contributing equipment."""
    answered = datetime.fromtimestamp(record.answered_at, UTC)
    dataset.InstanceCreationDate = answered.strftime("%Y%m%d")
    dataset.InstanceCreationTime = answered.strftime("%H%M%S.%f")
    dataset.TimezoneOffsetFromUTC = "+0000"
    dataset.ContributingEquipmentSequence = [_equipment(record)]
    # One implementation writes the file's meta group; its version must not change a document's bytes.
    dataset.file_meta.ImplementationVersionName = "RADFLEET_01"
    file = BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return Document(
        str(dataset.SOPInstanceUID),
        str(dataset.SOPClassUID),
        str(dataset.file_meta.TransferSyntaxUID),
        kind,
        file.getvalue(),
    )


def patient_and_study(source: Dataset) -> Dataset:
    """Returns the attributes that every result of a study copies; empty where the source has none that is valid."""
    copied = Dataset()
    for name in _COPIED:
        text = lenient_text(source, name, 64)
        if name.endswith("Date"):
            text = text if _is_date(text) else ""
        elif name.endswith("Time"):
            text = text.replace(":", "")  # as ACR-NEMA wrote it
            text = text if _TIME.fullmatch(text) else ""
        elif name == "PatientSex":
            text = text if text in ("M", "F", "O") else ""
        if text or name not in ("StudyDescription", "IssuerOfPatientID"):
            setattr(copied, name, text)
    return copied


def _is_date(text: str) -> bool:
    try:
        return len(text) == 8 and datetime.strptime(text, "%Y%m%d").year >= 1850  # noqa: DTZ007 a DICOM date has no zone
    except ValueError:
        return False


def series_description(record: AnswerRecord, kind: str) -> str:
    """Returns what a PACS shows in its list: short enough for LO (64)."""
    return f"AI {kind}, not verified, {RESEARCH_ONLY.lower()}"


def software_versions(record: AnswerRecord) -> list[str]:
    """Returns name, release, digest and variant of what answered."""
    if not record.package:
        return ["no package"]
    return [f"release {record.release}", f"package {record.package[:40]}", f"variant {record.variant}"[:64]]


def instance_number(uid: str) -> int:
    """Returns a positive number for the series list that repeats with the document."""
    return int(uid.rsplit(".", 1)[1]) % 9_999 + 1


def _version_of(record: AnswerRecord) -> tuple[str, str, str]:
    return inputs_digest(record.package, record.inputs), record.package, str(record.version)


def _content(record: AnswerRecord) -> MeasurementReport:
    shown = record.shown
    frames = [shown.frame + 1] if shown.frame else None
    # Always one group, also for "not assessed": viewers show groups, and silence is no answer.
    group = MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(
            uid=hashed_uid("tracking", record.answer), identifier=f"radfleet {record.head or 'none'}"
        ),
        algorithm_id=_algorithm(record),
        measurements=_measurements(record),
        qualitative_evaluations=[QualitativeEvaluation(name=_FINDING, value=finding_code(record))],
        source_images=[SourceImageForMeasurementGroup(shown.sop_class, shown.sop_instance, frames)],
    )
    for comment in _comments(record):
        group[0].ContentSequence.append(
            TextContentItem(name=_COMMENT, value=comment, relationship_type=RelationshipTypeValues.CONTAINS)
        )
    observer = DeviceObserverIdentifyingAttributes(
        uid=device_uid(record),
        name="Radfleet",
        manufacturer_name=MANUFACTURER,
        model_name=record.package_name or "Radfleet",
    )
    return MeasurementReport(
        observation_context=ObservationContext(
            observer_device_context=ObserverContext(
                observer_type=codes.DCM.Device, observer_identifying_attributes=observer
            )
        ),
        procedure_reported=_PROCEDURES.get(record.modality, _ANY_PROCEDURE),
        imaging_measurements=[group],
    )


def _comments(record: AnswerRecord) -> list[str]:
    comments = [RESEARCH_ONLY + "."]
    if record.reason:
        comments.append(f"Not assessed: {record.reason}.")
    if record.complete:
        images = len({one.sop_instance for one in record.inputs})
        comments.append(f"Images read: {images}. Series thought complete by: {record.complete}.")
    if record.degraded:
        comments.append(f"Degraded mode: {record.degraded}.")
    return comments


def finding_code(record: AnswerRecord) -> CodedConcept:
    """Returns the code of the chosen class, or of "not assessed"."""
    if record.reason or record.chosen < 0:
        return CodedConcept.from_code(_NOT_ASSESSED)
    code = record.classes[record.chosen].code
    return CodedConcept(code.value, code.scheme, code.meaning)


def _measurements(record: AnswerRecord) -> list[Measurement]:
    if record.reason or record.chosen < 0:
        return []
    # DS holds 16 characters; four decimals are more than the calibration carries.
    probability = round(record.probabilities[record.chosen], 4)
    return [Measurement(name=_PROBABILITY, value=probability, unit=_NO_UNIT)]


def _algorithm(record: AnswerRecord) -> AlgorithmIdentification:
    parameters = [f"sha256 {record.package}", f"variant {record.variant}"] if record.package else []
    return AlgorithmIdentification(
        name=f"Radfleet {record.title or 'routing'}",
        version=f"{record.package_name} release {record.release}" if record.package else "none",
        parameters=[*parameters, RESEARCH_ONLY],
        family=codes.DCM.ArtificialIntelligence,
        manufacturer=MANUFACTURER,
    )


def _equipment(record: AnswerRecord) -> Dataset:
    item: Dataset = highdicom.ContributingEquipment(
        manufacturer=MANUFACTURER,
        purpose_of_reference=codes.DCM.ProcessingEquipment,
        manufacturer_model_name=record.package_name[:64] or "Radfleet",
        software_versions=software_versions(record),
        contribution_description=RESEARCH_ONLY,
    )
    item.DeviceUID = device_uid(record)
    return item
