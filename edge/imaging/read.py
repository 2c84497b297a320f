"""From a spooled object to frames the model can read: pydicom and pylibjpeg behind limits that come first.

Everything that cannot be decoded ends as a PeerError whose message is the reason shown in quarantine; it
never names a patient.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from msgspec import Struct
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.pixels.processing import apply_modality_lut
from pydicom.pixels.utils import iter_pixels

from edge.imaging.codestream import sides
from edge.intake.head import valid_uid
from shared.errors import PeerError
from shared.files import read_limited
from shared.package.input_spec import MAX_SIDE, PixelMeaning

# pydicom's warnings quote values, and a value may name a patient: no check that nobody acts on.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE

OBJECT_LIMIT_BYTES = 1024 * 1024 * 1024  # larger objects are kept, not read
DECODED_LIMIT_BYTES = 1024 * 1024 * 1024  # of all frames together
FRAME_LIMIT = 8192
PIXELS_LIMIT = 8192 * 8192  # of one frame: preprocessing takes sixteen bytes a pixel
MANUFACTURER = "Radfleet"  # of our own reports and pictures
PHANTOM_MANUFACTURER = "Radfleet phantom"

# CID 4031 codes for the regions that heads name, for objects with AnatomicRegionSequence and no
# BodyPartExamined.
_REGIONS = {
    "51185008": "CHEST",
    "T-D3000": "CHEST",
    "12738006": "BRAIN",
    "T-A0100": "BRAIN",
    "69536005": "HEAD",
}
_ORIENTATION = "ImageOrientationPatient"
_PLANES = ("sagittal", "coronal", "axial")  # whose normals are x, y and z
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")


class ImageHead(Struct, frozen=True):
    """What routing and the results need of one image object; `body_part` and `view` upper case, empty if
    absent.
    """

    study: str
    series: str
    sop_instance: str
    sop_class: str
    modality: str
    body_part: str
    view: str
    patient_id: str  # for the pseudonym only; never logged, never sent
    manufacturer: str
    kind: tuple[str, ...]  # ImageType
    rows: int
    columns: int
    frames: int
    samples: int
    photometric: str  # PhotometricInterpretation
    has_pixels: bool

    @property
    def ours(self) -> bool:
        """True for results of this node or another of ours."""
        return self.manufacturer == MANUFACTURER

    @property
    def phantom(self) -> bool:
        """True for images that Radfleet itself drew."""
        return self.manufacturer == PHANTOM_MANUFACTURER


class Stack(Struct, frozen=True, array_like=True):
    """What all slices that are read as one must share; empty where a slice does not say it."""

    plane: str = ""  # axial, coronal or sagittal: the nearest one
    kernel: str = ""  # ConvolutionKernel of a CT


class Frame(Struct, frozen=True):
    """One frame: `pixels` stored values (H, W) of any integer or float dtype, row 0 as stored, and their
    meaning.
    """

    pixels: npt.NDArray[Any]
    meaning: PixelMeaning
    stack: Stack = Stack()


def open_object(path: Path) -> Dataset:
    """Returns the data set of a spooled object; pixels stay encoded.

    Raises:
        PeerError: not readable as DICOM, or larger than OBJECT_LIMIT_BYTES.
        StateError: the file is gone or the disk fails.
    """
    data = read_limited(path, OBJECT_LIMIT_BYTES)
    # BytesIO and not the file: a lying length can then read no further, and allocate no more, than there
    # is.
    with translated("cannot be read as DICOM"):
        return pydicom.dcmread(BytesIO(data))


def describe(dataset: Dataset) -> ImageHead:
    """Returns the head of an object.

    Raises:
        PeerError: a needed identifier is missing or a value has the wrong form.
    """
    with translated("has values that cannot be read"):
        head = ImageHead(
            study=_text(dataset, "StudyInstanceUID"),
            series=_text(dataset, "SeriesInstanceUID"),
            sop_instance=_text(dataset, "SOPInstanceUID"),
            sop_class=_text(dataset, "SOPClassUID"),
            modality=_text(dataset, "Modality").upper(),
            body_part=body_part(dataset),
            view=_text(dataset, "ViewPosition").upper(),
            patient_id=_text(dataset, "PatientID"),
            manufacturer=_text(dataset, "Manufacturer"),
            kind=tuple(str(part).upper() for part in _list(dataset.get("ImageType"))),
            rows=_int(dataset, "Rows", 0),
            columns=_int(dataset, "Columns", 0),
            frames=_int(dataset, "NumberOfFrames", 1),
            samples=_int(dataset, "SamplesPerPixel", 1),
            photometric=_text(dataset, "PhotometricInterpretation").upper(),
            has_pixels=any(name in dataset for name in _PIXELS),
        )
    for name in ("study", "series", "sop_instance"):
        if not getattr(head, name):
            raise PeerError(f"The object has no {name.replace('_', ' ')} UID.")
        if not valid_uid(getattr(head, name)):
            raise PeerError(f"The object's {name.replace('_', ' ')} UID is not a UID.")
    return head


def worklist_texts(dataset: Dataset) -> dict[str, str]:
    """Returns what the worklist shows of a study, by column; what cannot be read is empty, it keeps no image away."""
    return {
        "patient_name": lenient_text(dataset, "PatientName", 200),
        "patient_id": lenient_text(dataset, "PatientID", 200),
        "accession": lenient_text(dataset, "AccessionNumber", 64),
        "study_date": lenient_text(dataset, "StudyDate", 16),
        "description": lenient_text(dataset, "StudyDescription", 200)
        or lenient_text(dataset, "SeriesDescription", 200),
    }


def lenient_text(dataset: Dataset, name: str, length: int) -> str:
    """Returns an attribute's first value as text of at most `length` characters; empty when it cannot be read."""
    try:
        return _text(dataset, name)[:length]
    except Exception:  # noqa: BLE001 pydicom names no family for values it cannot read
        return ""


def decode_frames(dataset: Dataset, head: ImageHead) -> Iterator[Frame]:
    """Yields the frames in stored order, each decoded when asked for.

    Limits are checked against Rows, Columns, NumberOfFrames and BitsAllocated before a decoder allocates
    anything.

    Raises:
        PeerError: too large, shorter than it says, or not decodable; the reason is in the message.
    """
    check_size(dataset, head)
    with translated("cannot be decoded"):
        ask_streams(dataset, head.rows, head.columns, head.frames)
        # More pixel data than NumberOfFrames says would give more frames: those were not counted above.
        for index, pixels in enumerate(iter_pixels(dataset, raw=True, allow_excess_frames=False)):
            if pixels.shape != (head.rows, head.columns):
                raise PeerError(f"Frame {index + 1} has shape {pixels.shape}, the header says otherwise.")
            yield _frame(dataset, index, pixels)


def check_size(dataset: Dataset, head: ImageHead) -> None:
    """Returns when the pixels that the header asks for are within the limits and there; PeerError otherwise."""
    bits = _int(dataset, "BitsAllocated", 0)
    if not (0 < head.rows <= MAX_SIDE and 0 < head.columns <= MAX_SIDE and 0 < head.frames <= FRAME_LIMIT):
        raise PeerError(f"{head.rows} x {head.columns} x {head.frames} frames are outside of the limits.")
    if head.rows * head.columns > PIXELS_LIMIT:
        raise PeerError(f"A frame has {head.rows * head.columns} pixels, the limit is {PIXELS_LIMIT}.")
    if bits not in (8, 16, 32, 64):
        raise PeerError(f"{bits} bits allocated are not supported.")
    decoded = head.rows * head.columns * head.frames * head.samples * bits // 8
    if decoded > DECODED_LIMIT_BYTES:
        raise PeerError(f"The pixels would take {decoded} bytes, the limit is {DECODED_LIMIT_BYTES}.")
    with translated("has no readable pixels"):
        stored = len(next(dataset[name].value or b"" for name in _PIXELS if name in dataset))
        compressed = dataset.file_meta.TransferSyntaxUID.is_compressed
    if not compressed and stored < decoded:
        raise PeerError(f"The pixels have {stored} bytes where the header asks for {decoded}.")


def ask_streams(dataset: Dataset, rows: int, columns: int, frames: int) -> None:
    """Raises PeerError when compressed frames are not as large as the header says: a decoder believes the frame."""
    if "PixelData" not in dataset or not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        return
    for index, frame in enumerate(generate_frames(dataset.PixelData, number_of_frames=frames)):
        told = sides(frame)
        if told and told != (rows, columns):
            raise PeerError(
                f"Frame {index + 1} says that it has {told[0]} x {told[1]} pixels, the header says otherwise."
            )


def _frame(dataset: Dataset, index: int, pixels: npt.NDArray[Any]) -> Frame:
    inverted = (
        _text(dataset, "PhotometricInterpretation") == "MONOCHROME1"
        or _text(dataset, "PresentationLUTShape") == "INVERSE"
    )
    stack = Stack(_plane(dataset, index), _kernel(dataset, index))
    if dataset.get("ModalityLUTSequence"):
        return Frame(np.asarray(apply_modality_lut(pixels, dataset)), PixelMeaning(inverted=inverted), stack)
    rescale = _of_frame(dataset, index, "RescaleSlope", "PixelValueTransformationSequence")
    slope = float(rescale.get("RescaleSlope") or 1.0)
    intercept = float(rescale.get("RescaleIntercept") or 0.0)
    return Frame(pixels, PixelMeaning(slope, intercept, inverted), stack)


def _of_frame(dataset: Dataset, index: int, name: str, macro: str) -> Dataset:
    """The item that holds an attribute: in enhanced objects a macro, per frame or shared (PS3.3 C.7.6.16)."""
    if name in dataset:
        return dataset
    for groups_name, item in (("PerFrameFunctionalGroupsSequence", index), ("SharedFunctionalGroupsSequence", 0)):
        groups = dataset.get(groups_name)
        if groups and item < len(groups) and groups[item].get(macro):
            found: Dataset = groups[item][macro][0]
            return found
    return dataset


def _plane(dataset: Dataset, index: int) -> str:
    """The plane nearest to ImageOrientationPatient (PS3.3 C.7.6.2.1.1); empty when it cannot be told."""
    given = _list(_of_frame(dataset, index, _ORIENTATION, "PlaneOrientationSequence").get(_ORIENTATION))
    try:
        axes = np.array([float(value) for value in given]).reshape(2, 3)
    except (TypeError, ValueError):
        return ""
    normal = np.abs(np.cross(axes[0], axes[1]))
    if not 0.9 < float(normal.sum()) < 2:  # no two unit vectors at right angles
        return ""
    return _PLANES[int(np.argmax(np.round(normal, 1)))]  # rounded: oblique slices of one stack fall on one side


def _kernel(dataset: Dataset, index: int) -> str:
    held = _of_frame(dataset, index, "ConvolutionKernel", "CTReconstructionSequence").get("ConvolutionKernel")
    return "\\".join(str(one).strip(" \0") for one in _list(held))[:64]


def body_part(dataset: Dataset) -> str:
    """Returns BodyPartExamined in upper case, else the name of a region code that heads know; empty without both."""
    text = _text(dataset, "BodyPartExamined").upper()
    if text or not dataset.get("AnatomicRegionSequence"):
        return text
    return _REGIONS.get(_text(dataset.AnatomicRegionSequence[0], "CodeValue"), "")


def _text(dataset: Dataset, name: str) -> str:
    value = dataset.get(name)
    return "" if value is None else str(_list(value)[0] if _list(value) else "").strip(" \0")


def _int(dataset: Dataset, name: str, default: int) -> int:
    value = dataset.get(name)
    number = default if value in (None, "") else int(str(value))
    if not 0 <= number < 2**32:
        raise ValueError(name)
    return number


def _list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple, pydicom.multival.MultiValue)) else [value]


class translated:  # noqa: N801 reads as a verb at the with statement
    """Turns whatever a decoder raises into a PeerError; pydicom and the codecs name no families."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, _trace: object) -> None:
        if isinstance(exc, Exception) and not isinstance(exc, PeerError):
            raise PeerError(f"The object {self._what}: {type(exc).__name__}.") from exc
