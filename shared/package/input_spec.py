"""The input spec of a head, and its one implementation: stored pixels to the model's input.

Training, the edge and the golden proof all call `to_model_input`, so they cannot drift apart. Preprocessing is data:
an InputSpec travels inside the signed manifest, and nothing about intensity or size is decided anywhere else.
"""

from __future__ import annotations

from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from shared.errors import PeerError

Array = npt.NDArray[Any]
_COUNTED = (np.dtype(np.uint8), np.dtype(np.int8), np.dtype(np.uint16), np.dtype(np.int16))
_EXACT_COUNT = 2**24  # the largest number up to which float32 holds every integer
MAX_SIDE = 16_384  # pixels; a larger frame is refused before anything is allocated for it


class Window(Struct, frozen=True, tag="window"):
    """Maps `center - width/2 .. center + width/2` (modality units, e.g. HU) linearly to 0..1 and clips."""

    center: float
    width: float


class Percentile(Struct, frozen=True, tag="percentile"):
    """Maps the image's own `low` and `high` percentiles (0..100) linearly to 0..1 and clips."""

    low: float
    high: float


class InputSpec(Struct, frozen=True):
    """How one head wants to see an image.

    `intensity` is applied to modality units; MONOCHROME1 is inverted afterwards so that 1 is always the bright end
    of MONOCHROME2. `interpolation` names OpenCV's method; the image is stretched to `height` x `width`.
    """

    height: int
    width: int
    intensity: Window | Percentile
    interpolation: Literal["area", "linear"] = "area"


class PixelMeaning(Struct, frozen=True):
    """What a decoded frame's numbers mean (PS3.3 C.7.6.3, C.11.1)."""

    slope: float = 1.0  # RescaleSlope
    intercept: float = 0.0  # RescaleIntercept
    inverted: bool = False  # PhotometricInterpretation is MONOCHROME1, or PresentationLUTShape is INVERSE


def to_model_input(pixels: Array, meaning: PixelMeaning, spec: InputSpec) -> npt.NDArray[np.uint8]:
    """Returns what the model sees: uint8 (height, width), 0..255, row 0 as stored.

    The result is eight bits on purpose: it is exactly what a confirmed case keeps for local training, so a case
    read back later and a study read today give the network the same numbers. `as_tensor` scales it to 0..1.

    Args:
        pixels: decoded stored values, shape (H, W), any integer or float dtype, finite.
        meaning: modality LUT and polarity of those values.
        spec: the head's input spec.

    Raises:
        PeerError: not two-dimensional, empty, larger than MAX_SIDE on a side, or without a finite value.
    """
    if pixels.ndim != 2 or not 0 < min(pixels.shape) <= max(pixels.shape) <= MAX_SIDE:
        raise PeerError(f"A frame of shape {pixels.shape} cannot be read by the model.")
    image = pixels.astype(np.float32) * np.float32(meaning.slope) + np.float32(meaning.intercept)  # (H, W)
    if not np.isfinite(image).all():
        raise PeerError("The frame holds values that are not finite.")
    low, high = _range(pixels, meaning, image, spec.intensity)
    unit = np.clip((image - low) / max(high - low, 1e-6), 0.0, 1.0)  # (H, W) 0..1
    if meaning.inverted:
        unit = 1.0 - unit
    method = cv2.INTER_AREA if spec.interpolation == "area" else cv2.INTER_LINEAR
    small = cv2.resize(unit, (spec.width, spec.height), interpolation=method)  # (height, width) 0..1
    return np.asarray(np.rint(np.clip(small, 0.0, 1.0) * 255.0), dtype=np.uint8)


def as_tensor(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Returns float32 (N, 1, H, W), 0..1, from uint8 (N, H, W): the ONNX graph's input `image`."""
    return np.asarray(images[:, None].astype(np.float32) / np.float32(255.0), dtype=np.float32)


def _range(
    pixels: Array, meaning: PixelMeaning, image: npt.NDArray[np.float32], intensity: Window | Percentile
) -> tuple[float, float]:
    """The ends of the intensity rule; `image` (H, W) is `pixels` (H, W) in modality units."""
    if isinstance(intensity, Window):
        return intensity.center - intensity.width / 2, intensity.center + intensity.width / 2
    if pixels.dtype in _COUNTED:
        return _counted(pixels, meaning, intensity)
    low, high = np.percentile(image, [intensity.low, intensity.high])
    return float(low), float(high)


def _counted(pixels: Array, meaning: PixelMeaning, intensity: Percentile) -> tuple[float, float]:
    """The percentiles of integers of up to 16 bits, by counting: to the bit those of `np.percentile`, without a sort.

    What was stored is counted, and what is looked up is mapped afterwards: the modality LUT keeps or turns the order.
    """
    counts = _histogram(pixels)
    values = np.arange(np.iinfo(pixels.dtype).min, np.iinfo(pixels.dtype).max + 1).astype(np.float32)
    values = values * np.float32(meaning.slope) + np.float32(meaning.intercept)
    if meaning.slope < 0:
        counts, values = counts[::-1], values[::-1]
    upto = np.cumsum(counts)  # how many pixels are no larger than each value
    where = (pixels.size - 1) * (np.array([intensity.low, intensity.high]) / 100)  # ranks, from 0, with a fraction
    below = np.floor(where)
    previous = values[np.searchsorted(upto, below, side="right")]
    following = values[np.searchsorted(upto, np.minimum(below + 1, pixels.size - 1), side="right")]
    low, high = _between(previous, following, where - below)
    return float(low), float(high)


def _between(
    low: npt.NDArray[np.float32], high: npt.NDArray[np.float32], share: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Linear interpolation from the nearer end, as NumPy does it."""
    apart = high - low
    return np.where(share >= 0.5, high - apart * (1 - share), low + apart * share)


def _histogram(pixels: Array) -> npt.NDArray[np.int64]:
    """Returns how often each value of an integer dtype of up to 16 bits occurs, from the smallest value on."""
    bits = pixels.dtype.itemsize * 8
    counts = np.zeros(2**bits, dtype=np.int64)
    rows = max(1, _EXACT_COUNT // pixels.shape[1])
    for start in range(0, pixels.shape[0], rows):  # OpenCV counts in float32
        part = np.ascontiguousarray(pixels[start : start + rows]).view(f"u{pixels.dtype.itemsize}")
        counts += cv2.calcHist([part], [0], None, [2**bits], [0, 2**bits]).ravel().astype(np.int64)
    return np.roll(counts, 2 ** (bits - 1)) if pixels.dtype.kind == "i" else counts
