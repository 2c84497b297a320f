"""The evidence image: a Secondary Capture with the evidence over the image, for any PACS.

The evidence of a class is an exact decomposition of its logit over the model's tokens. Attention has
mixed the
tokens: it is evidence, not a localisation, and the picture says so.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from highdicom.sc import SCImage
from msgspec import structs
from pydicom.dataset import Dataset
from pydicom.uid import RLELossless

from edge.imaging.read import MANUFACTURER, Frame
from edge.results.report import (
    SERIES_NUMBER,
    Document,
    document_uid,
    encode,
    hashed_uid,
    instance_number,
    patient_and_study,
    series_description,
    software_versions,
)
from edge.results.tables import AnswerRecord
from shared.package.input_spec import InputSpec, to_model_input

BURNED_IN = "AI evidence, research use only, not for diagnosis"
MAX_SIDE = 1024  # pixels of the picture; the original stays in the PACS
_MIN_WIDTH = 512  # so that the burned-in text can be read
_BAND = 56  # pixels below the image for the text
_STRONGEST = 0.55  # opacity of the largest evidence

Gray = npt.NDArray[np.uint8]


def display_image(frame: Frame, spec: InputSpec) -> Gray:
    """Returns uint8 (H, W) for people: the head's own intensity rule at up to MAX_SIDE pixels, aspect kept.

    Raises:
        PeerError: the frame cannot be read (see `to_model_input`).
    """
    height, width = frame.pixels.shape
    scale = min(MAX_SIDE / max(height, width), max(1.0, _MIN_WIDTH / width))
    size = structs.replace(spec, height=max(1, round(height * scale)), width=max(1, round(width * scale)))
    return to_model_input(frame.pixels, frame.meaning, size)


def evidence_alpha(record: AnswerRecord, height: int, width: int) -> npt.NDArray[np.float32]:
    """Returns float32 (height, width), 0..1: the chosen class's evidence between its own smallest and
    largest value.
    """
    evidence = np.frombuffer(record.evidence, dtype="<f4").reshape(record.evidence_shape)  # (C, h, w)
    chosen = evidence[max(record.chosen, 0)]  # (h, w)
    unit = (chosen - chosen.min()) / max(float(np.ptp(chosen)), 1e-6)
    grown = cv2.resize(unit.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    return np.asarray(np.clip(grown, 0.0, 1.0), dtype=np.float32)


def draw(image: Gray, record: AnswerRecord) -> npt.NDArray[np.uint8]:
    """Returns RGB uint8 (H + band, W, 3): evidence over the image, class and probability burned in."""
    height, width = image.shape
    unit = evidence_alpha(record, height, width)  # (H, W) 0..1
    alpha = (unit**2 * _STRONGEST)[..., None]  # (H, W, 1), squared so that weak evidence hides no anatomy
    heat = cv2.applyColorMap(np.rint(unit * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
    base = np.repeat(image[..., None], 3, axis=2).astype(np.float32)  # (H, W, 3)
    mixed = base * (1 - alpha) + heat[..., ::-1].astype(np.float32) * alpha  # applyColorMap gives BGR
    band = np.zeros((_BAND, width, 3), dtype=np.uint8)
    _write(band, BURNED_IN, 20, width)
    _write(band, caption(record), 44, width)
    return np.concatenate([np.rint(mixed).astype(np.uint8), band])


def caption(record: AnswerRecord) -> str:
    """Returns class, probability and model in one line."""
    if record.reason:
        return f"{record.title}: not assessed ({record.reason})"
    name = record.classes[record.chosen].code.meaning
    probability = record.probabilities[record.chosen]
    return f"{record.title}: {name} {probability:.2f}   {record.package_name} r{record.release}"


def build_picture(record: AnswerRecord, image: Gray, source: Dataset) -> Document:
    """Returns the Secondary Capture (RGB, RLE) of one answer; UIDs and dates as in the report.

    Raises:
        ValueError, TypeError, AttributeError: the source's own attributes cannot be written as DICOM.
    """
    uid = document_uid("picture", record)
    answered = datetime.fromtimestamp(record.answered_at, UTC)
    study = patient_and_study(source)
    capture: Any = SCImage(
        pixel_array=draw(image, record),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        study_instance_uid=record.study,
        series_instance_uid=hashed_uid("picture-series", record.study),
        series_number=SERIES_NUMBER["picture"],
        sop_instance_uid=uid,
        instance_number=instance_number(uid),
        manufacturer=MANUFACTURER,
        patient_id=study.PatientID,
        patient_name=None,  # set below: highdicom's warnings would put a name into the log
        patient_orientation=("L", "F"),  # asked for by highdicom; the source's own replaces it below
        patient_birth_date=study.PatientBirthDate or None,
        patient_sex=str(study.PatientSex) or None,
        accession_number=study.AccessionNumber,
        study_id=study.StudyID,
        study_date=study.StudyDate or None,
        study_time=study.StudyTime or None,
        referring_physician_name=study.ReferringPhysicianName,
        transfer_syntax_uid=RLELossless,
        series_description=series_description(record, "evidence"),
        manufacturer_model_name=record.package_name[:64] or "Radfleet",
        software_versions=software_versions(record),
        content_date=answered.date(),
        content_time=answered.time(),
        specific_character_set="ISO_IR 192",
    )
    capture.PatientName = study.PatientName
    capture.PatientOrientation = None  # of the shown frame in enhanced objects: not copied, so never wrong
    capture.DateOfSecondaryCapture = answered.strftime("%Y%m%d")
    capture.TimeOfSecondaryCapture = answered.strftime("%H%M%S.%f")
    capture.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
    capture.BurnedInAnnotation = "YES"
    capture.DerivationDescription = f"{BURNED_IN}. {caption(record)}"[:1024]
    reference = Dataset()
    reference.ReferencedSOPClassUID = record.shown.sop_class
    reference.ReferencedSOPInstanceUID = record.shown.sop_instance
    capture.SourceImageSequence = [reference]
    return encode(capture, record, "picture")


def _write(band: npt.NDArray[np.uint8], text: str, baseline: int, width: int) -> None:
    ascii_text = text.encode("ascii", "replace").decode()  # OpenCV's fonts have no more
    scale = 0.55
    needed = cv2.getTextSize(ascii_text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)[0][0]
    scale = min(scale, scale * (width - 12) / max(needed, 1))
    cv2.putText(band, ascii_text, (6, baseline), cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), 1, cv2.LINE_AA)
