"""Labelled phantoms: images that nobody's body was needed for, with the truth known.

They train and test the whole path without patients; they say little about real disease, and whatever was measured on
them alone says so. The same generator state gives the same pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.heads import BY_NAME
from models.phantoms.chest import chest
from models.phantoms.scanner import SCANNERS, Scanner, draw_scanner, expose
from models.phantoms.sections import CT_INTERCEPT, ct_series, mr_series
from shared.package.input_spec import PixelMeaning, to_model_input

__all__ = ["SCANNERS", "Phantom", "Scanner", "draw_phantom", "draw_scanner", "phantom_inputs"]
SLICES = 12


@dataclass(frozen=True)
class Phantom:
    """One study of one head: a radiograph (one frame) or a series."""

    head: str
    label: int  # index into the head's classes
    pixels: npt.NDArray[np.uint16]  # (S, H, W) stored values, 12 significant bits
    meaning: PixelMeaning
    slice_labels: npt.NDArray[np.int64]  # (S,): the head's normal class where the lesion is not in the slice
    spacing_mm: float  # of pixels; slices are 5 mm apart


def draw_phantom(rng: np.random.Generator, head: str, label: int, scanner: Scanner, *, slices: int = SLICES) -> Phantom:
    """Returns a new patient's study with the answer `label` as `scanner` shows it."""
    if head == "chest-xray":
        pixels = expose(rng, chest(rng, label), scanner)[None]  # (1, 512, 480)
        meaning = PixelMeaning(inverted=scanner.inverted)
        return Phantom(head, label, pixels, meaning, np.array([label]), 0.8)
    make = ct_series if head == "chest-ct" else mr_series
    stack, shown = make(rng, label, scanner, slices)  # (S, 256, 256), (S,)
    meaning = PixelMeaning(intercept=CT_INTERCEPT) if head == "chest-ct" else PixelMeaning()
    normal = BY_NAME[head].normal
    return Phantom(head, label, stack, meaning, np.where(shown, label, normal), 1.4 if head == "chest-ct" else 0.9)


def phantom_inputs(phantom: Phantom) -> npt.NDArray[np.uint8]:
    """Returns what the model sees of every frame: uint8 (S, 224, 224)."""
    spec = BY_NAME[phantom.head].input
    return np.stack([to_model_input(frame, phantom.meaning, spec) for frame in phantom.pixels])
