"""Reading, routing and naming images; what cannot be read says why and takes nothing down."""

from __future__ import annotations

import contextlib
import csv
import tracemalloc
from pathlib import Path

import numpy as np
import pydicom
import pytest
from msgspec.structs import replace
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from edge.imaging.pseudonym import case_pseudonym, is_held_out
from edge.imaging.read import ImageHead, decode_frames, describe, open_object
from edge.imaging.route import NotAssessed, route
from shared.errors import PeerError
from shared.package.input_spec import PixelMeaning, to_model_input
from shared.package.manifest import Head
from tests.simulators.modality import phantom_study, to_bytes
from tests.simulators.node import baseline
from tests.simulators.real_data import DATA, needs_data


def frames_of(path: Path) -> tuple[ImageHead, list[np.ndarray], PixelMeaning]:
    dataset = open_object(path)
    head = describe(dataset)
    frames = list(decode_frames(dataset, head))
    return head, [frame.pixels for frame in frames], frames[0].meaning


def written(tmp_path: Path, item: Dataset) -> Path:
    path = tmp_path / "object.dcm"
    path.write_bytes(to_bytes(item))
    return path


def test_a_phantom_comes_back_as_it_was_drawn(tmp_path: Path) -> None:
    item = phantom_study("chest-ct", 0, seed=1)[3]
    head, (pixels,), meaning = frames_of(written(tmp_path, item))
    assert np.array_equal(pixels, item.pixel_array)
    assert (head.modality, head.body_part, head.frames, head.samples) == ("CT", "CHEST", 1, 1)
    assert (head.study, head.sop_instance) == (item.StudyInstanceUID, item.SOPInstanceUID)
    assert head.phantom
    assert meaning == PixelMeaning(float(item.RescaleSlope), float(item.RescaleIntercept), False)


def test_monochrome1_is_marked_inverted(tmp_path: Path) -> None:
    item = phantom_study("chest-xray", 0, seed=1)[0]
    item.PhotometricInterpretation = "MONOCHROME1"
    _, _, meaning = frames_of(written(tmp_path, item))
    assert meaning.inverted


def test_the_rescale_of_an_enhanced_object_is_found_by_frame(tmp_path: Path) -> None:
    item = phantom_study("chest-ct", 0, seed=1)[0]
    item.NumberOfFrames = 2
    item.PixelData = item.PixelData * 2
    del item.RescaleSlope, item.RescaleIntercept
    groups = []
    for intercept in (-1000, -900):
        inner, group = Dataset(), Dataset()
        inner.RescaleSlope, inner.RescaleIntercept, inner.RescaleType = 2, intercept, "HU"
        group.PixelValueTransformationSequence = Sequence([inner])
        groups.append(group)
    item.PerFrameFunctionalGroupsSequence = Sequence(groups)
    dataset = open_object(written(tmp_path, item))
    meanings = [frame.meaning for frame in decode_frames(dataset, describe(dataset))]
    assert meanings == [PixelMeaning(2.0, -1000.0), PixelMeaning(2.0, -900.0)]


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom warns of what it leaves out
def test_attack_more_pixels_than_frames_give_no_more_frames(tmp_path: Path) -> None:
    item = phantom_study("chest-ct", 0, seed=1)[0]
    item.NumberOfFrames = 2
    item.PixelData = item.PixelData * 5
    assert len(frames_of(written(tmp_path, item))[1]) == 2


@needs_data
@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom warns of what it puts right
def test_every_real_object_that_pydicom_decodes_is_decoded_to_the_same_values() -> None:
    seen, compared = set(), 0
    with (DATA / "dicom" / "manifest.csv").open() as file:
        for row in csv.DictReader(file):
            path = DATA / "dicom" / row["file"]
            decodes = row["pydicom_decode"].startswith("ok") and path.read_bytes()[128:132] == b"DICM"
            if not decodes or row["transfer_syntax_uid"] in seen:
                continue
            dataset = open_object(path)
            if "StudyInstanceUID" not in dataset:
                continue
            head = describe(dataset)
            if head.samples != 1 or not head.modality:
                continue
            frames = [frame.pixels for frame in decode_frames(dataset, head)]
            plain = pydicom.dcmread(path).pixel_array
            assert np.array_equal(np.squeeze(np.stack(frames)), np.squeeze(plain))
            seen.add(row["transfer_syntax_uid"])
            compared += 1
    assert compared >= 10


def _lie(item: Dataset, what: str) -> None:
    if what == "rows":
        item.Rows = 65535
    elif what == "frames":
        item.NumberOfFrames = 2_000_000_000
    elif what == "cut":
        item.PixelData = item.PixelData[:1000]
    elif what == "bits":
        item.BitsAllocated = 7
    elif what == "no study":
        del item.StudyInstanceUID
    elif what == "path for a study":
        item.StudyInstanceUID = "/tmp/evil"  # noqa: S108
    elif what == "no rows":
        del item.Rows
    elif what in ("rubbish", "huge"):
        if what == "huge":
            item.Rows, item.Columns, item.NumberOfFrames = 16_000, 16_000, 500
        item.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
        item.PixelData = pydicom.encaps.encapsulate([b"this is no picture" * 9])
        item["PixelData"].is_undefined_length = True


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("rows", "outside of the limits"),
        ("frames", "outside of the limits"),
        ("no rows", "outside of the limits"),
        ("huge", "the limit is"),
        ("cut", "1000 bytes where the header asks"),
        ("bits", "7 bits allocated"),
        ("no study", "no study UID"),
        ("path for a study", "study UID is not a UID"),
        ("rubbish", "cannot be decoded"),
    ],
)
def test_attack_a_lying_header_is_refused_with_a_reason_before_memory_is_taken(
    tmp_path: Path, what: str, reason: str
) -> None:
    item = phantom_study("chest-xray", 0, seed=1)[0]
    _lie(item, what)
    path = tmp_path / "object.dcm"
    item.save_as(path, enforce_file_format=True)
    tracemalloc.start()
    with pytest.raises(PeerError) as refused:
        frames_of(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000_000
    assert reason in refused.value.message
    assert "DOE" not in refused.value.message


@needs_data
@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom warns of what it puts right
def test_attack_hostile_files_end_in_a_peer_error_or_are_read() -> None:
    tried = 0
    for path in sorted((DATA / "dicom_hostile").rglob("*.dcm")):
        with contextlib.suppress(PeerError, IndexError):  # IndexError is this test's own: no frame
            frames_of(path)
        tried += 1
    assert tried > 250


def heads() -> list[Head]:
    return baseline()[1].heads


def image(**changes: object) -> ImageHead:
    plain = ImageHead(
        study="1.2", series="1.3", sop_instance="1.4", sop_class="1.5", modality="DX", body_part="CHEST",
        view="PA", patient_id="P1", manufacturer="M", kind=("ORIGINAL",), rows=10, columns=10, frames=1,
        samples=1, photometric="MONOCHROME2", has_pixels=True,
    )  # fmt: skip
    return replace(plain, **changes)


@pytest.mark.parametrize(
    ("changes", "head"),
    [
        ({}, "chest-xray"),
        ({"modality": "CR", "view": ""}, "chest-xray"),
        ({"modality": "CT", "view": ""}, "chest-ct"),
        ({"modality": "CT", "view": "", "frames": 40}, "chest-ct"),
        ({"modality": "MR", "body_part": "HEAD", "view": ""}, "brain-mri"),
    ],
)
def test_an_image_goes_to_its_head(changes: dict[str, object], head: str) -> None:
    found = route(heads(), image(**changes))
    assert isinstance(found, Head)
    assert found.name == head


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"modality": "US"}, "modality US"),
        ({"modality": "CT", "body_part": "ABDOMEN"}, "CT of ABDOMEN"),
        ({"body_part": ""}, "unnamed body part"),
        ({"view": "LL"}, "view LL"),
        ({"frames": 12}, "12 frames"),
        ({"samples": 3}, "colour"),
        ({"photometric": "PALETTE COLOR"}, "colour"),
        ({"modality": "CT", "kind": ("ORIGINAL", "PRIMARY", "LOCALIZER")}, "localizer"),
    ],
)
def test_an_image_that_no_head_reads_says_why(changes: dict[str, object], reason: str) -> None:
    found = route(heads(), image(**changes))
    assert isinstance(found, NotAssessed)
    assert reason in found.reason


def test_pseudonyms_are_keyed_and_stable() -> None:
    key, other = b"k" * 32, b"l" * 32
    name = case_pseudonym(key, "P1", "1.2.3")
    assert name == case_pseudonym(key, "P1", "1.2.3")
    assert len(name) == 32
    assert len({name, case_pseudonym(other, "P1", "1.2.3"), case_pseudonym(key, "P2", "1.2.3")}) == 3


def test_a_patient_is_on_one_side_of_the_split_and_a_third_is_held_out() -> None:
    key = b"k" * 32
    sides = [is_held_out(key, f"P{n}", "1.2") for n in range(3000)]
    assert 0.30 < np.mean(sides) < 0.37
    assert all(is_held_out(key, "P7", f"1.2.{n}") == is_held_out(key, "P7", "9") for n in range(50))
    nameless = [is_held_out(key, "", f"1.2.{n}") for n in range(300)]
    assert 0 < sum(nameless) < 300


def test_what_the_edge_sees_is_what_training_saw(tmp_path: Path) -> None:
    item = phantom_study("brain-mri", 1, seed=3)[5]
    _, (pixels,), meaning = frames_of(written(tmp_path, item))
    spec = baseline()[1].head("brain-mri").input
    direct = to_model_input(item.pixel_array, meaning, spec)
    assert np.array_equal(to_model_input(pixels, meaning, spec), direct)
