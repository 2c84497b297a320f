"""Burned-in text: found where it is drawn, blacked or refused by kind of object, never seen where there is none."""

from __future__ import annotations

import warnings
from io import BytesIO
from itertools import islice

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    RLELossless,
    SecondaryCaptureImageStorage,
    UltrasoundImageStorage,
    UltrasoundMultiFrameImageStorage,
)

from edge.imaging import burned_in as detector
from edge.imaging.burned_in import Mark, burned_in, marks, pictures
from edge.imaging.deidentify import deidentify, encode
from edge.imaging.read import open_object
from models.data import data_folder
from scripts.lab.bench_burned_in import draw, overlaps, phantoms, real_pictures, recall, share
from shared.errors import PeerError, TrustError
from tests.edge.test_deidentify import KEY, ct
from tests.simulators.modality import phantom_study
from tests.simulators.real_data import DATA, needs_data

SIDE = 256


def speckle(frames: int = 1, channels: int = 1) -> np.ndarray:
    """Frames (N, H, W) or (N, H, W, 3) of what no text is in: grey noise, smoothed, darker than writing."""
    rng = np.random.default_rng(5)
    coarse = rng.integers(0, 90, (frames, SIDE // 4, SIDE // 4), dtype=np.uint8)
    fine = coarse.repeat(4, axis=1).repeat(4, axis=2)
    return fine if channels == 1 else np.repeat(fine[..., None], 3, axis=3)


def image(pixels: np.ndarray, sop_class: str = UltrasoundImageStorage, **values: object) -> FileDataset:
    """An object that holds the pixels, uint8 (N, H, W) or (N, H, W, 3)."""
    item = ct()
    item.SOPClassUID = item.file_meta.MediaStorageSOPClassUID = sop_class
    item.Rows, item.Columns = pixels.shape[1:3]
    item.SamplesPerPixel = 3 if pixels.ndim == 4 else 1
    item.PhotometricInterpretation = "RGB" if pixels.ndim == 4 else "MONOCHROME2"
    if pixels.ndim == 4:
        item.PlanarConfiguration = 0
    item.BitsAllocated = item.BitsStored = 8
    item.HighBit = 7
    if len(pixels) > 1:
        item.NumberOfFrames = len(pixels)
    del item.BurnedInAnnotation
    for name, value in values.items():
        setattr(item, name, value)
    item.PixelData = pixels.tobytes()
    item["PixelData"].VR = "OB"
    return item


def written(frames: np.ndarray, at: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The frames with a line of text in frame `at`, and where its ink (H, W) is."""
    grey = frames.ndim == 3
    picture = np.repeat(frames[at][..., None], 3, axis=2) if grey else frames[at]
    drawn = draw(picture, 16, np.random.default_rng(1))
    assert drawn is not None
    text, ink = drawn
    out = frames.copy()
    out[at] = text[..., 0] if grey else text
    return out, ink


def after(item: FileDataset) -> tuple[FileDataset, int]:
    """The object as it is exported, and how many places were blacked."""
    result = deidentify(item, KEY)
    return pydicom.dcmread(BytesIO(encode(result.dataset))), len(result.blacked)


@pytest.mark.parametrize("sop_class", [UltrasoundImageStorage, SecondaryCaptureImageStorage])
@pytest.mark.parametrize("channels", [1, 3])
def test_text_on_screens_is_blacked_and_the_rest_stays(sop_class: str, channels: int) -> None:
    frames, ink = written(speckle(channels=channels))
    result, places = after(image(frames, sop_class))
    assert places >= 1
    grey = result.pixel_array if channels == 1 else result.pixel_array.max(axis=2)
    assert not grey[ink].max()
    assert result.BurnedInAnnotation == "NO"
    before = frames[0] if channels == 1 else frames[0].max(axis=2)
    assert (grey == before).mean() > 0.7
    assert not any(mark.text for one in pictures(result) for mark in marks(one))


def test_without_text_the_pixels_stay_bit_for_bit() -> None:
    frames = speckle()
    result, places = after(image(frames))
    assert places == 0
    assert result.PixelData == frames.tobytes()


def test_every_frame_is_looked_at_and_compressed_ones_come_out_uncompressed() -> None:
    frames, ink = written(speckle(frames=3), at=2)
    item = image(frames, UltrasoundMultiFrameImageStorage)
    item.compress(RLELossless, generate_instance_uid=False)
    result, places = after(item)
    assert places >= 1
    assert result.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert not result.pixel_array[2][ink].max()
    assert (result.pixel_array[0] == frames[0]).all()


def test_compressed_pixels_without_text_stay_compressed() -> None:
    item = image(speckle())
    item.compress(RLELossless, generate_instance_uid=False)
    result, _ = after(item)
    assert result.file_meta.TransferSyntaxUID == RLELossless
    assert result.PixelData == item.PixelData


def test_big_endian_pixels_are_blacked_in_their_order() -> None:
    frames, ink = written(speckle())
    item = image(frames)
    item.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    item.BitsAllocated = 16
    item.PixelData = frames.astype(">u2").tobytes()
    item["PixelData"].VR = "OW"
    out = BytesIO()
    pydicom.dcmwrite(out, item, implicit_vr=False, little_endian=False, enforce_file_format=True)
    result, places = after(pydicom.dcmread(BytesIO(out.getvalue())))
    assert places >= 1
    assert result.file_meta.TransferSyntaxUID == ExplicitVRBigEndian
    assert not result.pixel_array[ink].max()
    assert (result.pixel_array == frames[0]).mean() > 0.7


@pytest.mark.parametrize(
    ("sop_class", "header", "refused"),
    [
        ("1.2.840.10008.5.1.4.1.1.2", {}, True),  # CT whose header says nothing
        ("1.2.840.10008.5.1.4.1.1.2", {"BurnedInAnnotation": "NO"}, False),  # believed: straight from a scanner
        ("1.2.840.10008.5.1.4.1.1.2", {"BurnedInAnnotation": "NO", "ImageType": ["DERIVED", "SECONDARY"]}, True),
        ("1.2.840.10008.5.1.4.1.1.12.1", {"BurnedInAnnotation": "NO"}, True),  # XA: a header's NO is not believed
        ("1.2.840.10008.5.1.4.1.1.77.1.1", {}, True),  # endoscopy
    ],
)
def test_text_on_what_is_no_screen_is_refused(sop_class: str, header: dict[str, object], refused: bool) -> None:
    frames, _ = written(speckle())
    item = image(frames, sop_class, **header)
    if refused:
        with pytest.raises(PeerError, match="burned"):
            deidentify(item, KEY)
    else:
        assert after(item)[0].PixelData == frames.tobytes()


def test_a_header_that_speaks_of_text_is_believed() -> None:
    """Where nothing is found to be blacked the object is refused: the header knows better."""
    for sop_class in (UltrasoundImageStorage, "1.2.840.10008.5.1.4.1.1.2"):
        item = image(speckle(), sop_class, BurnedInAnnotation="YES")
        with pytest.raises(PeerError, match="header says"):
            deidentify(item, KEY)
        assert "header" in burned_in(item, 0)


def test_pixels_that_cannot_be_decoded_are_refused() -> None:
    item = image(speckle())
    item.compress(RLELossless, generate_instance_uid=False)
    item.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    item.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xc0\x00\x04\x08\x00\xff\xd9"])
    item["PixelData"].is_undefined_length = True
    with pytest.raises(PeerError, match="burned-in text"):
        deidentify(item, KEY)


def test_black_is_black_by_the_palette() -> None:
    frames, ink = written(speckle())
    item = image(frames, PhotometricInterpretation="PALETTE COLOR")
    ramp = (np.arange(255, -1, -1, dtype="<u2") * 257).tobytes()  # index 255 is black
    for colour in ("Red", "Green", "Blue"):
        setattr(item, f"{colour}PaletteColorLookupTableDescriptor", [256, 0, 16])
        setattr(item, f"{colour}PaletteColorLookupTableData", ramp)
    result, places = after(item)
    assert places >= 1
    assert (result.pixel_array[ink] == 255).all()


def test_phantoms_are_never_taken_for_text() -> None:
    for picture in list(phantoms())[::3]:
        assert not any(mark.text for mark in marks(picture))


def test_drawn_lines_are_found_on_phantoms() -> None:
    covered, _, of = recall(list(phantoms())[:8], 16, np.random.default_rng(3))
    assert covered >= of - 1


def test_attack_another_detector_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detector, "_MODEL_SHA256", "0" * 64)
    detector._session.cache_clear()
    with pytest.raises(TrustError, match="not the file that was tried"):
        marks(np.zeros((64, 64, 3), np.uint8))


def test_a_line_that_is_half_covered_does_not_count() -> None:
    ink = np.zeros((10, 10), bool)
    ink[4, :] = True
    assert share(ink, [(0, 0, 5, 10)]) == 0.5
    assert overlaps(ink, 0, 0, 5, 10)
    assert not overlaps(ink, 0, 6, 5, 4)


def test_a_scanner_s_images_are_not_looked_into_twice() -> None:
    assert burned_in(phantom_study("chest-xray", 1, seed=1)[0], 0) == ""


@needs_data
def test_clean_images_raise_no_alarm_and_screens_with_text_do() -> None:
    folder = data_folder()
    assert folder is not None
    found: dict[str, list[list[Mark]]] = {}
    for (kind, _), picture in islice(real_pictures(folder / "dicom"), 0, None, 2):
        if kind in ("CT", "MR", "CR", "PT", "US"):
            found.setdefault(kind, []).append(marks(picture))
    for kind in ("CT", "MR", "CR", "PT"):
        assert not [one for one in found[kind] if any(mark.text for mark in one)], kind
    assert sum(any(mark.text for mark in one) for one in found["US"]) >= 2


@needs_data
@pytest.mark.parametrize("name", ["US1_UNC", "examples_palette.dcm", "GH364.dcm", "examples_ybr_color.dcm"])
def test_real_ultrasound_comes_out_without_text(name: str) -> None:
    (path,) = (DATA / "dicom").rglob(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns of what it puts right
        result, places = after(open_object(path))
        assert places >= 5
        assert not any(mark.text for one in pictures(result) for mark in marks(one))
