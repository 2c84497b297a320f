"""Augmentation of model inputs: what differs between patients and rooms but not between diagnoses."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from models.heads import BY_NAME, HEADS

_MIRROR = {HEADS.index(BY_NAME[name]) for name in ("chest-ct", "brain-mri")}  # a mirrored chest X-ray is situs inversus


def augment(rng: np.random.Generator, image: npt.NDArray[np.uint8], head: int) -> npt.NDArray[np.float32]:
    """Returns float32 (H, W) 0..1 of uint8 (H, W): small affine, gamma, contrast, noise, blur, collimation."""
    height, width = image.shape
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), rng.uniform(-10, 10), rng.uniform(0.88, 1.12))
    turn[:, 2] += rng.uniform(-0.06, 0.06, 2) * (width, height)
    picture = cv2.warpAffine(image, turn, (width, height), flags=cv2.INTER_LINEAR).astype(np.float32) / 255
    if head in _MIRROR and rng.random() < 0.5:
        picture = picture[:, ::-1]
    picture = picture ** np.float32(np.exp(rng.uniform(-0.35, 0.35)))
    picture = (picture - 0.5) * np.float32(rng.uniform(0.8, 1.2)) + np.float32(0.5 + rng.uniform(-0.08, 0.08))
    if rng.random() < 0.25:
        picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.4, 1.0))
    if rng.random() < 0.4:
        noise = rng.standard_normal((height, width), dtype=np.float32)
        picture = picture + noise * np.float32(rng.uniform(0.005, 0.03))
    picture = np.clip(picture, 0, 1)
    if rng.random() < 0.2:
        top, bottom, left, right = rng.integers(0, height // 14, 4)
        framed = np.zeros_like(picture)
        framed[top : height - bottom, left : width - right] = picture[top : height - bottom, left : width - right]
        picture = framed
    return np.ascontiguousarray(picture, dtype=np.float32)
