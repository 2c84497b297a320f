"""Cross-sections: chest CT in Hounsfield units and brain MR, as series of neighbouring slices of one patient.

CT labels are those of the head chest-ct: 0 normal, 1 benign (small, smooth, often calcified nodule), 2 malignant
(larger, spiculated, soft). MR labels are those of brain-mri: 0 notumor, 1 glioma (inside the brain, irregular, ring
that enhances, oedema), 2 meningioma (outside it, even and bright, broad base on the skull), 3 pituitary (small, bright,
at the sella).
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from models.phantoms.scanner import Image, Pixels, Scanner, smooth_field

SIDE = 256
CT_INTERCEPT = -1024.0  # HU of the stored value 0


def _disc(x: float, y: float, a: float, b: float, angle: float = 0.0) -> Image:
    image = np.zeros((SIDE, SIDE), np.float32)
    cv2.ellipse(
        image,
        (round(x * 8), round(y * 8)),
        (max(1, round(a * 8)), max(1, round(b * 8))),
        angle,
        0,
        360,
        1.0,
        -1,
        shift=3,
    )
    return image


def _soft(image: Image, sigma: float) -> Image:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), dtype=np.float32)


def _blend(image: Image, mask: Image, value: float | Image) -> Image:
    return np.asarray(image * (1 - mask) + mask * value, dtype=np.float32)


def _star(rng: np.random.Generator, x: float, y: float, radius: float, roughness: float, spikes: int) -> Image:
    """Returns a filled shape whose edge wanders by `roughness` and that carries `spikes` thin rays."""
    image = np.zeros((SIDE, SIDE), np.float32)
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    edge = np.full_like(angle, radius)
    for k in range(2, 8):
        edge += roughness * radius / k * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) * rng.uniform(0.3, 1.3)
    points = np.stack([x + edge * np.cos(angle), y + edge * np.sin(angle)], 1)
    cv2.fillPoly(image, [np.rint(points * 8).astype(np.int32)], 1.0, shift=3)
    for _ in range(spikes):
        a, reach = rng.uniform(0, 2 * np.pi), radius * rng.uniform(1.3, 2.1)
        tip = (round(x + reach * np.cos(a)), round(y + reach * np.sin(a)))
        cv2.line(image, (round(x), round(y)), tip, 0.7, 1)
    return image


def ct_series(
    rng: np.random.Generator, label: int, scanner: Scanner, slices: int
) -> tuple[Pixels, npt.NDArray[np.bool_]]:
    """Returns stored pixels uint16 (S, 256, 256), HU = stored - 1024, and which slices show the lesion (S,)."""
    a, b = rng.uniform(98, 116), rng.uniform(72, 88)
    cx, cy = 128 + rng.normal(0, 3), 130 + rng.normal(0, 4)
    fat = rng.uniform(5, 14)
    lung_hu = rng.uniform(-880, -790)
    side = int(rng.choice([-1, 1]))
    heart = rng.uniform(0.1, 1.0)  # level of the slab: 0 above the heart, 1 through it
    place = (cx + side * a * rng.uniform(0.36, 0.6), cy + b * rng.uniform(-0.35, 0.3))
    radius = rng.uniform(3.0, 7.0) if label == 1 else rng.uniform(6.0, 15.0)
    calcified = rng.random() < 0.7
    density = rng.uniform(120, 400) if calcified else rng.uniform(-20, 60)
    shape_seed = int(rng.integers(2**31))
    vessels = [
        (
            int(rng.choice([-1, 1])),
            rng.uniform(0.2, 0.72),
            rng.uniform(-0.6, 0.6),
            rng.uniform(0.8, 2.6),
            rng.normal(0, 1.2, 2),
        )
        for _ in range(46)
    ]
    middle = (slices - 1) / 2 + rng.uniform(-0.1, 0.1) * slices
    frames, shown = [], []
    for i in range(slices):
        z = (i - middle) / max(slices, 2) * 2  # -1..1 along the slab
        hu = np.full((SIDE, SIDE), -1000.0, np.float32)
        hu = _blend(hu, _soft(_disc(cx, cy, a, b), 1), -100.0 + 10 * smooth_field(rng, hu.shape, 20))
        hu = _blend(hu, _soft(_disc(cx, cy, a - fat, b - fat), 1.2), 45.0)
        lungs = np.zeros_like(hu)
        for s in (-1, 1):
            lungs = np.maximum(lungs, _disc(cx + s * a * 0.46, cy - 2, a * 0.35, b * (0.72 - 0.04 * z), s * 6))
        core = _soft(_disc(cx, cy - b * 0.1, a * (0.2 + 0.06 * heart), b * 0.5), 2)
        hu = _blend(hu, _soft(lungs, 1.2), lung_hu + 18 * smooth_field(rng, hu.shape, 30))
        hu = _blend(hu, core, 40.0)
        hu = _blend(
            hu, _soft(_disc(cx + a * 0.1, cy - b * 0.1, a * 0.3 * heart + 4, b * 0.36 * heart + 4, 30), 1.5), 60.0
        )
        hu = _blend(hu, _soft(_disc(cx + 8, cy + b * 0.38, 8, 8), 1), 75.0)  # aorta
        hu = _blend(hu, _soft(_disc(cx - 1, cy - b * 0.28, 5, 5), 1), -980.0 if heart < 0.6 else 40.0)  # trachea
        hu = _blend(hu, _soft(_disc(cx, cy + b * 0.66, 13, 11), 1), 320.0)  # vertebra
        for k in range(14):
            t = k / 14 * 2 * np.pi + 0.15 * z
            spot = _disc(cx + (a - fat - 3) * np.cos(t), cy + (b - fat - 3) * np.sin(t), 6, 2.5, np.degrees(t) + 90)
            hu = _blend(hu, _soft(spot, 0.8), 350.0)
        inside = _soft(lungs, 1.0)
        tubes = np.zeros_like(hu)
        for s, u, v, size, drift in vessels:
            x, y = cx + s * a * u + drift[0] * z * 5, cy + b * v + drift[1] * z * 5
            tubes = np.maximum(tubes, _disc(x, y, size, size * 0.8))
        hu = _blend(hu, _soft(tubes, 0.6) * inside, 20.0)
        reach = radius * np.sqrt(max(0.0, 1 - (z * 0.95) ** 2))
        visible = label > 0 and reach > 0.35 * radius
        if visible:
            hu = _lesion(hu, label, place, reach, density if label == 1 else 30.0, shape_seed)
        hu = _kernel(hu, scanner) + 22 * scanner.noise * _texture_noise(rng)
        frames.append(np.clip(np.rint(hu - CT_INTERCEPT), 0, 4095).astype(np.uint16))
        shown.append(visible)
    return np.stack(frames), np.array(shown)


def _lesion(hu: Image, label: int, place: tuple[float, float], radius: float, density: float, seed: int) -> Image:
    rng = np.random.default_rng(seed)  # the same shape on every slice, scaled
    if label == 1:
        return _blend(hu, _soft(_star(rng, *place, radius, 0.05, 0), 0.7), density)
    star = _soft(_star(rng, *place, radius, 0.35, int(rng.integers(6, 16))), 0.7)
    texture = density + 25 * smooth_field(rng, (SIDE, SIDE), 5)
    return _blend(hu, star, texture)


def _kernel(image: Image, scanner: Scanner) -> Image:
    if scanner.sharpness < 1:
        return _soft(image, 0.3 + 2.0 * (1 - scanner.sharpness))
    return np.asarray(image + (scanner.sharpness - 1) * (image - _soft(image, 1.5)), dtype=np.float32)


def _texture_noise(rng: np.random.Generator) -> Image:
    white = rng.standard_normal((SIDE, SIDE)).astype(np.float32)
    return np.asarray(white - 0.6 * _soft(white, 1.5), dtype=np.float32)


def mr_series(
    rng: np.random.Generator, label: int, scanner: Scanner, slices: int
) -> tuple[Pixels, npt.NDArray[np.bool_]]:
    """Returns stored pixels uint16 (S, 256, 256), T1-weighted after contrast, and which slices show the tumour (S,)."""
    a, b = rng.uniform(74, 86), rng.uniform(92, 106)
    cx, cy = 128 + rng.normal(0, 3), 128 + rng.normal(0, 3)
    gray, white = rng.uniform(0.34, 0.42), rng.uniform(0.48, 0.56)
    folds = smooth_field(rng, (SIDE, SIDE), rng.uniform(9, 13))
    wide = rng.uniform(0.7, 1.4)  # ventricles
    seed, tumour = int(rng.integers(2**31)), _tumour_place(rng, label, (cx, cy), (a, b))
    contrast = rng.uniform(0.10, 0.40)
    middle = (slices - 1) / 2 + rng.uniform(-0.1, 0.1) * slices
    frames, shown = [], []
    for i in range(slices):
        z = (i - middle) / max(slices, 2) * 2
        shrink = 1 - 0.07 * abs(z)
        image = np.zeros((SIDE, SIDE), np.float32)
        image = _blend(image, _soft(_disc(cx, cy, a * shrink + 13, b * shrink + 13), 1), 0.75)  # scalp
        image = _blend(image, _soft(_disc(cx, cy, a * shrink + 8, b * shrink + 8), 1), 0.08)  # skull
        brain = _soft(_disc(cx, cy, a * shrink, b * shrink), 1)
        image = _blend(image, brain, 0.16)  # CSF
        tissue = _soft(_disc(cx, cy, a * shrink - 4, b * shrink - 4), 1.5)
        deep = _soft(_disc(cx, cy, a * shrink - 22, b * shrink - 24), 8)
        matter = gray + (white - gray) * np.clip(deep * 1.2 + 0.5 * folds * (1 - deep), 0, 1)
        image = _blend(image, tissue, matter.astype(np.float32))
        for s in (-1, 1):
            horn = _disc(cx + s * 11 * wide, cy - 8, 7 * wide * shrink, 26 * shrink, -s * 14)
            image = _blend(image, _soft(horn, 1.5), 0.14)
        cv2.line(image, (round(cx), round(cy - b + 8)), (round(cx), round(cy - 32)), 0.2, 1)
        cv2.line(image, (round(cx), round(cy + 34)), (round(cx), round(cy + b - 8)), 0.2, 1)
        reach = np.sqrt(max(0.0, 1 - (z * 0.95) ** 2))
        visible = label > 0 and reach > 0.35
        if visible:
            image = _tumour(image, label, tumour, float(reach), contrast, brain, seed)
        coil = np.exp(scanner.bias * smooth_field(rng, image.shape, 160))
        image = _kernel(image, scanner) * coil
        first, second = rng.standard_normal((2, SIDE, SIDE)) * 0.022 * scanner.noise
        image = np.hypot(image + first, second)  # Rician
        frames.append(np.clip(np.rint(image * 1400), 0, 4095).astype(np.uint16))
        shown.append(visible)
    return np.stack(frames), np.array(shown)


def _tumour_place(
    rng: np.random.Generator, label: int, centre: tuple[float, float], axes: tuple[float, float]
) -> tuple[float, float, float, float]:
    """Returns x, y, radius, and the direction (radians) in which the tumour lies from the centre."""
    (cx, cy), (a, b) = centre, axes
    if label == 3:
        return cx + rng.normal(0, 2.5), cy - 12 + rng.normal(0, 5), rng.uniform(6, 13), 0.0
    angle = rng.uniform(0, 2 * np.pi)
    share = rng.uniform(0.35, 0.62) if label == 1 else 0.9
    x, y = cx + share * a * np.cos(angle), cy + share * b * np.sin(angle)
    return x, y, rng.uniform(11, 24) if label == 1 else rng.uniform(10, 21), angle


def _tumour(
    image: Image,
    label: int,
    at: tuple[float, float, float, float],
    reach: float,
    contrast: float,
    brain: Image,
    seed: int,
) -> Image:
    rng = np.random.default_rng(seed)
    x, y, radius, angle = at
    radius *= reach
    if label == 1:
        swelling = _soft(_star(rng, x, y, radius * 1.5, 0.4, 0), 5) * brain
        image = _blend(image, swelling * 0.7, 0.27)
        shape = _soft(_star(rng, x, y, radius, 0.35, 0), 1.5) * brain
        core = _soft(_star(rng, x, y, radius * rng.uniform(0.45, 0.75), 0.4, 0), 1.5)
        image = _blend(image, shape, 0.45 + contrast + 0.04 * smooth_field(rng, image.shape, 6))
        return _blend(image, core * brain, 0.22)
    if label == 2:
        base = _disc(x, y, radius * 0.8, radius * 1.1, float(np.degrees(angle)))
        tail = _disc(x, y, 2.5, radius * 1.9, float(np.degrees(angle)))
        shape = _soft(np.maximum(base, tail * 0.7), 1.0) * brain
        return _blend(image, shape, 0.48 + contrast)
    shape = _soft(_disc(x, y, radius, radius * 0.85), 1.0)
    return _blend(image, shape, 0.50 + contrast * 0.9)
