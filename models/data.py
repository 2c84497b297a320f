"""What the baseline learns from: real labelled pictures of three modalities and phantoms, as the model sees them.

The pictures are read from the folder in RADFLEET_DATA, or `../shared/data` beside the checkout, with the splits that
they come with (by patient or group); nothing is copied. They are 8-bit pictures without modality units: a picture's
0..255 is taken as the head's window for CT, and goes through the head's percentiles for the others.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from models.heads import BY_NAME, HEADS
from models.phantoms import SCANNERS, draw_phantom, draw_scanner, phantom_inputs
from shared.errors import ConfigError
from shared.package.input_spec import PixelMeaning, Window, to_model_input
from shared.package.manifest import Head

FOLDERS = {"chest-xray": "xray", "chest-ct": "ct", "brain-mri": "mri"}
SKIPPED_SITES = {"hannover-de"}  # one class only: a model would learn the site


@dataclass(frozen=True)
class Samples:
    """Cases in columns. `site` is the hospital or "phantom"."""

    images: npt.NDArray[np.uint8]  # (N, 224, 224)
    heads: npt.NDArray[np.int64]  # (N,) index into HEADS
    labels: npt.NDArray[np.int64]  # (N,) index into the head's classes
    sites: npt.NDArray[np.str_]  # (N,)

    def where(self, mask: npt.NDArray[np.bool_]) -> Samples:
        """Returns the cases for which `mask` (N,) holds."""
        return Samples(self.images[mask], self.heads[mask], self.labels[mask], self.sites[mask])


def concatenate(parts: Sequence[Samples]) -> Samples:
    """Returns the cases of all parts in order."""
    return Samples(*(np.concatenate([getattr(part, name) for part in parts]) for name in Samples.__annotations__))


def data_folder() -> Path | None:
    """Returns where the real data is, or None."""
    named = os.environ.get("RADFLEET_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    return folder if (folder / "xray" / "labels.csv").is_file() else None


def picture_meaning(head: Head) -> PixelMeaning:
    """Returns what an 8-bit picture's 0..255 stands for, so that the head's input spec gives the picture back."""
    if isinstance(head.input.intensity, Window):
        window = head.input.intensity
        return PixelMeaning(slope=window.width / 255, intercept=window.center - window.width / 2)
    return PixelMeaning()


def pictures(folder: Path, head: Head, split: str) -> Samples:
    """Returns the pictures of one split of one head that carry one of the head's labels.

    Raises:
        ConfigError: the folder's labels.csv or one of its pictures cannot be read.
    """
    names = [c.name for c in head.classes]
    images, labels, sites = [], [], []
    for row in _rows(folder / FOLDERS[head.name] / "labels.csv"):
        if row["split"] != split or row["label"] not in names or row["source_site"] in SKIPPED_SITES:
            continue
        path = folder / FOLDERS[head.name] / row["file"]
        picture = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        if picture is None:
            raise ConfigError(f"{path} is not a picture.", cure="Check the data folder.")
        images.append(to_model_input(picture, picture_meaning(head), head.input))
        labels.append(names.index(row["label"]))
        sites.append(row["source_site"])
    return Samples(np.stack(images), np.full(len(images), HEADS.index(head)), np.array(labels), np.array(sites))


def _rows(path: Path) -> Iterator[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            yield from csv.DictReader(file)
    except OSError as exc:
        raise ConfigError(f"Cannot read {path}: {exc}.", cure="Point RADFLEET_DATA at the data folder.") from exc


def phantoms(
    seed: int, head_name: str, studies: int, *, scanner: str | None = None, slices: int = 6, keep: int = 2
) -> Samples:
    """Returns phantoms of one head, classes in turn, on drawn scanners or on the named one.

    Of each series of `slices`, `keep` slices are taken at random with their own labels.
    """
    rng = np.random.default_rng([seed, *head_name.encode()])
    head = BY_NAME[head_name]
    images, labels = [], []
    for i in range(studies):
        equipment = SCANNERS[scanner] if scanner else draw_scanner(rng)
        study = draw_phantom(rng, head_name, i % len(head.classes), equipment, slices=slices)
        chosen = rng.permutation(len(study.pixels))[:keep]
        images.append(phantom_inputs(study)[chosen])
        labels.append(study.slice_labels[chosen])
    stacked = np.concatenate(images)
    return Samples(
        stacked, np.full(len(stacked), HEADS.index(head)), np.concatenate(labels), np.full(len(stacked), "phantom")
    )
