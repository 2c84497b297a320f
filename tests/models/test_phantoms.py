"""Phantoms: one generator gives the same pixels, patients differ, labels are where the lesion is, DICOM is valid."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest

from models.data import data_folder, pictures
from models.heads import BY_NAME, HEADS
from models.phantom_dicom import PHANTOM_MAKER, Subject, to_bytes, wrap_phantom, wrap_picture
from models.phantoms import SCANNERS, draw_phantom, phantom_inputs
from models.phantoms.scanner import respond
from models.reference import reference_set
from shared.package.input_spec import PixelMeaning, to_model_input

SUBJECT = Subject("P-0001", "PHANTOM^ONE", "19500101", "O", "ACC-1", "SCANNER-1")
WHEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
EVERY = [(head.name, label) for head in HEADS for label in range(len(head.classes))]


def uids() -> Callable[[], str]:
    numbers = itertools.count(1)
    return lambda: f"1.2.826.0.1.3680043.10.999.{next(numbers)}"


def meaning_of(item: pydicom.Dataset) -> PixelMeaning:
    inverted = item.PhotometricInterpretation == "MONOCHROME1"
    return PixelMeaning(float(item.get("RescaleSlope", 1)), float(item.get("RescaleIntercept", 0)), inverted)


@pytest.mark.parametrize(("head", "label"), EVERY)
def test_the_same_generator_gives_the_same_study_and_another_patient_another(head: str, label: int) -> None:
    one, two, other = (
        draw_phantom(np.random.default_rng(seed), head, label, SCANNERS["A"], slices=3) for seed in (4, 4, 5)
    )
    assert np.array_equal(one.pixels, two.pixels)
    assert not np.array_equal(one.pixels, other.pixels)
    assert one.pixels.dtype == np.uint16
    assert one.pixels.max() < 4096
    assert label in one.slice_labels
    assert set(one.slice_labels) <= {label, BY_NAME[head].normal}


def test_a_long_series_shows_its_lesion_in_most_slices() -> None:
    study = draw_phantom(np.random.default_rng(1), "chest-ct", 2, SCANNERS["A"])
    assert (study.slice_labels == 2).mean() > 0.6


def test_the_reference_set_is_the_same_for_all_and_balanced() -> None:
    one, two = reference_set(3, 30), reference_set(3, 30)
    assert np.array_equal(one.images, two.images)
    assert np.bincount(one.heads).tolist() == [10, 10, 10]
    for index, head in enumerate(HEADS):
        assert len(np.unique(one.labels[one.heads == index])) == len(head.classes)
    assert not np.array_equal(one.images, reference_set(4, 30).images)


def test_the_shift_of_hospital_c_is_no_gain_and_offset() -> None:
    exposure = np.linspace(-4, 0.8, 200)
    here, there = respond(exposure, SCANNERS["A"]), respond(exposure, SCANNERS["C"])
    slope, offset = np.polyfit(here, there, 1)
    assert np.abs(there - (slope * here + offset)).max() > 0.1
    assert (np.diff(here) < 0).all()  # more exposure, darker: at A always
    assert (np.diff(there) > 0).any()  # at C the most exposed part turns back
    assert (np.diff(there) < 0).any()


@pytest.mark.parametrize(("head", "label"), EVERY)
@pytest.mark.parametrize("scanner", ["A", "B", "C"])
def test_a_wrapped_phantom_reads_back_to_the_same_model_input(head: str, label: int, scanner: str) -> None:
    study = draw_phantom(np.random.default_rng(label), head, label, SCANNERS[scanner], slices=2)
    direct = phantom_inputs(study)
    for modality in ("DX", "CR") if head == "chest-xray" else ("",):
        items = wrap_phantom(study, SUBJECT, new_uid=uids(), when=WHEN, modality=modality)
        assert len(items) == len(study.pixels)
        assert len({item.SeriesInstanceUID for item in items}) == 1
        assert len({item.SOPInstanceUID for item in items}) == len(items)
        for item, expected in zip(items, direct, strict=True):
            read = pydicom.dcmread(BytesIO(to_bytes(item)))
            assert read.Manufacturer == PHANTOM_MAKER
            assert read.Modality in BY_NAME[head].modalities
            assert read.BodyPartExamined in BY_NAME[head].body_parts
            assert read.get("ViewPosition", "PA") in ("AP", "PA")
            seen = to_model_input(read.pixel_array, meaning_of(read), BY_NAME[head].input)
            assert np.array_equal(seen, expected)


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.name)
def test_a_wrapped_picture_reads_back_as_the_picture(head: object) -> None:
    assert head in HEADS
    head = BY_NAME[head.name]  # type: ignore[attr-defined]
    picture = np.random.default_rng(1).integers(0, 256, (40, 50)).astype(np.uint8).repeat(6, 0).repeat(6, 1)
    (item,) = wrap_picture(picture, head, SUBJECT, new_uid=uids(), when=WHEN)
    read = pydicom.dcmread(BytesIO(to_bytes(item)))
    seen = to_model_input(read.pixel_array, meaning_of(read), head.input)
    plain = to_model_input(picture, PixelMeaning(), head.input)
    if head.name == "chest-ct":  # its window is that of 0..255
        import cv2

        plain = np.rint(cv2.resize(picture / np.float32(255), (224, 224), interpolation=cv2.INTER_AREA) * 255)
    assert np.abs(seen.astype(int) - plain.astype(int)).max() <= 1
    assert read.Manufacturer != PHANTOM_MAKER


@pytest.mark.parametrize("modality", ["DX", "CR", "CT", "MR"])
def test_dcmtk_reads_what_we_wrap(modality: str, tmp_path: Path) -> None:
    head = {"DX": "chest-xray", "CR": "chest-xray", "CT": "chest-ct", "MR": "brain-mri"}[modality]
    assert shutil.which("dcmdump") is not None
    study = draw_phantom(np.random.default_rng(1), head, 1, SCANNERS["B"], slices=1)
    (item,) = wrap_phantom(study, SUBJECT, new_uid=uids(), when=WHEN, modality=modality)
    (tmp_path / "x.dcm").write_bytes(to_bytes(item))
    done = subprocess.run(["dcmdump", "+E", tmp_path / "x.dcm"], check=True, capture_output=True, text=True)
    assert not done.stderr
    assert f"(0008,0060) CS [{modality}]" in done.stdout


def test_real_splits_share_no_picture_and_leave_hannover_out() -> None:
    folder = data_folder()
    if folder is None:
        pytest.skip("real data is absent: set RADFLEET_DATA")
    validation, test = (pictures(folder, BY_NAME["chest-ct"], split) for split in ("val", "test"))
    assert len(validation.images) == 100
    assert len(test.images) == 127
    seen = {image.tobytes() for image in validation.images}
    assert not seen & {image.tobytes() for image in test.images}
    assert "hannover-de" not in pictures(folder, BY_NAME["chest-xray"], "val").sites
