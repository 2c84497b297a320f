"""Chest radiographs: a map of line integrals of a chest that differs from patient to patient, with or without disease.

Labels are those of the head chest-xray: 0 normal, 1 pneumonia (soft patches of consolidation), 2 other (pleural
effusion, a round mass, or an enlarged heart). Contrast is drawn low often enough that no reader is right every time.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from models.phantoms.scanner import Image, smooth_field

HEIGHT, WIDTH = 512, 480


@dataclass(frozen=True)
class Chest:
    """One patient's proportions, in pixels of HEIGHT x WIDTH; x grows to the patient's left."""

    middle: float
    top: float
    domes: tuple[float, float]  # height of the right and left diaphragm
    half_width: float  # of the thorax
    stout: float  # 0.6..1.5, soft tissue


def chest(rng: np.random.Generator, label: int) -> Image:
    """Returns the line integrals (512, 480) of one patient: about 1 behind the lungs, 3 to 4 behind the abdomen."""
    body = Chest(
        middle=WIDTH / 2 + rng.normal(0, 8),
        top=rng.uniform(50, 85),
        domes=(rng.uniform(345, 405), rng.uniform(355, 420)),
        half_width=rng.uniform(165, 200),
        stout=rng.uniform(0.7, 1.4),
    )
    lungs = _lungs(rng, body)  # (H, W) 0..1
    image = _torso(rng, body) - 1.5 * lungs
    image += _heart(rng, body, enlarged=label == 2 and rng.random() < 0.3)
    image += _bones(rng, body) + _vessels(rng, body, lungs)
    image += 0.05 * smooth_field(rng, (HEIGHT, WIDTH), 40) + 0.02 * smooth_field(rng, (HEIGHT, WIDTH), 7)
    if label == 1:
        image += _consolidation(rng, body, lungs)
    elif label == 2:
        image += _effusion(rng, body) * lungs if rng.random() < 0.5 else _mass(rng, body, lungs)
    if rng.random() < 0.3:
        image += _wires(rng)
    return np.asarray(np.clip(image, -1.0, 5.0), dtype=np.float32)


def _blank() -> Image:
    return np.zeros((HEIGHT, WIDTH), np.float32)


def _soft(image: Image, sigma: float) -> Image:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), dtype=np.float32)


def _ellipse(image: Image, x: float, y: float, a: float, b: float, angle: float = 0.0, value: float = 1.0) -> None:
    cv2.ellipse(image, (round(x), round(y)), (max(1, round(a)), max(1, round(b))), angle, 0, 360, value, -1)


def _torso(rng: np.random.Generator, body: Chest) -> Image:
    shape = _blank()
    cv2.rectangle(
        shape,
        (round(body.middle - body.half_width - 12), round(body.top + 30)),
        (round(body.middle + body.half_width + 12), HEIGHT),
        1.0,
        -1,
    )
    _ellipse(shape, body.middle, body.top + 70, body.half_width * 1.35, 85)  # shoulders
    _ellipse(shape, body.middle, body.top - 40, 55, 100)  # neck
    image = _soft(shape, 14) * (1.9 + 0.35 * body.stout)
    abdomen = _blank()
    for side, dome in zip((-1, 1), body.domes, strict=True):
        _ellipse(abdomen, body.middle + side * 90, dome + 90, 110, 92)
    abdomen[round(max(body.domes)) + 60 :] = 1.0
    image += _soft(abdomen, 4) * 0.8
    if rng.random() < 0.5:  # stomach bubble
        bubble = _blank()
        _ellipse(
            bubble, body.middle + rng.uniform(70, 110), body.domes[1] + 45, rng.uniform(15, 35), rng.uniform(10, 20)
        )
        image -= _soft(bubble, 4) * 0.6
    return image


def _lungs(rng: np.random.Generator, body: Chest) -> Image:
    shape = _blank()
    for side, dome in zip((-1, 1), body.domes, strict=True):
        inner = body.middle + side * rng.uniform(26, 34)
        outer = body.middle + side * (body.half_width - rng.uniform(8, 16))
        apex = ((inner + outer) / 2 - side * 18, body.top + rng.uniform(0, 12))
        points = [
            (inner, body.top + 55),
            (apex[0] - side * 28, apex[1] + 8),
            apex,
            (apex[0] + side * 34, apex[1] + 28),
            (outer - side * 14, body.top + 120),
            (outer, dome - 60),
            (outer, dome + 22),
            ((inner + outer) / 2 + side * 20, dome - 4),
            (inner + side * 14, dome + 10),
            (inner, dome - 30),
        ]
        cv2.fillPoly(shape, [np.rint(np.array(points)).astype(np.int32)], 1.0)
    return _soft(shape, 6)


def _heart(rng: np.random.Generator, body: Chest, *, enlarged: bool) -> Image:
    image = _blank()
    size = rng.uniform(1.35, 1.6) if enlarged else rng.uniform(0.85, 1.08)
    dome = max(body.domes)
    _ellipse(image, body.middle + 28, dome - 55, 74 * size, 62 * size**0.7, -28)
    _ellipse(image, body.middle - 14, dome - 70, 48 * size**0.6, 62)
    _ellipse(image, body.middle + 26, body.top + 110, 22, 24)  # aortic arch
    cv2.rectangle(image, (round(body.middle - 30), 0), (round(body.middle + 30), round(dome)), 1.0, -1)
    spine = _blank()
    cv2.rectangle(spine, (round(body.middle - 17), 0), (round(body.middle + 17), HEIGHT), 1.0, -1)
    step, start = rng.uniform(24, 30), rng.uniform(0, 25)
    for y in np.arange(start, HEIGHT, step):
        cv2.line(spine, (round(body.middle - 20), round(y)), (round(body.middle + 20), round(y)), 0.5, 4)
    return _soft(image, 4) * rng.uniform(0.85, 1.1) + _soft(spine, 2.5) * 0.35


def _bones(rng: np.random.Generator, body: Chest) -> Image:
    image = _blank()
    spacing, tilt = rng.uniform(29, 35), rng.uniform(0.2, 0.45)
    t = np.linspace(0, 1, 24)
    strength = rng.uniform(0.12, 0.24)
    for side in (-1, 1):
        for i in range(11):
            y0 = body.top + 10 + i * spacing
            reach = body.half_width * min(1.0, 0.62 + 0.1 * i)
            x = body.middle + side * (18 + (reach - 18) * np.sin(t * np.pi / 2))
            back = y0 - 14 * np.sin(t * np.pi) + tilt * 70 * t**2
            front = back[-1] + (1 - t) * tilt * 110
            for y, weight in ((back, 1.0), (front, 0.55)):
                line = np.rint(np.stack([x, y], 1)).astype(np.int32)
                rib = _blank()
                cv2.polylines(rib, [line], False, strength * weight, 10)
                image += rib
        clavicle = [
            (body.middle + side * 25, body.top + 42),
            (body.middle + side * 90, body.top + 26),
            (body.middle + side * 165, body.top + 12),
        ]
        cv2.polylines(image, [np.rint(np.array(clavicle)).astype(np.int32)], False, 0.4, 12)
    return _soft(image, 2.2)


def _vessels(rng: np.random.Generator, body: Chest, lungs: Image) -> Image:
    image = _blank()
    for side in (-1, 1):
        x0, y0 = body.middle + side * 40, body.top + rng.uniform(135, 160)
        for _ in range(26):
            angle = rng.uniform(-1.25, 1.35)
            x, y, thick = x0 + side * rng.uniform(-6, 12), y0 + rng.uniform(-30, 30), rng.uniform(3, 7)
            for _ in range(7):
                step = rng.uniform(12, 24)
                angle += rng.normal(0, 0.25)
                nx, ny = x + side * step * np.cos(angle), y + step * np.sin(angle)
                cv2.line(image, (round(x), round(y)), (round(nx), round(ny)), 0.05 + 0.03 * thick, max(1, round(thick)))
                x, y, thick = nx, ny, thick * 0.8
    return _soft(image, 1.5) * lungs * rng.uniform(0.8, 1.3)


def _place(rng: np.random.Generator, body: Chest, *, low: bool) -> tuple[float, float]:
    side = int(rng.choice([-1, 1]))
    dome = body.domes[0] if side < 0 else body.domes[1]
    top = body.top + (130 if low else 40)
    reach = rng.uniform(75, body.half_width - 45) if side > 0 else rng.uniform(55, body.half_width - 45)
    return body.middle + side * reach, rng.uniform(top, dome - 30)


def _consolidation(rng: np.random.Generator, body: Chest, lungs: Image) -> Image:
    image = _blank()
    for _ in range(int(rng.integers(1, 4))):
        x, y = _place(rng, body, low=rng.random() < 0.7)
        patch = _blank()
        _ellipse(patch, x, y, rng.uniform(24, 58), rng.uniform(22, 50), rng.uniform(0, 180))
        image = np.maximum(image, _soft(patch, rng.uniform(8, 16)))
    mottled = np.clip(1 + 0.45 * smooth_field(rng, image.shape, 14) + 0.25 * smooth_field(rng, image.shape, 6), 0, 2)
    return np.asarray(image * mottled * lungs * rng.uniform(0.14, 0.75), dtype=np.float32)


def _effusion(rng: np.random.Generator, body: Chest) -> Image:
    side = int(rng.choice([-1, 1]))
    dome = body.domes[0] if side < 0 else body.domes[1]
    yy, xx = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    outward = np.clip((xx - body.middle) * side / body.half_width, 0, 1)  # 0 at the middle, 1 at the wall
    level = dome - rng.uniform(0, 70) - rng.uniform(20, 50) * outward**3  # meniscus climbs the wall
    fluid = 1 / (1 + np.exp(-(yy - level) / 5)) * (outward > 0)
    return np.asarray(_soft(fluid.astype(np.float32), 3) * rng.uniform(0.5, 1.3), dtype=np.float32)


def _mass(rng: np.random.Generator, body: Chest, lungs: Image) -> Image:
    image = _blank()
    x, y = _place(rng, body, low=False)
    radius = rng.uniform(11, 30)
    _ellipse(image, x, y, radius, radius * rng.uniform(0.85, 1.15), rng.uniform(0, 180))
    shape = _soft(image, rng.uniform(1.5, 3.5)) * np.clip(lungs * 1.2, 0, 1)
    return np.asarray(shape * rng.uniform(0.22, 0.8), dtype=np.float32)


def _wires(rng: np.random.Generator) -> Image:
    image = _blank()
    for _ in range(int(rng.integers(1, 4))):
        steps = rng.normal(0, 60, (6, 2))
        points = np.cumsum(steps, 0) + np.array([rng.uniform(100, 380), rng.uniform(100, 400)])
        cv2.polylines(image, [np.rint(points).astype(np.int32)], False, 0.5, 2)
        _ellipse(image, float(points[-1, 0]), float(points[-1, 1]), 6, 6, value=0.8)
    return _soft(image, 1.0)
