"""What stands between a patient and the stored pixels: dose, scatter, blur, the detector's curve, collimation.

One `Scanner` describes a hospital's equipment. `draw_scanner` varies it for training; scanner C is outside that
variety on purpose: digitised film whose response turns back on itself in the most exposed part (solarised lungs), by
another amount on every film because the developer is not stable; tightly collimated, the border left white. It hides
little (a reader who has seen such films reads them), and percentile normalisation cannot undo it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Scanner:
    """Equipment of one hospital. Lengths are fractions of the image's height unless they say otherwise."""

    name: str
    # projection (CR, DX)
    dose: float = 900.0  # quanta a pixel at the exposure of the lungs
    gamma: float = 1.0  # slope of the response against log exposure
    shoulder: float = 0.0  # 0: straight response; towards 1: S-shaped
    reversal: float = 0.0  # strength of the turn-back (solarisation) of the most exposed part
    unrest: float = 0.0  # the reversal of one exposure differs from that by up to this, either way
    blur: float = 0.003
    scatter: float = 0.15  # share of the primary beam
    grid: float = 0.0  # amplitude of the anti-scatter grid's lines, share of the signal
    structure: float = 0.0  # amplitude of the read-out's column and row pattern, share of the full scale
    collimation: float = 0.02  # largest width of a border that the collimator covers
    shutter: float = 0.0  # stored value of the covered border, share of the full scale
    marker: bool = True
    inverted: bool = False  # stores MONOCHROME1
    # cross-sections (CT, MR)
    noise: float = 1.0  # standard deviation against a usual protocol
    sharpness: float = 1.0  # kernel: below 1 blurs, above 1 enhances edges
    bias: float = 0.15  # MR receive-coil inhomogeneity, share


SCANNERS = {
    "standard": Scanner("standard"),
    "A": Scanner("A", dose=1200, gamma=0.9, shoulder=0.15, grid=0.004, collimation=0.03, noise=0.8),
    "B": Scanner("B", dose=700, gamma=1.15, shoulder=0.3, scatter=0.22, blur=0.004, inverted=True, noise=1.2),
    "C": Scanner(
        "C",
        dose=700,
        gamma=1.5,
        shoulder=0.5,
        reversal=1.65,
        unrest=0.85,
        blur=0.004,
        scatter=0.25,
        grid=0.0,
        structure=0.01,
        collimation=0.11,
        shutter=1.0,
        noise=1.6,
        sharpness=0.8,
        bias=0.3,
    ),
}


def draw_scanner(rng: np.random.Generator) -> Scanner:
    """Returns equipment as the training hospitals have it, varied."""
    return Scanner(
        name="drawn",
        dose=float(np.exp(rng.uniform(np.log(350), np.log(2500)))),
        gamma=float(rng.uniform(0.75, 1.3)),
        shoulder=float(rng.uniform(0.0, 0.45)),
        blur=float(rng.uniform(0.001, 0.005)),
        scatter=float(rng.uniform(0.05, 0.3)),
        grid=float(rng.choice([0.0, rng.uniform(0.002, 0.008)])),
        collimation=float(rng.uniform(0.0, 0.05)),
        marker=bool(rng.random() < 0.7),
        inverted=bool(rng.random() < 0.3),
        noise=float(np.exp(rng.uniform(np.log(0.6), np.log(1.6)))),
        sharpness=float(rng.uniform(0.75, 1.3)),
        bias=float(rng.uniform(0.0, 0.25)),
    )


def smooth_field(rng: np.random.Generator, shape: tuple[int, int], cell: float) -> Image:
    """Returns a random field (H, W) of zero mean and unit deviation whose structures are about `cell` pixels wide."""
    rows, columns = (max(2, round(side / cell)) + 3 for side in shape)
    coarse = rng.standard_normal((rows, columns)).astype(np.float32)
    fine = cv2.resize(coarse, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)
    return np.asarray((fine - fine.mean()) / (fine.std() + 1e-6), dtype=np.float32)


def expose(rng: np.random.Generator, attenuation: Image, scanner: Scanner) -> Pixels:
    """Returns the 12-bit radiograph (H, W) of line integrals (H, W): lungs about 1, bone and abdomen 3 to 4."""
    height, width = attenuation.shape
    if scanner.unrest:
        turned = scanner.reversal + scanner.unrest * rng.uniform(-1, 1)
        scanner = replace(scanner, reversal=float(turned))
    beam = np.exp(1.0 - attenuation)  # 1 behind the lungs, 7 in open air
    beam = cv2.GaussianBlur(beam, (0, 0), max(0.3, scanner.blur * height))
    wide = cv2.resize(cv2.GaussianBlur(cv2.resize(beam, (64, 64)), (0, 0), 8), (width, height))
    beam = (1 - scanner.scatter * 0.5) * beam + scanner.scatter * 0.5 * np.minimum(wide, 1.5)
    white = rng.standard_normal((height, width)).astype(np.float32)
    quantum = 0.6 * white + 0.8 * cv2.GaussianBlur(white, (0, 0), 1.2) * 4.0  # the detector correlates noise
    beam = np.maximum(beam + np.sqrt(beam / scanner.dose) * quantum, 0.005)
    if scanner.grid:
        beam = beam * (1 + scanner.grid * np.sin(np.arange(width, dtype=np.float32) * 2.1))
    stored = respond(np.log(beam), scanner)  # (H, W) 0..1, 1 is dense tissue
    if scanner.structure:
        columns = rng.standard_normal((1, width)) + smooth_field(rng, (1, width), 9.0)
        pattern = 0.6 * columns + 0.5 * rng.standard_normal((height, 1))  # (H, W)
        stored = np.asarray(stored + scanner.structure * pattern, dtype=np.float32)
    unit = np.clip(_collimate(rng, stored, scanner), 0, 1)
    return np.asarray(np.rint((1 - unit if scanner.inverted else unit) * 4095), dtype=np.uint16)


def respond(log_exposure: npt.NDArray[np.floating], scanner: Scanner) -> Image:
    """Returns the stored value, 0 for much exposure and 1 for none, of natural-log exposure (0 behind the lungs)."""
    x = -log_exposure * scanner.gamma  # 0 behind lungs, about 2.5 behind the heart
    straight = (x + 1.2) / 5.0
    bent = 1 / (1 + np.exp(-2.2 * (x - 1.0)))
    value = (1 - scanner.shoulder) * straight + scanner.shoulder * bent
    if scanner.reversal:
        over = np.maximum(0.0, 0.9 - x)  # exposure beyond the curve's turning point, in the lungs and in open air
        value = value + scanner.reversal * 0.55 * np.minimum(over, 1.5)
    return np.asarray(value, dtype=np.float32)


def _collimate(rng: np.random.Generator, image: Image, scanner: Scanner) -> Image:
    height, width = image.shape
    top, bottom, left, right = (int(scanner.collimation * height * rng.uniform(0.3, 1.0)) for _ in range(4))
    covered = np.full_like(image, scanner.shutter)
    covered[top : height - bottom, left : width - right] = image[top : height - bottom, left : width - right]
    if scanner.marker:
        place = (left + int(width * rng.uniform(0.02, 0.08)), top + int(height * rng.uniform(0.06, 0.2)))
        letter = np.array([(0, 20), (0, 0), (9, 0), (12, 5), (9, 10), (0, 10), (6, 10), (13, 20)])  # an R of lead
        cv2.polylines(covered, [(letter + place).astype(np.int32)], False, 1.0, 2)
    return covered
