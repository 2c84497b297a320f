"""Studies for the demo and the tests, with the truth known: phantoms, or real pictures wrapped into DICOM."""

from __future__ import annotations

import csv
import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import cv2
import numpy as np
import pydicom
from pydicom.uid import generate_uid

from models.heads import BY_NAME
from models.phantom_dicom import PICTURE_MAKER, Stack, Subject, to_bytes, wrap, wrap_phantom, wrap_picture
from models.phantoms import SCANNERS, Scanner, draw_phantom
from models.phantoms.scanner import expose
from shared.errors import ConfigError
from shared.package.input_spec import PixelMeaning

HEAD_OF_FOLDER = {"xray": "chest-xray", "ct": "chest-ct", "mri": "brain-mri"}
SECTION_HEADS = ("chest-ct", "brain-mri")
WHEN = datetime(2026, 11, 22, 8, 0, tzinfo=UTC)
_fresh = itertools.count(1)


@dataclass(frozen=True)
class Case:
    """One study on disk: what it is filed under and what is really the matter."""

    head: str
    label: str  # name of the class
    study: str  # StudyInstanceUID
    files: tuple[Path, ...]

    def again(self) -> Case:
        """Returns the same pixels of the same patient as a new study with fresh UIDs."""
        study, series = generate_uid(), generate_uid()
        files = []
        for file in self.files:
            ds = pydicom.dcmread(file)
            ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID = study, series, generate_uid()
            ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
            path = file.with_name(f"{file.stem}-again{next(_fresh)}.dcm")
            ds.save_as(path, enforce_file_format=True)
            files.append(path)
        return replace(self, study=study, files=tuple(files))


@dataclass(frozen=True)
class Picture:
    """A row of a labels.csv."""

    head: str
    label: str
    path: Path


class Source:
    """Where the studies come from: our phantoms, or the labelled pictures below a folder."""

    def __init__(self, data: Path | None) -> None:
        """Raises ConfigError when `data` holds no labels.csv that a head can use."""
        self._pictures: dict[str, dict[str, Iterator[Picture]]] | None = _pictures(data) if data else None

    def draw(
        self, rng: np.random.Generator, head: str, number: int, scanner: Scanner, slices: int, subject: Subject
    ) -> tuple[str, list[pydicom.FileDataset]] | None:
        """Returns (label, objects) of a new patient's study, classes in turn; None when pictures have run out."""
        classes = [c.name for c in BY_NAME[head].classes]
        if self._pictures is None:
            label = number % len(classes)
            phantom = draw_phantom(rng, head, label, scanner, slices=slices)
            modality = ("DX", "CR")[number % 2] if head == "chest-xray" else ""
            return classes[label], wrap_phantom(phantom, subject, new_uid=generate_uid, when=WHEN, modality=modality)
        left = self._pictures.get(head, {})
        for turn in range(len(classes)):
            picture = next(left.get(classes[(number + turn) % len(classes)], iter(())), None)
            if picture is not None:
                return picture.label, _wrap(rng, picture, scanner, subject)
        return None


def draw_cases(
    source: Source, folder: Path, *, scanner: str, purpose: str, radiographs: int, sections: int, slices: int
) -> list[Case]:
    """Writes `radiographs` chest X-rays and `sections` series of each other head below `folder`; returns them.

    `scanner` names the hospital's equipment (models.phantoms.SCANNERS); the same arguments give the same patients.
    """
    rng = np.random.default_rng(zlib.crc32(f"{scanner} {purpose}".encode()))
    wanted = [("chest-xray", radiographs), *((head, sections) for head in SECTION_HEADS)]
    cases = []
    for head, count in wanted:
        for number in range(count):
            patient = f"{scanner}-{purpose}-{head}-{number:03}"
            subject = Subject(patient, f"Phantom^{patient}", "19600101", "FM"[number % 2], patient[-16:], scanner)
            drawn = source.draw(rng, head, number, SCANNERS[scanner], slices, subject)
            if drawn is None:
                break
            label, objects = drawn
            files = []
            for index, item in enumerate(objects):
                files.append(folder / f"{head}-{number:03}-{index:02}.dcm")
                files[-1].write_bytes(to_bytes(item))
            cases.append(Case(head, label, str(objects[0].StudyInstanceUID), tuple(files)))
    return cases


def _wrap(rng: np.random.Generator, picture: Picture, scanner: Scanner, subject: Subject) -> list[pydicom.FileDataset]:
    """Wraps a real picture; hospital C's X-ray machine takes it anew, its brightness standing for attenuation."""
    image = cv2.imread(str(picture.path), cv2.IMREAD_GRAYSCALE)
    if image is None:
        raise ConfigError(f"{picture.path} is not a picture.", cure="Check the folder given to --data.")
    if picture.head != "chest-xray" or scanner.name != "C":
        return wrap_picture(image, BY_NAME[picture.head], subject, new_uid=generate_uid, when=WHEN)
    attenuation = 0.7 + image.astype(np.float32) / 255 * 3.0  # (H, W) line integrals: lungs 1, mediastinum 3 to 4
    pixels = expose(rng, attenuation, scanner)[None]  # (1, H, W)
    stack = Stack(pixels, PixelMeaning(inverted=scanner.inverted), "DX", "CHEST", 1.0, PICTURE_MAKER)
    return wrap(stack, subject, new_uid=generate_uid, when=WHEN)


def _pictures(data: Path) -> dict[str, dict[str, Iterator[Picture]]]:
    """Returns, by head and label, the pictures that no training saw (`val` and `test`, one a patient)."""
    found: dict[str, dict[str, list[Picture]]] = {}
    seen: set[str] = set()
    for table in sorted([*data.glob("labels.csv"), *data.glob("*/labels.csv")]):
        head = HEAD_OF_FOLDER.get(table.parent.name, "")
        if not head:
            continue
        names = {c.name for c in BY_NAME[head].classes}
        with table.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                patient = row.get("patient_id") or row["file"]
                if row["split"] == "train" or row["label"] not in names or patient in seen:
                    continue
                seen.add(patient)
                picture = Picture(head, row["label"], table.parent / row["file"])
                found.setdefault(head, {}).setdefault(row["label"], []).append(picture)
    if not found:
        raise ConfigError(
            f"{data} holds no labels.csv in a folder called {', '.join(HEAD_OF_FOLDER)}.",
            cure="Give --data a folder laid out like the project's data folder.",
        )
    rng = np.random.default_rng(7)
    return {
        head: {label: iter([rows[i] for i in rng.permutation(len(rows))]) for label, rows in by_label.items()}
        for head, by_label in found.items()
    }
