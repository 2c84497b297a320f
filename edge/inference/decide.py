"""From logits to an answer: calibrated probabilities, or "not assessed" with the reason."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from shared.package.manifest import Head

_BLANK_RANGE = 8  # of 255; the least contrast that can be an image

Array = npt.NDArray[np.float32]


class Answer(Struct, frozen=True):
    """What a head says about one image or series.

    `probabilities` has one value 0..1 a class and sums to 1; `chosen` is the index of the largest.
    `reason` is empty, or says why the answer must be shown as "not assessed".
    """

    head: str
    probabilities: tuple[float, ...]
    chosen: int
    reason: str
    distance: float  # mean squared z-score of the features; about 1 inside the training data, 0 without statistics


class SliceOutputs(Struct, frozen=True):
    """One slice of a series as one head sees it: `logits` (C,), `features` (D,), both float32."""

    key: str  # SOP Instance UID and frame
    logits: Array
    features: Array


def decide(head: Head, logits: Array, features: Array) -> Answer:
    """Returns the answer for one image (or one pooled series).

    Args:
        head: the head that read it.
        logits: float32 (C,), the head's own classes only.
        features: float32 (D,).
    """
    scaled = logits.astype(np.float64) / head.temperature
    exponentials = np.exp(scaled - scaled.max())
    probabilities = exponentials / exponentials.sum()
    distance, reason = 0.0, ""
    if head.scope is not None:
        mean = np.asarray(head.scope.mean)
        variance = np.maximum(np.asarray(head.scope.variance), 1e-12)
        distance = float(np.mean((features.astype(np.float64) - mean) ** 2 / variance))
        if not distance <= head.scope.limit:
            reason = f"unlike the training images (distance {distance:.1f}, limit {head.scope.limit:.1f})"
    return Answer(
        head=head.name,
        probabilities=tuple(float(p) for p in probabilities),
        chosen=int(np.argmax(probabilities)),
        reason=reason,
        distance=distance,
    )


def is_blank(image: npt.NDArray[np.uint8]) -> bool:
    """Tells whether a model input, uint8 (H, W), holds no picture: an unexposed plate, a covered detector."""
    return int(image.max()) - int(image.min()) < _BLANK_RANGE


def pool(slices: Sequence[SliceOutputs]) -> tuple[Array, Array]:
    """Returns the series' logits (C,) and features (D,): means over slices, whatever order they arrived in.

    The mean is additive: a series logit is the mean of its slices' evidence, so the map explains the
    series exactly as it explains a slice. Sums run in the order of `key` and in float64, so two orders of
    arrival agree to the bit.
    """
    ordered = sorted(slices, key=lambda one: one.key)
    logits = np.mean([one.logits for one in ordered], axis=0, dtype=np.float64)
    features = np.mean([one.features for one in ordered], axis=0, dtype=np.float64)
    return np.asarray(logits, dtype=np.float32), np.asarray(features, dtype=np.float32)
