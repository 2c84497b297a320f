"""Burned-in text: how much of what is drawn is found and blacked, and how often clean images are taken for text."""

from __future__ import annotations

import csv
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pydicom
from PIL import Image, ImageDraw, ImageFont

from edge.imaging.burned_in import marks, pictures
from edge.imaging.read import open_object
from models.data import data_folder
from models.phantoms import SCANNERS, draw_phantom
from scripts.lab.table import Row
from shared.errors import PeerError

Picture = npt.NDArray[np.uint8]  # (H, W, 3)

HEIGHTS = (8, 10, 12, 16, 24, 32)  # pixels, of a line from the highest to the lowest part of its letters
LINES = ("MUELLER^HANS 12.03.1961", "ID 00471147", "Jane Doe F 045Y", "St. Mary Hospital")
COLOURS = ((255, 255, 255), (255, 255, 0), (150, 150, 150))
SCREENS = ("US", "SC")
CLEAN = ("CT", "MR", "CR", "PT")
COVERED = 0.9  # of a drawn line's own pixels: then it counts as covered
READABLE = 60  # grey levels between the text and what is under it
PLACES = 30  # tried
EVERY = 8  # of a whole series, one image in so many


def measure() -> list[Row]:
    """Returns the share of drawn lines that are covered, by height; and the clean images with an alarm."""
    rows = []
    folder = data_folder()
    real = dict(real_pictures(folder / "dicom")) if folder else {}
    pictures_of = {
        "ultrasound and secondary captures": [one for name, one in real.items() if name[0] in SCREENS],
        "CT, MR, CR and PET": [one for name, one in real.items() if name[0] in CLEAN],
        "phantoms": list(phantoms()),
    }
    for what, pictures_here in pictures_of.items():
        if not pictures_here:
            continue
        rng = np.random.default_rng(7)
        for height in HEIGHTS:
            covered, sure, of = recall([one for one in pictures_here if fits(one, height)], height, rng)
            if of:
                rows.append(Row(f"{what}: lines of {height} pixels blacked, n {of}", covered / of, ""))
                rows.append(Row(f"{what}: lines of {height} pixels sure to be text, n {of}", sure / of, ""))
    for what, clean in (("CT, MR, CR and PET", pictures_of["CT, MR, CR and PET"]), ("phantoms", list(phantoms()))):
        if clean:
            alarms = sum(any(mark.text for mark in marks(one)) for one in clean)
            rows.append(Row(f"{what}: clean images taken for text, n {len(clean)}", alarms, "images"))
    screen = np.zeros((512, 512, 3), np.uint8)
    times = []
    for _ in range(10):
        began = time.perf_counter()
        marks(screen)
        times.append((time.perf_counter() - began) * 1000)
    rows.append(Row("one image of 512 by 512, two threads, p50", float(np.median(times)), "ms"))
    return rows


def recall(pictures_here: list[Picture], height: int, rng: np.random.Generator) -> tuple[int, int, int]:
    """Returns how many drawn lines were covered by marks, how many by a mark sure to be text, and of how many."""
    covered = sure = of = 0
    for picture in pictures_here:
        drawn = draw(picture, height, rng)
        if drawn is None:
            continue
        written, ink = drawn
        of += 1
        found = marks(written)
        covered += share(ink, [(m.left, m.top, m.width, m.height) for m in found]) >= COVERED
        sure += any(mark.text and overlaps(ink, mark.left, mark.top, mark.width, mark.height) for mark in found)
    return covered, sure, of


def draw(picture: Picture, height: int, rng: np.random.Generator) -> tuple[Picture, npt.NDArray[np.bool_]] | None:
    """Returns the picture with a line of text where it can be read, and its pixels (H, W); None if nowhere."""
    text, colour = LINES[rng.integers(len(LINES))], COLOURS[rng.integers(len(COLOURS))]
    if rng.integers(2):  # a scanner's stroked letters
        scale = height / 29
        (width, tall), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
        ink = np.zeros((tall + below + 2, width), np.uint8)
        cv2.putText(ink, text, (0, tall), cv2.FONT_HERSHEY_SIMPLEX, scale, 255, 1)
    else:
        font = ImageFont.load_default(size=height)
        left, top, right, bottom = (int(side) for side in font.getbbox(text))
        image = Image.new("L", (right - left, bottom - top))
        ImageDraw.Draw(image).text((-left, -top), text, fill=255, font=font)
        ink = np.asarray(image)
    ink = ink[:, : picture.shape[1] - 8]
    luminance = picture.mean(axis=2)
    for _ in range(PLACES):
        x = int(rng.integers(4, picture.shape[1] - ink.shape[1] - 3))
        y = int(rng.integers(4, picture.shape[0] - ink.shape[0] - 3))
        under = luminance[y : y + ink.shape[0], x : x + ink.shape[1]][ink > 76]
        for shown in (colour, (0, 0, 0)):
            if np.mean(np.abs(under - np.mean(shown)) >= READABLE) >= COVERED:
                alpha = np.zeros(picture.shape[:2], np.float32)
                alpha[y : y + ink.shape[0], x : x + ink.shape[1]] = ink / 255
                written = picture * (1 - alpha[..., None]) + np.array(shown, np.float32) * alpha[..., None]
                return written.astype(np.uint8), alpha > 0.3
    return None


def fits(picture: Picture, height: int) -> bool:
    """Whether a line of this height is no larger than lines on screens are."""
    return height * 9 <= min(picture.shape[:2]) and height * 12 <= picture.shape[1]


def share(ink: npt.NDArray[np.bool_], boxes: list[tuple[int, int, int, int]]) -> float:
    """Returns the share of the text's pixels that the boxes cover."""
    left = ink.copy()
    for x, y, w, h in boxes:
        left[y : y + h, x : x + w] = False
    return 1 - left.sum() / max(ink.sum(), 1)


def overlaps(ink: npt.NDArray[np.bool_], x: int, y: int, w: int, h: int) -> bool:
    """Whether a box holds any of the text."""
    return bool(ink[y : y + h, x : x + w].any())


def real_pictures(folder: Path) -> Iterator[tuple[tuple[str, str], Picture]]:
    """Yields one frame of every decodable object of the kinds above, by (kind, file), each image once."""
    seen: Counter[bytes] = Counter()
    with (folder / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for index, row in enumerate(rows):
        secondary, kind = "Secondary" in row["sop_class"], row["modality"]
        kind = "SC" if secondary else kind
        if kind not in (*SCREENS, *CLEAN) or (row["kind"] == "series" and index % EVERY):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                picture = next(pictures(open_object(folder / row["file"])))
        except (PeerError, StopIteration):
            continue
        seen[digest := cv2.resize(picture, (16, 16)).tobytes()] += 1
        if min(picture.shape[:2]) >= 64 and seen[digest] == 1:
            yield (kind, row["file"]), picture


def phantoms() -> Iterator[Picture]:
    """Yields phantoms of every head, as 8-bit pictures."""
    scanner = next(iter(SCANNERS.values())) if isinstance(SCANNERS, dict) else SCANNERS[0]
    for head in ("chest-xray", "chest-ct", "brain-mri"):
        for seed in range(8):
            drawn = draw_phantom(np.random.default_rng(seed), head, seed % 3, scanner, slices=3)
            values = np.asarray(drawn.pixels[len(drawn.pixels) // 2], dtype=np.float32)
            grey = (values - values.min()) * (255 / max(float(np.ptp(values)), 1e-6))
            yield np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
