"""The head of every real object against pydicom's reading of it; and no object that was cut passes for a whole one."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import pydicom
import pytest

from edge.intake.head import DEFLATED, CutError, DatasetHead, read_head, valid_uid
from tests.simulators.real_data import DATA, needs_data

CUTS = (1, 2, 5, 100, 0.25, 0.5, 0.9)


def objects() -> list[tuple[Path, int, str]]:
    """Every real object with a meta header: file, where its data set starts, transfer syntax."""
    found = []
    for path in sorted((DATA / "dicom").rglob("*")):
        if not path.is_file() or path.suffix in (".md", ".csv"):
            continue
        try:
            with path.open("rb") as file:
                pydicom.filereader.read_preamble(file, force=False)
                meta = pydicom.filereader._read_file_meta_info(file)
                found.append((path, file.tell(), str(meta.TransferSyntaxUID)))
        except Exception:  # noqa: BLE001, S112 odd on purpose: no modality could send it
            continue
    return found


def uid(value: object) -> str:
    text = str(value or "")
    return text if valid_uid(text) else ""


@needs_data
@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom warns of what it puts right
def test_the_head_of_every_real_object_is_what_pydicom_reads() -> None:
    wrong, compared = [], 0
    for path, offset, syntax in objects():
        try:
            head = read_head(path, offset, syntax)
        except CutError:
            continue  # the next test tells which
        if head.fault:
            continue
        read = pydicom.dcmread(path, stop_before_pixels=True)
        patient = str(read.get("PatientID") or "")
        expected = {
            "sop_class": uid(read.get("SOPClassUID")),
            "sop_instance": uid(read.get("SOPInstanceUID")),
            "study": uid(read.get("StudyInstanceUID")),
            "series": uid(read.get("SeriesInstanceUID")),
            "modality": str(read.get("Modality") or ""),
        }
        if patient.isascii():
            expected["patient"] = hashlib.sha256(patient.strip().encode()).hexdigest() if patient.strip() else ""
        compared += 1
        wrong += [(path.name, name) for name, value in expected.items() if getattr(head, name) != value]
    assert wrong == []
    assert compared > 500


@needs_data
def test_few_real_objects_are_cut_and_no_cut_one_passes_for_whole(tmp_path: Path) -> None:
    refused, passed, tried = [], [], 0
    cut = tmp_path / "cut"
    for number, (path, offset, syntax) in enumerate(objects()):
        data = path.read_bytes()
        if whole(path, offset, syntax) is None:
            refused.append(path.name)
            continue
        if number % 4 and syntax != DEFLATED and path.parent.parent.name == "series":
            continue  # they are all alike
        for part in CUTS:
            length = part if isinstance(part, int) else int((len(data) - offset) * part)
            if length >= len(data) - offset or not data[-length:].strip(b"\0"):
                continue  # nothing is left, or padding is
            cut.write_bytes(data[:-length])
            found = whole(cut, offset, syntax)
            tried += 1
            if found is not None and not found.fault and found.pixels_at >= 0 and syntax != DEFLATED:
                passed.append((path.name, part))
    assert len(refused) <= 12, refused
    assert passed == []
    assert tried > 1000


def whole(path: Path, offset: int, syntax: str) -> DatasetHead | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return read_head(path, offset, syntax)
        except CutError:
            return None
