"""Wraps a phantom, or a real 8-bit picture, into valid DICOM objects as a modality would send them.

Attributes follow the IODs of PS3.3: Digital X-Ray (A.26) and Computed Radiography (A.2), CT (A.3), MR (A.4), with every
Type 1 and Type 2 attribute of their mandatory modules. Patients are invented; Manufacturer says "Radfleet phantom" for
phantoms, so that what was learned from them can be told apart later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from io import BytesIO

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    CTImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    MRImageStorage,
)

from models.data import picture_meaning
from models.phantoms import Phantom
from shared.package.input_spec import PixelMeaning
from shared.package.manifest import Head

PHANTOM_MAKER = "Radfleet phantom"
PICTURE_MAKER = "Radfleet picture wrapper"
_CLASSES = {
    "DX": DigitalXRayImageStorageForPresentation,
    "CR": ComputedRadiographyImageStorage,
    "CT": CTImageStorage,
    "MR": MRImageStorage,
}
_SLICE_MM = 5.0


@dataclass(frozen=True)
class Subject:
    """The invented person, visit and equipment that an image is filed under."""

    patient_id: str
    name: str  # PN: FAMILY^GIVEN
    birth: str  # DA: YYYYMMDD
    sex: str  # CS: M, F, O
    accession: str
    station: str


@dataclass(frozen=True)
class Stack:
    """Pixels on their way into objects: stored values uint16 (S, H, W), 12 significant bits, and their meaning."""

    pixels: npt.NDArray[np.uint16]
    meaning: PixelMeaning
    modality: str  # DX, CR, CT, MR
    body_part: str
    spacing_mm: float
    maker: str


def wrap_phantom(
    phantom: Phantom, subject: Subject, *, new_uid: Callable[[], str], when: datetime, modality: str = ""
) -> list[FileDataset]:
    """Returns a phantom's study: one object for a radiograph (`modality` DX, the default, or CR), one a slice else.

    Args:
        new_uid: gives a fresh UID a call: study, series, frame of reference, then one an object.
        when: acquisition time.
    """
    usual = {"chest-xray": ("DX", "CHEST"), "chest-ct": ("CT", "CHEST"), "brain-mri": ("MR", "BRAIN")}
    kind, part = usual[phantom.head]
    stack = Stack(phantom.pixels, phantom.meaning, modality or kind, part, phantom.spacing_mm, PHANTOM_MAKER)
    return wrap(stack, subject, new_uid=new_uid, when=when)


def wrap_picture(
    picture: npt.NDArray[np.uint8], head: Head, subject: Subject, *, new_uid: Callable[[], str], when: datetime
) -> list[FileDataset]:
    """Returns one object of an 8-bit picture (H, W), so stored that the head's input spec gives the picture back.

    A CT picture has lost its Hounsfield units: its 0..255 is spread over the head's window.
    """
    modality = "CR" if "CR" in head.modalities else head.modalities[0]
    stack = Stack(
        picture.astype(np.uint16)[None], picture_meaning(head), modality, head.body_parts[0], 1.0, PICTURE_MAKER
    )
    return wrap(stack, subject, new_uid=new_uid, when=when)


def wrap(stack: Stack, subject: Subject, *, new_uid: Callable[[], str], when: datetime) -> list[FileDataset]:
    """Returns one object a frame of the stack, in order, all of one series."""
    study, series, frame_of_reference = new_uid(), new_uid(), new_uid()
    objects = []
    for i, frame in enumerate(stack.pixels):
        item = _object(_CLASSES[stack.modality], new_uid())
        _patient_and_study(item, subject, study, when)
        item.SeriesInstanceUID, item.SeriesNumber, item.InstanceNumber = series, 1, i + 1
        item.Modality, item.Manufacturer, item.StationName = stack.modality, stack.maker, subject.station
        item.BodyPartExamined = stack.body_part
        item.ContentDate, item.ContentTime = when.strftime("%Y%m%d"), when.strftime("%H%M%S")
        item.AcquisitionDate, item.AcquisitionTime = item.ContentDate, item.ContentTime
        item.AcquisitionNumber = 1
        _pixels(item, frame, stack.meaning)
        if stack.modality in ("CT", "MR"):
            _place(item, i, len(stack.pixels), frame.shape, stack.spacing_mm, frame_of_reference)
        _OWN[stack.modality](item, stack)
        objects.append(item)
    return objects


def to_bytes(item: FileDataset) -> bytes:
    """Returns the object as a DICOM file (PS3.10)."""
    buffer = BytesIO()
    pydicom.dcmwrite(buffer, item, enforce_file_format=True)
    return buffer.getvalue()


def _object(sop_class: UID, uid: str) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = sop_class
    meta.MediaStorageSOPInstanceUID = UID(uid)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    item = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    item.SOPClassUID, item.SOPInstanceUID = sop_class, uid
    item.SpecificCharacterSet = "ISO_IR 192"
    return item


def _patient_and_study(item: Dataset, subject: Subject, study: str, when: datetime) -> None:
    item.PatientName, item.PatientID = subject.name, subject.patient_id
    item.PatientBirthDate, item.PatientSex = subject.birth, subject.sex
    item.StudyInstanceUID, item.StudyID = study, "1"
    item.StudyDate, item.StudyTime = when.strftime("%Y%m%d"), when.strftime("%H%M%S")
    item.SeriesDate, item.SeriesTime = item.StudyDate, item.StudyTime
    item.ReferringPhysicianName, item.AccessionNumber = "", subject.accession
    item.PatientOrientation = ""


def _pixels(item: Dataset, frame: npt.NDArray[np.uint16], meaning: PixelMeaning) -> None:
    item.SamplesPerPixel = 1
    item.PhotometricInterpretation = "MONOCHROME1" if meaning.inverted else "MONOCHROME2"
    item.Rows, item.Columns = frame.shape
    item.BitsAllocated, item.BitsStored, item.HighBit, item.PixelRepresentation = 16, 12, 11, 0
    item.BurnedInAnnotation, item.LossyImageCompression = "NO", "00"
    item.add_new("PixelData", "OW", np.ascontiguousarray(frame, dtype="<u2").tobytes())


def _place(item: Dataset, index: int, of: int, shape: tuple[int, ...], spacing: float, frame_of_reference: str) -> None:
    item.FrameOfReferenceUID, item.PositionReferenceIndicator = frame_of_reference, ""
    item.PixelSpacing, item.SliceThickness = [spacing, spacing], _SLICE_MM
    item.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    height = (index - (of - 1) / 2) * _SLICE_MM
    item.ImagePositionPatient = [-spacing * shape[1] / 2, -spacing * shape[0] / 2, height]
    item.SliceLocation = height
    item.PatientPosition = "HFS"


def _modality_lut(item: Dataset, meaning: PixelMeaning, unit: str) -> None:
    # A DS holds sixteen characters.
    item.RescaleSlope, item.RescaleIntercept = f"{meaning.slope:.10g}", f"{meaning.intercept:.10g}"
    item.RescaleType = unit


def _dx(item: Dataset, stack: Stack) -> None:
    item.PresentationIntentType = "FOR PRESENTATION"
    item.ImageType = ["ORIGINAL", "PRIMARY", ""]
    item.PixelIntensityRelationship, item.PixelIntensityRelationshipSign = "LOG", -1
    _modality_lut(item, PixelMeaning(), "US")
    item.PresentationLUTShape = "INVERSE" if stack.meaning.inverted else "IDENTITY"
    item.ImageLaterality, item.ViewPosition, item.PatientOrientation = "U", "PA", ["L", "F"]
    item.AnatomicRegionSequence = [_code("816094009", "SCT", "Chest")]
    item.ViewCodeSequence = [_code("272479007", "SCT", "postero-anterior")]
    item.AcquisitionContextSequence = []
    item.DetectorType, item.ImagerPixelSpacing = "DIRECT", [stack.spacing_mm, stack.spacing_mm]
    item.AcquisitionDeviceProcessingDescription = ""
    item.WindowCenter, item.WindowWidth = 2048, 4096


def _cr(item: Dataset, stack: Stack) -> None:
    item.ViewPosition, item.PatientOrientation = "AP", ["L", "F"]
    item.ImageType = ["ORIGINAL", "PRIMARY"]
    item.ImagerPixelSpacing = [stack.spacing_mm, stack.spacing_mm]
    if not stack.meaning.inverted:
        _modality_lut(item, stack.meaning, "US")


def _ct(item: Dataset, stack: Stack) -> None:
    item.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    _modality_lut(item, stack.meaning, "HU")
    item.KVP = 120


def _mr(item: Dataset, stack: Stack) -> None:
    del stack
    item.ImageType = ["ORIGINAL", "PRIMARY", "OTHER"]
    item.ScanningSequence, item.SequenceVariant, item.ScanOptions = "SE", "NONE", ""
    item.MRAcquisitionType, item.RepetitionTime, item.EchoTime, item.EchoTrainLength = "2D", 550, 12, 1


_OWN: dict[str, Callable[[Dataset, Stack], None]] = {"DX": _dx, "CR": _cr, "CT": _ct, "MR": _mr}


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item
